"""How far the outputs of the two encoders lie apart, for each item and each task, and when that is a failure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hypervl_jax.architecture import BRANCHES
from hypervl_jax.evaluation.failure_signs import branch_imbalance
from hypervl_jax.evaluation.metrics import normalise
from hypervl_jax.evaluation.statistics import Estimate, bootstrap_interval, mean_interval, wilson_interval


@dataclasses.dataclass(frozen=True)
class ItemComparison:
    """One item through both encoders.

    Attributes:
        identity, task: of the item.
        answer_tokens: of the right answer, which the values below up to `hidden_distance` are means over.
        kl, reverse_kl: KL(large ‖ base) and KL(base ‖ large) of the output distributions at T = 1, nats.
        agreement: share of tokens that both find likeliest.
        cross_entropy: of the right answer by branch, nats.
        hidden_distance: 1 - cosine of the last hidden states.
        visual_distance: 1 - cosine of the visual tokens, mean over the image's; NaN without an image.
        answers: what each branch answered by itself.
    """

    identity: str
    task: str
    answer_tokens: int
    kl: float
    reverse_kl: float
    agreement: float
    cross_entropy: Mapping[str, float]
    hidden_distance: float
    visual_distance: float
    answers: Mapping[str, str]

    @property
    def same_answer(self) -> bool:
        """Whether both say the same, case and punctuation aside."""
        base, large = (normalise(self.answers[branch]) for branch in BRANCHES)
        return base == large


@dataclasses.dataclass(frozen=True)
class TaskComparison:
    """Means over a task's items with 95 % intervals; `left_out` items could not be read or fitted no row."""

    task: str
    items: tuple[ItemComparison, ...]
    left_out: int
    kl: Estimate
    reverse_kl: Estimate
    agreement: Estimate
    cross_entropy: Mapping[str, Estimate]
    hidden_distance: Estimate
    visual_distance: Estimate | None
    same_answer: Estimate

    def to_json(self) -> dict[str, Any]:
        """Plain values, the items counted instead of listed."""
        estimates = {
            field.name: value._asdict()
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Estimate)
        }
        losses = {branch: value._asdict() for branch, value in self.cross_entropy.items()}
        counts = {"items": len(self.items), "left_out": self.left_out}
        tokens = sum(item.answer_tokens for item in self.items)
        return {"task": self.task, **counts, "answer_tokens": tokens, "cross_entropy": losses, **estimates}


def compare_task(task: str, items: Sequence[ItemComparison], left_out: int = 0) -> TaskComparison:
    """The means of a task. Raises `ValueError` without items."""
    means = lambda name: bootstrap_interval(np.array([getattr(item, name) for item in items]))
    visual = np.array([item.visual_distance for item in items if not math.isnan(item.visual_distance)])
    return TaskComparison(
        task=task,
        items=tuple(items),
        left_out=left_out,
        kl=means("kl"),
        reverse_kl=means("reverse_kl"),
        agreement=mean_interval([item.agreement for item in items]),
        cross_entropy={
            branch: bootstrap_interval(np.array([item.cross_entropy[branch] for item in items])) for branch in BRANCHES
        },
        hidden_distance=means("hidden_distance"),
        visual_distance=bootstrap_interval(visual) if len(visual) else None,
        same_answer=wilson_interval(sum(item.same_answer for item in items), len(items)),
    )


def worst(row: TaskComparison, count: int) -> list[ItemComparison]:
    """The items whose output distributions lie farthest apart."""
    return sorted(row.items, key=lambda item: (-item.kl, item.identity))[:count]


def imbalance_warnings(rows: Sequence[TaskComparison], least_agreement: float) -> list[str]:
    """The failure sign of the two branches, with the measured values: tasks whose share of same answers lies wholly, with its
    interval, below `least_agreement`.
    """
    found = []
    for row in rows:
        losses = ", ".join(f"{branch} {row.cross_entropy[branch].mean:.3f}" for branch in BRANCHES)
        measured = f" (KL {row.kl.mean:.3f} nats, loss {losses})"
        found += branch_imbalance(row.task, row.same_answer, len(row.items), least_agreement, measured)
    return found
