"""`python -m tools.benchmark_edge`: our TFLite graphs beside the same model in ONNX Runtime and PyTorch, on this CPU, in one run.

    checkpoint ─► encoder, prefill, decode as TFLite, ONNX and PyTorch ─► each in a process of its own, on the same inputs
               ├► compressor (VRC) of its configuration, as TFLite and ONNX ─► its share of a tile's time
               └► encoder for tiles, and for whole pictures in one pass ─► the same picture both ways

Medians of several runs; the peak of resident memory above what the libraries take; and how far every output is from JAX in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from hypervl_jax.architecture import BRANCHES, ConfigError, HyperVLConfig, branch_parts, require, vision_part
from hypervl_jax.models.compressor import Compressor
from hypervl_jax.models.safetensors_files import CheckpointError, write_directory
from hypervl_jax.partitioning import unbox
from hypervl_jax.text.tokenizer import TokenizerError
from hypervl_jax.vision.pixels import normalise_pixels
from tools import edge_graphs, huggingface_files
from tools.artifacts import ArtifactError
from tools.edge_graphs import Graph, HostCache
from tools.edge_parity import snr
from tools.edge_probe import COMPILED, COMPRESSOR, DECODE, ENCODER, ONNX, PREFILL, TFLITE, TORCH, Case, Probe
from tools.export_tflite import converter
from tools.golden import picture
from tools.label_resolutions import ReportProgress, progress_line
from tools.quantisation import PRECISIONS
from tools.to_torch import Source, load_parts, open_source

FAILURE, SUCCESS = 1, 0
PARTS = (COMPRESSOR, ENCODER, PREFILL, DECODE)
RUNTIMES = (TFLITE, ONNX, TORCH, COMPILED)
FILES = (TFLITE, ONNX)
"""Runtimes of graphs; the compressor is measured in these alone."""

BITS = ("float32", "int8")
MIB = 2**20

_EPILOG = """\
int8 is dynamic everywhere: matrices of 8 bits, activations rounded as products run. ONNX Runtime's is made by its own
quantize_dynamic, PyTorch's by torch.ao.quantization.quantize_dynamic.

examples:
  python -m tools.benchmark_edge --checkpoint runs/demo/stage3
  python -m tools.benchmark_edge --checkpoint runs/initial --parts encoder --images 1024,2048 --json

exit status:
  0  measured    1  something cannot be read or run; what could be run is printed    2  wrong usage
"""


class Wanted(NamedTuple):
    """What is to be measured: a graph, or a picture by a graph called so many times."""

    label: str
    graph: Graph
    feeds: Mapping[str, np.ndarray]
    calls: int = 1

    @property
    def compared(self) -> str:
        """The output that is compared with JAX; the compressor's α may lie at a bound whatever the runtime computes."""
        return self.graph.outputs[0 if self.label == COMPRESSOR else -1]


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        part: what was run.
        runtime, precision: by what.
        probe: what was measured.
        snr_db: of the outputs against JAX in float32.
    """

    part: str
    runtime: str
    precision: str
    probe: Probe
    snr_db: float


@dataclasses.dataclass(frozen=True)
class Bench:
    """A model and how it is measured."""

    source: Source
    params: Mapping[str, Any]
    branch: str
    slots: int
    prefill: int
    repeats: int
    threads: int
    home: pathlib.Path

    def wanted(self, parts: Sequence[str]) -> Iterator[Wanted]:
        """The graphs of the parts, then each picture tile by tile and whole."""
        config = self.source.config
        side = config.tiling.tile_size
        if COMPRESSOR in parts:
            yield Wanted(
                COMPRESSOR, edge_graphs.compressor_graph(config.compressor, random_compressor(config)), _proxy(config)
            )
        if ENCODER in parts:
            yield Wanted(ENCODER, edge_graphs.encoder_graph(config, self.branch, self.params), _tile(side))
        for part, length in ((PREFILL, self.prefill), (DECODE, 1)):
            if part in parts:
                weights = edge_graphs.decoder_weights(self.params)
                graph = edge_graphs.decoder_graph(config.decoder, weights, length, self.slots, head=length == 1)
                yield Wanted(part, graph, self._positions(length))

    def pictures(self, images: Sequence[int]) -> Iterator[Wanted]:
        """Each picture tile by tile, then in one pass of full attention."""
        config = self.source.config
        side = config.tiling.tile_size
        for image in images:
            tiles = (image // side) ** 2
            graph = edge_graphs.encoder_graph(config, self.branch, self.params)
            yield Wanted(f"{image}² in {tiles} tiles", graph, _tile(side), tiles)
            whole = with_side(config, image)
            params = {**self.params, vision_part(self.branch): resized(self.params, config, whole, self.branch)}
            yield Wanted(f"{image}² in one pass", edge_graphs.encoder_graph(whole, self.branch, params), _tile(image))

    def _positions(self, length: int) -> dict[str, np.ndarray]:
        """Random embeddings; before a decoded token all other slots are taken, before a prompt none is."""
        config, rng = self.source.config.decoder, np.random.default_rng(0)
        cache = HostCache(config, self.slots)
        if length == 1:
            cache.written = self.slots - 1
            for array in cache.arrays.values():
                array[:, :, :-1] = rng.normal(size=array[:, :, :-1].shape)
        embeddings = rng.normal(size=(1, length, config.hidden_size)).astype(np.float32) * np.float32(0.05)
        return cache.inputs(embeddings, length)

    def rows(
        self, wanted: Wanted, runtimes: Sequence[str], bits: Sequence[str]
    ) -> Iterator[tuple[str, Callable[[], Row]]]:
        """The measurements of one graph by name, each made when it is called."""
        expected: dict[str, np.ndarray] = {}

        def reference() -> dict[str, np.ndarray]:
            if not expected:
                feeds = {n: normalise_pixels(v) if n == "tile" else v for n, v in wanted.feeds.items()}
                with jax.default_matmul_precision("highest"):
                    expected.update(wanted.graph(*feeds.values()))
                np.savez(self.home / "inputs.npz", **wanted.feeds)
            return expected

        for runtime in runtimes:
            for precision in bits:
                name = f"{wanted.label} in {runtime}, {precision}"
                yield name, lambda run=(runtime, precision): self._row(wanted, *run, reference())

    def _row(self, wanted: Wanted, runtime: str, precision: str, expected: Mapping[str, np.ndarray]) -> Row:
        model = self._model(wanted.graph, runtime, precision)
        outputs = self.home / "outputs.npz"
        part = ENCODER if "tile" in wanted.feeds else wanted.label
        sizes = (wanted.calls, self.repeats, self.threads)
        case = Case(runtime, part, str(model), str(self.home / "inputs.npz"), precision, *sizes, str(outputs))
        found = run_case(case)
        arrays = np.load(outputs)
        name = wanted.compared
        return Row(wanted.label, runtime, precision, found, snr(expected[name], arrays[name]))

    def _model(self, graph: Graph, runtime: str, precision: str) -> pathlib.Path:
        """The graph as a file of a runtime; PyTorch's directory is made once."""
        for path in self.home.glob("graph*"):
            path.unlink()
        if runtime == TFLITE:
            path = self.home / "graph.tflite"
            converter().convert(lambda: [graph.rounded(PRECISIONS[precision])], path)
            return path
        if runtime == ONNX:
            return write_onnx(graph, self.home, precision)
        home = self.home / "torch"
        if not home.exists():
            write_torch(self.source, self.params, self.branch, home)
        return home


def _tile(side: int) -> dict[str, np.ndarray]:
    return {"tile": picture(side, side, 0)[None]}


def _proxy(config: HyperVLConfig) -> dict[str, np.ndarray]:
    side = config.compressor.proxy_size
    longest = np.array([2 * config.tiling.tile_size], np.float32)
    return {"proxy": picture(side, side, 0)[None].astype(np.float32) / 255, "longest_side": longest}


def random_compressor(config: HyperVLConfig) -> Mapping[str, Any]:
    """Fresh parameters of the configured compressor: no checkpoint of a stage holds one, and its time does not depend on them."""
    proxy = np.zeros((1, *2 * (config.compressor.proxy_size,), 3), np.uint8)
    return unbox(Compressor(config.compressor).init(jax.random.key(0), proxy)["params"])[0]


def with_side(config: HyperVLConfig, side: int) -> HyperVLConfig:
    """The same model with tiles of another side."""
    changed = {f"vision_{branch}": dataclasses.replace(config.vision(branch), image_size=side) for branch in BRANCHES}
    return dataclasses.replace(config, **changed, tiling=dataclasses.replace(config.tiling, tile_size=side))


def resized(params: Mapping[str, Any], config: HyperVLConfig, whole: HyperVLConfig, branch: str) -> dict[str, Any]:
    """A tower whose position embedding is stretched, bilinear, to a larger picture."""
    tower = dict(params[vision_part(branch)])
    old, new = (math.isqrt(each.vision(branch).num_patches) for each in (config, whole))
    table = np.asarray(tower["position_embedding"])
    grid = jax.image.resize(table.reshape(old, old, -1), (new, new, table.shape[-1]), "bilinear")
    return tower | {"position_embedding": np.asarray(grid).reshape(new * new, -1)}


def write_onnx(graph: Graph, home: pathlib.Path, precision: str) -> pathlib.Path:
    """The graph in ONNX; int8 by ONNX Runtime's own dynamic quantisation. Raises `ArtifactError` without the extra."""
    try:
        from tools import onnx_files, onnx_graphs
    except ImportError as error:
        raise ArtifactError(
            f"ONNX files need onnx and onnxruntime ({error}): pip install 'hypervl-jax[qnn]'"
        ) from error
    path = home / "graph.onnx"
    onnx_files.save(onnx_graphs.onnx_graph(graph), path)
    if precision == "float32":
        return path
    from onnxruntime.quantization import QuantType, quantize_dynamic

    rounded = home / "graph_int8.onnx"
    quantize_dynamic(
        str(path), str(rounded), weight_type=QuantType.QInt8, per_channel=True, use_external_data_format=True
    )
    return rounded


def write_torch(source: Source, params: Mapping[str, Any], branch: str, home: pathlib.Path) -> None:
    """The model with one encoder as `tools.to_torch` writes it, weights and config alone."""
    from hypervl_jax.models.huggingface import pending_tensors
    from hypervl_jax.models.key_table import LFM2, model_tables

    values = {"architectures": [LFM2.architecture], "dtype": "float32", "torch_dtype": "float32"}
    values |= huggingface_files.FORMATS["lfm2"].config(source.config, branch, source.tokenizer)
    tables = model_tables(source.config, branch, LFM2)
    tensors = [tensor for part, table in tables.items() for tensor in pending_tensors(params[part], table)]
    home.mkdir()
    write_directory(home, values, tensors, "float32")


def run_case(case: Case) -> Probe:
    """Measures a case in a process of its own. Raises `ArtifactError` when it fails."""
    command = [sys.executable, "-m", "tools.edge_probe", json.dumps(dataclasses.asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return Probe(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        raise ArtifactError(_why(done)) from None


def _why(done: subprocess.CompletedProcess[str]) -> str:
    """Why a process gave no result."""
    if done.returncode < 0:
        return f"ended by signal {-done.returncode}, as the system ends what needs more memory than there is"
    said = (done.stderr.strip().splitlines() or [f"no result, exit status {done.returncode}"])[-1]
    if re.fullmatch(r"\w+:?", said):
        return f"{said.rstrip(':')} without a reason; a runtime that gets no memory gives none"
    return said


def benchmark(bench: Bench, options: argparse.Namespace, progress: ReportProgress) -> tuple[list[Row], list[str]]:
    """All rows, graph after graph; and what could not be measured, a sentence each."""
    work: list[tuple[str, Callable[[], Row]]] = []
    for wanted in bench.wanted(options.parts):
        runtimes = [each for each in options.runtimes if wanted.label != COMPRESSOR or each in FILES]
        work += bench.rows(wanted, runtimes, options.precisions)
    for wanted in bench.pictures(options.images):
        work += bench.rows(wanted, (TFLITE,), options.precisions)
    rows, failed = [], []
    for number, (name, measure) in enumerate(work):
        progress(name, number, len(work))
        try:
            rows.append(measure())
        except ArtifactError as error:
            failed.append(f"{name}: {error}")
    return rows, failed


def show(rows: Sequence[Row]) -> Table:
    """The rows, times as ratios to TFLite in float32 too."""
    table = Table(
        caption="milliseconds and MiB above the libraries; ratio: time over that of TFLite float32" + _share(rows)
    )
    for heading in ("part", "runtime", "precision", "ms", "slowest", "ratio", "first call", "MiB", "SNR dB"):
        table.add_column(
            heading, justify="left" if heading in ("part", "runtime", "precision") else "right", no_wrap=True
        )
    base = {
        row.part: row.probe.milliseconds for row in reversed(rows) if row.runtime == TFLITE and row.precision == BITS[0]
    }
    for row in rows:
        found = row.probe
        ratio = f"{found.milliseconds / base[row.part]:.2f}" if row.part in base else ""
        times = (f"{found.milliseconds:,.1f}", f"{found.slowest:,.1f}", ratio, f"{found.first:,.0f}")
        table.add_row(
            row.part, row.runtime, row.precision, *times, f"{found.peak_bytes / MIB:,.0f}", f"{row.snr_db:.1f}"
        )
    return table


def _share(rows: Sequence[Row]) -> str:
    """The compressor's time as a share of one tile's, by the fastest of what ran both; nothing without both."""
    times: dict[str, list[float]] = {COMPRESSOR: [], ENCODER: []}
    for row in rows:
        if row.part in times and row.runtime in FILES:
            times[row.part].append(row.probe.milliseconds)
    if not all(times.values()):
        return ""
    return f"\nfastest compressor over fastest encoder of one tile: {min(times[COMPRESSOR]) / min(times[ENCODER]):.2%}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options. Ends the program with status 2 on anything else."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmark_edge",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", required=True, help="a run's workdir or its checkpoints directory")
    add("--step", type=int, help="checkpoint to read (default: the newest)")
    add("--encoder", choices=BRANCHES, default=BRANCHES[0], help="default: %(default)s")
    add("--parts", type=_list_of(PARTS), default=PARTS, metavar="LIST", help=f"of {','.join(PARTS)} (default: all)")
    add("--runtimes", type=_list_of(RUNTIMES), default=RUNTIMES, metavar="LIST", help=f"of {','.join(RUNTIMES)}")
    add("--precisions", type=_list_of(BITS), default=BITS, metavar="LIST", help=f"of {','.join(BITS)} (default: both)")
    add("--images", type=_sides, default=(), metavar="LIST", help="sides of square pictures, tiles against one pass")
    add("--slots", type=int, default=1024, metavar="N", help="of the cache (default: %(default)s)")
    add("--prefill", type=int, default=128, metavar="N", help="positions of a prefill (default: %(default)s)")
    add("--repeats", type=int, default=5, metavar="N", help="timed runs; the median counts (default: %(default)s)")
    add("--threads", type=int, default=2, metavar="N", help="of every runtime (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object as the last line")
    return parser.parse_args(arguments)


def _list_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def read(text: str) -> tuple[str, ...]:
        names = tuple(part.strip() for part in text.split(","))
        if set(names) - set(known):
            raise argparse.ArgumentTypeError(f"{text!r} is no list of {', '.join(known)}")
        return names

    return read


def _sides(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers") from None


def open_bench(options: argparse.Namespace, home: pathlib.Path) -> Bench:
    """Reads the parameters of one branch and the decoder, or of the branch alone."""
    source = open_source(options.checkpoint, options.step)
    side = source.config.tiling.tile_size
    for image in options.images:
        require(image % side == 0, f"--images {image} is not a whole number of tiles of {side} pixels")
    require(min(options.repeats, options.threads) >= 1, "--repeats and --threads must be at least 1")
    require(options.slots > options.prefill > 1, f"--prefill {options.prefill} must be 2 or more, and below --slots")
    parts = branch_parts(options.encoder)
    if set(options.parts) <= {COMPRESSOR, ENCODER} and set(options.runtimes) <= set(FILES):
        parts = parts[:2]  # tower and projector; PyTorch's directory holds the decoder too
    params = load_parts(source, parts)
    sizes = (options.slots, options.prefill, options.repeats, options.threads)
    return Bench(source, params, options.encoder, *sizes, home)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parse(arguments)
    try:
        with tempfile.TemporaryDirectory() as name, progress_line() as progress:
            rows, failed = benchmark(open_bench(options, pathlib.Path(name)), options, progress)
    except (ArtifactError, CheckpointError, ConfigError, TokenizerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILURE
    if options.json:
        print(json.dumps({"rows": [dataclasses.asdict(row) for row in rows], "failed": failed}))
    elif rows:
        Console(width=120).print(show(rows))
    for sentence in failed:
        print(f"error: {sentence}", file=sys.stderr)
    return FAILURE if failed else SUCCESS


if __name__ == "__main__":
    sys.exit(main())
