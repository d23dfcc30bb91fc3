import itertools
import pathlib
import shutil
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from corpora import (
    SHAPE,
    TILING,
    WORDS,
    assert_batches_equal,
    config,
    mixed_records,
    sample,
    sign_indexes,
    tokenizer,
    write,
)

from data_pipelines.config import DataConfig, EpochLimit, ShareChange
from data_pipelines.errors import RecordError
from data_pipelines.lane_state import MAX_LAG, MAX_PARTS, LaneState, SourceCounters, SourceFailed, Waiting
from data_pipelines.lanes import LaneLoader
from data_pipelines.packing import Sample
from data_pipelines.records import Record
from data_pipelines.sources import DamagedShard
from data_pipelines.streams import Lane, SourceExhausted
from hypervl_jax.text.conversation import IMAGE_SLOT, Turn
from hypervl_jax.training.batch import BatchShape

SHARES = {"pictures": 1.0, "text": 1.0, "rare": 0.0}
CHANGES = (ShareChange(60, "rare", 2.0), ShareChange(120, "text", 3.0), ShareChange(180, "pictures", 0.0))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("streams")
    write(root, "pictures", mixed_records(40, "pictures", images=2))
    write(root, "text", mixed_records(23, "text", seed=100, images=0))
    write(root, "rare", mixed_records(17, "rare", seed=200))
    return root


def loader(settings: DataConfig, shape: BatchShape = SHAPE) -> LaneLoader:
    return LaneLoader(settings, shape, TILING, tokenizer())


def streams(source: LaneLoader) -> list[Lane]:
    return [
        Lane(source.mixture, lane, vector) for lane, vector in zip(source.lanes, source.initial_states(), strict=True)
    ]


def planned(source: LaneLoader, rows: int) -> list[list[list[Sample]]]:
    """By lane and row."""
    return [[stream.plan() for _ in range(rows)] for stream in streams(source)]


def plan_rows(stream: Lane, rows: int) -> None:
    for _ in range(rows):
        stream.plan()


def tokens(lanes: Sequence[list[list[Sample]]], rows: range) -> Counter[int]:
    return Counter(
        {
            source: sum(s.tokens for lane in lanes for row in rows for s in lane[row] if s.source == source)
            for source in range(3)
        }
    )


def test_sources_enter_leave_and_change_at_their_steps(root: pathlib.Path) -> None:
    lanes = planned(loader(config(root, SHARES, changes=CHANGES)), 240)
    for start, shares in [(0, (1, 1, 0)), (60, (1, 1, 2)), (120, (1, 3, 2)), (180, (0, 3, 2))]:
        # A window's worth of samples was drawn under the earlier shares.
        found = tokens(lanes, range(start + 6, start + 60))
        for source, share in enumerate(shares):
            assert found[source] / found.total() == pytest.approx(share / sum(shares), abs=0.02)


def test_no_place_in_another_source_moves_when_shares_change(root: pathlib.Path) -> None:
    with_changes, without = (
        loader(config(root, SHARES | {"rare": 1.0}, alpha_jitter=0.5, changes=changes)) for changes in (CHANGES[1:], ())
    )
    found = [
        {(s.source, lane, s.draw): s for lane, rows in enumerate(planned(source, 200)) for row in rows for s in row}
        for source in (with_changes, without)
    ]
    common = found[0].keys() & found[1].keys()
    assert len(common) > 2000
    assert all(found[0][key] == found[1][key] for key in common)


@pytest.mark.parametrize("row", [59, 60, 61, 119, 150])
def test_a_run_resumes_around_a_change_of_shares(root: pathlib.Path, row: int) -> None:
    source = loader(
        config(root, SHARES, changes=CHANGES, epoch_limits=(EpochLimit("rare", 6.0),), over_limit="reweight")
    )
    whole = streams(source)[1]
    for _ in range(row):
        whole.plan()
    resumed = Lane(source.mixture, 1, whole.vector())
    for _ in range(40):
        assert resumed.plan() == whole.plan()
        np.testing.assert_array_equal(resumed.vector(), whole.vector())


def test_a_run_resumed_with_other_shares_goes_on_with_them(root: pathlib.Path) -> None:
    before = streams(loader(config(root, {"pictures": 3.0, "text": 1.0, "rare": 0.001})))
    after = loader(config(root, {"pictures": 0.001, "text": 1.0, "rare": 1.0}))
    lanes = []
    for lane, stream in enumerate(before):
        for _ in range(50):
            stream.plan()
        resumed = Lane(after.mixture, lane, stream.vector())
        lanes.append([resumed.plan() for _ in range(60)])
    found = tokens(lanes, range(6, 60))
    assert found[1] / found.total() == pytest.approx(0.5, abs=0.03)
    assert found[2] / found.total() == pytest.approx(0.5, abs=0.03)


def consumed(source: LaneLoader, states: np.ndarray, message: str) -> np.ndarray:
    """The states after the last batch before the run ends with `message`."""
    seen = [states]
    with pytest.raises(SourceExhausted, match=message):
        seen.extend(loaded.lane_states for loaded in itertools.islice(source.iterate(states), 1000))
    return seen[-1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stops_when_all_of_a_source_was_used(root: pathlib.Path, workers: int) -> None:
    limits = (EpochLimit("rare", 2.5),)
    source = loader(config(root, SHARES | {"rare": 0.2}, epoch_limits=limits, workers=workers))
    message = r"'rare' was read 2\.5 times by step \d+.*: 43 records.*over_limit=reweight.*tools\.plan_data"
    end = consumed(source, source.initial_states(), message)
    assert (source.report(end)["rare"].drawn, source.report(end)["rare"].used) == (43, 43)
    # Not a step later than it must, and again at once when the run is resumed without a change.
    reweighted = loader(config(root, SHARES | {"rare": 0.2}, epoch_limits=limits, over_limit="reweight"))
    before = next(
        loaded for loaded in reweighted.iterate(source.initial_states()) if loaded.lane_states[0, 1] == end[0, 1] - 1
    )
    assert reweighted.report(before.lane_states)["rare"].used < 43
    np.testing.assert_array_equal(consumed(source, end, message), end)


def test_many_lanes_with_little_of_a_source_each_use_all_of_it(root: pathlib.Path) -> None:
    """A lane may draw one record or none of it: those with none must not end the run for the others."""
    shape = BatchShape(32, SHAPE.length, SHAPE.tiles)
    source = loader(
        config(root, {"pictures": 5.0, "text": 5.0, "rare": 0.5}, epoch_limits=(EpochLimit("rare", 1.0),)), shape
    )
    end = consumed(source, source.initial_states(), "'rare' was read 1 times")
    assert source.report(end)["rare"].used == 17


@pytest.mark.parametrize("limit", [1.0, 2.5])
def test_a_source_at_its_limit_gives_its_share_to_the_others(root: pathlib.Path, limit: float) -> None:
    limits = (EpochLimit("rare", limit),)
    source = loader(
        config(root, {"pictures": 1.0, "text": 2.0, "rare": 3.0}, epoch_limits=limits, over_limit="reweight")
    )
    lanes = planned(source, 300)
    read = Counter(s.record for lane in lanes for row in lane for s in row if s.source == 2)
    assert sum(read.values()) == int(limit * 17 + 0.5)
    assert set(read.values()) <= {int(limit), int(limit + 0.5)}
    found = tokens(lanes, range(100, 300))
    assert found[2] == 0
    assert found[1] / found[0] == pytest.approx(2, rel=0.03)


def test_a_run_whose_sources_are_all_read_out_ends(root: pathlib.Path) -> None:
    source = loader(config(root, SHARES | {"rare": 1.0}, epoch_limit=1.0, over_limit="reweight"))
    end = consumed(source, source.initial_states(), "every source of the mixture")
    assert {name: counters.used for name, counters in source.report(end).items()} == {
        "pictures": 40,
        "text": 23,
        "rare": 17,
    }


def talk(number: int, exchanges: int, words: int) -> Record:
    """One picture, many questions."""
    turns = []
    for i in range(exchanges):
        slot = IMAGE_SLOT if i == 0 else ""
        turns += [Turn("user", f"{slot}{number}?"), Turn("assistant", " ".join(WORDS[i % 10] for _ in range(words)))]
    return Record((sample(number, [(64, 64)], 1).images), tuple(turns), "long")


@pytest.fixture(scope="module")
def long_root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Three long talks among short samples, and one whose answers fit no row of 256 positions."""
    root = tmp_path_factory.mktemp("long")
    short = [sample(number, [(40, 40)], 5) for number in range(12)]
    write(root, "long", [*short, *(talk(100 + i, 10, 40) for i in range(3)), talk(200, 2, 400)])
    return root


def test_long_records_are_split_or_dropped_and_counted(long_root: pathlib.Path) -> None:
    split, drop = (loader(config(long_root, {"long": 1.0}, oversize=rule)) for rule in ("split", "drop"))
    counter, found = after_rows(drop, 40)
    assert counter.split == 0
    assert counter.oversize / counter.drawn == pytest.approx(4 / 16, abs=0.02)
    assert all(s.part == 0 and s.record < 12 for s in found)
    counter, found = after_rows(split, 40)
    assert counter.split / counter.drawn == pytest.approx(3 / 16, abs=0.02)
    assert counter.oversize / counter.drawn == pytest.approx(2 / 16, abs=0.02)
    parts = {s.part for s in found if s.record == 13}
    assert parts == set(range(1, len(parts) + 1))
    assert len(parts) >= 2


def after_rows(source: LaneLoader, rows: int) -> tuple[SourceCounters, list[Sample]]:
    """The counters of all lanes after some rows of each, and the samples in them."""
    lanes = streams(source)
    found = [s for stream in lanes for _ in range(rows) for s in stream.plan()]
    return source.report(np.stack([stream.vector() for stream in lanes]))["long"], found


@pytest.mark.parametrize("step", range(0, 8, 2))
def test_rows_with_parts_resume_bit_for_bit(long_root: pathlib.Path, step: int) -> None:
    source = loader(config(long_root, {"long": 1.0}, window=2))
    whole = list(itertools.islice(source.iterate(source.initial_states()), step + 4))
    resumed = list(itertools.islice(source.iterate(whole[step].lane_states), 3))
    for left, right in zip(resumed, whole[step + 1 :], strict=True):
        assert_batches_equal(left.batch, right.batch)
        np.testing.assert_array_equal(left.lane_states, right.lane_states)
    assert (
        any(LaneState.from_vector(vector, 1).unfinished for loaded in whole for vector in loaded.lane_states)
        or step < 4
    )
    assert not source.report(whole[-1].lane_states)["long"].failed


def test_every_exchange_of_a_split_record_is_trained_on_once(long_root: pathlib.Path) -> None:
    """Each answer ends once, in a part that holds the record's picture."""
    source = loader(config(long_root, {"long": 1.0}))
    parts = source.mixture.fitting(source.mixture.price(0, 0, 13, 1000), SourceCounters())
    assert sum(s.tiles for s in parts) == len(parts)
    whole = source.mixture.sources[0].cost(13, 1000, TILING)[0]
    assert whole > SHAPE.length
    assert all(s.tokens <= SHAPE.length for s in parts)


def test_a_source_that_joins_later_moves_no_row_before(root: pathlib.Path) -> None:
    """Named with share 0 from the start: until it joins, rows are those of a run that never heard of it."""
    alone = planned(loader(config(root, {"pictures": 1.0, "text": 1.0})), 40)
    joined = planned(
        loader(config(root, {"pictures": 1.0, "text": 1.0, "rare": 0.0}, changes=(ShareChange(20, "rare", 1.0),))), 40
    )
    for before, after in zip(alone, joined, strict=True):
        assert after[:20] == before[:20]
        assert all(sample.source < 2 for row in after[:20] for sample in row)
        assert any(sample.source == 2 for row in after[20:] for sample in row)


def test_rows_with_parts_are_planned_without_opening_a_shard(long_root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    expected = planned(loader(config(long_root, {"long": 1.0})), 12)
    shutil.copytree(long_root, tmp_path, dirs_exist_ok=True)
    for shard in (tmp_path / "train" / "long").glob("*.array_record"):
        shard.write_bytes(bytes(shard.stat().st_size))
    closed = loader(config(tmp_path, {"long": 1.0}))
    assert any(sample.part for lane in expected for row in lane for sample in row)
    assert planned(closed, 12) == expected
    with pytest.raises(DamagedShard):
        next(closed.iterate(closed.initial_states()))


def test_a_source_without_pieces_in_its_index_is_split_alike(long_root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """As sources that were written before indexes told where a record may be cut."""
    shutil.copytree(long_root, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "train" / "long").glob("*.index.arrow"):
        table = pa.ipc.open_file(path.read_bytes()).read_all().drop_columns(["pieces"])
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    sign_indexes(tmp_path / "train" / "long")
    of_old, of_new = (loader(config(root, {"long": 1.0})) for root in (tmp_path, long_root))
    assert planned(of_old, 12) == planned(of_new, 12)


def test_a_sample_that_waits_is_one_word() -> None:
    counters = [SourceCounters(drawn=10), SourceCounters(drawn=2**31 - 1)]
    for waiting in (Waiting(0, 0, 0), Waiting(0, 9, MAX_PARTS), Waiting(1, 2**31 - 1 - MAX_LAG, 7)):
        word = waiting.to_word(counters[waiting.source].drawn)
        assert 0 < word < 2**31
        assert Waiting.from_word(word, counters) == waiting
    with pytest.raises(SourceFailed, match="almost none fits a row"):
        Waiting(1, 0, 0).to_word(2**31 - 1)


def test_a_source_in_which_nothing_fits_is_refused_or_split(tmp_path: pathlib.Path) -> None:
    write(tmp_path, "s", [talk(i, 10, 40) for i in range(3)])
    with pytest.raises(RecordError, match="no record that fits"):
        loader(config(tmp_path, {"s": 1.0}, oversize="drop"))
    rows = planned(loader(config(tmp_path, {"s": 1.0})), 3)
    assert all(s.part for lane in rows for row in lane for s in row)
