"""Sources on a remote store, here fsspec's memory: the same batches, shards when they are needed, errors that name the file."""

import itertools
import pathlib
import shutil
import time

import fsspec
import pytest
from corpora import SHAPE, TILING, assert_batches_equal, config, mixed_records, tokenizer, write

from data_pipelines import staged
from data_pipelines.errors import RecordError
from data_pipelines.ingest import storage
from data_pipelines.ingest.config import IngestConfig
from data_pipelines.lanes import LaneLoader, MissingData, source_directories
from data_pipelines.records import MANIFEST, read_manifest, verify_source
from data_pipelines.sources import DamagedShard
from hypervl_jax.text.tokenizer import load_tokenizer

SHARES = {"a": 1.0, "b": 1.0}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("staged")
    write(root, "a", mixed_records(40, "a"), per_shard=4)
    write(root, "b", mixed_records(12, "b", seed=50))
    tokenizer().save(root)
    return root


@pytest.fixture
def remote(local: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The sources in memory under a name of their own, with an empty cache."""
    monkeypatch.setenv("HYPERVL_DATA_CACHE", str(tmp_path / "cache"))
    url = f"memory://bucket{abs(hash(tmp_path))}/data"
    fsspec.filesystem("memory").put(str(local), url.removeprefix("memory:/"), recursive=True)
    return url


def loader(root: str | pathlib.Path) -> LaneLoader:
    return LaneLoader(config(root, SHARES), SHAPE, TILING, tokenizer())


def test_batches_are_those_of_local_files(local: pathlib.Path, remote: str) -> None:
    near, far = loader(local), loader(remote)
    pairs = zip(near.iterate(near.initial_states()), far.iterate(far.initial_states()), strict=True)
    for left, right in itertools.islice(pairs, 3):
        assert_batches_equal(right.batch, left.batch)


def test_a_shard_comes_when_a_record_of_it_is_read(remote: str) -> None:
    source = loader(remote).mixture.sources[0]
    shards = lambda: sorted(path.name for path in source.directory.glob("*.array_record"))
    assert shards() == []
    assert source.cost(39, 1000, TILING)[0] > 0
    assert shards() == []
    source.record(39)
    assert shards() == ["shard-00009-of-00010.array_record"]
    verify_source(source.directory)
    assert len(shards()) == 10


def test_what_is_copied_is_kept_until_the_source_changes(remote: str, local: pathlib.Path) -> None:
    directory = source_directories(config(remote, SHARES))["a"]
    index = next(directory.glob("*.index.arrow"))
    kept = index.stat().st_ino
    staged.local_source.cache_clear()
    assert source_directories(config(remote, SHARES))["a"] == directory
    assert index.stat().st_ino == kept
    store, path = fsspec.filesystem("memory"), remote.removeprefix("memory:/")
    store.rm(f"{path}/train/a", recursive=True)
    store.put(str(local / "train" / "b"), f"{path}/train/a", recursive=True)
    staged.local_source.cache_clear()
    assert read_manifest(source_directories(config(remote, SHARES))["a"]).name == "b"


def test_a_source_is_found_by_its_url(remote: str, local: pathlib.Path) -> None:
    directory = staged.local_directory(f"{remote}/train/a/")
    assert read_manifest(directory) == read_manifest(staged.local_directory(str(local / "train" / "a")))
    pytest.importorskip("imagehash")
    from data_pipelines.ingest.lists import compile_lists

    assert compile_lists(IngestConfig(held_out=(f"{remote}/train/b",))).pictures.size > 0


def test_a_remote_source_that_is_not_there_is_missing(remote: str) -> None:
    with pytest.raises(MissingData, match=f"none: {remote}/train/none/{MANIFEST}"):
        LaneLoader(config(remote, {"none": 1.0}), SHAPE, TILING, tokenizer())


def test_a_truncated_remote_shard_is_refused_at_open(remote: str) -> None:
    store, path = fsspec.filesystem("memory"), remote.removeprefix("memory:/")
    shard = f"{path}/train/b/shard-00000-of-00001.array_record"
    store.pipe_file(shard, store.cat_file(shard)[:-1])
    with pytest.raises(RecordError, match=r"b/shard-00000-of-00001\.array_record has \d+ bytes, the manifest says \d+"):
        loader(remote)


def test_a_manifest_with_paths_is_refused(remote: str, tmp_path: pathlib.Path) -> None:
    store, path = fsspec.filesystem("memory"), f"{remote.removeprefix('memory:/')}/train/b/{MANIFEST}"
    store.pipe_file(path, store.cat_file(path).replace(b"shard-00000-of", b"../../shard-00000-of"))
    with pytest.raises(RecordError, match="names a shard with a path"):
        loader(remote)
    assert not list(tmp_path.rglob("*.array_record"))


def test_a_store_that_does_not_answer_stops_with_the_file(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = loader(remote).mixture.sources[0]
    store = fsspec.filesystem("memory")
    monkeypatch.setattr(storage, "CALL_SECONDS", 0.2)
    monkeypatch.setattr(type(store), "_open", lambda *arguments, **options: time.sleep(5))
    with pytest.raises(DamagedShard, match=r"cannot open .*array_record: no answer in 0\.2 seconds"):
        source.record(0)


def test_a_full_disk_is_said_before_it_is_filled(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = loader(remote).mixture.sources[0]
    monkeypatch.setattr(staged, "_SPARE_BYTES", shutil.disk_usage("/").total * 1000)
    with pytest.raises(DamagedShard, match="set HYPERVL_DATA_CACHE to a larger disk, or mount the bucket"):
        source.record(0)


def test_the_tokenizer_comes_from_the_same_place(remote: str) -> None:
    assert load_tokenizer(staged.local_tokenizer(remote)).fingerprint == tokenizer().fingerprint
