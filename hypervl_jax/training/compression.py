"""What the Visual Resolution Compressor (VRC) learns from: labels from a reference model's losses, targets, and metrics of its α.
`training.compressor_training` trains it.

For an image with its question and answer, a reference model gives L(α), the mean cross-entropy of the answer's tokens given
the image scaled by α (the share of its area that is kept), for the ten `RATIOS`. The relative increase is

    Δ(α) = (L(α) − L(1)) / max(L(1), floor)

and the label α* is the strongest compression that it and every weaker one keep within ε. Labels are stored as whole curves,
so that any ε and floor can be tried later. Source: HyperVL (arXiv 2512.14052), section on the VRC.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32, Float64

from hypervl_jax.architecture import TilingConfig
from hypervl_jax.vision.anyres import plan_image
from hypervl_jax.vision.resolution import MAX_ALPHA, prediction_from_alpha

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""The candidates for α at which a reference model is asked."""

DEFAULT_FLOOR = 0.1
"""Nats per answer token below which L(1) is no scale to compare with: e^-0.1 is 90 % certainty of every token."""

DEFAULT_EPSILON = 0.05
"""The middle of the three that are studied."""

EVERY_TASK = "all"
"""Name of the row over all tasks in a summary."""


@dataclasses.dataclass(frozen=True)
class ResolutionLabel:
    """What a reference model lost on one image at each resolution.

    Attributes:
        content_hash: of the record (`data_pipelines.records.content_hash`).
        source, task: of the record.
        height, width: of the image, pixels.
        losses: L(α) at `RATIOS`, nats per answer token.
        blind_loss: L at α = 1 with every pixel mid-grey: what the answer costs without seeing the image.
        tokens: visual tokens at `RATIOS`.
        paraphrase_losses: L(1) of other right answers, where the data has them: how much of a loss is the wording.
    """

    content_hash: str
    source: str
    task: str
    height: int
    width: int
    losses: tuple[float, ...]
    blind_loss: float
    tokens: tuple[int, ...]
    paraphrase_losses: tuple[float, ...] = ()


def relative_increase(losses: Float[np.ndarray, "... 10"], floor: float) -> Float64[np.ndarray, "... 10"]:
    """Δ(α) = (L(α) − L(1)) / max(L(1), floor) at `RATIOS`; negative where compression helped.

    Raises `ValueError` for a curve that has not ten finite values of 0 or more, or a floor that is not positive.
    """
    losses = np.asarray(losses, np.float64)
    if losses.shape[-1:] != (len(RATIOS),) or not np.all(np.isfinite(losses)) or np.any(losses < 0):
        raise ValueError(f"loss curves need an axis of {len(RATIOS)} finite losses of 0 or more, not {losses.shape}")
    if not floor > 0:
        raise ValueError(f"floor {floor} must be positive: it replaces a loss near 0 as the scale of an increase")
    full = losses[..., -1:]
    return (losses - full) / np.maximum(full, floor)


def optimal_ratio(losses: Float[np.ndarray, "... 10"], epsilon: float, floor: float) -> Float64[np.ndarray, "..."]:
    """α*: the smallest ratio such that it and every larger one have Δ <= ε. 1 always qualifies, since Δ(1) = 0.

    A curve that rises and falls again is thus not trusted below its first rise (seen from α = 1).

    Raises `ValueError` as `relative_increase`, and for a negative ε.
    """
    if not epsilon >= 0:
        raise ValueError(f"epsilon {epsilon} must be 0 or more")
    within = relative_increase(losses, floor) <= epsilon
    qualified = np.logical_and.accumulate(within[..., ::-1], axis=-1).sum(-1)
    return np.asarray(RATIOS)[len(RATIOS) - qualified]


def at_alpha(curves: Float[np.ndarray, "n 10"], alphas: Float[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    """L (or Δ) of each image at its own α in [0.1, 1], linear between `RATIOS`."""
    position = np.clip(np.asarray(alphas, np.float64) * len(RATIOS) - 1, 0, len(RATIOS) - 1)
    lower = np.minimum(position.astype(int), len(RATIOS) - 2)
    images, share = np.arange(len(lower)), position - lower
    return (1 - share) * curves[images, lower] + share * curves[images, lower + 1]


def chance_lost(curves: Float[np.ndarray, "n 10"], alphas: Float[np.ndarray, "n"]) -> float:
    """1 − Σ exp(−L(α)) / Σ exp(−L(1)), each image at its own α: the share of the right answers' chance that compression costs.

    exp(−L) is the geometric mean of an answer's token probabilities. Unlike a mean of Δ it is not ruled by images whose answer was
    certain or is lost anyway, and like a score it counts an image once: what some gain makes good what others lose, so noise
    in L(α) does not pass for a cost.
    """
    full = np.exp(-np.asarray(curves, np.float64)[:, -1]).sum()
    return float(1 - np.exp(-at_alpha(curves, alphas)).sum() / full)


def loss_curves(labels: Sequence[ResolutionLabel]) -> Float64[np.ndarray, "n 10"]:
    """L(α) of every label."""
    return np.array([label.losses for label in labels], np.float64).reshape(-1, len(RATIOS))


def longest_sides(labels: Sequence[ResolutionLabel]) -> Float32[np.ndarray, "n"]:
    """M of every label's image, pixels."""
    return np.array([max(label.height, label.width) for label in labels], np.float32)


def compressor_targets(
    labels: Sequence[ResolutionLabel], epsilon: float, floor: float, proxy_size: int
) -> Float32[np.ndarray, "n"]:
    """What the compressor should predict for each image: α* in the units of `vision.resolution.prediction_from_alpha`."""
    best = optimal_ratio(loss_curves(labels), epsilon, floor)
    return prediction_from_alpha(best, longest_sides(labels), proxy_size).astype(np.float32)


def by_task(labels: Sequence[ResolutionLabel]) -> dict[str, list[ResolutionLabel]]:
    """The labels of each task, tasks sorted, and all of them as `EVERY_TASK`."""
    tasks = sorted({label.task for label in labels})
    return {task: [label for label in labels if label.task == task] for task in tasks} | {EVERY_TASK: list(labels)}


@dataclasses.dataclass(frozen=True)
class LabelSummary:
    """Labels of one task at one ε and floor.

    Attributes:
        images: labelled.
        mean_optimal: mean α*.
        tokens_saved: share of the visual tokens that α* saves.
        on_floor: share of images whose L(1) lies below the floor.
        blind: share of images whose answer costs within ε of L(1) without seeing them: their α* says nothing about them.
        drift: share, of images with paraphrased answers, whose L(1) changes by more than ε with the wording: their Δ may be mere wording.
            None without any.
        histogram: images by α*, at `RATIOS`.
    """

    images: int
    mean_optimal: float
    tokens_saved: float
    on_floor: float
    blind: float
    drift: float | None
    histogram: tuple[int, ...]


def summarise_labels(
    labels: Sequence[ResolutionLabel], epsilon: float, floor: float = DEFAULT_FLOOR
) -> dict[str, LabelSummary]:
    """Summaries by task, sorted, and over all of them as `EVERY_TASK`."""
    return {task: _summarise(members, epsilon, floor) for task, members in by_task(labels).items()}


def _summarise(labels: Sequence[ResolutionLabel], epsilon: float, floor: float) -> LabelSummary:
    curves = loss_curves(labels)
    best = optimal_ratio(curves, epsilon, floor)
    places = np.searchsorted(RATIOS, best)
    tokens = np.array([label.tokens for label in labels])
    blind = np.array([is_blind_guess(label, epsilon, floor) for label in labels])
    return LabelSummary(
        images=len(labels),
        mean_optimal=float(best.mean()),
        tokens_saved=float(1 - tokens[np.arange(len(labels)), places].sum() / tokens[:, -1].sum()),
        on_floor=float((curves[:, -1] < floor).mean()),
        blind=float(blind.mean()),
        drift=_drift(labels, epsilon, floor),
        histogram=tuple(np.bincount(places, minlength=len(RATIOS)).tolist()),
    )


def _drift(labels: Sequence[ResolutionLabel], epsilon: float, floor: float) -> float | None:
    changes = [
        max(abs(other - label.losses[-1]) for other in label.paraphrase_losses) / max(label.losses[-1], floor)
        for label in labels
        if label.paraphrase_losses
    ]
    return float(np.mean(np.array(changes) > epsilon)) if changes else None


def is_blind_guess(label: ResolutionLabel, epsilon: float, floor: float) -> bool:
    """Whether the answer costs within ε of L(1) without seeing the image: α* then says nothing about the image."""
    return label.blind_loss - label.losses[-1] <= epsilon * max(label.losses[-1], floor)


@dataclasses.dataclass(frozen=True)
class CompressorMetrics:
    """How a compressor's α do on the labelled images of one task.

    Attributes:
        images: measured.
        mean_alpha: that was predicted.
        mean_optimal: mean α* of the labels.
        tokens_saved, tiles_saved: shares of the visual tokens and of the encoder's tiles at α = 1.
        rank_correlation: Spearman's, between α and α*; None where one of them is constant.
        over_compressed: share of images with Δ(α) > ε.
        chance_lost: see `chance_lost`.
    """

    images: int
    mean_alpha: float
    mean_optimal: float
    tokens_saved: float
    tiles_saved: float
    rank_correlation: float | None
    over_compressed: float
    chance_lost: float


def compressor_metrics(
    labels: Sequence[ResolutionLabel],
    alphas: Float[np.ndarray, "n"],
    epsilon: float,
    floor: float,
    tiling: TilingConfig,
) -> dict[str, CompressorMetrics]:
    """Metrics by task, sorted, and over all of them as `EVERY_TASK`. `alphas` are the predicted ones, by label."""
    predicted = {id(label): alpha for label, alpha in zip(labels, np.asarray(alphas, np.float64), strict=True)}
    return {
        task: _metrics(members, np.array([predicted[id(label)] for label in members]), epsilon, floor, tiling)
        for task, members in by_task(labels).items()
    }


def _metrics(
    labels: Sequence[ResolutionLabel],
    alphas: Float64[np.ndarray, "n"],
    epsilon: float,
    floor: float,
    tiling: TilingConfig,
) -> CompressorMetrics:
    curves = loss_curves(labels)
    increases, best = relative_increase(curves, floor), optimal_ratio(curves, epsilon, floor)
    saved = 1 - _costs(labels, alphas, tiling) / _costs(labels, np.full(len(labels), MAX_ALPHA), tiling)
    return CompressorMetrics(
        images=len(labels),
        mean_alpha=float(alphas.mean()),
        mean_optimal=float(best.mean()),
        tokens_saved=float(saved[0]),
        tiles_saved=float(saved[1]),
        rank_correlation=rank_correlation(alphas, best),
        over_compressed=float((at_alpha(increases, alphas) > epsilon).mean()),
        chance_lost=chance_lost(curves, alphas),
    )


def _costs(
    labels: Sequence[ResolutionLabel], alphas: Float64[np.ndarray, "n"], tiling: TilingConfig
) -> Float64[np.ndarray, "2"]:
    """(visual tokens, tiles) of all images."""
    pairs = zip(labels, alphas, strict=True)
    plans = [plan_image(label.height, label.width, float(alpha), tiling) for label, alpha in pairs]
    return np.array([sum(plan.tokens for plan in plans), sum(plan.tiles for plan in plans)], np.float64)


def rank_correlation(first: Float[np.ndarray, "n"], second: Float[np.ndarray, "n"]) -> float | None:
    """Spearman's rank correlation, equal values sharing their mean rank; None where one side is constant."""
    ranks = [_ranks(values) for values in (first, second)]
    if min(np.ptp(rank) for rank in ranks) == 0:
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: Float[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]
