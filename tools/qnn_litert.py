"""The other way to an NPU: TFLite files compiled ahead of time by LiteRT, with a QAIRT SDK that is installed on this machine.

    tools.export_tflite ─► NAME.tflite ─► LiteRT's compiler plugin + SDK ─► NAME.tflite with the chip's context in it

LiteRT's package holds the plugin, Qualcomm's SDK the compiler; the SDK is downloaded from Qualcomm under its own licence.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

from tools import artifacts, export_tflite
from tools.artifacts import ArtifactError
from tools.edge_runtime import TOKENIZER
from tools.qnn_chips import find_soc
from tools.quantisation import FLOAT16

KIND = "litert-qnn"
SDK_VARIABLE = "QAIRT_SDK_ROOT"
_LIBRARIES = pathlib.Path("lib/x86_64-linux-clang")
_PLUGIN = pathlib.Path("vendors/qualcomm/compiler/libLiteRtCompilerPlugin_Qualcomm.so")
_KEPT = ("embedder",)
"""Files that stay for the CPU: the table of embeddings."""


def find_sdk(directory: str | None) -> pathlib.Path:
    """The directory with the SDK's libraries. Raises `ArtifactError` when there is none."""
    named = directory or os.environ.get(SDK_VARIABLE)
    if not named:
        raise ArtifactError(
            f"route litert needs Qualcomm's QAIRT SDK: download it from Qualcomm and give --sdk DIR or set {SDK_VARIABLE}"
        )
    libraries = pathlib.Path(named) / _LIBRARIES
    if not (libraries / "libQnnHtp.so").exists():
        raise ArtifactError(f"{named} is no QAIRT SDK for Linux on x86-64: it has no {_LIBRARIES}/libQnnHtp.so")
    return libraries


def export(checkpoint: str, output: str, soc: str, sdk: str | None, precision: str, **options: Any) -> dict[str, Any]:
    """Writes one artifact of TFLite files compiled for a chip.

    Args:
        checkpoint, output, options: as for `export_tflite.export`.
        soc: a name in `SOCS`.
        sdk: root of the QAIRT SDK; the environment's when None.
        precision: of `QNN_PRECISIONS`; float32 files are compiled for float16.

    Returns:
        For each file its bytes and how many of its operations are on the NPU.

    Raises:
        ArtifactError: the SDK or a package is missing, the chip is unknown, an operation would stay on the CPU, or what
            `export_tflite.export` says.
    """
    artifacts.check_output(output)
    find_soc(soc)
    libraries = find_sdk(sdk)
    whole = "float32" if precision == FLOAT16 else precision
    with artifacts.writing(output) as home, tempfile.TemporaryDirectory() as temporary:
        source = pathlib.Path(temporary) / "tflite"
        reports = export_tflite.export(checkpoint, str(source), precisions=(whole,), **options)
        files = {
            path.name: _compile(path, home / path.name, soc, libraries) for path in sorted(source.glob("*.tflite"))
        }
        _finish(source, home, soc, precision, files)
    return {"files": files, "tflite": reports[whole]}


def _compile(source: pathlib.Path, target: pathlib.Path, soc: str, libraries: pathlib.Path) -> dict[str, Any]:
    if source.stem in _KEPT:
        target.write_bytes(source.read_bytes())
        return {"bytes": target.stat().st_size, "on_npu": 0, "operations": 0}
    try:
        from ai_edge_litert.aot.core import aot_types, apply_plugin, common
    except ImportError as error:
        raise ArtifactError("ai-edge-litert is not installed: pip install 'hypervl-jax[export]'") from error
    made = aot_types.Model.create_from_path(target)
    plugin = pathlib.Path(common.get_resource(_PLUGIN)).parent
    try:
        apply_plugin.ApplyPlugin()(
            aot_types.Model.create_from_path(source),
            made,
            "Qualcomm",
            soc.upper(),
            sdk_libs_path=str(libraries),
            libs=str(plugin),
        )
    except ValueError as error:
        raise ArtifactError(f"LiteRT cannot compile {source.name} for {soc}: {str(error).splitlines()[0]}") from error
    stats = made.partition_stats.subgraph_stats
    total, offloaded = (sum(getattr(one, name) for one in stats) for name in ("num_total_ops", "num_ops_offloaded"))
    if offloaded < total:
        raise ArtifactError(f"{total - offloaded} of {total} operations of {source.name} would stay on the CPU")
    return {"bytes": target.stat().st_size, "on_npu": offloaded, "operations": total}


def _finish(
    source: pathlib.Path, home: pathlib.Path, soc: str, precision: str, files: Mapping[str, Mapping[str, Any]]
) -> None:
    """The manifest of the TFLite files, for this chip; its parity is that of the files before they were compiled."""
    for name in (artifacts.GOLDEN, artifacts.REPORT):
        (home / name).write_bytes((source / name).read_bytes())
    tokenizer = home / TOKENIZER
    tokenizer.mkdir()
    for path in (source / TOKENIZER).iterdir():
        (tokenizer / path.name).write_bytes(path.read_bytes())
    manifest = artifacts.read_manifest(source)
    shapes = {**manifest.shapes, "soc": soc.lower(), "files": files}
    made = dataclasses.replace(manifest, kind=KIND, dtype=precision, shapes=shapes, files={})
    artifacts.write_manifest(home, made)
