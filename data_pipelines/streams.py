"""One lane's stream of samples: what it draws next, at what cost, and how its rows are packed.

    LaneState ─due─► source ─shuffle─► record ─sizes, α─► cost ─window─► packed row, next LaneState

Everything follows from the seed, the lane's number and its state; nothing from other lanes.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int16, Int32

from data_pipelines import mixtures
from data_pipelines.config import SPLIT, STOP, DataConfig
from data_pipelines.errors import RecordError
from data_pipelines.lane_state import LaneState, SourceCounters, SourceFailed, Waiting
from data_pipelines.packing import Budget, Sample, pack_row
from data_pipelines.sources import DamagedShard, Source
from data_pipelines.splitting import SplitRecord, split_sample
from data_pipelines.transforms import Failure, fill_row
from hypervl_jax.architecture import TilingConfig
from hypervl_jax.text.tokenizer import Tokenizer
from hypervl_jax.training.batch import Batch
from hypervl_jax.vision.anyres import ALPHA_UNIT

_MIN_ATTEMPTS = 32
"""Samples of a source that a lane tries before it judges the source."""

_MAX_DROPS = 100_000
"""Records in a row that fit no row; after that the lane gives up instead of searching for ever."""


class SourceExhausted(SourceFailed):
    """A source was read as often as `data.epoch_limit` allows; the message says which, when, and what to do."""


@dataclasses.dataclass(frozen=True)
class Period:
    """Steps during which the shares stay the same.

    Attributes:
        start: its first step.
        weights: integers in proportion to the shares of the tokens, by source.
        phases: what is due when each lane enters the period, by lane and source.
    """

    start: int
    weights: tuple[int, ...]
    phases: list[tuple[int, ...]]

    @property
    def word(self) -> int:
        """A positive 31-bit hash of the weights."""
        return _word(self.weights) | 1


def _word(meaning: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(meaning).encode(), digest_size=4).digest(), "little") >> 1


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The sources of a run with their shares: what all lanes have in common. Pickles small: sources as paths.

    Attributes:
        config: of the data.
        sources: by number.
        alphas: α of each record of a source in thousandths; None where it is 1 for all.
        periods: the shares over time, in order.
        lanes: how many there are.
        budget: of a row.
        tiling: of the run.
        tokenizer: of the run.
    """

    config: DataConfig
    sources: tuple[Source, ...]
    alphas: tuple[Int16[np.ndarray, "n"] | None, ...]
    periods: tuple[Period, ...]
    lanes: int
    budget: Budget
    tiling: TilingConfig
    tokenizer: Tokenizer

    def period(self, step: int) -> Period:
        """The period that a step lies in."""
        return self.periods[bisect.bisect_right([period.start for period in self.periods], step) - 1]

    def place(self, lane: int, draw: int) -> int:
        """Where a lane's `draw`-th draw from a source stands in that source's endless stream."""
        return draw * self.lanes + lane

    @functools.cached_property
    def limits(self) -> tuple[float, ...]:
        """Records that may be drawn of each source, over all lanes; infinite without a limit."""
        allowed = zip(self.config.epochs_allowed(), self.sources, strict=True)
        return tuple(epochs * len(source) for epochs, source in allowed)

    def at_limit(self, lane: int, source: int, draw: int) -> bool:
        """Whether a lane's `draw`-th draw would read a source more often than it may be read."""
        return self.place(lane, draw) >= self.limits[source]

    def check_limits(self, lanes: Sequence[int], lane_states: Int32[np.ndarray, "b k"]) -> None:
        """Raises `SourceExhausted` when the given lanes have used up what ends a run.

        With `over_limit` `stop` that is any source that has a share in the next step; with `reweight` it is all of them.
        """
        step = LaneState.step(lane_states)
        active = [source for source, weight in enumerate(self.period(step).weights) if weight]
        used_up = [source for source in active if self._used_up(source, lanes, lane_states)]
        if used_up and self.config.over_limit == STOP:
            drawn = int(LaneState.drawn(lane_states, used_up[0]).sum())
            raise SourceExhausted(
                f"{self.limit_fact(used_up[0], step)}: {drawn:,} records by the rows of this host (data.epoch_limit, data.epoch_limits). "
                f"Bring more of it, lower its share, let it leave earlier by data.changes, raise the limit (with --accept-changes), or "
                f"give its share to the others by --config.data.over_limit=reweight; `python -m tools.plan_data` says beforehand how far each source reaches"
            )
        if used_up == active:
            raise SourceExhausted(
                f"at step {step} every source of the mixture was read as often as data.epoch_limit allows; bring more data, raise the limit, or end the run there"
            )

    def limit_fact(self, source: int, step: int) -> str:
        """That a source was read as often as it may be."""
        times = self.config.epochs_allowed()[source]
        return f"source {self.sources[source].name!r} was read {times:g} times by step {step}, its limit"

    def _used_up(self, source: int, lanes: Sequence[int], lane_states: Int32[np.ndarray, "b k"]) -> bool:
        """Whether lanes have drawn all that they may of a source, and no sample of it still waits for a row."""
        places = LaneState.drawn(lane_states, source).astype(np.int64) * self.lanes + np.array(lanes)
        if (places < self.limits[source]).any():
            return False
        states = (LaneState.from_vector(vector, len(self.sources)) for vector in lane_states)
        return not any(state.waits_for(source) for state in states)

    def sample(self, lane: int, source: int, draw: int) -> Sample:
        """The sample that a lane gets at its `draw`-th draw from a source; a whole record."""
        place, opened, seed = self.place(lane, draw), self.sources[source], self.config.seed
        record = mixtures.drawn_record(place, len(opened), seed, opened.name)
        alpha = mixtures.drawn_alpha(place, self.alpha(source, record), seed, opened.name, self.config.alpha_jitter)
        return self.price(source, draw, record, alpha)

    def price(self, source: int, draw: int, record: int, alpha: int) -> Sample:
        """A whole record as a sample with its cost."""
        return Sample(source, draw, record, alpha, *self.sources[source].cost(record, alpha, self.tiling))

    def alpha(self, source: int, record: int) -> int:
        """α of a record in thousandths, without jitter."""
        alphas = self.alphas[source]
        return ALPHA_UNIT if alphas is None else int(alphas[record])

    def fitting(self, sample: Sample, counters: SourceCounters) -> list[Sample]:
        """What rows can hold of a whole record: itself, its parts, or nothing. What cannot be held is counted."""
        if self.budget.holds(sample):
            return [sample]
        if self.config.oversize != SPLIT:
            counters.oversize += 1
            return []
        try:
            split = self._split(sample)
        except DamagedShard:
            raise
        except RecordError:
            counters.record += 1
            return []
        counters.oversize += split.left_out
        counters.split += bool(split.parts)
        return self._parts(sample, split)

    def waiting(self, lane: int, waiting: Waiting) -> list[Sample]:
        """The sample that waits, and the parts of its record that follow it; empty when none fits a row of this run."""
        whole = self.sample(lane, waiting.source, waiting.draw)
        if not waiting.part:
            return [whole] if self.budget.holds(whole) else []
        return self._parts(whole, self._split(whole))[waiting.part - 1 :]

    def _split(self, sample: Sample) -> SplitRecord:
        return split_sample(sample, self.sources[sample.source], self.tokenizer, self.tiling, self.budget)

    def _parts(self, sample: Sample, split: SplitRecord) -> list[Sample]:
        parts = enumerate(split.parts, start=1)
        return [sample._replace(tokens=part.tokens, tiles=part.tiles, part=number) for number, part in parts]

    def check_word(self, lane: int) -> int:
        """A 31-bit hash of all that gives a lane's state its meaning: sources, their sizes, seed, number of lanes, lane."""
        sources = [(source.name, len(source)) for source in self.sources]
        return _word((sources, self.config.seed, self.lanes, lane))

    def check_failures(self, counters: Sequence[SourceCounters], failures: Sequence[Failure]) -> None:
        """Raises `SourceFailed` if a source that has just failed passed `failure_limit`."""
        for failure in failures:
            counter = counters[failure.source]
            attempts = counter.used + counter.failed
            if attempts >= _MIN_ATTEMPTS and counter.failed > self.config.failure_limit * attempts:
                raise SourceFailed(
                    f"source {self.sources[failure.source].name!r}: {counter.failed} of {attempts} samples could not be used "
                    f"({counter.image} images, {counter.record} records), more than data.failure_limit {self.config.failure_limit}; "
                    f"the last one: {failure.message}. Repair or leave out the source, or raise the limit"
                )


class Lane:
    """One lane: plans its rows and keeps its own books."""

    def __init__(self, mixture: Mixture, lane: int, vector: Int32[np.ndarray, "k"]) -> None:
        self._mixture, self._lane = mixture, lane
        self._state = LaneState.from_vector(vector, len(mixture.sources))
        self._check = mixture.check_word(lane)
        self._weights = list(mixture.period(self._state.rows).weights)
        self._pending = list(self._restored())
        unfinished = self._state.unfinished
        self._parts = mixture.waiting(lane, unfinished) if unfinished else []

    def plan(self) -> list[Sample]:
        """The samples of the next row, none when the lane may draw no more; the state moves behind it.

        Raises:
            SourceFailed: too many records in a row fit no row.
        """
        self._enter(self._mixture.period(self._state.rows))
        row = pack_row(self._pending, self._draw, self._mixture.budget, self._mixture.config.window)
        self._state.rows += 1
        return row

    def fill_next(self, row: Batch) -> None:
        """Plans the next row and writes it into `row`, a row of `unfilled_batch`.

        Raises:
            SourceFailed: too many samples of a source could not be used; or as `plan`.
        """
        samples = self.plan()
        failures = fill_row(row, samples, self._mixture.sources, self._mixture.tokenizer, self._mixture.tiling)
        count_row(self._state.counters, samples, failures)
        self._mixture.check_failures(self._state.counters, failures)

    def vector(self) -> Int32[np.ndarray, "k"]:
        """The state after the rows made so far."""
        self._state.pending = [_waiting(sample) for sample in self._pending]
        self._state.unfinished = _waiting(self._parts[0]) if self._parts else None
        return self._state.to_vector(self._check, self._mixture.config.window)

    def _restored(self) -> Iterator[Sample]:
        """The samples in the window of the state; a run resumed with shorter rows may find some that fit no more."""
        for waiting in self._state.pending:
            samples = self._mixture.waiting(self._lane, waiting)
            if samples:
                yield samples[0]
            else:
                self._state.counters[waiting.source].oversize += 1

    def _enter(self, period: Period) -> None:
        """With new weights the lane begins anew what is due; its places in the sources stay."""
        if self._state.weights_word != period.word:
            self._state.weights_word, self._state.due = period.word, list(period.phases[self._lane])
            self._weights = list(period.weights)

    def _draw(self) -> Sample | None:
        """The next sample that fits a row of its own, None when no source may be read any more; others are dropped and counted."""
        for _ in range(_MAX_DROPS):
            if self._parts:
                return self._parts.pop(0)
            source = self._next_source()
            if source is None:
                return None
            counter = self._state.counters[source]
            whole = self._mixture.sample(self._lane, source, counter.drawn)
            counter.drawn += 1
            self._parts = self._mixture.fitting(whole, counter)
            tokens = sum(sample.tokens for sample in self._parts)
            self._state.due[source] += mixtures.stride(tokens, self._weights[source])
        budget, name = self._mixture.budget, self._mixture.sources[source].name
        raise SourceFailed(
            f"{_MAX_DROPS} records in a row, the last of source {name!r}, did not fit {budget.tokens} tokens and {budget.tiles} tiles; "
            f"raise batch.length or batch.tiles"
        )

    def _next_source(self) -> int | None:
        """The source whose turn it is and that this lane may still read.

        One that it may not gives its share to the others, in this lane; `Mixture.check_limits` says whether the run ends for it.
        """
        while any(self._weights):
            source = mixtures.next_source(self._weights, self._state.due)
            if not self._mixture.at_limit(self._lane, source, self._state.counters[source].drawn):
                return source
            if self._lane == 0:
                fact = self._mixture.limit_fact(source, self._state.rows)
                logging.getLogger(__name__).warning("%s, in lane 0; the other sources get its share there", fact)
            self._weights[source] = 0
        return None


def _waiting(sample: Sample) -> Waiting:
    return Waiting(sample.source, sample.draw, sample.part)


def count_row(counters: Sequence[SourceCounters], samples: Sequence[Sample], failures: Sequence[Failure]) -> None:
    """Books one row: every sample was used unless it failed."""
    for sample in samples:
        counters[sample.source].used += 1
    for failure in failures:
        counter, name = counters[failure.source], failure.reason.name.lower()
        counter.used -= 1
        setattr(counter, name, getattr(counter, name) + 1)


def make_periods(config: DataConfig, lengths: Sequence[Sequence[int]], lanes: int) -> tuple[Period, ...]:
    """The shares over time as integer weights, and when each source's first turn in each lane is due.

    Args:
        config: of the data.
        lengths: in tokens, of samples of each source.
        lanes: how many.
    """
    names, periods = [source.name for source in config.mixture], []
    for start, shares in config.shares_by_step().items():
        weights = mixtures.integer_weights(shares)
        described = zip(weights, lengths, names, strict=True)
        due = [
            mixtures.lane_phases(weight, known, lanes, config.seed, name) if weight else [0] * lanes
            for weight, known, name in described
        ]
        periods.append(Period(start, weights, list(zip(*due, strict=True))))
    return tuple(periods)
