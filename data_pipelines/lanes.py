"""Lanes: batches that do not care how many hosts, worker processes or prefetched batches there are.

Row i of every global batch comes from lane i. A lane is an independent stream: its turns among the sources, its places in the
sources' shuffled orders and its packing window follow from the seed and a small vector of counters, and from nothing else. So
the rows are the same however lanes are split, and the vectors, stacked by lane, resume the run on any number of hosts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import logging
import os
import pathlib
from collections.abc import Generator, Iterator, Sequence

import numpy as np
from jaxtyping import Int32

from data_pipelines.bulk_tokenizer import bulk_tokenizer
from data_pipelines.config import SPLIT, DataConfig
from data_pipelines.lane_state import LaneState, SourceCounters
from data_pipelines.packing import Budget, Sample, pack_row
from data_pipelines.records import MANIFEST
from data_pipelines.sources import Source, read_alphas, sampled_lengths
from data_pipelines.staged import is_remote, local_source
from data_pipelines.streams import Lane, Mixture, count_row, make_periods
from data_pipelines.transforms import fill_row
from hypervl_jax.architecture import TilingConfig, require
from hypervl_jax.text.tokenizer import Tokenizer, load_tokenizer
from hypervl_jax.training.batch import Batch, BatchShape, LoadedBatch, unfilled_batch


class MissingData(FileNotFoundError):
    """Sources of the mixture that are not on disk; the message lists them and says how to get them."""


class LaneRows(Iterator[LoadedBatch]):
    """The next rows of some lanes, one of each per step, made in this process. Picklable."""

    def __init__(self, mixture: Mixture, lanes: Sequence[int], lane_states: Int32[np.ndarray, "b k"]) -> None:
        self._mixture, self._lanes = mixture, tuple(lanes)
        self._shape = BatchShape(len(self._lanes), mixture.budget.tokens, mixture.budget.tiles)
        self.set_states(lane_states)

    def states(self) -> Int32[np.ndarray, "b k"]:
        """States after the rows made so far."""
        return np.stack([stream.vector() for stream in self._streams]) if self._streams else self._first

    def set_states(self, lane_states: Int32[np.ndarray, "b k"]) -> None:
        """Goes on from the given states. Windows are restored where the rows are made, each worker its own."""
        self._first, self._streams = np.array(lane_states, np.int32), []

    def copy(self) -> LaneRows:
        """An independent iterator that stands at the same place."""
        return LaneRows(self._mixture, self._lanes, self.states())

    def __next__(self) -> LoadedBatch:
        if not self._streams:
            pairs = zip(self._lanes, self._first, strict=True)
            self._streams = [Lane(self._mixture, lane, vector) for lane, vector in pairs]
        batch = unfilled_batch(self._shape, self._mixture.tiling.tile_size)
        for row, stream in enumerate(self._streams):
            stream.fill_next(_row(batch, row))
        return LoadedBatch(batch, self.states())


def _row(batch: Batch, row: int) -> Batch:
    return Batch(*(field[row] for field in batch))


class LaneLoader:
    """The `BatchLoader` of this project: packed batches of a mixture.

    Args:
        config: which data, and how it is read.
        shape: of the GLOBAL batch; its rows are the number of lanes.
        tiling: of the model.
        tokenizer: of the model; picklable, since workers get a copy.
        lanes: the rows that this host feeds; all of them when None.

    Raises:
        MissingData: a source is not on disk.
        RecordError: a source cannot be used with this tokenizer or row, or is damaged.
        ConfigError: shape and tiling do not fit, or `lanes` are not distinct rows of the batch.
    """

    def __init__(
        self,
        config: DataConfig,
        shape: BatchShape,
        tiling: TilingConfig,
        tokenizer: Tokenizer,
        lanes: Sequence[int] | None = None,
    ) -> None:
        shape.validate_with(tiling)
        self.lanes = _own_lanes(lanes, shape)
        self.mixture = _open_mixture(config, shape, tiling, tokenizer)
        self.state_size = LaneState.size(len(config.mixture), config.window)
        self._shape = dataclasses.replace(shape, rows=len(self.lanes))

    def initial_states(self) -> Int32[np.ndarray, "b k"]:
        """State of this host's lanes before the first batch."""
        state, window = LaneState.first(len(self.mixture.sources)), self.mixture.config.window
        return np.stack([state.to_vector(self.mixture.check_word(lane), window) for lane in self.lanes])

    def iterate(self, lane_states: Int32[np.ndarray, "b k"]) -> Generator[LoadedBatch, None, None]:
        """Batches of this host's lanes, endless; close the iterator to stop its worker processes.

        Raises:
            ConfigError: the states are not of these lanes, this mixture and this seed.
            SourceFailed: while iterating, when a source passes `failure_limit`.
            SourceExhausted: while iterating, after the batch with which this host's lanes have used up a source that ends the run.
            WorkerDied: while iterating, when a worker process was killed.
        """
        lane_states = np.asarray(lane_states, np.int32)
        self._check_states(lane_states)
        workers = min(self.mixture.config.workers, len(self.lanes))
        if not workers:
            return self._within_limits(LaneRows(self.mixture, self.lanes, lane_states), lane_states)
        parts = [LaneRows(self.mixture, self.lanes[w::workers], lane_states[w::workers]) for w in range(workers)]
        from data_pipelines.workers import close_at_exit  # imports grain, which imports jax where it can

        return close_at_exit(self._merged(parts, lane_states))

    def report(self, lane_states: Int32[np.ndarray, "b k"]) -> dict[str, SourceCounters]:
        """What became of the samples of each source, summed over the given lanes."""
        sources = self.mixture.sources
        lanes = [LaneState.from_vector(vector, len(sources)).counters for vector in np.asarray(lane_states)]
        sums = [np.sum([dataclasses.astuple(lane[s]) for lane in lanes], axis=0).tolist() for s in range(len(sources))]
        return {source.name: SourceCounters(*values) for source, values in zip(sources, sums, strict=True)}

    def _within_limits(
        self, batches: Iterator[LoadedBatch], lane_states: Int32[np.ndarray, "b k"]
    ) -> Generator[LoadedBatch, None, None]:
        """The batches, as long as there is something to read for the lanes of this host together."""
        self.mixture.check_limits(self.lanes, lane_states)
        for loaded in batches:
            yield loaded
            self.mixture.check_limits(self.lanes, loaded.lane_states)

    def _merged(
        self, parts: list[LaneRows], lane_states: Int32[np.ndarray, "b k"]
    ) -> Generator[LoadedBatch, None, None]:
        """Batches put together from the workers' rows; worker w has every lane from w on in steps of their number."""
        from data_pipelines.workers import worker_steps

        with contextlib.closing(worker_steps(parts, self.mixture.config.prefetch)) as steps:
            yield from self._within_limits(map(self._assembled, steps), lane_states)

    def _assembled(self, parts: Sequence[LoadedBatch]) -> LoadedBatch:
        """A copy of the workers' rows in the order of the lanes."""
        batch = unfilled_batch(self._shape, self.mixture.tiling.tile_size)
        states = np.empty((len(self.lanes), self.state_size), np.int32)
        for worker, part in enumerate(parts):
            own = slice(worker, None, len(parts))
            states[own] = part.lane_states
            for whole, rows in zip(batch, part.batch, strict=True):
                whole[own] = rows
        return LoadedBatch(batch, states)

    def _check_states(self, lane_states: Int32[np.ndarray, "b k"]) -> None:
        expected, words = (len(self.lanes), self.state_size), [self.mixture.check_word(lane) for lane in self.lanes]
        require(
            lane_states.shape == expected and lane_states[:, 0].tolist() == words,
            f"lane states {lane_states.shape} were not saved by these lanes of this mixture: expected {expected}, in the order of the lanes, with the "
            f"same sources, seed, window and number of rows. Resume with the data settings of the saved run, or start the data anew from initial_states()",
        )


def open_loader(
    config: DataConfig,
    shape: BatchShape,
    tiling: TilingConfig,
    tokenizer: str | os.PathLike[str],
    lanes: Sequence[int] | None = None,
) -> LaneLoader:
    """`LaneLoader` with the tokenizer in a file or directory."""
    return LaneLoader(config, shape, tiling, load_tokenizer(pathlib.Path(tokenizer)), lanes)


def heldout_batches(
    config: DataConfig,
    shape: BatchShape,
    tiling: TilingConfig,
    tokenizer: Tokenizer,
    lanes: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Each record of the mixture's sources once, in order up to the packing window; finite; the last batch ends in empty rows.

    α is 1 or that of the side table, never random; shares are not used. Every host gets the same number of batches.

    Args:
        config: `split` names the held-out split.
        shape: of the global batch.
        tiling: of the model.
        tokenizer: of the model.
        lanes: rows of each batch to return; all of them when None.

    Raises:
        MissingData, RecordError, ConfigError: as `LaneLoader`.
        SourceFailed: too many samples of a source cannot be used.
    """
    shape.validate_with(tiling)
    own = _own_lanes(lanes, shape)
    mixture = _open_mixture(config, shape, tiling, tokenizer)
    return _heldout_rows(mixture, shape, own)


def _heldout_rows(mixture: Mixture, shape: BatchShape, own: tuple[int, ...]) -> Iterator[Batch]:
    counters = [SourceCounters() for _ in mixture.sources]
    samples, pending = _all_samples(mixture, counters), []
    plans = iter(lambda: pack_row(pending, lambda: next(samples, None), mixture.budget, mixture.config.window), [])
    while rows := list(itertools.islice(plans, shape.rows)):
        batch = unfilled_batch(dataclasses.replace(shape, rows=len(own)), mixture.tiling.tile_size)
        for row, lane in enumerate(own):
            planned = rows[lane] if lane < len(rows) else []
            failures = fill_row(_row(batch, row), planned, mixture.sources, mixture.tokenizer, mixture.tiling)
            count_row(counters, planned, failures)
            mixture.check_failures(counters, failures)
        yield batch
    _warn_left_out(mixture, counters)


def _all_samples(mixture: Mixture, counters: Sequence[SourceCounters]) -> Iterator[Sample]:
    """Every record of every source in order, split where need be; those that fit no row are counted."""
    for number, source in enumerate(mixture.sources):
        for record in range(len(source)):
            counters[number].drawn += 1
            whole = mixture.price(number, record, record, mixture.alpha(number, record))
            yield from mixture.fitting(whole, counters[number])


def _warn_left_out(mixture: Mixture, counters: Sequence[SourceCounters]) -> None:
    for source, counter in zip(mixture.sources, counters, strict=True):
        if counter.oversize or counter.failed:
            logging.getLogger(__name__).warning("held-out source %s is not complete: %s", source.name, counter)


def source_directories(config: DataConfig) -> dict[str, pathlib.Path]:
    """Where each source of the mixture lies, by name, in the mixture's order; of a remote one, the local copy (`staged`).

    Raises:
        RecordError: a remote store cannot be reached, or has other files than a manifest says.
    """
    return {name: local_source(config.root, config.split, name) for name in source_names(config)}


def source_names(config: DataConfig) -> tuple[str, ...]:
    """Names of the sources by number: `Batch.sources` holds positions in this."""
    return tuple(source.name for source in config.mixture)


def manifest_hashes(config: DataConfig) -> dict[str, str]:
    """SHA-256 of each source's manifest, which itself holds the checksum of every file: what a release card says of its data.

    Raises:
        MissingData: a source is not on disk.
    """
    directories = source_directories(config)
    _require_present(config, directories)
    return {name: hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest() for name, path in directories.items()}


def _require_present(config: DataConfig, directories: dict[str, pathlib.Path]) -> None:
    place = f"{config.root}/{config.split}" if is_remote(config.root) else f"{pathlib.Path(config.root) / config.split}"
    missing = [
        f"  {name}: {place}/{name}/{MANIFEST}" for name, path in directories.items() if not (path / MANIFEST).is_file()
    ]
    if missing:
        listed = "\n".join(missing)
        raise MissingData(
            f"{len(missing)} of {len(directories)} sources of the mixture are missing; looked for\n{listed}\n"
            f"The embedded data is made by `python -m data_pipelines.rendered --output {config.root}`; docs/data.md explains how to bring real data."
        )


def _own_lanes(lanes: Sequence[int] | None, shape: BatchShape) -> tuple[int, ...]:
    own = tuple(range(shape.rows)) if lanes is None else tuple(int(lane) for lane in lanes)
    valid = len(set(own)) == len(own) > 0 and set(own) <= set(range(shape.rows))
    require(valid, f"lanes {own} must be distinct rows of the global batch, 0 to {shape.rows - 1}")
    return own


def _open_mixture(config: DataConfig, shape: BatchShape, tiling: TilingConfig, tokenizer: Tokenizer) -> Mixture:
    directories = source_directories(config)
    _require_present(config, directories)
    sources = tuple(Source(path, tokenizer.fingerprint) for path in directories.values())
    table = read_alphas(config.alphas) if config.alphas else None
    budget, splits = Budget(shape.length, shape.tiles), config.oversize == SPLIT
    lengths = [sampled_lengths(source, budget, tiling, splits) for source in sources]
    return Mixture(
        config=config,
        sources=sources,
        alphas=tuple(None if table is None else source.alphas(table) for source in sources),
        periods=make_periods(config, lengths, shape.rows),
        lanes=shape.rows,
        budget=budget,
        tiling=tiling,
        tokenizer=bulk_tokenizer(tokenizer),
    )
