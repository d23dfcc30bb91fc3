"""What a step cannot be faster than, and what a stage costs: floors from the chip's published peaks.

Each floor assumes that nothing else limits the step and that everything overlaps, so the longest floor bounds the step from below, and
useful FLOPs over that time bound MFU from above. A real step is slower; plan with a stated MFU.
"""

from __future__ import annotations

from typing import NamedTuple

from hypervl_jax.architecture import require
from hypervl_jax.planning.chips import Chip, Topology

SECONDS_PER_DAY, SECONDS_PER_HOUR = 86_400, 3_600


class Demand(NamedTuple):
    """What one step asks of one device: FLOPs that it computes, bytes over HBM, and bytes that it receives over ICI and DCN."""

    flops: float
    hbm_bytes: float = 0.0
    ici_bytes: float = 0.0
    dcn_bytes: float = 0.0


class Floors(NamedTuple):
    """Seconds that one step takes at least, by what limits it."""

    arithmetic: float
    hbm: float
    ici: float
    dcn: float

    @property
    def seconds(self) -> float:
        """The longest floor."""
        return max(self)

    @property
    def limit(self) -> str:
        """Name of the longest floor."""
        return max(self._fields, key=lambda name: getattr(self, name))


def floors(chip: Chip, demand: Demand) -> Floors:
    """Floors of a step on a device of `chip`. The devices of one chip share its peak and its bandwidths.

    Raises `ConfigError` for bytes between slices of a generation without a published DCN bandwidth.
    """
    require(not demand.dcn_bytes or chip.dcn_bandwidth > 0, f"no DCN bandwidth is published for {chip.name}")
    peaks = (chip.flops, chip.hbm_bandwidth, chip.ici_bandwidth, chip.dcn_bandwidth)
    return Floors(
        *(amount * chip.devices / peak if amount else 0.0 for amount, peak in zip(demand, peaks, strict=True))
    )


def mfu(topology: Topology, useful_flops: float, seconds: float) -> float:
    """Model FLOPs utilisation: a step's useful FLOPs over all chips, over what the chips could do in its time (PaLM, arXiv 2204.02311)."""
    return useful_flops / (seconds * topology.chips * topology.chip.flops)


class Budget(NamedTuple):
    """What a stage takes at a stated MFU. `price` is in the currency of the price per chip-hour; None without one."""

    mfu: float
    step_seconds: float
    tokens_per_chip_second: float
    days: float
    chip_hours: float
    price: float | None


def budget(
    topology: Topology,
    useful_flops: float,
    step_tokens: float,
    total_tokens: float,
    mfu: float,
    price_per_chip_hour: float | None = None,
) -> Budget:
    """Time and cost of a stage.

    Args:
        topology: that it runs on.
        useful_flops: of a step, over all chips; the mean over the branches that alternate.
        step_tokens: LLM positions of a step that are not padding.
        total_tokens: of the stage.
        mfu: stated, between 0 and 1.
        price_per_chip_hour: in any currency.
    """
    require(0 < mfu <= 1, f"the MFU {mfu} must lie above 0 and at most at 1")
    seconds = useful_flops / (mfu * topology.chips * topology.chip.flops)
    whole = total_tokens / step_tokens * seconds
    chip_hours = whole / SECONDS_PER_HOUR * topology.chips
    price = None if price_per_chip_hour is None else chip_hours * price_per_chip_hour
    rate = step_tokens / seconds / topology.chips
    return Budget(mfu, seconds, rate, whole / SECONDS_PER_DAY, chip_hours, price)
