import contextlib
import gc
import itertools
import multiprocessing
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from corpora import SHAPE, TILING, assert_batches_equal, config, mixed_records, sample, tokenizer, write

from data_pipelines.config import DataConfig, EpochLimit, ShareChange, SourceShare
from data_pipelines.errors import RecordError
from data_pipelines.lane_state import LaneState, SourceCounters, SourceFailed
from data_pipelines.lanes import (
    LaneLoader,
    LaneRows,
    MissingData,
    heldout_batches,
    manifest_hashes,
    open_loader,
    source_names,
)
from data_pipelines.mixtures import sampling_odds
from data_pipelines.records import MANIFEST, Record, content_hash
from data_pipelines.sources import sampled_lengths
from data_pipelines.streams import Lane
from data_pipelines.workers import LanesDataset, WorkerDied
from hypervl_jax.architecture import ConfigError
from hypervl_jax.text.conversation import Turn
from hypervl_jax.training.batch import Batch, BatchShape, LoadedBatch

REPOSITORY = pathlib.Path(__file__).parents[2]
SHARES = {"pictures": 2.0, "text": 1.0, "rare": 0.2}
STEPS = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Three sources; `rare` has fewer records than the batch has rows."""
    root = tmp_path_factory.mktemp("lanes")
    write(root, "pictures", mixed_records(40, "pictures", images=2))
    write(root, "text", mixed_records(23, "text", seed=100, images=0))
    write(root, "rare", mixed_records(3, "rare", seed=200))
    tokenizer().save(root / "tokenizer")
    return root


def loader(
    root: pathlib.Path, lanes: list[int] | None = None, shape: BatchShape = SHAPE, **changes: object
) -> LaneLoader:
    return LaneLoader(config(root, SHARES, alpha_jitter=0.3, **changes), shape, TILING, tokenizer(), lanes)


def batches(source: LaneLoader, states: np.ndarray, steps: int = STEPS) -> list[LoadedBatch]:
    with contextlib.closing(source.iterate(states)) as stream:
        return list(itertools.islice(stream, steps))


@pytest.fixture(scope="module")
def expected(root: pathlib.Path) -> list[LoadedBatch]:
    one = loader(root)
    return batches(one, one.initial_states(), 2 * STEPS)


def assert_same(actual: list[LoadedBatch], expected: list[LoadedBatch]) -> None:
    for left, right in zip(actual, expected, strict=True):
        assert_batches_equal(left.batch, right.batch)
        np.testing.assert_array_equal(left.lane_states, right.lane_states)


def stacked(hosts: list[list[LoadedBatch]], order: list[int]) -> list[LoadedBatch]:
    """Global batches from those of all hosts, whose lanes are `order` one after the other."""
    rows = np.argsort(order)
    whole = []
    for step in zip(*hosts, strict=True):
        fields = [np.concatenate(field)[rows] for field in zip(*(part.batch for part in step), strict=True)]
        whole.append(LoadedBatch(Batch(*fields), np.concatenate([part.lane_states for part in step])[rows]))
    return whole


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_rows_do_not_depend_on_workers(root: pathlib.Path, expected: list[LoadedBatch], workers: int) -> None:
    many = loader(root, workers=workers)
    assert_same(batches(many, many.initial_states()), expected[:STEPS])


@pytest.mark.parametrize("hosts", [[[0, 1], [2, 3]], [[3], [0], [2], [1]], [[0, 2, 3], [1]]])
def test_rows_do_not_depend_on_hosts(root: pathlib.Path, expected: list[LoadedBatch], hosts: list[list[int]]) -> None:
    loaders = [loader(root, lanes) for lanes in hosts]
    parts = [batches(host, host.initial_states()) for host in loaders]
    assert_same(stacked(parts, list(itertools.chain(*hosts))), expected[:STEPS])


@pytest.mark.parametrize("step", [0, 3, 5])
def test_resumes_from_any_batch(root: pathlib.Path, expected: list[LoadedBatch], step: int) -> None:
    resumed = batches(loader(root), expected[step].lane_states)
    assert_same(resumed, expected[step + 1 : step + 1 + STEPS])


def test_state_is_that_of_the_batch_consumed_not_prefetched(root: pathlib.Path, expected: list[LoadedBatch]) -> None:
    ahead = loader(root, workers=2, prefetch=8)
    with contextlib.closing(ahead.iterate(ahead.initial_states())) as stream:
        consumed = list(itertools.islice(stream, 3))
        time.sleep(0.5)  # the workers run ahead
        consumed.append(next(stream))
    assert_same(consumed, expected[:4])
    hosts = [loader(root, [2, 3]), loader(root, [0, 1], workers=1)]
    parts = [batches(host, consumed[-1].lane_states[list(host.lanes)]) for host in hosts]
    assert_same(stacked(parts, [2, 3, 0, 1]), expected[4 : 4 + STEPS])


def test_a_grain_iterator_restores_its_state(root: pathlib.Path, expected: list[LoadedBatch]) -> None:
    stream = iter(LanesDataset(LaneRows(loader(root).mixture, [1], expected[0].lane_states[[1]])))
    state = stream.get_state()
    first = [next(stream)["tokens"] for _ in range(3)]
    stream.set_state(state)
    np.testing.assert_array_equal([next(stream)["tokens"] for _ in range(3)], first)
    np.testing.assert_array_equal(first[0][0], expected[1].batch.tokens[1])


def drawn_places(source: LaneLoader, rows: int) -> dict[int, dict[int, int]]:
    """By source: place in its stream -> record, of all samples that the lanes have drawn after `rows` rows each."""
    mixture, places = source.mixture, {number: {} for number in range(len(source.mixture.sources))}
    for lane, vector in zip(source.lanes, source.initial_states(), strict=True):
        stream = Lane(mixture, lane, vector)
        samples = list(itertools.chain.from_iterable(stream.plan() for _ in range(rows)))
        pending = LaneState.from_vector(stream.vector(), len(places)).pending
        for s in samples + [mixture.sample(lane, *waiting[:2]) for waiting in pending]:
            place = s.draw * mixture.lanes + lane
            assert places[s.source].setdefault(place, s.record) == s.record
    return places


def test_every_record_once_an_epoch_over_all_lanes(root: pathlib.Path) -> None:
    source = loader(root)
    for number, places in drawn_places(source, 60).items():
        size = len(source.mixture.sources[number])
        whole = min(set(range(max(places) + 2)) - set(places)) // size
        assert whole >= 2
        for epoch in range(whole):
            assert sorted(places[place] for place in range(epoch * size, (epoch + 1) * size)) == list(range(size))


def test_token_shares_are_realised(root: pathlib.Path) -> None:
    source = LaneLoader(config(root, SHARES), SHAPE, TILING, tokenizer())
    tokens = Counter()
    for lane, vector in zip(source.lanes, source.initial_states(), strict=True):
        stream = Lane(source.mixture, lane, vector)
        for s in itertools.chain.from_iterable(stream.plan() for _ in range(250)):
            tokens[s.source] += s.tokens
    total, shares = sum(tokens.values()), list(SHARES.values())
    for number, share in enumerate(shares):
        assert tokens[number] / total == pytest.approx(share / sum(shares), rel=0.02)


def test_the_first_samples_of_all_lanes_are_already_balanced(root: pathlib.Path) -> None:
    wide = loader(root, shape=BatchShape(128, SHAPE.length, SHAPE.tiles))
    streams = [Lane(wide.mixture, lane, vector) for lane, vector in zip(wide.lanes, wide.initial_states(), strict=True)]
    first = Counter(stream.plan()[0].source for stream in streams)
    means = [np.mean(sampled_lengths(opened, wide.mixture.budget, TILING, True)) for opened in wide.mixture.sources]
    for number, odds in enumerate(sampling_odds(list(SHARES.values()), means)):
        assert first[number] == pytest.approx(128 * odds, abs=10)


def test_rows_are_well_filled(expected: list[LoadedBatch]) -> None:
    assert np.mean([loaded.batch.segments > 0 for loaded in expected]) > 0.85


def test_the_seed_decides(root: pathlib.Path, expected: list[LoadedBatch]) -> None:
    other = LaneLoader(config(root, SHARES, seed=8), SHAPE, TILING, tokenizer())
    assert (batches(other, other.initial_states(), 1)[0].batch.tokens != expected[0].batch.tokens).any()


def test_adding_a_host_count_changes_no_state_size(root: pathlib.Path) -> None:
    assert loader(root).state_size == loader(root, [1]).state_size == LaneState.size(sources=3, window=8)


@pytest.mark.parametrize("lanes", [[], [4], [1, 1], [-1]])
def test_lanes_must_be_distinct_rows(root: pathlib.Path, lanes: list[int]) -> None:
    with pytest.raises(ConfigError, match="distinct rows of the global batch"):
        loader(root, lanes)


def test_states_of_another_run_are_refused(root: pathlib.Path, expected: list[LoadedBatch]) -> None:
    states = expected[0].lane_states
    others = [
        loader(root, seed=8),
        loader(root, window=9),
        loader(root, [0, 1]),
        loader(root, [0, 1, 2, 3], BatchShape(8, SHAPE.length, SHAPE.tiles)),
    ]
    for other in others:
        with pytest.raises(ConfigError, match="not saved by these lanes of this mixture"):
            other.iterate(states)
    with pytest.raises(ConfigError, match="not saved by these lanes of this mixture"):
        loader(root).iterate(states[::-1])


def test_a_run_resumed_with_shorter_rows_drops_what_fits_no_more(
    root: pathlib.Path, expected: list[LoadedBatch]
) -> None:
    shorter = loader(root, shape=BatchShape(SHAPE.rows, 64, 4))
    counters = shorter.report(batches(shorter, expected[3].lane_states, 4)[-1].lane_states)
    before = loader(root).report(expected[3].lane_states)
    assert counters["pictures"].oversize > before["pictures"].oversize == 0


def broken(record: Record) -> Record:
    return Record(images=tuple(image[:-60] for image in record.images), turns=record.turns, source=record.source)


@pytest.fixture(scope="module")
def partly_broken(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """One picture in eight is broken; a few conversations fit no row."""
    root = tmp_path_factory.mktemp("broken")
    records = [sample(i, [(40, 40)], 400 if i % 20 == 19 else 5) for i in range(40)]
    write(root, "s", [broken(record) if i % 8 == 0 else record for i, record in enumerate(records)])
    return root


def test_skips_and_drops_are_counted_and_survive_a_resume(partly_broken: pathlib.Path) -> None:
    settings = config(partly_broken, {"s": 1.0}, failure_limit=0.5)
    one, two = (LaneLoader(settings, SHAPE, TILING, tokenizer()) for _ in range(2))
    done = batches(one, one.initial_states(), 10)
    resumed = batches(two, done[4].lane_states, 5)
    assert_same(resumed, done[5:])
    counters = two.report(resumed[-1].lane_states)["s"]
    used = sum(len(np.unique(row[row > 0])) for loaded in done for row in loaded.batch.segments)
    pending = sum(len(LaneState.from_vector(vector, 1).pending) for vector in resumed[-1].lane_states)
    assert counters.used == used > 0
    assert counters.drawn == counters.used + counters.failed + counters.oversize + pending
    assert counters.record == 0
    assert counters.image / counters.drawn == pytest.approx(1 / 8, abs=0.04)
    assert counters.oversize / counters.drawn == pytest.approx(1 / 20, abs=0.03)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failing_source_stops_with_its_reason(partly_broken: pathlib.Path, workers: int) -> None:
    failing = LaneLoader(config(partly_broken, {"s": 1.0}, workers=workers), SHAPE, TILING, tokenizer())
    with pytest.raises(SourceFailed, match=r"source 's': \d+ of \d+ samples .* truncated"):
        batches(failing, failing.initial_states(), 100)
    assert not multiprocessing.active_children()


def test_predicted_alphas_shrink_their_images(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    records = mixed_records(40, "pictures", images=2)
    table = pa.table({"content_hash": [content_hash(r) for r in records], "alpha": [0.2] * len(records)})
    with pa.OSFile(str(tmp_path / "alphas.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    settings = config(root, {"pictures": 1.0}, alphas=str(tmp_path / "alphas.arrow"))
    small = LaneLoader(settings, SHAPE, TILING, tokenizer())
    assert {small.mixture.sample(1, 0, draw).alpha for draw in range(20)} == {200}
    assert not small.report(batches(small, small.initial_states(), 3)[-1].lane_states)["pictures"].failed


def questions(batch: Batch) -> list[int]:
    """The numbers that `corpora.sample` wrote into the questions, in the order of the rows."""
    text = [tokenizer().decode(row[row > 0].tolist()) for row in batch.tokens]
    return [int(number) for row in text for number in re.findall(r"(\d+)\?", row)]


def heldout(root: pathlib.Path, lanes: list[int] | None = None) -> list[Batch]:
    settings = config(root, {"text": 1.0, "pictures": 1.0}, alpha_jitter=0.9)
    return list(heldout_batches(settings, SHAPE, TILING, tokenizer(), lanes))


def test_heldout_reads_each_record_once(root: pathlib.Path) -> None:
    found = heldout(root)
    assert sorted(itertools.chain(*map(questions, found))) == [*range(40), *range(100, 123)]
    assert all(batch.segments.any(axis=1).all() for batch in found[:-1])
    assert all(batch.tokens.shape == (SHAPE.rows, SHAPE.length) for batch in found)
    assert questions(found[0])[0] == 100


def test_heldout_splits_over_hosts(root: pathlib.Path) -> None:
    whole, even, odd = heldout(root), heldout(root, [0, 2]), heldout(root, [1, 3])
    assert len(whole) == len(even) == len(odd)
    for batch, first, second in zip(whole, even, odd, strict=True):
        assert_batches_equal(Batch(*(field[::2] for field in batch)), first)
        assert_batches_equal(Batch(*(field[1::2] for field in batch)), second)


def test_heldout_says_what_it_left_out(partly_broken: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = config(partly_broken, {"s": 1.0}, failure_limit=0.5)
    found = list(heldout_batches(settings, SHAPE, TILING, tokenizer()))
    assert sorted(itertools.chain(*map(questions, found))) == [i for i in range(40) if i % 8 and i % 20 != 19]
    assert str(SourceCounters(drawn=40, used=33, oversize=2, image=5, record=0)) in caplog.text


def test_missing_sources_are_listed_with_the_way_to_get_them(root: pathlib.Path) -> None:
    settings = config(root, {"text": 1.0, "charts": 1.0, "scenes": 1.0}, split="train")
    for need in (lambda: LaneLoader(settings, SHAPE, TILING, tokenizer()), lambda: manifest_hashes(settings)):
        with pytest.raises(MissingData) as caught:
            need()
        message = str(caught.value)
        assert "2 of 3 sources" in message
        assert str(root / "train" / "charts" / MANIFEST) in message
        assert str(root / "train" / "scenes" / MANIFEST) in message
        assert "text:" not in message
        assert f"python -m data_pipelines.rendered --output {root}" in message
        assert "docs/data.md" in message


def test_manifest_hashes_follow_the_data(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    records = mixed_records(40, "pictures", images=2)
    write(tmp_path, "pictures", records)
    write(tmp_path, "text", records[1:])
    settings = config(root, {"pictures": 1.0, "text": 1.0})
    first, second = manifest_hashes(settings), manifest_hashes(config(tmp_path, {"pictures": 1.0, "text": 1.0}))
    assert list(first) == list(source_names(settings)) == ["pictures", "text"]
    assert first["pictures"] == second["pictures"]
    assert first["text"] != second["text"]


def test_open_loader_finds_the_tokenizer(root: pathlib.Path, expected: list[LoadedBatch]) -> None:
    settings = config(root, SHARES, alpha_jitter=0.3)
    found = open_loader(settings, SHAPE, TILING, root / "tokenizer")
    assert_same(batches(found, found.initial_states(), 1), expected[:1])


def test_another_tokenizer_is_refused(root: pathlib.Path) -> None:
    other = type(tokenizer())(root / "tokenizer" / "tokenizer.model", type(tokenizer().template)(True, "Be brief."))
    with pytest.raises(RecordError, match="this run uses"):
        LaneLoader(config(root, SHARES), SHAPE, TILING, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixture": ()}, "empty"),
        ({"mixture": (SourceShare("a", 1), SourceShare("a", 2))}, "twice"),
        ({"mixture": (SourceShare("a", 0),)}, "every source of data.mixture has share 0"),
        ({"mixture": (SourceShare("a", 1), SourceShare("b", 0))}, "'b' has share 0 from beginning to end"),
        ({"mixture": tuple(SourceShare(str(i), 1) for i in range(129))}, "129 sources, the limit is 128"),
        ({"changes": (ShareChange(3, "b", 1),)}, "data.changes names b, not in data.mixture"),
        ({"changes": (ShareChange(3, "a", 0),)}, "from step 3 on every source"),
        ({"changes": (ShareChange(3, "a", 1), ShareChange(3, "a", 2))}, "two shares at one step"),
        ({"epoch_limits": (EpochLimit("b", 1),)}, "data.epoch_limits names b"),
        ({"epoch_limit": -1.0}, "epoch_limit"),
        ({"over_limit": "ignore"}, "'stop' or 'reweight'"),
        ({"oversize": "cut"}, "'drop' or 'split'"),
        ({"window": 0}, "window"),
        ({"workers": -1}, "workers"),
        ({"prefetch": 0}, "prefetch"),
        ({"alpha_jitter": 1.1}, "alpha_jitter"),
        ({"failure_limit": 1.0}, "failure_limit"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**{"root": "data", "mixture": (SourceShare("a", 1),), "seed": 0, **changes})


@pytest.mark.parametrize(
    ("name", "share"), [("", 1), ("../a", 1), ("..", 1), ("a", -1), ("a", float("inf")), ("a", float("nan"))]
)
def test_impossible_shares_are_refused(name: str, share: float) -> None:
    with pytest.raises(ConfigError):
        SourceShare(name, share)


def test_a_killed_worker_is_an_error_that_says_so(root: pathlib.Path) -> None:
    many = loader(root, workers=2)
    with contextlib.closing(many.iterate(many.initial_states())) as stream:
        next(stream)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match=r"lower data\.workers"):
            list(itertools.islice(stream, 1000))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("collected", [False, True])
def test_workers_end_with_their_iterator(root: pathlib.Path, collected: bool) -> None:
    many = loader(root, workers=2)
    stream = many.iterate(many.initial_states())
    next(stream)
    assert len(multiprocessing.active_children()) == 2
    if not collected:
        stream.close()
    del stream
    gc.collect()
    assert not multiprocessing.active_children()


SCRIPT = """
    import multiprocessing, pathlib, sys, time
    print("started", flush=True)
    sys.path[:0] = [{repository!r}, {tests!r}]
    from corpora import SHAPE, TILING, config
    from data_pipelines.lanes import open_loader
    assert "jax" not in sys.modules and "grain" not in sys.modules
    loader = open_loader(config({root!r}, {{"text": 1.0}}, workers=2), SHAPE, TILING, {root!r} + "/tokenizer")
    stream = loader.iterate(loader.initial_states())
    next(stream)
    workers = [child.pid for child in multiprocessing.active_children()]
    maps = "".join(pathlib.Path(f"/proc/{{pid}}/maps").read_text() for pid in workers)
    assert "array_record" in maps and "jaxlib" not in maps
    print(*workers, flush=True)
    {ending}
"""


def run_script(root: pathlib.Path, path: pathlib.Path, ending: str) -> subprocess.Popen:
    """Starts a script without a `__main__` guard that opens a loader with two workers."""
    places = {"repository": str(REPOSITORY), "tests": str(pathlib.Path(__file__).parent), "root": str(root)}
    path.write_text(textwrap.dedent(SCRIPT.format(ending=ending, **places)))
    return subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


linux = pytest.mark.skipif(not pathlib.Path("/proc/self/maps").exists(), reason="looks at processes in /proc")


@linux
def test_an_unguarded_script_runs_once_and_its_workers_have_no_jax(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    output, errors = run_script(root, tmp_path / "script.py", "").communicate(timeout=60)
    assert [line.split()[0] for line in output.splitlines()][:1] == ["started"]
    assert output.count("started") == 1
    assert len(output.splitlines()[1].split()) == 2
    assert not errors


@linux
@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_trainer(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    script = run_script(root, tmp_path / "script.py", "time.sleep(60)")
    script.stdout.readline()
    workers = [int(pid) for pid in script.stdout.readline().split()]
    script.kill()
    script.wait()
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while (alive := [pid for pid in workers if pathlib.Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert not alive


def test_a_turn_without_words_is_no_batch(tmp_path: pathlib.Path) -> None:
    with pytest.raises(RecordError):
        write(tmp_path, "s", [Record(images=(), turns=(Turn("user", " "),), source="s")])
