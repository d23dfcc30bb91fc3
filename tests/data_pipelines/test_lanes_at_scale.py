"""Lanes by the thousand, on shards that no number of lanes divides, split over hosts that come and go."""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import time
from collections.abc import Callable

import numpy as np
import pytest
from array_record.python import array_record_module
from corpora import assert_batches_equal, config, sample, tokenizer, write

from data_pipelines.lane_state import LaneState, Waiting
from data_pipelines.lanes import LaneLoader
from data_pipelines.manifest import MANIFEST, file_checksum
from data_pipelines.named_mixtures import MIXTURES
from data_pipelines.records import Record
from data_pipelines.sources import Source
from data_pipelines.streams import Lane
from experiments.configs import stage1, stage2, stage3
from hypervl_jax.architecture import TilingConfig
from hypervl_jax.training.batch import Batch, BatchShape, LoadedBatch

SHARES = {"prime": 3.0, "uneven": 2.0, "tiny": 0.1}
LENGTH, TILES = 40, 1
TILING = TilingConfig(tile_size=16, patch_size=8, shuffle=2, max_tiles=1)
LANES = (256, 1024)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Text: 131 records in shards of 7, 40 in shards of 16 with an empty shard between, and 3 records."""
    root = tmp_path_factory.mktemp("scale")
    write(root, "prime", texts(131, 0), per_shard=7)
    write(root, "uneven", texts(40, 500), per_shard=16)
    write(root, "tiny", texts(3, 900))
    insert_empty_shard(root / "train" / "uneven", after=1)
    return root


def texts(count: int, first: int) -> list[Record]:
    """Short conversations, each of another length."""
    return [sample(first + number, [], 1 + number % 9) for number in range(count)]


def insert_empty_shard(directory: pathlib.Path, after: int) -> None:
    """What an ingest worker that got no record leaves: a shard of 0 records with its place in the manifest."""
    path = directory / "shard-00099-of-00100.array_record"
    array_record_module.ArrayRecordWriter(str(path), "group_size:1").close()
    manifest = json.loads((directory / MANIFEST).read_text())
    empty = {"file": path.name, "records": 0, "bytes": path.stat().st_size, "checksum": file_checksum(path)}
    manifest["shards"].insert(after, manifest["shards"][0] | empty)
    (directory / MANIFEST).write_text(json.dumps(manifest))


def loader(root: pathlib.Path, rows: int, lanes: list[int] | None = None, **changes: object) -> LaneLoader:
    shape = BatchShape(rows, LENGTH, TILES)
    return LaneLoader(config(root, SHARES, **changes), shape, TILING, tokenizer(), lanes)


def hosts_of(rows: int, hosts: int) -> list[list[int]]:
    """Lanes of each host: blocks, as a mesh lays rows out."""
    return np.arange(rows).reshape(hosts, -1).tolist()


def batches(source: LaneLoader, states: np.ndarray, steps: int) -> list[LoadedBatch]:
    with contextlib.closing(source.iterate(states)) as stream:
        return list(itertools.islice(stream, steps))


def on_hosts(root: pathlib.Path, rows: int, hosts: int, states: np.ndarray | None, steps: int) -> list[LoadedBatch]:
    """Global batches put together from what each host loads."""
    parts = []
    for lanes in hosts_of(rows, hosts):
        host = loader(root, rows, lanes)
        parts.append(batches(host, host.initial_states() if states is None else states[lanes], steps))
    return [
        LoadedBatch(
            Batch(*(np.concatenate(field) for field in zip(*(part.batch for part in step), strict=True))),
            np.concatenate([part.lane_states for part in step]),
        )
        for step in zip(*parts, strict=True)
    ]


def assert_same(actual: list[LoadedBatch], expected: list[LoadedBatch]) -> None:
    for left, right in zip(actual, expected, strict=True):
        assert_batches_equal(left.batch, right.batch)
        np.testing.assert_array_equal(left.lane_states, right.lane_states)


def test_an_empty_shard_and_uneven_ones_are_read_in_order(root: pathlib.Path) -> None:
    source = Source(root / "train" / "uneven", tokenizer().fingerprint)
    assert [shard.records for shard in source.manifest.shards] == [16, 0, 16, 8]
    assert [source.record(number) for number in range(40)] == texts(40, 500)


@pytest.mark.parametrize("rows", LANES)
def test_batches_do_not_depend_on_the_number_of_hosts(root: pathlib.Path, rows: int) -> None:
    whole = on_hosts(root, rows, 1, None, 2)
    for hosts in (2, 4, 8) if rows == LANES[0] else (8,):
        assert_same(on_hosts(root, rows, hosts, None, 2), whole)


@pytest.mark.parametrize(("rows", "before", "after"), [(256, 8, 2), (256, 1, 4), (1024, 4, 8)])
def test_a_run_goes_on_with_another_number_of_hosts(root: pathlib.Path, rows: int, before: int, after: int) -> None:
    stopped = on_hosts(root, rows, before, None, 1)[-1]
    resumed = on_hosts(root, rows, after, stopped.lane_states, 1)
    assert_same([stopped, *resumed], on_hosts(root, rows, 1, None, 2))


@pytest.mark.parametrize("rows", LANES)
def test_all_lanes_together_read_every_record_once_an_epoch(root: pathlib.Path, rows: int) -> None:
    source = loader(root, rows)
    mixture = source.mixture
    places: list[dict[int, int]] = [{} for _ in mixture.sources]
    for lane, vector in zip(source.lanes, source.initial_states(), strict=True):
        stream = Lane(mixture, lane, vector)
        stream.plan()
        for number, counter in enumerate(LaneState.from_vector(stream.vector(), len(places)).counters):
            for draw in range(counter.drawn):
                places[number][mixture.place(lane, draw)] = mixture.sample(lane, number, draw).record
    for number, opened in enumerate(mixture.sources):
        size = len(opened)
        whole = next(place for place in itertools.count() if place not in places[number]) // size
        assert whole >= 2 or number == 2
        for epoch in range(whole):
            assert sorted(places[number][place] for place in range(epoch * size, epoch * size + size)) == list(
                range(size)
            )


def test_the_state_of_1024_lanes_of_every_stage_is_under_a_megabyte() -> None:
    for name, stage in (("stage1", stage1), ("stage2", stage2), ("stage3", stage3)):
        data = stage.experiment().data
        assert data.mixture == MIXTURES[name]
        assert 1024 * 4 * LaneState.size(len(data.mixture), data.window) < 1e6


def test_1024_lanes_are_restored_in_seconds_however_far_they_are(
    root: pathlib.Path, record_property: Callable[[str, object], None]
) -> None:
    source = loader(root, 1024, window=64)
    drawn = 10**8
    state = LaneState.from_vector(source.initial_states()[0], len(SHARES))
    state.rows, state.counters = 10**7, [dataclasses.replace(counter, drawn=drawn) for counter in state.counters]
    state.pending = [Waiting(number % 3, drawn - 1 - number // 3, 0) for number in range(64)]
    far = np.stack([state.to_vector(source.mixture.check_word(lane), 64) for lane in source.lanes])
    started = time.process_time()
    streams = [Lane(source.mixture, lane, vector) for lane, vector in zip(source.lanes, far, strict=True)]
    seconds = time.process_time() - started
    record_property("seconds", seconds)
    assert seconds < 5
    np.testing.assert_array_equal(streams[7].vector(), far[7])
