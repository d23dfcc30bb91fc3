"""`python -m tools.qnn_compiler SOURCE.onnx TARGET.onnx --options JSON`: one ONNX file to a QNN context; `tools.qnn_contexts` starts it.

A process of its own, because the compiler's memory goes back only when its process ends, and because what it says of the memory
of the NPU comes as text on standard error. The last line of standard output is a JSON object with seconds and peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

PROVIDER = "QNNExecutionProvider"
_VERBOSE, _INFO, _ERROR = 0, 1, 3


def provider_devices(severity: int = _ERROR) -> tuple[Any, list[Any]]:
    """ONNX Runtime with the QNN provider registered, and the provider's devices. Raises `ImportError` without the packages."""
    import onnxruntime
    import onnxruntime_qnn

    # The provider keeps the level that it is registered at.
    onnxruntime.set_default_logger_severity(severity)
    if PROVIDER not in {device.ep_name for device in onnxruntime.get_ep_devices()}:
        onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    return onnxruntime, [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER]


def open_on_npu(path: str, options: Mapping[str, str], entries: Mapping[str, str], severity: int = _ERROR) -> Any:
    """A session all of whose operations are the NPU's; creation fails when one is not."""
    import onnxruntime_qnn

    onnxruntime, devices = provider_devices(_VERBOSE if severity == _INFO else severity)
    session = onnxruntime.SessionOptions()
    session.log_severity_level = severity
    session.add_provider_for_devices(devices, {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), **options})
    for key, value in {"session.disable_cpu_ep_fallback": "1", **entries}.items():
        session.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(path, session)


def peak_mib() -> float:
    """Most memory that this program has held, MiB; `getrusage` would count what the process was before it became this program."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024


def main() -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.qnn_compiler", description=__doc__)
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--options", required=True, type=json.loads, help="of the provider")
    options = parser.parse_args()
    entries = {"ep.context_enable": "1", "ep.context_file_path": options.target, "ep.context_embed_mode": "0"}
    began = time.perf_counter()
    try:
        open_on_npu(options.source, options.options, entries, _INFO)
    except Exception as error:  # every failure of the runtime becomes one sentence of the caller
        print(f"compiler: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"seconds": time.perf_counter() - began, "peak_mib": peak_mib()}), flush=True)
    # Taking the runtime down has been seen to hang; the files are written.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
