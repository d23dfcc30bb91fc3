"""One measurement of `tools.profile_tiles`, made in a process of its own: `python -m tools.tile_probe CASE`, CASE as JSON.

    picture ─► tiles of the asked size (or the whole picture as one) ─► tower and projector with random weights ─► visual tokens

Peak memory is what the kernel says (`VmHWM` of /proc/self/status, reset before each run), less what the process held before the run
(program, weights, pixels), less the visual tokens that come out: what encoding itself needs.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import gc
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from hypervl_jax.architecture import HyperVLConfig, projector_part, require, vision_part
from hypervl_jax.inference.assistant import encode, inference_dtypes, inference_runtime
from hypervl_jax.models.hypervl import HyperVL
from hypervl_jax.models.runtime import RuntimeConfig
from hypervl_jax.planning import programs
from hypervl_jax.planning.chips import topology
from hypervl_jax.planning.flops import count_flops
from hypervl_jax.training.state import abstract_parameters
from hypervl_jax.vision.anyres import ImagePlan, plan_image, tile_image
from tools.process_memory import status_bytes
from tools.profile_device import SIZES, random_like

SERIAL, BATCHED, FULL, CHUNKED, FLASH = "serial", "batched", "full", "chunked", "flash"
WAYS = {
    SERIAL: "one tile after another",
    BATCHED: "all tiles at once",
    FULL: "the whole picture in one pass, all attention scores in memory",
    CHUNKED: "the whole picture in one pass, the scores of 512 patches at a time",
    FLASH: "the whole picture in one pass by the TPU's kernel, which holds no scores",
}
"""How a picture is encoded."""

WHOLE = {FULL: "xla", CHUNKED: "chunked", FLASH: "splash"}
"""Attention kernel of each way that takes the picture in one pass."""

HERE = "cpu"
"""Compiles for this machine, and runs nothing."""

HEADROOM = 0.9
"""Share of the free memory that a run may be predicted to need."""

WARM_SECONDS = 10.0
"""A first run that takes longer counts as measured; what is done once for all is nothing beside it."""

_RESET_PEAK = "5"
"""What, written to /proc/self/clear_refs, sets the peak of the resident memory back to the present (proc_pid_clear_refs(5))."""


def square_side(height: int, width: int, cell: int) -> int:
    """Side in pixels of the smallest square with as many cells of `cell` pixels as a picture: attention costs what its patches cost,
    however they lie, and the tower's positions form squares.
    """
    cells = -(-height // cell) * -(-width // cell)
    return (math.isqrt(cells - 1) + 1) * cell


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        size: named architecture, of `tools.profile_device.SIZES`.
        branch: whose tower and projector.
        way: of `WAYS`.
        tile: side of a tile in pixels; of a picture in one pass, that of the square it is encoded as (`square_side`).
        height, width: of the picture, in pixels.
        tile_chunk: tiles that pass through the tower together; 0 for all.
        repeats: measured runs; medians count.
        chip: a TPU topology to compile for (`v5e-4`; one device of it is used), `HERE` to compile for this machine, or "" to run.
    """

    size: str
    branch: str
    way: str
    tile: int
    height: int
    width: int
    tile_chunk: int = 1
    repeats: int = 3
    chip: str = ""

    def __post_init__(self) -> None:
        whole = self.way in WHOLE
        require(self.way in WAYS, f"{self.way!r} is no way to encode a picture; ways are {', '.join(WAYS)}")
        fits = self.tile**2 >= self.height * self.width
        require(not whole or fits, f"{self.way} takes a picture as one square tile of at least its area")
        require(self.way != FLASH or self.is_tpu, f"{FLASH} runs on TPU only: give a topology to compile for")

    @property
    def is_tpu(self) -> bool:
        """Whether it is compiled for a TPU."""
        return self.chip not in ("", HERE)

    @property
    def encoded(self) -> tuple[int, int]:
        """(height, width) that pass through the tower: the picture's, in one pass the square's."""
        return (self.tile, self.tile) if self.way in WHOLE else (self.height, self.width)

    @property
    def config(self) -> HyperVLConfig:
        """The architecture with tiles of this size and enough of them that the picture keeps its size."""
        named = SIZES[self.size]()
        tiles = math.prod(-(-side // self.tile) for side in self.encoded)
        return dataclasses.replace(
            named,
            vision_base=dataclasses.replace(named.vision_base, image_size=self.tile),
            vision_large=dataclasses.replace(named.vision_large, image_size=self.tile),
            tiling=dataclasses.replace(named.tiling, tile_size=self.tile, max_tiles=tiles),
        )

    @property
    def plan(self) -> ImagePlan:
        """What AnyRes makes of the picture."""
        return plan_image(*self.encoded, 1.0, self.config.tiling)

    def runtime(self) -> RuntimeConfig:
        """As inference computes on the device, the tiles of this way together."""
        together = self.tile_chunk if self.way == SERIAL and self.tile_chunk else self.plan.tiles
        made = inference_runtime(together)
        attention = WHOLE.get(self.way, "splash" if self.is_tpu else "xla")
        return dataclasses.replace(made, dtype="bfloat16" if self.is_tpu else made.dtype, attention=attention)


@dataclasses.dataclass(frozen=True)
class Probe:
    """What was found.

    Attributes:
        tiles: encoded.
        tokens: visual tokens that enter the LLM.
        flops: matrix FLOPs by the program's own operations.
        compiled_bytes: temporary memory by the compiler.
        traffic_bytes: read from and written to HBM by the TPU compiler's program; None on this machine.
        net_bytes: measured peak, net of weights, pixels and visual tokens; None where nothing ran.
        milliseconds: median of a run's wall time; None where nothing ran.
        cpu_milliseconds: median of its processor time over all cores, which a busy machine hardly changes.
        left_out: why nothing ran; empty if it did.
    """

    tiles: int
    tokens: int
    flops: int
    compiled_bytes: int | None
    traffic_bytes: int | None = None
    net_bytes: int | None = None
    milliseconds: float | None = None
    cpu_milliseconds: float | None = None
    left_out: str = ""


def probe(case: Case) -> Probe:
    """Compiles the case, and runs it if it is for this machine and fits."""
    config, runtime, plan = case.config, case.runtime(), case.plan
    parts = (vision_part(case.branch), projector_part(case.branch))
    abstract = {part: abstract_parameters(config, runtime)[0][part] for part in parts}
    abstract = inference_dtypes(abstract, runtime.dtype)
    function = functools.partial(encode, model=HyperVL(config, runtime), branch=case.branch)
    pixels = jax.ShapeDtypeStruct((plan.tiles, case.tile, case.tile, 3), np.uint8)
    if case.is_tpu:
        return _probe_chip(case, function, abstract, pixels)
    traced = jax.jit(function).trace(abstract, pixels)
    compiled = traced.lower().compile()
    found = Probe(plan.tiles, plan.tokens, sum(count_flops(traced.jaxpr).values()), temporary_bytes(compiled))
    if case.chip == HERE:
        return found
    needed, free = found.compiled_bytes + _weight_bytes(abstract), status_bytes("MemAvailable", "/proc/meminfo")
    if needed > HEADROOM * free:
        return dataclasses.replace(found, left_out=f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (*case.encoded, 3), np.uint8)
    tiles = jax.device_put(tile_image(picture, plan, config.tiling))
    params = jax.block_until_ready(random_like(abstract))
    run = measure(lambda: compiled(params, tiles), case.repeats)
    return dataclasses.replace(found, **run._asdict())


def _probe_chip(case: Case, function: Callable[..., jax.Array], abstract: Any, pixels: jax.ShapeDtypeStruct) -> Probe:
    """The case compiled for one device of a TPU topology."""
    device = jax.sharding.SingleDeviceSharding(topology(case.chip).devices()[0])
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), (abstract, pixels)
    )
    traced = jax.jit(function).trace(*placed)
    found = Probe(case.plan.tiles, case.plan.tokens, sum(count_flops(traced.jaxpr).values()), None)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return dataclasses.replace(found, left_out=str(error).splitlines()[0][:200])
    traffic = programs.hbm_bytes(programs.parse_program(compiled.as_text()))
    return dataclasses.replace(found, compiled_bytes=temporary_bytes(compiled), traffic_bytes=traffic)


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Memory for intermediate values, by the compiler."""
    return compiled.memory_analysis().temp_size_in_bytes


def _weight_bytes(abstract: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))


class Run(NamedTuple):
    """One run, or the medians of several: fields of `Probe`."""

    net_bytes: int
    milliseconds: float
    cpu_milliseconds: float


def measure(run: Callable[[], jax.Array], repeats: int) -> Run:
    """Medians of `repeats` runs; one before them only warms up, unless it is long."""
    runs = [_measure_once(run)]
    if runs[0].milliseconds < 1000 * WARM_SECONDS:
        runs = [_measure_once(run) for _ in range(repeats)]
    return Run(*(statistics.median(values) for values in zip(*runs, strict=True)))


def _measure_once(run: Callable[[], jax.Array]) -> Run:
    before = settle()
    began, worked = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(run())
    seconds = time.perf_counter() - began, time.process_time() - worked
    return Run(max(0, status_bytes("VmHWM") - before - result.nbytes), *(1000 * value for value in seconds))


def settle() -> int:
    """Gives free memory back to the kernel, resets the peak, and returns the resident bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    return status_bytes("VmRSS")


def main() -> int:
    """Measures the case on the command line and prints it as one line of JSON."""
    print(json.dumps(dataclasses.asdict(probe(Case(**json.loads(sys.argv[1]))))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
