"""`python -m tools.export_tflite`: a checkpoint in, TFLite files out, one for each part, with their distance to JAX.

    checkpoint ─► graphs (tools.edge_graphs) ─► encoder_BRANCH, compressor, embedder, decoder .tflite ─► manifest.json
               └► JAX on prompts and records ─► the files in ai-edge-litert on the same ─► report.json

Every precision is an artifact of its own. Embedder and decoder hold several signatures that share their weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from data_pipelines.errors import RecordError
from hypervl_jax.architecture import BRANCHES, DECODER, ConfigError, HyperVLConfig, projector_part, require, vision_part
from hypervl_jax.models.compressor_io import SavedCompressor, load_compressor
from hypervl_jax.models.safetensors_files import CheckpointError
from hypervl_jax.text.conversation import ConversationError
from hypervl_jax.text.tokenizer import Tokenizer, TokenizerError
from hypervl_jax.training.checkpoint import load_params
from hypervl_jax.training.state import abstract_parameters
from hypervl_jax.vision.decoding import decode_image
from tools import artifacts, edge_graphs, edge_parity, evaluate, golden
from tools.artifacts import ArtifactError, Manifest
from tools.edge_graphs import Graph
from tools.edge_runtime import KIND, TOKENIZER, EdgeModel, EdgeSettings, open_signatures
from tools.golden import RUNTIME, Case, Golden
from tools.label_resolutions import ReportProgress, progress_line
from tools.quantisation import PRECISIONS, Precision, quantise
from tools.to_torch import BOTH, Source, open_source

FAILURE, SUCCESS = 1, 0
HELDOUT, TRAIN = "heldout", "train"
ENCODER = "encoder"
PARTS = (ENCODER, DECODER)
"""What can be exported by itself; the compressor goes along where one is given."""

CALIBRATED_AS = {"compressor": "float32", "embedder": "int8"}
"""Parts of a calibrated artifact that are not calibrated: a small network that decides on α, and a table."""

PACKAGES = ("jax", "flax", "numpy", "litert-converter", "ai-edge-litert", "litert-quantizer")
MINIMUM_SNR = 80.0
"""Of every part at float32, dB; below it the graphs are wrong, and nothing is written."""

_DESCRIPTION = """\
Writes a checkpoint as TFLite files for edge runtimes: the encoder (vision tower and projector) of each branch, the compressor (VRC),
the token embedder, and the decoder with prefill and decode signatures. Then runs them by ai-edge-litert and prints how far
they are from JAX in float32 on three golden prompts and on records of --data. Nothing is left behind when anything fails.
"""
_EPILOG = """\
precisions:
  float32    as trained
  int8       matrices of 8 bits, one scale an output; activations rounded row by row to 8 bits as products run
  int4       the same with 4 bits in transformer layers; patch embedding, projector, head and embeddings keep 8
  w8a8, w8a16, w4a16
             whole-numbered weights and activations of so many bits, ranges calibrated on records of --data/train;
             the compressor stays float32, the embeddings 8 bits

examples:
  python -m tools.export_tflite --checkpoint runs/demo/stage3 --compressor runs/demo/compressor --output exports/tflite
  python -m tools.export_tflite --checkpoint runs/demo/stage3 --encoder both --precision float32,int8,int4 \\
      --data runs/demo/data --items 10 --output exports/tflite
  python -m tools.run_tflite exports/tflite/int8 --image picture.png --question "What is in the picture?"

exit status:
  0  written, and compared with JAX    1  it cannot be written, or float32 differs from JAX    2  wrong usage
"""


@dataclasses.dataclass(frozen=True)
class Exported:
    """Everything that is the same for all precisions."""

    source: Source
    settings: EdgeSettings
    params: Mapping[str, Any]
    vrc: SavedCompressor | None
    cases: tuple[Case, ...]
    references: Mapping[str, Mapping[str, Golden]]
    calibration: tuple[Case, ...]


def export(
    checkpoint: str,
    output: str,
    *,
    precisions: Sequence[str] = ("float32",),
    parts: Sequence[str] = PARTS,
    encoder: str = BRANCHES[0],
    compressor: str | None = None,
    prefill: Sequence[int] = (128,),
    slots: int = 1024,
    data: str | None = None,
    items: int = 4,
    step: int | None = None,
    progress: ReportProgress = lambda what, done, total: None,
) -> dict[str, dict[str, Any]]:
    """Writes one artifact for each precision; `output` appears only when all are complete.

    Args:
        checkpoint: a run's workdir or its `checkpoints` directory.
        output: the artifact of one precision, or the parent of one directory for each.
        precisions: of `PRECISIONS`.
        parts: of `PARTS`; only their parameters are read.
        encoder: "base", "large" or "both".
        compressor: directory of a VRC.
        prefill: lengths of the prefill graphs.
        slots: of the cache, for prompt and answer.
        data: root of sources with answers (`data/heldout/TASK`), compared on besides the golden prompts; the ranges of calibrated
            precisions come from the same sources' training split.
        items: of each source.
        step: the newest when None.
        progress: told what is being done, and how much of it is.

    Returns:
        The report of each precision.

    Raises:
        CheckpointError, ConfigError, TokenizerError, RecordError: an input is missing or of another kind.
        ArtifactError: the output is taken, the disk is full, the converter is missing, or float32 differs from JAX.
    """
    artifacts.check_output(output)
    converter()
    require(bool(prefill) and min(prefill) > 1, f"prefill lengths {list(prefill)} must be 2 or more")
    require(slots > max(prefill), f"a cache of {slots} slots does not hold a prefill of {max(prefill)}")
    steps = 2 * len(precisions) + 2
    progress("reading", 0, steps)
    source = open_source(checkpoint, step)
    branches = (BRANCHES if encoder == BOTH else (encoder,)) if ENCODER in parts else ()
    vrc = None if compressor is None else load_compressor(compressor)
    lengths = tuple(sorted(set(prefill))) if DECODER in parts else ()
    settings = EdgeSettings(source.config, vrc.config if vrc else None, branches, lengths, slots)
    calibrated = [name for name in precisions if PRECISIONS[name].activations is not None]
    require(
        not calibrated or data is not None, f"{' and '.join(calibrated)} take ranges from real records: give --data"
    )
    calibration = _records(source, data, TRAIN, items) if calibrated else ()
    held_out = () if data is None else _records(source, data, HELDOUT, items)
    made = _prepare(source, settings, vrc, (*golden.cases(source.config.tiling), *held_out), calibration)
    reports = {}
    with artifacts.writing(output, _bytes(made, precisions)) as temporary:
        for number, name in enumerate(precisions):
            home = temporary / name if len(precisions) > 1 else temporary
            home.mkdir(exist_ok=True)
            told = lambda what, done, shift=2 * number + 1: progress(what, done + shift, steps)
            reports[name] = _export_one(made, name, home, told)
    return reports


def converter() -> ModuleType:
    """The module that writes TFLite files. Raises `ArtifactError` where litert-converter is not installed."""
    try:
        from tools import tflite_convert
    except ImportError as error:
        raise ArtifactError(
            f"TFLite files are written by litert-converter ({error}): pip install 'hypervl-jax[export]'"
        ) from error
    return tflite_convert


def _prepare(
    source: Source,
    settings: EdgeSettings,
    vrc: SavedCompressor | None,
    cases: tuple[Case, ...],
    calibration: tuple[Case, ...],
) -> Exported:
    """Reads the parameters, and lets JAX compute what the artifacts are compared with."""
    parts = {part(branch) for branch in settings.branches for part in (vision_part, projector_part)}
    parts |= {DECODER} if settings.prefill else set()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract, _ = abstract_parameters(source.config, RUNTIME)
    targets = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), abstract)
    params = load_params(source.home, targets, source.step, sorted(parts))
    compute = golden.compute if settings.prefill and settings.branches else _encode_only
    references = {
        branch: {case.name: compute(case, source.config, params, source.tokenizer, branch) for case in cases}
        for branch in settings.branches
    }
    return Exported(source, settings, params, vrc, cases, references, calibration)


def _encode_only(
    case: Case, config: HyperVLConfig, params: Mapping[str, Any], tokenizer: Tokenizer, branch: str
) -> Golden:
    """What JAX makes of a prompt's tiles, without a decoder."""
    tiles, none = golden.tile_all(case.images, config.tiling), np.zeros(0, np.int32)
    with jax.default_matmul_precision("highest"):
        visual = np.asarray(golden.encode_tiles(tiles, config, params, branch))
    return Golden(tiles, visual, none, np.zeros((0, 0), np.float32), none)


def _records(source: Source, data: str, split: str, items: int) -> tuple[Case, ...]:
    """The first records of each held-out source, or of the source of that name in another split; those of one question only."""
    root = pathlib.Path(data) / HELDOUT
    tasks = sorted(path.name for path in root.glob("*") if path.is_dir())
    if not tasks:
        raise RecordError(f"{root} holds no sources; give the root of a data directory with a {HELDOUT} split")
    fingerprint = source.tokenizer.fingerprint
    return tuple(
        Case(f"{task}_{number}", item.turns[0].text, tuple(map(decode_image, item.images)))
        for task in tasks
        for number, item in enumerate(evaluate.read_items(data, split, task, fingerprint, items))
        if len(item.turns) == 1
    )


def _bytes(made: Exported, precisions: Sequence[str]) -> int:
    """A lower bound of what will be written."""
    counts = made.source.config.parameter_counts()
    parameters = sum(counts[part] for part in made.params)
    return sum(parameters * (PRECISIONS[name].layers or 32) // 8 for name in precisions)


def part_graphs(made: Exported, precision: Precision) -> dict[str, Callable[[], list[Graph]]]:
    """The graphs of each file, made when they are called for."""
    settings, params, config = made.settings, made.params, made.settings.config
    files: dict[str, Callable[[], list[Graph]]] = {
        f"encoder_{branch}": lambda branch=branch: [edge_graphs.encoder_graph(config, branch, params)]
        for branch in settings.branches
    }
    if made.vrc is not None:
        vrc = made.vrc
        files["compressor"] = lambda: [edge_graphs.compressor_graph(vrc.config, vrc.params)]
    if settings.prefill:
        files["embedder"] = lambda: _embedders(params, settings, precision)
        files["decoder"] = lambda: _decoders(params, settings)
    return files


def _embedders(params: Mapping[str, Any], settings: EdgeSettings, precision: Precision) -> list[Graph]:
    bits = precision.others
    table = None if bits is None else quantise(np.asarray(params[DECODER]["embedding"]), bits)
    return [edge_graphs.embedder_graph(params, length, table) for length in (1, *settings.prefill)]


def _decoders(params: Mapping[str, Any], settings: EdgeSettings) -> list[Graph]:
    config, slots = settings.config.decoder, settings.slots
    prefill = [edge_graphs.decoder_graph(config, params, length, slots, head=False) for length in settings.prefill]
    return [*prefill, edge_graphs.decoder_graph(config, params, 1, slots, head=True)]


def _export_one(made: Exported, name: str, home: pathlib.Path, progress: Callable[[str, int], None]) -> dict[str, Any]:
    """Writes and compares the artifact of one precision; returns its report."""
    precision = PRECISIONS[name]
    progress(f"{name}: files", 0)
    if precision.activations is None:
        _write_files(made, precision, home)
    else:
        _write_calibrated(made, precision, home)
    made.source.tokenizer.save(home / TOKENIZER)
    progress(f"{name}: parity", 1)
    model = EdgeModel(made.settings, made.source.tokenizer, open_signatures(home))
    parts = edge_parity.compare(model, made.cases, made.references, made.vrc)
    sizes = {path.name: path.stat().st_size for path in sorted(home.glob("*.tflite"))}
    report = {"precision": name, "bytes": sizes, "parts": parts}
    wrong = [part for part, found in parts.items() if name == "float32" and found.get("snr_db", 200) < MINIMUM_SNR]
    if wrong:
        raise ArtifactError(f"at float32 {' and '.join(wrong)} differs from JAX: {json.dumps(parts)}")
    _finish(made, name, home, report)
    return report


def _write_files(made: Exported, precision: Precision, home: pathlib.Path) -> None:
    for part, graphs in part_graphs(made, precision).items():
        converter().convert(graphs(), home / f"{part}.tflite", precision.bits)


def _write_calibrated(made: Exported, precision: Precision, home: pathlib.Path) -> None:
    """Float32 files first; what they are called with on the calibration records gives the ranges of the whole-numbered ones."""
    from tools import tflite_static

    with tempfile.TemporaryDirectory(dir=home) as name:
        whole = pathlib.Path(name)
        _write_files(made, PRECISIONS["float32"], whole)
        model = EdgeModel(made.settings, made.source.tokenizer, open_signatures(whole))
        feeds = tflite_static.record(model, made.calibration)
        for path in sorted(whole.glob("*.tflite")):
            if path.stem not in CALIBRATED_AS:
                tflite_static.quantise_file(path, home / path.name, precision, feeds)
    for part, stored in CALIBRATED_AS.items():
        graphs = part_graphs(made, PRECISIONS[stored])
        if part in graphs:
            converter().convert(graphs[part](), home / f"{part}.tflite", PRECISIONS[stored].bits)


def _finish(made: Exported, name: str, home: pathlib.Path, report: Mapping[str, Any]) -> None:
    """Golden arrays, report and manifest."""
    source, tiling = made.source, made.settings.config.tiling
    shown = golden.cases(tiling)
    arrays = {
        f"{branch}/{key}": value
        for branch, found in made.references.items()
        for key, value in golden.arrays(found, shown).items()
    }
    artifacts.write_golden(home, arrays)
    artifacts.write_json(home / artifacts.REPORT, report)
    preprocessing = {
        "tiling": dataclasses.asdict(tiling),
        "pixels": "byte / 255, row, column, channel; the encoder and the compressor normalise inside",
        "padding": "byte 128 in tiles, 0 in proxies; visual tokens wholly in padding are not in the prompt",
        "mask": f"0 where a position is seen, {edge_graphs.MASKED_SCORE} where not; cached slots first, then the new positions",
        "rotary": "cosine and sine of position · theta^(-2i/k), the half-width table written twice",
        "prompts": [{"name": case.name, "question": case.question, "images": len(case.images)} for case in shown],
    }
    origin = artifacts.source_of(source.home, source.step, source.description)
    versions = artifacts.versions(PACKAGES)
    manifest = Manifest(KIND, origin, made.settings.to_json(), name, preprocessing, versions, report["parts"])
    artifacts.write_manifest(home, manifest)


def show(reports: Mapping[str, Mapping[str, Any]], output: str) -> None:
    """Prints the reports as one table."""
    table = Table(title="TFLite in ai-edge-litert, against JAX in float32", title_justify="left")
    for heading in ("precision", "part", "MB", "SNR dB", "top-1 / tokens equal"):
        table.add_column(heading, justify="left" if heading in ("precision", "part") else "right", no_wrap=True)
    for name, report in reports.items():
        for part, found in report["parts"].items():
            size = report["bytes"].get(f"{part}.tflite")
            ratio = f"{found['snr_db']:.1f}" if "snr_db" in found else ""
            equal = found.get("top1", found.get("tokens_equal"))
            agreement = "" if equal is None else f"{equal} of {found['of']}"
            table.add_row(name, part, f"{size / 1e6:.2f}" if size else "", ratio, agreement)
    Console(width=100).print(table)
    print(f"written: {output}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options. Ends the program with status 2 on anything else."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.export_tflite",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", required=True, help="a run's workdir or its checkpoints directory")
    add("--step", type=int, help="checkpoint to read (default: the newest)")
    add("--output", metavar="DIR", required=True, help="directory to make; must not exist, or be empty")
    add("--parts", type=_parts, default=PARTS, metavar="LIST", help="encoder, decoder (default: both)")
    add("--encoder", choices=(*BRANCHES, BOTH), default=BRANCHES[0], help="default: %(default)s")
    add("--compressor", metavar="DIR", help="what tools.train_compressor wrote, to go with the model")
    add("--precision", type=_precisions, default=("float32",), metavar="LIST", help=f"of {', '.join(PRECISIONS)}")
    add("--prefill", type=_lengths, default=(128,), metavar="LIST", help="lengths of prefill graphs (default: 128)")
    add("--slots", type=int, default=1024, metavar="N", help="positions the cache holds (default: %(default)s)")
    add("--data", metavar="ROOT", help="compare on ROOT/heldout/TASK too, calibrate on ROOT/train/TASK")
    add("--items", type=int, default=4, metavar="N", help="records of each source of --data (default: %(default)s)")
    add("--json", action="store_true", help="print the reports as one JSON object")
    return parser.parse_args(arguments)


def _precisions(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [name for name in names if name not in PRECISIONS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of {', '.join(PRECISIONS)}")
    return names


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if set(names) - set(PARTS):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of {', '.join(PARTS)}")
    return names


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parse(arguments)
    try:
        with progress_line() as progress:
            reports = export(
                options.checkpoint,
                options.output,
                precisions=options.precision,
                parts=options.parts,
                encoder=options.encoder,
                compressor=options.compressor,
                prefill=options.prefill,
                slots=options.slots,
                data=options.data,
                items=options.items,
                step=options.step,
                progress=progress,
            )
    except (ArtifactError, CheckpointError, ConfigError, ConversationError, RecordError, TokenizerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILURE
    if options.json:
        print(json.dumps(reports))
    else:
        show(reports, options.output)
    return SUCCESS


if __name__ == "__main__":
    sys.exit(main())
