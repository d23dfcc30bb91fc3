"""`python -m tools.profile_qnn`: what the NPU of a Snapdragon needs for parts of the real size, with random weights and no checkpoint.

    sizes of SigLIP2, Qwen3 ─► graph ─► ONNX (ranges from one random input) ─► compiler ─► context size, DDR traffic, what does not fit

Tiles of several sizes against one pass over a whole picture show what tiling does to the memory that a picture takes: a graph whose
intermediate results fit the fast memory spills nothing to DDR. Times of the phone are not measured, because nothing here can.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from hypervl_jax.architecture import (
    BRANCHES,
    DECODER,
    ConfigError,
    HyperVLConfig,
    hypervl_2b,
    projector_part,
    require,
    vision_part,
)
from hypervl_jax.training.state import abstract_parameters
from tools import edge_graphs, onnx_files, qnn_contexts
from tools.artifacts import ArtifactError
from tools.edge_graphs import Graph
from tools.edge_parity import snr
from tools.golden import RUNTIME
from tools.label_resolutions import progress_line
from tools.onnx_graphs import onnx_graph
from tools.onnx_quantise import quantise_graph
from tools.qnn_chips import SOCS, VTCM_MB, find_soc
from tools.qnn_contexts import compile_context
from tools.quantisation import FLOAT16, QNN_PRECISIONS

FAILURE, SUCCESS = 1, 0
_VOCABULARY = 256
"""Of the decoder here: its embeddings and its head are left out."""

_EPILOG = """\
examples:
  python -m tools.profile_qnn --soc sm8750 --part base --layers 1 --patches 8,16,32,64 --precision float16,w8a16
  python -m tools.profile_qnn --soc sm8750 --part decoder --layers 1 --prefill 128 --slots 1024 --precision w4a16
  python -m tools.profile_qnn --soc sm8750 --part large --patches 32 --precision w8a16

exit status:
  0  the table is printed, with what does not fit    1  a package or the chip is unknown    2  wrong usage
"""


@dataclasses.dataclass(frozen=True)
class Job:
    """One graph.

    Attributes:
        label: for the table.
        graph: with random weights.
    """

    label: str
    graph: Graph


def random_parameters(config: HyperVLConfig, parts: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Parameters of a few parts: matrices that keep the size of what goes through them, norms of 1."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key == "scale":
            return np.ones(leaf.shape, np.float32)
        if path[-1].key == "bias":
            return np.zeros(leaf.shape, np.float32)
        width = math.prod(leaf.shape[-2:-1]) or 1
        return rng.standard_normal(leaf.shape, np.float32) * np.float32(min(1.0, width**-0.5))

    abstract = abstract_parameters(config, RUNTIME)[0]
    return jax.tree_util.tree_map_with_path(draw, {part: abstract[part] for part in parts})


def encoder_job(branch: str, patches: int, layers: int | None) -> Job:
    """Tower and projector for tiles of `patches` × `patches` patches; all layers when None."""
    config, name = hypervl_2b(), vision_part(branch)
    side = config.tiling.patch_size * patches
    towers = {vision_part(each): dataclasses.replace(config.vision(each), image_size=side) for each in BRANCHES}
    vision = dataclasses.replace(towers[name], num_layers=layers or towers[name].num_layers)
    tiling = dataclasses.replace(config.tiling, tile_size=side)
    config = dataclasses.replace(config, tiling=tiling, **{**towers, name: vision})
    graph = edge_graphs.encoder_graph(config, branch, random_parameters(config, (name, projector_part(branch))))
    return Job(f"{branch}, {vision.num_layers} layers, {patches}×{patches} patches", graph)


def decoder_job(layers: int | None, length: int, slots: int) -> Job:
    """Layers of Qwen3-1.7B for `length` positions, without embedder and head."""
    config = hypervl_2b()
    decoder = dataclasses.replace(config.decoder, vocab_size=_VOCABULARY)
    decoder = dataclasses.replace(decoder, num_layers=layers or decoder.num_layers)
    config = dataclasses.replace(config, decoder=decoder)
    weights = edge_graphs.decoder_weights(random_parameters(config, (DECODER,)))
    graph = edge_graphs.decoder_graph(decoder, weights, length, slots, head=False)
    return Job(f"decoder, {decoder.num_layers} layers, {length} new of {slots} cached", graph)


def random_feed(graph: Graph, seed: int = 1) -> dict[str, np.ndarray]:
    """Inputs of a graph: pixels in [-1, 1], embeddings and caches of unit size, rotary tables on the circle, the causal mask."""
    rng = np.random.default_rng(seed)
    feed = {name: rng.standard_normal(kind.shape, np.float32) for name, kind in graph.inputs.items()}
    if "tile" in feed:
        feed["tile"] = 2 * rng.random(feed["tile"].shape, np.float32) - 1
    if "mask" in feed:
        *_, length, seen = feed["mask"].shape
        slots = seen - length
        feed["mask"] = edge_graphs.step_mask(slots // 2, length, length, slots)
        angles = rng.random(feed["cosine"].shape, np.float32) * 2 * np.pi
        feed |= {"cosine": np.cos(angles), "sine": np.sin(angles)}
    return feed


def profile(job: Job, precision: str, soc: str, simulate: bool = False) -> dict[str, Any]:
    """Compiles a graph.

    Returns:
        What `Compiled` says, or "does_not_fit" and why; with `simulate` the "snr_db" of the simulator against ONNX Runtime in
        float32 on the same random input.

    Raises:
        ArtifactError: onnxruntime-qnn is not installed, or the chip is not known.
    """
    chip = find_soc(soc)
    qnn_contexts.runtime_version()
    row: dict[str, Any] = {"graph": job.label, "precision": precision, "soc": soc}
    graph, feed = onnx_graph(job.graph), random_feed(job.graph)
    with tempfile.TemporaryDirectory() as home:
        source, target = (pathlib.Path(home) / f"{name}.onnx" for name in ("source", "context"))
        found = QNN_PRECISIONS[precision]
        onnx_files.save(graph if found.activations is None else quantise_graph(graph, found, [feed]), source)
        try:
            row |= dataclasses.asdict(compile_context(source, target, chip))
        except ArtifactError as error:
            return row | {"does_not_fit": str(error)}
        if simulate:
            whole = pathlib.Path(home) / "whole.onnx"
            onnx_files.save(graph, whole)
            expected = onnx_files.signature(onnx_files.open_session(whole))(**feed)
            last = job.graph.outputs[-1]
            row["snr_db"] = snr(expected[last], qnn_contexts.open_signature(target)(**feed)[last])
    return row


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """The graphs that are asked for, one at a time: their weights are large."""
    if options.part in BRANCHES:
        for patches in options.patches:
            yield encoder_job(options.part, patches, options.layers)
        return
    for length in options.prefill:
        require(0 < length < options.slots, f"{length} new positions do not fit a cache of {options.slots}")
        yield decoder_job(options.layers, length, options.slots)


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints the rows as a table."""
    table = Table(title=f"random weights, {VTCM_MB} MiB of fast memory", title_justify="left")
    for heading in (
        "graph",
        "precision",
        "MB",
        "s",
        "peak GiB",
        "operations",
        "spill",
        "fill",
        "read",
        "write MB",
        "SNR dB",
    ):
        table.add_column(heading, justify="left" if heading in ("graph", "precision") else "right", no_wrap=True)
    for row in rows:
        if "does_not_fit" in row:
            table.add_row(row["graph"], row["precision"], "does not fit")
            continue
        moved = (f"{row[key] / 1e6:.1f}" for key in ("spill", "fill", "read", "write"))
        took = (
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['seconds']:.0f}",
            f"{row['peak_mib'] / 1024:.1f}",
            str(row["operations"]),
        )
        table.add_row(row["graph"], row["precision"], *took, *moved, f"{row['snr_db']:.1f}" if "snr_db" in row else "")
    Console(width=150).print(table)
    for row in rows:
        if "does_not_fit" in row:
            print(f"{row['graph']}, {row['precision']}: {row['does_not_fit']}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options. Ends the program with status 2 on anything else."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.profile_qnn",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    numbers = lambda text: tuple(int(part) for part in text.split(","))
    add("--soc", required=True, metavar="NAME", help=f"the chip: {', '.join(SOCS)}")
    add("--part", required=True, choices=(*BRANCHES, DECODER), help="a SigLIP2 tower with its projector, or Qwen3-1.7B")
    add("--layers", type=int, help="of the tower or decoder (default: all)")
    add("--patches", type=numbers, default=(32,), metavar="LIST", help="patches on a side of a tile (default: 32)")
    add("--prefill", type=numbers, default=(128,), metavar="LIST", help="new positions of the decoder (default: 128)")
    add("--slots", type=int, default=1024, metavar="N", help="of the decoder's cache (default: %(default)s)")
    add("--precision", default=FLOAT16, metavar="LIST", help=f"of {', '.join(QNN_PRECISIONS)} (default: %(default)s)")
    add(
        "--simulate",
        action="store_true",
        help="run each on the simulator too; a layer of 1,024 patches takes half a minute",
    )
    add("--json", action="store_true", help="print the rows as one JSON object")
    options = parser.parse_args(arguments)
    options.precision = options.precision.split(",")
    if set(options.precision) - set(QNN_PRECISIONS):
        parser.error(f"--precision is no list of {', '.join(QNN_PRECISIONS)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parse(arguments)
    rows = []
    try:
        with progress_line() as progress:
            for job in jobs(options):
                for precision in options.precision:
                    progress(f"{job.label}, {precision}", len(rows), 0)
                    rows.append(profile(job, precision, options.soc, options.simulate))
    except (ArtifactError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILURE
    if options.json:
        print(json.dumps({"rows": rows}))
    else:
        show(rows)
    return SUCCESS


if __name__ == "__main__":
    sys.exit(main())
