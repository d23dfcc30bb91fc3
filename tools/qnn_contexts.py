"""QNN contexts: ONNX files compiled for the NPU of a Snapdragon, by ONNX Runtime's QNN provider on this machine, and run on its simulator.

NAME.onnx, NAME.weights ─► compile_context ─► NAME.onnx (a wrapper: one EPContext node) and NAME_qnn.bin, for one chip
                                              └► open_signature: the simulator of the package runs it on x86
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

import onnx

from tools.artifacts import ArtifactError
from tools.onnx_files import Signature, signature
from tools.qnn_chips import EXTRA, VTCM_MB, Soc
from tools.qnn_compiler import open_on_npu, provider_devices


def runtime_version() -> str:
    """Version of Qualcomm's runtime in the package. Raises `ArtifactError` without the package."""
    try:
        provider_devices()
        from onnxruntime_qnn import build_and_package_info
    except ImportError as error:
        raise ArtifactError(EXTRA) from error
    return str(build_and_package_info.qnn_version)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What compiling took and what the compiler says of the context; bytes move between the NPU and DDR in one run.

    Attributes:
        bytes: of the context.
        seconds: of compiling.
        peak_mib: of the compiling process.
        operations: of the ONNX file, all of them in the context.
        spill, fill: intermediate results that did not fit the fast memory, and came back.
        read, write: all, weights, inputs and outputs too.
    """

    bytes: int
    seconds: float
    peak_mib: float
    operations: int
    spill: int
    fill: int
    read: int
    write: int


def compile_context(source: pathlib.Path, target: pathlib.Path, soc: Soc) -> Compiled:
    """Compiles an ONNX file for a chip; `target` ends in ".onnx", and the context lies beside it.

    Raises:
        ArtifactError: the NPU does not run an operation, the graph does not fit it, or the compiler fails.
    """
    options = {
        "soc_model": str(soc.model),
        "htp_arch": str(soc.arch),
        "vtcm_mb": str(VTCM_MB),
        # Rounding of inputs and outputs on the NPU too.
        "offload_graph_io_quantization": "0",
    }
    command = [sys.executable, "-m", "tools.qnn_compiler", str(source), str(target), "--options", json.dumps(options)]
    root = pathlib.Path(__file__).resolve().parent.parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, check=False)
        log.seek(0)
        said = log.read()
    if done.returncode:
        raise ArtifactError(f"the QNN compiler cannot compile {source.stem}: {_reason(said, done.returncode)}")
    measured = json.loads(done.stdout.strip().splitlines()[-1])
    wrapper = onnx.load(str(target), load_external_data=False)
    outside = sorted({node.op_type for node in wrapper.graph.node if node.op_type != "EPContext"})
    if outside:
        raise ArtifactError(f"{source.stem}: {', '.join(outside)} would not run on the NPU")
    return Compiled(
        bytes=sum(path.stat().st_size for path in context_files(target)),
        seconds=measured["seconds"],
        peak_mib=measured["peak_mib"],
        operations=len(onnx.load(str(source), load_external_data=False).graph.node),
        **_traffic(said),
    )


def context_files(wrapper: pathlib.Path) -> list[pathlib.Path]:
    """The wrapper and the contexts that it names."""
    found = [wrapper]
    for node in onnx.load(str(wrapper), load_external_data=False).graph.node:
        names = [value.s.decode() for value in node.attribute if value.name == "ep_cache_context"]
        found += [wrapper.parent / name for name in names]
    return found


def _traffic(said: str) -> dict[str, int]:
    """The compiler's summary of its last graph."""
    names = {"spill": "spill_bytes", "fill": "fill_bytes", "read": "read_total_bytes", "write": "write_total_bytes"}
    found = {key: re.findall(rf"\b{name}=(\d+)", said) for key, name in names.items()}
    if not all(found.values()):
        raise ArtifactError("the QNN compiler gave no summary of the memory it uses; this version is not known here")
    return {key: int(values[-1]) for key, values in found.items()}


_REASONS = (
    (r"Unsupported nodes in QNN EP: (.*)", "the NPU does not run {}"),
    (r"((?:Graph|graph) .*?requires estimated allocation of .*?bytes.*)", "{}"),
    (r"(.*(?:VTCM|TCM).*(?:exceed|too large|does not fit|fail).*)", "{}"),
    (r"(assigned to the default CPU EP)", "some of its operations would not run on the NPU"),
    (r"compiler: (.*)", "{}"),
)


def _reason(said: str, status: int) -> str:
    """Why it failed, in few words."""
    for pattern, sentence in _REASONS:
        found = re.findall(pattern, said)
        if found:
            kinds = sorted(set(re.findall(r"type: (\w+)", found[-1])))
            return sentence.format(", ".join(kinds) or re.sub(r"\x1b\[[0-9;]*m", "", found[-1]).strip()[:300])
    return f"it ended with status {status}" + (" (killed: out of memory?)" if status < 0 else "")


def open_signature(wrapper: pathlib.Path) -> Signature:
    """A context on the simulator. Raises `ArtifactError` when it cannot be loaded."""
    try:
        session: Any = open_on_npu(str(wrapper), {}, {})
    except ImportError as error:
        raise ArtifactError(EXTRA) from error
    except Exception as error:
        raise ArtifactError(f"{wrapper} cannot be loaded: {str(error).splitlines()[0][:200]}") from error
    return signature(session)
