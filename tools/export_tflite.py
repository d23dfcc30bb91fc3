"""`python -m tools.export_tflite`: a checkpoint in, TFLite files out, one for each part, with their distance to JAX.

    checkpoint ─► graphs (tools.edge_graphs) ─► encoder_BRANCH, compressor, embedder, decoder .tflite ─► manifest.json
               └► JAX on prompts and records ─► the files in ai-edge-litert on the same ─► report.json

Every precision is an artifact of its own. Embedder and decoder hold several signatures that share their weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.table import Table

from data_pipelines.errors import RecordError
from experiments.stopping import terminate_as_interrupt
from hypervl_jax.architecture import BRANCHES, ConfigError, require
from hypervl_jax.models.compressor_io import load_compressor
from hypervl_jax.models.safetensors_files import CheckpointError
from hypervl_jax.text.conversation import ConversationError
from hypervl_jax.text.tokenizer import TokenizerError
from tools import artifacts, edge_calibration, edge_parity, edge_sources, litert_bundle
from tools.artifacts import ArtifactError
from tools.edge_runtime import KIND, TOKENIZER, EdgeModel, open_signatures
from tools.edge_sources import PARTS, Exported, Request, part_graphs
from tools.label_resolutions import ReportProgress, progress_line
from tools.quantisation import PRECISIONS, Precision

FAILURE, SUCCESS, INTERRUPTED = 1, 0, 130
CALIBRATED_AS = {"compressor": "float32", "embedder": "int8"}
"""Parts of a calibrated artifact that are not calibrated: a small network that decides on α, and a table."""

PACKAGES = (
    "jax",
    "flax",
    "numpy",
    "litert-converter",
    "ai-edge-litert",
    "litert-quantizer",
    "litert-lm-builder",
    "litert-lm",
)
MINIMUM_SNR = 80.0
"""Of every part at float32, dB; below it the graphs are wrong, and nothing is written."""

_DESCRIPTION = """\
Writes a checkpoint as TFLite files for edge runtimes: the encoder (vision tower and projector) of each branch, the compressor (VRC),
the token embedder, and the decoder with prefill and decode signatures; with --bundle a .litertlm for the LiteRT-LM engine. Then runs them by ai-edge-litert and prints how far
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
  python -m tools.export_tflite --checkpoint runs/demo/stage3 --precision int8 --bundle --output exports/phone
  litert-lm run exports/phone/base.litertlm --prompt "What is 2 + 3?"
  python -m tools.run_tflite exports/tflite/int8 --image picture.png --question "What is in the picture?"

exit status:
  0  written, and compared with JAX    1  it cannot be written, or float32 differs from JAX
  2  wrong usage                       130  stopped; nothing was written
"""


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
    calibration_items: int = 16,
    step: int | None = None,
    bundle: bool = False,
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
        items: of each held-out source.
        calibration_items: of each training source, for ranges.
        step: the newest when None.
        bundle: write a `.litertlm` of each branch too, except at calibrated precisions.
        progress: told what is being done, and how much of it is.

    Returns:
        The report of each precision.

    Raises:
        CheckpointError, ConfigError, TokenizerError, RecordError: an input is missing or of another kind.
        ArtifactError: the output is taken, the disk is full, the converter is missing, or float32 differs from JAX.
    """
    artifacts.check_output(output)
    converter()
    if bundle:
        _check_bundle(precisions, parts)
    steps = 2 * len(precisions) + 2
    progress("reading", 0, steps)
    calibrated = [name for name in precisions if PRECISIONS[name].activations is not None]
    vrc = None if compressor is None else load_compressor(compressor)
    request = Request(
        checkpoint, step, parts, encoder, vrc, prefill, slots, data, items, calibration_items, tuple(calibrated)
    )
    made = edge_sources.read(request)
    reports = {}
    with artifacts.writing(output, _bytes(made, precisions)) as temporary:
        for number, name in enumerate(precisions):
            home = temporary / name if len(precisions) > 1 else temporary
            home.mkdir(exist_ok=True)
            told = lambda what, done, shift=2 * number + 1: progress(what, done + shift, steps)
            reports[name] = _export_one(made, name, home, told, bundle and PRECISIONS[name].activations is None)
        artifacts.write_list(temporary, precisions)
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


def _bytes(made: Exported, precisions: Sequence[str]) -> int:
    """A lower bound of what will be written."""
    parameters = made.parameters()
    return sum(parameters * (PRECISIONS[name].layers or 32) // 8 for name in precisions)


def _check_bundle(precisions: Sequence[str], parts: Sequence[str]) -> None:
    """Raises what would stop a bundle, before anything is computed."""
    litert_bundle.packages()
    require(set(parts) == set(PARTS), f"a bundle holds all parts: leave --parts out, or give {','.join(PARTS)}")
    whole = any(PRECISIONS[name].activations is None for name in precisions)
    require(whole, "the engine of bundles keeps activations in float32: give float32, int8 or int4")


def _export_one(
    made: Exported, name: str, home: pathlib.Path, progress: Callable[[str, int], None], bundle: bool
) -> dict[str, Any]:
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
    del model
    gc.collect()  # interpreters and their runners hold one another, and the files with them
    if bundle:
        parts |= _write_bundles(made, precision, home)
    sizes = {path.name: path.stat().st_size for path in sorted(home.glob("*.*lite*"))}
    report = {"precision": name, "bytes": sizes, "parts": parts}
    wrong = [part for part, found in parts.items() if name == "float32" and _differs(found)]
    if wrong:
        raise ArtifactError(f"at float32 {' and '.join(wrong)} differs from JAX: {json.dumps(parts)}")
    tiles = litert_bundle.golden_tiles(made.settings.config.tiling) if bundle else None
    edge_sources.finish(made, KIND, name, home, report, artifacts.versions(PACKAGES), more_golden=tiles)
    return report


def _differs(found: Mapping[str, Any]) -> bool:
    """Whether a part at float32 is another function than JAX's."""
    return found.get("snr_db", edge_parity.EXACT) < MINIMUM_SNR or found.get("answers_equal") not in (
        None,
        found.get("of"),
    )


def _write_bundles(made: Exported, precision: Precision, home: pathlib.Path) -> dict[str, dict[str, Any]]:
    """A bundle of each branch; returns how the engine answers."""
    found = {}
    for branch in made.settings.branches:
        path = home / f"{branch}{litert_bundle.SUFFIX}"
        litert_bundle.write(made, branch, precision, path)
        found[path.name] = litert_bundle.compare(made, branch, path)
    return found


def _write_files(made: Exported, precision: Precision, home: pathlib.Path) -> None:
    for part, graphs in part_graphs(made, precision).items():
        converter().convert(graphs, home / f"{part}.tflite")


def _write_calibrated(made: Exported, precision: Precision, home: pathlib.Path) -> None:
    """Float32 files first; what they are called with on the calibration records gives the ranges of the whole-numbered ones."""
    from tools import tflite_static

    with tempfile.TemporaryDirectory(dir=home) as name:
        whole = pathlib.Path(name)
        _write_files(made, PRECISIONS["float32"], whole)
        model = EdgeModel(made.settings, made.source.tokenizer, open_signatures(whole))
        feeds = edge_calibration.record(model, made.calibration)
        for path in sorted(whole.glob("*.tflite")):
            if path.stem not in CALIBRATED_AS:
                tflite_static.quantise_file(path, home / path.name, precision, feeds)
    for part, stored in CALIBRATED_AS.items():
        graphs = part_graphs(made, PRECISIONS[stored])
        if part in graphs:
            converter().convert(graphs[part], home / f"{part}.tflite")


def show(reports: Mapping[str, Mapping[str, Any]], output: str) -> None:
    """Prints the reports as one table."""
    table = Table(title="TFLite in ai-edge-litert, against JAX in float32", title_justify="left")
    for heading in ("precision", "part", "MB", "SNR dB", "top-1 / tokens equal"):
        table.add_column(heading, justify="left" if heading in ("precision", "part") else "right", no_wrap=True)
    for name, report in reports.items():
        for part, found in report["parts"].items():
            size = report["bytes"].get(f"{part}.tflite", report["bytes"].get(part))
            ratio = f"{found['snr_db']:.1f}" if "snr_db" in found else ""
            equal = found.get("top1", found.get("tokens_equal", found.get("answers_equal")))
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
    edge_sources.add_options(parser.add_argument, tuple(PRECISIONS))
    about = "write a .litertlm of each encoder for litert-lm too, and compare its answers (float32, int8, int4)"
    parser.add_argument("--bundle", action="store_true", help=about)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parse(arguments)
    try:
        with terminate_as_interrupt(), progress_line() as progress:
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
                calibration_items=options.calibration_items,
                step=options.step,
                bundle=options.bundle,
                progress=progress,
            )
    except (ArtifactError, CheckpointError, ConfigError, ConversationError, RecordError, TokenizerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return INTERRUPTED
    if options.json:
        print(json.dumps(reports))
    else:
        show(reports, options.output)
    return SUCCESS


if __name__ == "__main__":
    sys.exit(main())
