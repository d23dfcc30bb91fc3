"""One measurement of `tools.benchmark_edge`, made in a process of its own: `python -m tools.edge_probe CASE`, CASE as JSON.

    imports ─► resident memory ─► model loaded ─► first run ─► timed runs ─► peak of the resident memory, outputs

Memory is what the kernel says (`VmHWM` of /proc/self/status) less what the process held when its libraries were loaded: weights,
as far as they were read, and everything that a run needs.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hypervl_jax.architecture import require
from hypervl_jax.vision.pixels import normalise_pixels
from tools.process_memory import status_bytes

TFLITE, ONNX, TORCH, COMPILED = "tflite", "onnx", "torch", "torch.compile"
COMPRESSOR, ENCODER, PREFILL, DECODE = "compressor", "encoder", "prefill", "decode"

Arrays = Mapping[str, np.ndarray]
Run = Callable[[], dict[str, np.ndarray]]

WARM_SECONDS = 20.0
"""A first run that takes longer counts as measured."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        runtime: one of the constants above.
        part: `COMPRESSOR` (one proxy to α), `ENCODER` (one tile to its visual tokens), `PREFILL` (a piece of a prompt, empty cache) or `DECODE` (one token).
        model: file, or for PyTorch the directory.
        inputs: .npz with the arrays of `tools.edge_graphs` by name; of a tile, as bytes.
        precision: "float32", "int8".
        calls: runs that make one measurement, as tiles of a picture are encoded one by one.
        repeats: measurements; the median counts.
        threads: of the runtime.
        outputs: .npz to write.
    """

    runtime: str
    part: str
    model: str
    inputs: str
    precision: str
    calls: int
    repeats: int
    threads: int
    outputs: str


@dataclasses.dataclass(frozen=True)
class Probe:
    """What was measured: times of one measurement, and bytes above those of the loaded libraries."""

    milliseconds: float
    slowest: float
    first: float
    peak_bytes: int


def probe(case: Case) -> Probe:
    """Measures a case, and writes what came out."""
    arrays = dict(np.load(case.inputs))
    prepare = OPEN[case.runtime](case)
    gc.collect()
    before = status_bytes("VmRSS")
    run = prepare(arrays)
    began = time.perf_counter()
    found = run()
    first = 1000 * (time.perf_counter() - began)
    if first <= 1000 * WARM_SECONDS:
        run()  # compilers look at a second call before they settle
    times = (
        [first * case.calls] if first > 1000 * WARM_SECONDS else [_timed(run, case.calls) for _ in range(case.repeats)]
    )
    peak = status_bytes("VmHWM") - before
    np.savez(case.outputs, **found)
    return Probe(statistics.median(times), max(times), first, max(0, peak))


def _timed(run: Run, calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        run()
    return 1000 * (time.perf_counter() - began)


def _scaled(arrays: Arrays) -> dict[str, np.ndarray]:
    """Tiles as graphs take them."""
    return {name: normalise_pixels(value) if name == "tile" else value for name, value in arrays.items()}


def open_tflite(case: Case) -> Callable[[Arrays], Run]:
    """A file of one signature in ai-edge-litert, with XNNPACK."""
    from ai_edge_litert.interpreter import Interpreter

    def prepare(arrays: Arrays) -> Run:
        interpreter = Interpreter(case.model, num_threads=case.threads)
        (name,) = interpreter.get_signature_list()
        signature, inputs = interpreter.get_signature_runner(name), _scaled(arrays)
        return lambda: dict(signature(**inputs))

    return prepare


def open_onnx(case: Case) -> Callable[[Arrays], Run]:
    """A file in ONNX Runtime on the CPU."""
    import onnxruntime  # noqa: F401 (its memory counts as a library's)

    from tools import onnx_files

    def prepare(arrays: Arrays) -> Run:
        call = onnx_files.signature(onnx_files.open_session(pathlib.Path(case.model), case.threads))
        inputs = _scaled(arrays)
        return lambda: dict(call(**inputs))

    return prepare


def open_torch(case: Case) -> Callable[[Arrays], Run]:
    """A directory of `tools.to_torch`: eager, or its modules compiled; "int8" rounds the linear layers dynamically."""
    import torch

    from tools import torch_parts

    torch.set_num_threads(case.threads)

    def prepare(arrays: Arrays) -> Run:
        part = torch_parts.open_part(pathlib.Path(case.model), case.part)
        if case.precision == "int8":
            part = torch_parts.rounded(part)
        if case.runtime == COMPILED:
            part.compile()
        return torch_parts.runner(part, arrays)

    return prepare


OPEN: dict[str, Callable[[Case], Callable[[Arrays], Run]]] = {
    TFLITE: open_tflite,
    ONNX: open_onnx,
    TORCH: open_torch,
    COMPILED: open_torch,
}


def main() -> int:
    """Measures the case on the command line and prints it as one line of JSON."""
    values: dict[str, Any] = json.loads(sys.argv[1])
    require(values["runtime"] in OPEN, f"{values['runtime']!r} is no runtime; there are {', '.join(OPEN)}")
    print(json.dumps(dataclasses.asdict(probe(Case(**values)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
