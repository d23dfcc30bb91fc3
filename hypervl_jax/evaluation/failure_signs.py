"""Signs of failure that the program raises by itself, with the measured value and what to do.

"Tiling not triggered" lies where it is measured, in `tools.profile_tiles`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from hypervl_jax.architecture import BRANCHES
from hypervl_jax.evaluation import analysis
from hypervl_jax.evaluation.analysis import percent
from hypervl_jax.evaluation.benchmarks import IMAGE
from hypervl_jax.evaluation.statistics import Estimate
from hypervl_jax.inference.latency import COMPRESSOR_STEP

MOST_DROP = 0.05
"""Drop of the score on dense images beyond which compression is called too strong; the paper's mean cost is 0.013."""

MOST_SHARE = 0.02
"""Share of the encoder's work on one tile that the compressor may cost; our bound."""


LEAST_AGREEMENT = 0.9
"""Share of answers that both encoders should give alike; our bound."""


def over_compression(
    way: str, change: Estimate, items: int, images: str = "with the most edges", allowed: float = MOST_DROP
) -> list[str]:
    """Warns where the score on some images falls by more than `allowed`, and the fall's interval lies below 0.

    Args:
        way: how α was chosen.
        change: of the score on these images, against α = 1.
        items: how many they are.
        images: which; by default dense small text.
        allowed: largest fall, as a positive share.
    """
    if change.mean >= -allowed or change.high >= 0:
        return []
    return [
        f"over-compression: {way} changes the score on the {items} images {images} by {percent(change, signed=True)} points, "
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


def branch_imbalance(
    task: str, same: Estimate, items: int, least: float = LEAST_AGREEMENT, measured: str = ""
) -> list[str]:
    """Warns where the share of answers that both encoders give alike lies wholly, with its interval, below `least`.

    Args:
        task: which questions.
        same: that share.
        items: how many questions.
        least: smallest share that is expected.
        measured: what else is known of the difference, in brackets.
    """
    if same.high >= least:
        return []
    return [
        f"branch imbalance: outputs differ when switching encoders: on {task} {percent(same)} % of {items} answers are the same, at "
        f"least {100 * least:g} % is expected{measured}; train longer with DCL, or compare the branches' scores"
    ]


def of_results(groups: analysis.Groups) -> list[str]:
    """The signs that answers show by themselves: α = auto against α = 1, and the encoders against each other, as far as measured."""
    found = []
    for row in analysis.savings(groups):
        way, items = f"α = auto with encoder {row.encoder}", analysis.compressed(groups, row.task, row.encoder).items
        found += over_compression(way, row.score_change, len(items), f"of {row.task}")
    for encoder in BRANCHES:
        tasks = [row.task for row in analysis.savings(groups) if row.encoder == encoder]
        if tasks:
            full = [item for task in tasks for item in analysis.full_resolution(groups, task, encoder, IMAGE).items]
            auto = [item for task in tasks for item in analysis.compressed(groups, task, encoder).items]
            times = analysis.mean_milliseconds(full), analysis.mean_milliseconds(auto)
            found += compressor_overhead(f"the compressor with encoder {encoder}", *times, COMPRESSOR_STEP)
    for row in analysis.agreements(groups):
        found += branch_imbalance(row.task, row.same_answer, row.items)
    return found


def tell(warnings: Sequence[str]) -> None:
    """Prints warnings on standard error."""
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
