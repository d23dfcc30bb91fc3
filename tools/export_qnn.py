"""`python -m tools.export_qnn`: a checkpoint in, QNN contexts for the NPU of a Snapdragon out, with their distance to JAX.

    checkpoint ─► graphs (tools.edge_graphs) ─► ONNX in float32, run on this CPU: within 80 dB of JAX, or nothing is written
        └► records of data/train ─► ranges ─► ONNX in whole numbers ─► compiler ─► NAME.onnx and NAME_qnn.bin of each part
                                                                          └► simulator: parity ─► report.json, manifest.json

Route "litert" makes the same of TFLite files, with a QAIRT SDK that is installed on this machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from data_pipelines.errors import RecordError
from experiments.stopping import terminate_as_interrupt
from hypervl_jax.architecture import ConfigError, require
from hypervl_jax.models.safetensors_files import CheckpointError
from hypervl_jax.text.conversation import ConversationError
from hypervl_jax.text.tokenizer import TokenizerError
from tools import edge_sources
from tools.artifacts import ArtifactError
from tools.label_resolutions import ReportProgress, progress_line
from tools.qnn_chips import EXTRA, SOCS, find_soc
from tools.quantisation import QNN_PRECISIONS

FAILURE, SUCCESS, INTERRUPTED = 1, 0, 130
ROUTES = (ONNX, LITERT) = ("onnx", "litert")
_DESCRIPTION = """\
Writes a checkpoint as QNN contexts for the NPU of a Snapdragon: the encoder (vision tower and projector) of each branch, the
compressor (VRC), and the decoder with prefill and decode graphs; the token embedder is an ONNX file for the CPU. Then runs them
on the simulator of onnxruntime-qnn and prints how far they are from JAX in float32, and what moves between the NPU's fast
memory and DDR. No operation falls back to the CPU. Nothing is left behind when anything fails.
"""
_EPILOG = """\
precisions:
  float16       weights and activations in float16
  w8a16         8-bit matrices, one scale an output; 16-bit activations, ranges calibrated on records of --data/train
  w4a16         the same with 4 bits in transformer layers, one scale for 32 inputs; patch embedding, projector and head keep 8
  w8a8          8-bit activations too
                the compressor stays in float16

examples:
  python -m tools.export_qnn --checkpoint runs/demo/stage3 --compressor runs/demo/compressor --soc sm8750 --output exports/qnn
  python -m tools.export_qnn --checkpoint runs/demo/stage3 --encoder both --precision float16,w8a16,w4a16 \\
      --data runs/demo/data --items 4 --prefill 64 --slots 192 --soc sm8650 --output exports/qnn
  python -m tools.verify_artifact exports/qnn

exit status:
  0  written, and compared with JAX    1  it cannot be written, or float32 differs from JAX
  2  wrong usage                       130  stopped; nothing was written
"""


def show(reports: Mapping[str, Mapping[str, Any]], output: str) -> None:
    """Prints the reports as two tables."""
    first = next(iter(reports.values()))
    table = Table(
        title=f"contexts for {first['soc']}: compiling, and what moves between DDR and {first['vtcm_mb']} MiB of fast memory",
        title_justify="left",
    )
    headings = ("precision", "graph", "MB", "s", "operations", "on CPU", "spill MB", "fill MB", "read MB", "write MB")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("precision", "graph") else "right", no_wrap=True)
    for name, report in reports.items():
        for part, found in report["npu"].items():
            moved = (f"{found[key] / 1e6:.2f}" for key in ("spill", "fill", "read", "write"))
            counts = (f"{found['bytes'] / 1e6:.2f}", f"{found['seconds']:.1f}", str(found["operations"]), "0")
            table.add_row(name, part, *counts, *moved)
    console = Console(width=120)
    console.print(table)
    console.print(_parity_table(reports))
    print(f"written: {output}")


def _parity_table(reports: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title="on the simulator, against JAX in float32", title_justify="left")
    for heading in ("precision", "part", "SNR dB", "top-1 / tokens equal"):
        table.add_column(heading, justify="left" if heading in ("precision", "part") else "right", no_wrap=True)
    for name, report in reports.items():
        for part, found in report["parts"].items():
            ratio = f"{found['snr_db']:.1f}" if "snr_db" in found else ""
            equal = found.get("top1", found.get("tokens_equal"))
            table.add_row(name, part, ratio, "" if equal is None else f"{equal} of {found['of']}")
    return table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options. Ends the program with status 2 on anything else."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.export_qnn",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    edge_sources.add_options(add, tuple(QNN_PRECISIONS))
    add("--soc", required=True, metavar="NAME", help=f"the chip: {', '.join(SOCS)}")
    add(
        "--route",
        choices=ROUTES,
        default=ROUTES[0],
        help="compiler: of onnxruntime-qnn, or LiteRT's with --sdk (default: %(default)s)",
    )
    add(
        "--sdk",
        metavar="DIR",
        help="root of Qualcomm's QAIRT SDK, for route litert (default: the environment's QAIRT_SDK_ROOT)",
    )
    return parser.parse_args(arguments)


def _shared(options: argparse.Namespace, progress: ReportProgress) -> dict[str, Any]:
    names = ("parts", "encoder", "compressor", "prefill", "slots", "data", "items", "calibration_items", "step")
    return {"progress": progress, **{name: getattr(options, name) for name in names}}


def _by_onnx(options: argparse.Namespace, progress: ReportProgress) -> dict[str, Any]:
    try:
        from tools import qnn_artifact
    except ImportError as error:
        raise ArtifactError(EXTRA) from error
    shared = _shared(options, progress)
    return qnn_artifact.export(options.checkpoint, options.output, options.soc, precisions=options.precision, **shared)


def _by_litert(options: argparse.Namespace, progress: ReportProgress) -> dict[str, Any]:
    """Imported here: what it needs belongs to another extra."""
    from tools import qnn_litert

    require(len(options.precision) == 1, "route litert takes one precision at a time")
    shared = _shared(options, progress)
    return qnn_litert.export(
        options.checkpoint, options.output, options.soc, options.sdk, options.precision[0], **shared
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parse(arguments)
    try:
        find_soc(options.soc)
        with terminate_as_interrupt(), progress_line() as progress:
            reports = (_by_litert if options.route == LITERT else _by_onnx)(options, progress)
    except (ArtifactError, CheckpointError, ConfigError, ConversationError, RecordError, TokenizerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return INTERRUPTED
    if options.json:
        print(json.dumps(reports))
    elif options.route == LITERT:
        for name, found in reports["files"].items():
            print(
                f"{name}: {found['bytes'] / 1e6:.2f} MB, {found['on_npu']} of {found['operations']} operations on the NPU"
            )
    else:
        show(reports, options.output)
    return SUCCESS


if __name__ == "__main__":
    sys.exit(main())
