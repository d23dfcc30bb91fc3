"""Signs of failure that the program raises by itself, with the measured value and what to do.

The other two lie where they are measured: "branch imbalance" in `consistency`, "tiling not triggered" in `tools.profile_tiles`.
"""

from __future__ import annotations

from collections.abc import Mapping

from hypervl_jax.evaluation.analysis import percent
from hypervl_jax.evaluation.statistics import Estimate

MOST_DROP = 0.05
"""Drop of the score on dense images beyond which compression is called too strong; the paper's mean cost is 0.013."""

MOST_SHARE = 0.02
"""Share of the encoder's work on one tile that the compressor may cost; our bound."""


def over_compression(way: str, change: Estimate, items: int, allowed: float = MOST_DROP) -> list[str]:
    """Warns where the score on dense images falls by more than `allowed`, and the fall's interval lies below 0.

    Args:
        way: how α was chosen.
        change: of the score on the images with the most edges, against α = 1.
        items: how many those are.
        allowed: largest fall, as a positive share.
    """
    if change.mean >= -allowed or change.high >= 0:
        return []
    return [
        f"over-compression: {way} changes the score on the {items} images with the most edges by {percent(change, signed=True)} points, "
        f"at most −{100 * allowed:g} is allowed; calibrate with a smaller --allowed-loss, or train with a larger "
        "--over-compression-weight"
    ]


def compressor_overhead(way: str, full: Mapping[str, float], compressed: Mapping[str, float], step: str) -> list[str]:
    """Warns where the compressor takes as long as it saves.

    Args:
        way: which compressor.
        full, compressed: mean milliseconds of each step of an answer at α = 1 and with the compressor.
        step: the compressor's name among them.
    """
    cost = compressed.get(step, 0.0)
    saved = sum(full.values()) - (sum(compressed.values()) - cost)
    if cost < saved:
        return []
    return [
        f"compressor overhead: {way} takes {cost:.2f} ms an answer and saves {saved:.2f} ms elsewhere; use α = 1, or a smaller compressor"
    ]


def compressor_share(flops: int, tile_flops: int, most: float = MOST_SHARE) -> list[str]:
    """Warns where the compressor costs more than a share `most` of the Base encoder's FLOPs on one tile."""
    share = flops / tile_flops
    if share <= most:
        return []
    return [
        f"compressor overhead: the compressor takes {share:.1%} of the FLOPs of one tile of the base encoder, at most {most:.0%} is meant; "
        "choose a smaller backbone or proxy"
    ]
