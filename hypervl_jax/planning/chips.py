"""TPU generations as Google publishes them, and the topologies that the TPU compiler can be asked about.

    v5e-256        one slice of 256 chips                         v5p-512        one slice of 512 TensorCores: 256 chips
    2xv5e-256      two such slices, joined by the data-centre network
    v5p:16x16x16   one slice by its shape: 4,096 chips            2xv5p:8x8x8    two slices by shape

**The number in a name is Google's**: chips for v5e and v6e, TensorCores (two a chip) for v4, v5p and tpu7x. So v5p-512 has 256
chips and v5p-4096 has 2,048; 4,096 v5p chips are v5p-8192 or v5p:16x16x16. A shape always counts chips.

Sources: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x (peak compute, HBM, ICI and DCN bandwidth, slice shapes, cores and
chips of each shape). The v4 page gives no DCN figure, so that generation is planned in single slices only, and no ICI figure was found on it either: v4's is
our assumption of six links of 50 GB/s.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
import re
from collections.abc import Mapping

import jax
from jax.experimental import topologies

from hypervl_jax.architecture import ConfigError, require

GIB = 1 << 30
HOST_BOUNDS = (2, 2, 1)
"""Chips of one virtual machine along each axis of the torus, in slices of several machines: four in every generation."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU generation. All figures are per chip but `device_hbm`.

    Attributes:
        name: as in topology names.
        kind: `jax.Device.device_kind`.
        devices: JAX devices of one chip: v4 and v5p join their two TensorCores into one, tpu7x shows two.
        counted: what one chip adds to the number in an accelerator name: 2 TensorCores, or 1 chip.
        axes: of the torus.
        flops: peak bfloat16 FLOP/s.
        hbm_bytes: published capacity.
        device_hbm: bytes of HBM that the TPU compiler lets a program of one device use (libtpu 0.0.52).
        hbm_bandwidth: bytes/s.
        ici_bandwidth: bytes/s into the chip over all its links; Google publishes twice this, both directions summed.
        dcn_bandwidth: bytes/s into the chip over the data-centre network; 0 where none is published.
        most_chips: of one slice.
    """

    name: str
    kind: str
    devices: int
    counted: int
    axes: int
    flops: float
    hbm_bytes: int
    device_hbm: int
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    most_chips: int


_TABLE = (
    Chip("v4", "TPU v4", 1, 2, 3, 275e12, 32 * GIB, int(30.75 * GIB), 1200e9, 300e9, 0.0, 4096),
    Chip("v5e", "TPU v5 lite", 1, 1, 2, 197e12, 16 * GIB, int(15.75 * GIB), 819e9, 200e9, 25e9 / 8, 256),
    Chip("v5p", "TPU v5", 1, 2, 3, 459e12, 95 * GIB, int(95.73 * GIB), 2765e9, 600e9, 50e9 / 8, 6144),
    Chip("v6e", "TPU v6 lite", 1, 1, 2, 918e12, 32 * GIB, int(31.24 * GIB), 1638e9, 400e9, 100e9 / 8, 256),
    Chip("tpu7x", "TPU7x", 2, 2, 3, 2307e12, 192 * GIB, int(94.74 * GIB), 7380e9, 600e9, 100e9 / 8, 9216),
)
CHIPS: Mapping[str, Chip] = {chip.name: chip for chip in _TABLE}
KINDS: Mapping[str, Chip] = {chip.kind: chip for chip in _TABLE} | {
    "TPU v5e": CHIPS["v5e"],
    "TPU v5p": CHIPS["v5p"],
    "TPU v6e": CHIPS["v6e"],
    "TPU v7x": CHIPS["tpu7x"],
}
"""By `jax.Device.device_kind`, in all its spellings."""


class CompilerMissing(RuntimeError):
    """The TPU compiler is not installed; the message says how to get it."""


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of one JAX device, `jax.devices()[0].device_kind`; None for anything but a TPU of the table.

    The denominator of MFU. A tpu7x device is half a chip and has half of its peak.
    """
    chip = KINDS.get(device_kind)
    return None if chip is None else chip.flops / chip.devices


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` equal slices of one generation; `shape` is a slice's extent in chips along each axis of the torus."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        """JAX devices of all slices."""
        return self.chips * self.chip.devices

    @property
    def name(self) -> str:
        """The accelerator name, e.g. `2xv5e-256`; by shape where the name would mean another shape."""
        named = f"{self.chip.name}-{math.prod(self.shape) * self.chip.counted}"
        if slice_shape(self.chip, math.prod(self.shape)) != self.shape:
            named = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return named if self.slices == 1 else f"{self.slices}x{named}"

    def devices(self) -> list[jax.Device]:
        """The devices of this topology as the TPU compiler describes them; no accelerator is needed.

        Raises:
            CompilerMissing: libtpu is not installed.
            ConfigError: the compiler knows no such slice.
        """
        return list(_devices(self))


def topology(name: str) -> Topology:
    """The topology called `name`; the module's docstring shows the forms.

    Raises `ConfigError` for an unknown generation, a number that no slice has, or a shape with the wrong number of axes.
    """
    match = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*)(?:-(\d+)|:(\d+(?:x\d+)*))", name)
    require(match is not None, f"topology {name!r} is not of the form v5e-256, 2xv5e-256 or v5p:16x16x16")
    slices, generation, number, shape = match.groups()
    require(generation in CHIPS, f"topology {name!r} names no known TPU; known: {', '.join(CHIPS)}")
    chip = CHIPS[generation]
    require(slices is None or int(slices) >= 1, f"topology {name!r} has no slice")
    require(
        int(slices or 1) == 1 or chip.dcn_bandwidth > 0,
        f"topology {name!r}: no DCN bandwidth is published for {chip.name}; plan one slice",
    )
    if number:
        return Topology(chip, _named_shape(name, chip, int(number)), int(slices or 1))
    extents = tuple(map(int, shape.split("x")))
    require(len(extents) == chip.axes, f"topology {name!r}: a {chip.name} slice has {chip.axes} axes")
    require(
        min(extents) >= 1 and math.prod(extents) <= chip.most_chips,
        f"topology {name!r} is not between 1 and {chip.most_chips} chips",
    )
    return Topology(chip, extents, int(slices or 1))


def _named_shape(name: str, chip: Chip, number: int) -> tuple[int, ...]:
    shape = slice_shape(chip, number // chip.counted) if number % chip.counted == 0 else None
    unit = "TensorCores" if chip.counted == 2 else "chips"
    require(
        shape is not None,
        f"topology {name!r}: no {chip.name} slice has {number} {unit} (up to {chip.most_chips * chip.counted}); "
        f"a shape can be given instead, {chip.name}:{'x'.join(['4'] * chip.axes)}",
    )
    return shape


def slice_shape(chip: Chip, chips: int) -> tuple[int, ...] | None:
    """The usual shape of a slice with this many chips: the most compact one, shortest axis first; None if there is none.

    Two axes: powers of two up to 16 × 16. Three axes: up to 2 × 4 × 4 powers of two that start with 2 × 2, above it multiples of 4.
    """
    if not 4 <= chips <= chip.most_chips:
        return None
    if chip.axes == 2:
        fits = chips & (chips - 1) == 0
        return (1 << (chips.bit_length() - 1) // 2, 1 << chips.bit_length() // 2) if fits else None
    small = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}
    if chips < 64:
        return small.get(chips)
    return _compact(chips // 64) if chips % 64 == 0 else None


def _compact(cubes: int) -> tuple[int, ...]:
    """The three factors of `cubes` that are closest together, times the side 4 of a cube."""
    splits = [
        (a, b, cubes // (a * b))
        for a in range(1, cubes + 1)
        if cubes % a == 0
        for b in range(a, cubes // a + 1)
        if cubes // a % b == 0 and cubes // (a * b) >= b
    ]
    return tuple(4 * side for side in min(splits, key=sum))


@functools.lru_cache
def _devices(wanted: Topology) -> tuple[jax.Device, ...]:
    _prepare_compiler()
    name = f"{wanted.chip.name}:{'x'.join(map(str, wanted.shape))}"
    joined = {"chip_config_name": "megacore"} if wanted.chip.name == "v4" else {}
    try:
        description = topologies.get_topology_desc(
            platform="tpu",
            topology_name=name,
            chips_per_host_bounds=tuple(map(min, HOST_BOUNDS, (*wanted.shape, 1))),
            num_slices=wanted.slices,
            **joined,
        )
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise ConfigError(f"the TPU compiler knows no topology {name}: {str(error).splitlines()[0]}") from error
    return tuple(description.devices)


def _prepare_compiler() -> None:
    """Lets libtpu load on a machine without TPUs, beside other compilers; what the user has set stays."""
    if importlib.util.find_spec("libtpu") is None:
        raise CompilerMissing("the TPU compiler (libtpu) is not installed; install it with `pip install .[tpu]`")
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
    }
    for variable, value in settings.items():
        os.environ.setdefault(variable, value)


def slice_of(device: jax.Device) -> int:
    """Number of a device's slice; devices of a single slice carry none."""
    return getattr(device, "slice_index", 0) or 0
