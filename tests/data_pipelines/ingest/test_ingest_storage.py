"""Files on any store: time limits, whole files or none, clear errors."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import re
import resource
import time
from collections.abc import Callable, Iterator

import fsspec
import pytest

from data_pipelines.ingest import storage
from data_pipelines.ingest.errors import IngestError
from data_pipelines.ingest.staging import open_staging


def test_silent_store_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "CALL_SECONDS", 0.2)
    store = fsspec.filesystem("memory")
    monkeypatch.setattr(type(store), "cat_file", lambda self, path, **options: time.sleep(30))
    started = time.monotonic()
    with pytest.raises(
        storage.StorageError, match=r"cannot read memory://a/b: no answer in 0\.2 seconds; check the network"
    ):
        storage.read_bytes("memory://a/b")
    assert time.monotonic() - started < 5


def test_errors_name_the_file_and_the_remedy(tmp_path: pathlib.Path) -> None:
    with pytest.raises(storage.StorageError, match=r"cannot read memory://none/x: FileNotFoundError"):
        storage.read_bytes("memory://none/x")
    with pytest.raises(storage.StorageError, match="cannot reach nowhere://x"):
        storage.read_bytes("nowhere://x")
    with pytest.raises(storage.StorageError, match="names no file"):
        storage.expand(str(tmp_path / "{0..2}.tar"))


def test_ranges_and_globs(tmp_path: pathlib.Path) -> None:
    for name in ("a-08", "a-09", "a-10", "a-11"):
        (tmp_path / name).touch()
    (tmp_path / "directory").mkdir()
    names = lambda pattern: [pathlib.Path(path).name for path in storage.expand(f"{tmp_path}/{pattern}")]
    assert names("a-{09..10}") == ["a-09", "a-10"]
    assert names("a-1*") == ["a-10", "a-11"]
    assert names("*") == ["a-08", "a-09", "a-10", "a-11"]
    store = fsspec.filesystem("memory")
    store.pipe_file("/glob/1.txt", b"x")
    assert storage.expand("memory://glob/*.txt") == ["memory:///glob/1.txt"]


def test_ranges_of_a_file(tmp_path: pathlib.Path) -> None:
    for path in (str(tmp_path / "x"), "memory://ranges/x"):
        storage.write_bytes(path, b"0123456789")
        assert storage.read_ranges(path, [(8, 10), (0, 3)]) == [b"89", b"012"]
        with storage.local_copy(path) as copy:
            assert copy.read_bytes() == b"0123456789"


def test_failed_write_leaves_the_old_file(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "x")
    storage.write_bytes(path, b"old")

    def full(self: pathlib.Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(storage.StorageError, match=f"cannot write {tmp_path}: .*No space left on device; make room"):
        storage.write_bytes(path, b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


@contextlib.contextmanager
def room(limit: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: the nearest to a full disk that a test can make."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_does_not_fit_is_said_whoever_writes_it(tmp_path: pathlib.Path) -> None:
    from array_record.python import array_record_module

    def by_arrays(path: pathlib.Path) -> None:
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        writer.write(os.urandom(2**13))
        writer.close()

    def by_python(path: pathlib.Path) -> None:
        path.write_bytes(bytes(2**13))

    def write(by: Callable[[pathlib.Path], None]) -> None:
        with storage.new_directory(str(tmp_path)) as directory:
            by(directory / "x")

    for by in (by_python, by_arrays):
        with room(2**12), pytest.raises(storage.StorageError, match=f"cannot write {tmp_path}: .*File too large"):
            write(by)
    assert not list(tmp_path.iterdir())


def test_errors_of_other_work_are_not_called_writing(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError), storage.new_directory(str(tmp_path)):
        (tmp_path / "none").read_bytes()
    with pytest.raises(RuntimeError, match="other"), storage.new_directory(str(tmp_path)):
        raise RuntimeError("other")
    with storage.new_directory(str(tmp_path)) as directory:
        (directory / "x").touch()
        with pytest.raises(storage.StorageError, match=f"cannot write {tmp_path}/none/x: FileNotFoundError"):
            storage.publish(directory / "x", f"{tmp_path}/none/x")


def test_directories_are_listed_by_their_names(tmp_path: pathlib.Path) -> None:
    for name in ("set[1]", "a*", "b?"):
        for directory in (str(tmp_path / name), f"memory://listed/{name}"):
            assert storage.names_in(directory) == []
            for file in ("y", "x"):
                storage.write_bytes(f"{directory}/{file}", b"x")
            assert storage.names_in(directory) == ["x", "y"]


def test_lock_is_let_go_of_with_its_block(tmp_path: pathlib.Path) -> None:
    directory = str(tmp_path / "new")
    held = contextlib.ExitStack()
    held.enter_context(storage.locked(directory))
    with pytest.raises(storage.StorageError, match=f"{directory} is in use by process"):
        contextlib.ExitStack().enter_context(storage.locked(directory))
    held.close()
    with storage.locked(directory), storage.locked("memory://locked"), storage.locked("memory://locked"):
        pass


def test_first_setting_that_differs_is_named(tmp_path: pathlib.Path) -> None:
    settings = {"config": {"long": "x" * 300, "scorers": [{"name": "a"}, {"name": "b", "maximum": 1}]}, "name": "n"}
    open_staging(str(tmp_path), settings)
    open_staging(str(tmp_path), settings)
    changed = json.loads(json.dumps(settings))
    changed["config"]["scorers"][1]["maximum"] = 2
    with pytest.raises(IngestError, match=re.escape("with another config.scorers[1].maximum (1, now 2); give")):
        open_staging(str(tmp_path), changed)
    changed["config"]["scorers"].pop()
    with pytest.raises(IngestError, match=re.escape("with another config.scorers ([{")):
        open_staging(str(tmp_path), changed)
    del changed["config"]
    with pytest.raises(IngestError, match=re.escape("with another config ({")):
        open_staging(str(tmp_path), changed)


def test_a_long_range_is_one_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    store = fsspec.filesystem("memory")
    for number in (3, 7):
        store.pipe_file(f"/range/part-{number:05d}.tar", b"x")
    calls = []
    asked = type(store).ls
    monkeypatch.setattr(
        type(store), "ls", lambda self, *path, **options: calls.append(path) or asked(self, *path, **options)
    )
    found = storage.expand("memory://range/part-{00000..20000}.tar")
    assert [path.rpartition("/")[2] for path in found] == ["part-00003.tar", "part-00007.tar"]
    assert len(calls) < 5


def test_of_two_creators_one_creates(tmp_path: pathlib.Path) -> None:
    for path in (str(tmp_path / "new" / "x"), "memory://create/x"):
        assert [storage.create(path, data) for data in (b"first", b"second")] == [True, False]
        assert storage.read_bytes(path) == b"first"


def test_versions_tell_a_replaced_file(tmp_path: pathlib.Path) -> None:
    for path in (str(tmp_path / "x"), "memory://versions/x"):
        storage.write_bytes(path, b"one")
        before = storage.versions([path])
        assert list(before) == [path]
        assert storage.versions([path]) == before
        time.sleep(0.02)
        storage.write_bytes(path, b"two")
        assert storage.versions([path]) != before
