"""How sure a measured mean is: intervals for proportions, for means of scores, and for paired differences."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

CONFIDENCE = 0.95
RESAMPLES = 2000

Scores = Float64[np.ndarray, "n"]


class Estimate(NamedTuple):
    """A mean and its confidence interval."""

    mean: float
    low: float
    high: float


def wilson_interval(successes: float, count: int, confidence: float = CONFIDENCE) -> Estimate:
    """A proportion with its score interval (Wilson, JASA 22, 1927, p. 209): never outside [0, 1], sound for few items too.

    Raises:
        ValueError: no items, or more successes than items.
    """
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(f"{successes} successes of {count} items are no proportion")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / count
    centre = share + z * z / (2 * count)
    margin = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return Estimate(share, max(0.0, (centre - margin) / scale), min(1.0, (centre + margin) / scale))


def bootstrap_interval(
    scores: Scores, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """A mean of scores with its percentile bootstrap interval (Efron, Ann. Statist. 7, 1979, p. 1), from a fixed seed.

    For a paired comparison give each item's difference: resampling items keeps the two measurements of an item together.

    Raises:
        ValueError: no scores.
    """
    if len(scores) == 0:
        raise ValueError("an interval needs at least one score")
    draws = np.random.default_rng(seed).integers(0, len(scores), (resamples, len(scores)))
    low, high = np.quantile(np.asarray(scores)[draws].mean(1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(np.mean(scores)), float(low), float(high))


def mean_interval(scores: Any, confidence: float = CONFIDENCE) -> Estimate:
    """A task's mean score with its interval: Wilson's where every score is 0 or 1, else the bootstrap's."""
    values = np.asarray(scores, np.float64)
    if np.isin(values, (0.0, 1.0)).all():
        return wilson_interval(float(values.sum()), len(values), confidence)
    return bootstrap_interval(values, confidence)


def paired_difference(scores: Any, baseline: Any, confidence: float = CONFIDENCE) -> Estimate:
    """Mean difference of two scores of the same items, in the same order, with its bootstrap interval.

    Raises:
        ValueError: the two have different lengths, or no item.
    """
    first, second = np.asarray(scores, np.float64), np.asarray(baseline, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"{len(first)} and {len(second)} scores are not paired: give the scores of the same items")
    return bootstrap_interval(first - second, confidence)


def intervals_apart(higher: Estimate, lower: Estimate) -> bool:
    """Whether the first interval lies wholly above the second: stricter than a test of their difference."""
    return higher.low > lower.high


def mean_of_ratios(parts: Float64[np.ndarray, "n c 2"], confidence: float = CONFIDENCE) -> Estimate:
    """A score that is the mean of c ratios of sums over n independent units, with its percentile bootstrap interval.

    Args:
        parts: of each unit and ratio, what it adds to the numerator and to the denominator. Units are resampled whole, so that
            answers that hang together (all questions on one figure) stay together.
        confidence: of the interval.

    Raises:
        ValueError: no unit, or a ratio whose denominator is 0 over all units.
    """
    totals = parts.sum(0)
    if len(parts) == 0 or (totals[:, 1] <= 0).any():
        raise ValueError("a ratio needs at least one unit that counts")
    rng = np.random.default_rng(0)
    counts = rng.multinomial(len(parts), np.full(len(parts), 1 / len(parts)), RESAMPLES)
    sums = np.einsum("rn,ncx->rcx", counts, parts, optimize=True)
    # A resample may miss every unit of a rare ratio; it says nothing then.
    ratios = np.divide(sums[..., 0], sums[..., 1], out=np.full(sums.shape[:2], np.nan), where=sums[..., 1] > 0)
    low, high = np.nanquantile(ratios.mean(1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float((totals[:, 0] / totals[:, 1]).mean()), float(low), float(high))
