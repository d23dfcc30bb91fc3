"""All that a lane remembers, as a fixed-size vector of int32: what a checkpoint keeps of the data."""

from __future__ import annotations

import dataclasses
import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from data_pipelines.config import MAX_SOURCES

_HEADER = 5
"""Words before the counters: check word, rows made, weights in force, samples in the window, record half handed out."""

_DUE_WORDS = 2
_DUE_BASE = 2**31

MAX_PARTS = 31
"""Parts that a record too long for a row is split into at most."""

_PART_UNIT = MAX_SOURCES
_LAG_UNIT = _PART_UNIT * (MAX_PARTS + 1)
MAX_LAG = 2**31 // _LAG_UNIT - 1
"""How many samples of its source a lane may draw while one of them waits."""


class SourceFailed(RuntimeError):
    """A source of which too many samples are unusable; the message says which and why."""


@dataclasses.dataclass
class SourceCounters:
    """What became of the records drawn from one source. Samples still in a window are drawn and nothing else yet.

    Attributes:
        drawn: records drawn.
        used: samples laid out in a row: records, or parts of split ones.
        oversize: records, or stretches of split ones, dropped since no row could hold them.
        split: records that were split.
        image: samples left out, since an image could not be decoded.
        record: samples left out, since the record was damaged or not as its index says.
    """

    drawn: int = 0
    used: int = 0
    oversize: int = 0
    split: int = 0
    image: int = 0
    record: int = 0

    @property
    def failed(self) -> int:
        """Samples left out for any reason but their size."""
        return self.image + self.record

    @property
    def dropped_share(self) -> float:
        """Samples left out for any reason, as a share of those whose fate is known."""
        left_out = self.oversize + self.failed
        return left_out / (left_out + self.used) if left_out else 0.0


_COUNTERS = len(dataclasses.fields(SourceCounters))


class Waiting(NamedTuple):
    """A sample that was drawn and is not yet in a row. `part` counts the parts of a split record from 1; 0 is a whole record."""

    source: int
    draw: int
    part: int

    def to_word(self, drawn: int) -> int:
        """As a positive int32, given how many samples of its source the lane has drawn.

        Raises `SourceFailed` if they are more than `MAX_LAG` further.
        """
        lag = drawn - self.draw
        if lag > MAX_LAG:
            raise SourceFailed(
                f"a sample of source number {self.source} waits while {lag} more were drawn, since almost none fits a row; leave the source out or "
                f"raise batch.length or batch.tiles"
            )
        return self.source + self.part * _PART_UNIT + lag * _LAG_UNIT

    @staticmethod
    def from_word(word: int, counters: list[SourceCounters]) -> Waiting:
        """The inverse of `to_word`."""
        lag, rest = divmod(word, _LAG_UNIT)
        part, source = divmod(rest, _PART_UNIT)
        return Waiting(source, counters[source].drawn - lag, part)


@dataclasses.dataclass
class LaneState:
    """The state of one lane.

    Attributes:
        rows: made so far; the number of the next step.
        weights_word: hash of the weights that `due` belongs to; 0 before the first row.
        counters: by source.
        due: by source, when its next turn is (`mixtures.stride`).
        pending: samples in the window, oldest first.
        unfinished: the next part of a split record to be handed out; None between records.
    """

    rows: int
    weights_word: int
    counters: list[SourceCounters]
    due: list[int]
    pending: list[Waiting]
    unfinished: Waiting | None

    @staticmethod
    def first(sources: int) -> LaneState:
        """Before the first row."""
        return LaneState(0, 0, [SourceCounters() for _ in range(sources)], [0] * sources, [], None)

    @staticmethod
    def size(sources: int, window: int) -> int:
        """Length of the vector."""
        return _HEADER + (_COUNTERS + _DUE_WORDS) * sources + window

    @staticmethod
    def step(vectors: Int32[np.ndarray, "b k"]) -> int:
        """The next step of lanes, which all have made as many rows."""
        return int(vectors[0, 1])

    @staticmethod
    def drawn(vectors: Int32[np.ndarray, "b k"], source: int) -> Int32[np.ndarray, "b"]:
        """Records that each lane has drawn from a source."""
        return vectors[:, _HEADER + _COUNTERS * source]

    def waits_for(self, source: int) -> bool:
        """Whether a sample of a source was drawn and is not yet in a row."""
        waiting = [*self.pending, *([self.unfinished] if self.unfinished else [])]
        return any(sample.source == source for sample in waiting)

    def to_vector(self, check: int, window: int) -> Int32[np.ndarray, "k"]:
        """The state as integers; unused places of the window are 0."""
        word = lambda waiting: waiting.to_word(self.counters[waiting.source].drawn)
        header = (
            check,
            self.rows,
            self.weights_word,
            len(self.pending),
            word(self.unfinished) if self.unfinished else 0,
        )
        counters = itertools.chain.from_iterable(map(dataclasses.astuple, self.counters))
        due = itertools.chain.from_iterable(divmod(time, _DUE_BASE) for time in self.due)
        padding = [0] * (window - len(self.pending))
        return np.array([*header, *counters, *due, *map(word, self.pending), *padding], np.int32)

    @staticmethod
    def from_vector(vector: Int32[np.ndarray, "k"], sources: int) -> LaneState:
        """What `to_vector` wrote."""
        _, rows, weights_word, pending, unfinished, *words = vector.tolist()
        counters = [SourceCounters(*words[s * _COUNTERS : (s + 1) * _COUNTERS]) for s in range(sources)]
        words = words[sources * _COUNTERS :]
        due = [words[2 * s] * _DUE_BASE + words[2 * s + 1] for s in range(sources)]
        window = words[sources * _DUE_WORDS :][:pending]
        return LaneState(
            rows,
            weights_word,
            counters,
            due,
            [Waiting.from_word(word, counters) for word in window],
            Waiting.from_word(unfinished, counters) if unfinished else None,
        )
