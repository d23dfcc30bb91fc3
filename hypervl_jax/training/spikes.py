"""When a loss spike calls for going back: the rule, as a pure function of the steps' losses."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

LossLine = tuple[int, float]
"""(step, loss) of one update."""


def find_spike(history: Sequence[LossLine], window: int, factor: float, examine_from: int) -> int | None:
    """The first step, from `examine_from` on, whose loss exceeds `factor` times the median of the `window` before it.

    A step is only judged once it has `window` predecessors. Losses must be positive for the factor to mean anything,
    which cross-entropy and KL are. NaN losses are left to the non-finite rule.
    """
    for index in range(window, len(history)):
        step, loss = history[index]
        before = statistics.median(value for _, value in history[index - window : index])
        if step >= examine_from and loss > factor * before:
            return step
    return None


def first_spike(
    histories: Mapping[int, Sequence[LossLine]], window: int, factor: float, examine_from: int
) -> int | None:
    """The first step that `find_spike` finds in the history of any arm.

    Each arm is judged by its own steps: the loss of a base step holds a KL term and is another quantity than that of a large one.
    """
    found = (find_spike(history, window, factor, examine_from) for history in histories.values())
    return min((step for step in found if step is not None), default=None)
