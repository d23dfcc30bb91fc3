"""Packing samples into rows under a token AND a tile budget, from sizes alone: no pixel is decoded to decide.

Each row is the best that its window allows: the oldest sample, and of all ways to fill what it leaves the one with the most tokens.
Best fit (the online form of Best-Fit-Decreasing packing, arXiv 2404.10830), sample by sample, stands in only while the window is too
small to choose from, as for very short samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple


class Sample(NamedTuple):
    """One draw of a lane, with its cost.

    Attributes:
        source: position of its source in the mixture.
        draw: how many samples this lane had drawn from that source before.
        record: which record of the source it is.
        alpha: share of each image's area that is kept, in thousandths.
        tokens: LLM positions, visual tokens included.
        tiles: tiles of all its images.
        part: 0 for the whole record, else which part of a record that was split, from 1.
    """

    source: int
    draw: int
    record: int
    alpha: int
    tokens: int
    tiles: int
    part: int = 0


@dataclasses.dataclass(frozen=True)
class Budget:
    """What one row holds: `tokens` positions and `tiles` tile slots."""

    tokens: int
    tiles: int

    def fits(self, tokens: int, tiles: int) -> bool:
        """Whether one sample of these sizes fits. A sample of no token has nothing to teach and fits none."""
        return 0 < tokens <= self.tokens and tiles <= self.tiles

    def holds(self, sample: Sample) -> bool:
        """Whether the sample fits a row of its own."""
        return self.fits(sample.tokens, sample.tiles)


def pack_row(pending: list[Sample], draw: Callable[[], Sample | None], budget: Budget, window: int) -> list[Sample]:
    """The samples of the next row.

    The oldest pending sample always enters, so none waits for more than `window` rows. As long as the window holds less than twice
    what is free, the largest sample that fits follows and the window is refilled; then the rest of the row is chosen at once.

    Args:
        pending: the window, oldest first; changed in place, and what is left waits for the next row.
        draw: gives the next sample, or None when there is no more. Each must fit a row of its own.
        budget: of a row.
        window: samples in the window at most.

    Returns:
        The samples in the order of the row; empty when nothing is left.
    """
    _refill(pending, draw, window)
    row, free = pending[:1], budget
    del pending[:1]
    while row:
        free = Budget(free.tokens - row[-1].tokens, free.tiles - row[-1].tiles)
        _refill(pending, draw, window)
        if len(pending) < window or sum(sample.tokens for sample in pending) >= 2 * free.tokens:
            break
        chosen = _best_fit(pending, free, budget)
        if chosen is None:
            return row
        row.append(pending.pop(chosen))
    rest = _fullest(pending, free)
    row += [pending[place] for place in rest]
    for place in reversed(rest):
        del pending[place]
    return row


def _refill(pending: list[Sample], draw: Callable[[], Sample | None], window: int) -> None:
    while len(pending) < window and (sample := draw()) is not None:
        pending.append(sample)


def _best_fit(pending: list[Sample], free: Budget, budget: Budget) -> int | None:
    """Position of the largest sample that fits what is free; the oldest of equals; None when none fits."""
    best, best_size = None, -1
    for position, sample in enumerate(pending):
        if sample.tokens > free.tokens or sample.tiles > free.tiles:
            continue
        # tokens/budget.tokens against tiles/budget.tiles, multiplied out: exact, so equal on every machine
        size = max(sample.tokens * budget.tiles, sample.tiles * budget.tokens) or sample.tokens
        if size > best_size:
            best, best_size = position, size
    return best


def _fullest(pending: list[Sample], free: Budget) -> list[int]:
    """Positions of the samples that together leave the fewest tokens free, then the fewest tiles; of equals the oldest ones.

    Bellman's recursion for subset sums, over tokens and tiles: bit n of `reachable[t]` says whether samples of n tokens and t tiles in
    all can be chosen. All sums of a tile count are one integer, so that a sample is added by a shift. It ends with the first sample that
    lets the row be full.
    """
    full, every = 1 << free.tokens, (1 << (free.tokens + 1)) - 1
    reachable = [1] + [0] * free.tiles
    history = [reachable]
    for sample in pending:
        if max(reachable) >= full:
            break
        if sample.tiles <= free.tiles:
            skipped = len(reachable) - sample.tiles
            moved = [0] * sample.tiles + [sums << sample.tokens & every for sums in reachable[:skipped]]
            reachable = [old | new for old, new in zip(reachable, moved, strict=True)]
        history.append(reachable)
    tokens, tiles = max((sums.bit_length() - 1, count) for count, sums in enumerate(reachable))
    chosen = []
    for place in range(len(history) - 2, -1, -1):
        if not history[place][tiles] >> tokens & 1:
            chosen.append(place)
            tokens, tiles = tokens - pending[place].tokens, tiles - pending[place].tiles
    return chosen[::-1]
