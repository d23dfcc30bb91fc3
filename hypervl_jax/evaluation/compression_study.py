"""The study of the compressor (VRC): ways to choose α compared on the same items, by tokens and by score.

A *way* gives an α to each item: one α for all ("uniform"), the VRC, a hand rule, the oracle α* of the item's own loss curve.
Scores are means over tasks of the tasks' means, so that a task counts once however many items it has; all intervals are 95 %
percentile bootstraps that resample items within their tasks and keep the measurements of an item together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from hypervl_jax.architecture import TilingConfig
from hypervl_jax.evaluation.statistics import CONFIDENCE, RESAMPLES, Estimate
from hypervl_jax.training.compression import rank_correlation
from hypervl_jax.vision.anyres import ALPHA_UNIT, plan_image
from hypervl_jax.vision.resolution import MAX_ALPHA, MIN_ALPHA

UNIFORM, VRC, UNSURE, ORACLE, ENTROPY, EDGES = "uniform", "vrc", "unsure", "oracle", "entropy", "edges"

DENSE_SHARE = 0.25
"""Share of the items, those with the most edges, that stand for dense small text."""

Sizes = Sequence[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to choose α, measured on all items in their common order.

    Attributes:
        name: for tables; unique.
        kind: one of the constants above.
        compressor: whose α these are, or whose tokens were matched; empty for neither.
        alphas: of each item.
        scores: of each answer, in [0, 1].
        tokens, tiles: visual tokens and encoder tiles of each item.
    """

    name: str
    kind: str
    compressor: str
    alphas: Float64[np.ndarray, "n"]
    scores: Float64[np.ndarray, "n"]
    tokens: Int64[np.ndarray, "n"]
    tiles: Int64[np.ndarray, "n"]


class Resampling:
    """Items of several tasks, and weights with which any mean over tasks is computed on resampled items.

    Args:
        tasks: of each item.
        resamples, seed: of the bootstrap.
    """

    def __init__(self, tasks: Sequence[str], resamples: int = RESAMPLES, seed: int = 0) -> None:
        self.tasks = np.array(tasks)
        self.names = sorted(set(tasks))
        self.weights = np.zeros(len(tasks))
        self._draws = np.zeros((resamples, len(tasks)))
        rng = np.random.default_rng(seed)
        for name in self.names:
            members = np.flatnonzero(self.tasks == name)
            share = 1 / (len(members) * len(self.names))
            counts = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), resamples)
            self.weights[members], self._draws[:, members] = share, counts * share

    def mean(self, values: Float[np.ndarray, "n"]) -> Estimate:
        """Mean over tasks of `values`, with its interval."""
        return _estimate(float(self.weights @ values), self._draws @ values)

    def ratio(self, above: Float[np.ndarray, "n"], below: Float[np.ndarray, "n"]) -> Estimate:
        """Ratio of two means over tasks; NaN where the lower one is 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn = (self._draws @ above) / (self._draws @ below)
            return _estimate(float(np.divide(self.weights @ above, self.weights @ below)), drawn[np.isfinite(drawn)])


def _estimate(value: float, drawn: Float64[np.ndarray, "r"]) -> Estimate:
    if len(drawn) == 0:
        return Estimate(value, float("nan"), float("nan"))
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value, float(low), float(high))


def costs(sizes: Sizes, alphas: Float[np.ndarray, "n"], tiling: TilingConfig) -> Int64[np.ndarray, "2 n"]:
    """(visual tokens, tiles) of each image at its α."""
    plans = [plan_image(*size, float(alpha), tiling) for size, alpha in zip(sizes, alphas, strict=True)]
    return np.array([[plan.tokens for plan in plans], [plan.tiles for plan in plans]], np.int64)


def uniform_alpha(sizes: Sizes, budget: int, tiling: TilingConfig) -> float:
    """The largest α in thousandths that takes no more tokens than the smallest one that takes `budget` or more; 1 where none does.

    Uniform scaling thus never gets fewer tokens than what it is compared with, and the best α among those that cost the same.
    """
    total = lambda milli: int(costs(sizes, np.full(len(sizes), min(milli / ALPHA_UNIT, MAX_ALPHA)), tiling)[0].sum())
    least = _smallest(total, budget, round(MIN_ALPHA * ALPHA_UNIT), ALPHA_UNIT)
    beyond = _smallest(total, total(least) + 1, least, ALPHA_UNIT + 1)
    return (beyond - 1) / ALPHA_UNIT


def rule_alphas(
    detail: Float[np.ndarray, "n"], sizes: Sizes, budget: int, tiling: TilingConfig
) -> Float64[np.ndarray, "n"]:
    """α proportional to how much detail an image holds, clipped to [0.1, 1]; the factor is the smallest that takes `budget` tokens.

    Args:
        detail: 0 or more; an image without any gets the least α.
        sizes: (height, width) of the images.
        budget: tokens of all images together.
        tiling: of the model.
    """
    scaled = lambda step: np.clip(detail * 1.01**step, MIN_ALPHA, MAX_ALPHA)
    total = lambda step: int(costs(sizes, scaled(step), tiling)[0].sum())
    return scaled(_smallest(total, budget, -1000, 2000))


def _smallest(total: Callable[[int], int], budget: int, low: int, high: int) -> int:
    """The smallest whole number in [low, high] with total(·) >= budget, by bisection; `high` where none has it."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if total(middle) >= budget else (middle + 1, high)
    return low


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A way to choose α against α = 1 and, at the same tokens, against uniform scaling and the hand rules.

    Attributes:
        way: what is compared.
        tokens_saved, tiles_saved: shares of all visual tokens and encoder tiles at α = 1.
        mean_tokens_saved: mean over tasks of the shares of tokens saved.
        score: mean over tasks.
        retention: score as a share of that at α = 1.
        against: name of another way -> paired difference of the scores, this way's minus the other's.
    """

    way: Way
    tokens_saved: float
    tiles_saved: float
    mean_tokens_saved: float
    score: Estimate
    retention: Estimate
    against: Mapping[str, Estimate]

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the items."""
        return {
            "name": self.way.name,
            "kind": self.way.kind,
            "compressor": self.way.compressor,
            "mean_alpha": float(self.way.alphas.mean()),
            "tokens_saved": self.tokens_saved,
            "mean_tokens_saved": self.mean_tokens_saved,
            "tiles_saved": self.tiles_saved,
            "score": self.score._asdict(),
            "retention": self.retention._asdict(),
            "against": {name: estimate._asdict() for name, estimate in self.against.items()},
        }


def compare(way: Way, full: Way, others: Sequence[Way], items: Resampling) -> Comparison:
    """`way` against α = 1 (`full`) and against `others`."""
    saved = lambda field: 1 - float(getattr(way, field).sum() / getattr(full, field).sum())
    by_task = [1 - way.tokens[here].sum() / full.tokens[here].sum() for here in _members(items).values()]
    return Comparison(
        way=way,
        tokens_saved=saved("tokens"),
        tiles_saved=saved("tiles"),
        mean_tokens_saved=float(np.mean(by_task)),
        score=items.mean(way.scores),
        retention=items.ratio(way.scores, full.scores),
        against={other.name: items.mean(way.scores - other.scores) for other in others},
    )


def _members(items: Resampling) -> dict[str, Bool[np.ndarray, "n"]]:
    """Masks of the tasks' items, by name."""
    return {name: items.tasks == name for name in items.names}


@dataclasses.dataclass(frozen=True)
class TaskCompression:
    """One way on one task: shares of tokens and tiles saved, score kept, and α beside the oracle's α*."""

    task: str
    items: int
    tokens_saved: float
    tiles_saved: float
    full_score: float
    score: float
    change: Estimate
    mean_alpha: float
    mean_optimal: float
    over_compressed: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**dataclasses.asdict(self), "change": self.change._asdict()}


def by_task(way: Way, full: Way, oracle: Way, over: Bool[np.ndarray, "n"], items: Resampling) -> list[TaskCompression]:
    """The tasks of a way; `over` marks items whose loss rises by more than ε at their α."""
    rows = []
    for task, here in _members(items).items():
        alone = Resampling([task] * int(here.sum()))
        saved = lambda field, here=here: 1 - float(getattr(way, field)[here].sum() / getattr(full, field)[here].sum())
        rows.append(
            TaskCompression(
                task=task,
                items=int(here.sum()),
                tokens_saved=saved("tokens"),
                tiles_saved=saved("tiles"),
                full_score=float(full.scores[here].mean()),
                score=float(way.scores[here].mean()),
                change=alone.mean((way.scores - full.scores)[here]),
                mean_alpha=float(way.alphas[here].mean()),
                mean_optimal=float(oracle.alphas[here].mean()),
                over_compressed=float(over[here].mean()),
            )
        )
    return rows


def adaptivity(way: Way, oracle: Way, items: Resampling) -> dict[str, float | None]:
    """How well α follows α*: Spearman's correlation of the tasks' means, and of all items; None where one is constant."""
    means = [np.array([each.alphas[here].mean() for here in _members(items).values()]) for each in (way, oracle)]
    return {
        "tasks": rank_correlation(*means) if len(items.names) > 1 else None,
        "items": rank_correlation(way.alphas, oracle.alphas),
    }


def dense_items(edges: Float[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """The `DENSE_SHARE` of the items with the most edges."""
    return edges >= np.quantile(edges, 1 - DENSE_SHARE)


def change_on(part: Bool[np.ndarray, "n"], way: Way, full: Way) -> Estimate:
    """Mean paired change of the score on some of the items, those of all tasks alike."""
    return Resampling(["part"] * int(part.sum())).mean((way.scores - full.scores)[part])


def on_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (tokens, score) no other point beats: fewer tokens at the same score or more, or a higher score at the same or fewer."""
    beaten = lambda t, s: any(u <= t and v >= s and (u < t or v > s) for u, v in points)
    return [not beaten(tokens, score) for tokens, score in points]
