"""Files wherever fsspec finds them (`gs://`, `s3://`, local paths): every remote call has a time limit and a clear error.

Remote files are read from a local copy and written by one upload of a whole file, so that ArrayRecord, which opens local files
only, works on any store, and so that what exists is whole: a local file is renamed into place, an object appears when its
upload ends.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import glob
import os
import pathlib
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from data_pipelines.ingest.errors import IngestError
from data_pipelines.locks import InUse, lock_file

CALL_SECONDS = float(os.environ.get("HYPERVL_STORAGE_TIMEOUT", "60"))
"""Time limit of one remote call: an open, a listing, a block of a copy."""

_BLOCK = 2**23
_UPLOAD_BYTES_PER_SECOND = 2**20
"""An upload may be this slow before it is given up."""

_UNFINISHED = ".new-"
_LOCK = "lock"
_FULL = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)))
"""What the system says when a write does not fit, whoever passes it on."""

_VERSIONS = ("etag", "ETag", "generation", "mtime", "LastModified", "last_modified", "created")
"""Under one of these names a store tells which version of a file it has."""

_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs", "abfs": "adlfs", "az": "adlfs"}
_BUCKETS = frozenset({"gs", "gcs", "s3", "s3a"})
"""Stores of buckets: they have no directories, and a bucket is not ours to make. Their clients remember listings for ever if one lets
them, and would not see what another process writes."""

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_T = TypeVar("_T")


class StorageError(IngestError):
    """A file that cannot be opened, listed, read or written; the message names it."""


def is_local(path: str) -> bool:
    """Whether a path lies in the file system of this machine."""
    return isinstance(_filesystem(path)[0], LocalFileSystem)


def within(seconds: float, work: Callable[[], _T], what: str) -> _T:
    """The result of `work`, which may take so many seconds.

    Raises:
        StorageError: it took longer, or failed; the message begins with `what`.
    """
    future: concurrent.futures.Future[_T] = concurrent.futures.Future()
    # A daemon thread: one that hangs in a network call must not keep the process from ending.
    threading.Thread(target=_fulfil, args=(future, work), daemon=True).start()
    try:
        return future.result(seconds)
    except concurrent.futures.TimeoutError as error:
        advice = "check the network and the credentials, or raise HYPERVL_STORAGE_TIMEOUT (seconds)"
        raise StorageError(f"{what}: no answer in {seconds:g} seconds; {advice}") from error
    except Exception as error:  # every store has its own errors
        raise StorageError(f"{what}: {type(error).__name__}: {error}") from error


def _fulfil(future: concurrent.futures.Future[_T], work: Callable[[], _T]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # handed to the caller's thread
        future.set_exception(error)


def _filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The store of a path, and the path as the store calls it."""
    try:
        return url_to_fs(path, **({"use_listings_cache": False} if _in_bucket(path) else {}))
    except (ImportError, ValueError) as error:
        package = _PACKAGES.get(path.partition("://")[0])
        advice = f"pip install {package}" if package else "give a local path or a URL of a store that fsspec knows"
        raise StorageError(f"cannot reach {path} ({error}); {advice}") from error


def _in_bucket(path: str) -> bool:
    return path.partition("://")[0] in _BUCKETS


def _call(path: str, action: str, work: Callable[[fsspec.AbstractFileSystem, str], _T]) -> _T:
    return within(CALL_SECONDS, lambda: work(*_filesystem(path)), f"cannot {action} {path}")


def join(base: str, *names: str) -> str:
    """A path below another, whatever the store."""
    return "/".join([base.rstrip("/"), *names])


def parent(path: str) -> str:
    """The directory of a path, whatever the store."""
    return path.rstrip("/").rpartition("/")[0] or "."


def expand(pattern: str) -> list[str]:
    """The files of a path with `{000..123}` ranges and glob stars, sorted; of a directory, all files directly in it.

    Raises:
        StorageError: there is none, or the store cannot be asked.
    """
    names = list(_ranges(pattern))
    # A range of a hundred thousand shards is one listing, not as many questions.
    several = len(names) > 1 and not glob.has_magic(pattern)
    found = sorted(_listed(names) if several else {path for name in names for path in _call(name, "list", _list)})
    if not found:
        bucket = "/".join(pattern.split("/", 3)[:3])
        lost = f"there is no bucket {bucket}" if _in_bucket(pattern) and not exists(bucket) else "check the path"
        raise StorageError(f"{pattern} names no file; {lost} (ranges are written {{000..123}})")
    return found


def _listed(names: Sequence[str]) -> Iterator[str]:
    """Those of some files that are there."""
    wanted: dict[str, set[str]] = {}
    for name in names:
        directory, _, last = name.rpartition("/")
        wanted.setdefault(directory or ("/" if name.startswith("/") else "."), set()).add(last)
    for directory, last in wanted.items():
        yield from (path for path in _call(directory, "list", _list) if path.rpartition("/")[2] in last)


def _ranges(pattern: str) -> Iterator[str]:
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = match.groups()
    for number in range(int(first), int(last) + 1):
        yield from _ranges(f"{pattern[: match.start()]}{number:0{len(first)}d}{pattern[match.end() :]}")


def _list(store: fsspec.AbstractFileSystem, path: str) -> list[str]:
    if glob.has_magic(path):
        found = [name for name in store.glob(path) if not store.isdir(name)]
    elif store.isdir(path):
        found = [entry["name"] for entry in store.ls(path, detail=True) if entry["type"] == "file"]
    else:
        found = [path] if store.exists(path) else []
    return [name if isinstance(store, LocalFileSystem) else store.unstrip_protocol(name) for name in found]


def exists(path: str) -> bool:
    """Whether there is a file or directory."""
    return _call(path, "look for", lambda store, name: store.exists(name))


def size(path: str) -> int:
    """Bytes of a file."""
    return int(_call(path, "open", lambda store, name: store.size(name)))


def names_in(directory: str) -> list[str]:
    """Names of the files directly in a directory, sorted; none when there is no directory."""
    return sorted(sizes_in(directory)) if exists(directory) else []


def sizes_in(directory: str) -> dict[str, int | None]:
    """Bytes of the files directly in a directory by name; None where the store does not tell."""
    entries = _call(directory, "list", lambda store, name: store.ls(name, detail=True))
    return {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries if entry["type"] == "file"}


def versions(paths: Sequence[str]) -> dict[str, str]:
    """Size and version of files: a checksum, a generation or a date, whatever their store tells. One listing a directory."""
    wanted: dict[str, set[str]] = {}
    for path in paths:
        wanted.setdefault(parent(path), set()).add(path.rpartition("/")[2])
    found = {}
    for directory, names in wanted.items():
        for entry in _call(directory, "list", lambda store, name: store.ls(name, detail=True)):
            name = entry["name"].rpartition("/")[2]
            if name in names:
                version = next((entry[key] for key in _VERSIONS if entry.get(key) is not None), "")
                found[join(directory, name)] = f"{entry['size']} {version}"
    return found


def read_bytes(path: str) -> bytes:
    """A small file, whole."""
    return _call(path, "read", lambda store, name: store.cat_file(name))


def read_ranges(path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Pieces [start, end) of a file; a remote store is asked for them at once."""
    starts, ends = [start for start, _ in ranges], [end for _, end in ranges]
    return _call(
        path, "read", lambda store, name: store.cat_ranges([name] * len(starts), starts, ends, on_error="raise")
    )


def write_bytes(path: str, data: bytes) -> None:
    """Writes a small file so that it holds all of `data` or does not exist (or keeps its old content)."""
    with new_directory(parent(path)) as directory:
        (directory / "file").write_bytes(data)
        publish(directory / "file", path)


def create(path: str, data: bytes) -> bool:
    """Writes a small file unless there is one, and says whether it did; of several writers at once, one does."""
    return _call(path, "create", lambda store, name: _create(store, name, data))


def _create(store: fsspec.AbstractFileSystem, name: str, data: bytes) -> bool:
    try:
        if isinstance(store, LocalFileSystem):
            os.makedirs(parent(name), exist_ok=True)
            # fsspec's own way looks first and writes then.
            with open(name, "xb") as file:
                file.write(data)
        else:
            store.pipe_file(name, data, mode="create")
    except FileExistsError:
        return False
    return True


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[pathlib.Path]:
    """A local path with the content of a file: the file itself, or a copy that lives as long as the block."""
    if is_local(path):
        yield pathlib.Path(_filesystem(path)[1])
        return
    with tempfile.TemporaryDirectory(prefix="hypervl-ingest-") as directory:
        copy = pathlib.Path(directory) / path.rpartition("/")[2]
        download(path, copy)
        yield copy


def download(path: str, copy: pathlib.Path) -> None:
    """Copies a file into a local one, block by block."""
    with _writing(str(copy), others=True), copy.open("wb") as file:
        file.writelines(blocks(path))


def blocks(path: str) -> Iterator[bytes]:
    """A file's bytes from its start, in blocks of some megabytes; each block has the time limit of a call."""
    source = _call(path, "open", lambda store, name: store.open(name, "rb"))
    with contextlib.closing(source):
        while block := within(CALL_SECONDS, lambda: source.read(_BLOCK), f"cannot read {path}"):
            yield block


@contextlib.contextmanager
def _writing(path: str, others: bool = False) -> Iterator[None]:
    """Says of a local write that fails what it was to write. With `others` the block may fail of other things too, which pass.

    Raises:
        StorageError: the system refused.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # ArrayRecord passes the system's words on in a RuntimeError.
        full = any(words in str(error) for words in _FULL)
        if not full and (others or not isinstance(error, OSError)):
            raise
        advice = "make room there or name another place"
        raise StorageError(f"cannot write {path}: {type(error).__name__}: {error}; {advice}") from error


@contextlib.contextmanager
def new_directory(destination: str) -> Iterator[pathlib.Path]:
    """A local directory for files that `publish` then moves to `destination`, on the same file system where that is local.

    Raises:
        StorageError: it cannot be made, or what is written in it does not fit.
    """
    beside = _filesystem(destination)[1] if is_local(destination) else None
    with _writing(destination):
        if beside is not None:
            os.makedirs(beside, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=beside)
    with _writing(destination, others=True), temporary as directory:
        yield pathlib.Path(directory)


def check_writable(directory: str) -> None:
    """Raises `StorageError` unless a local directory can be written, or made where it is not there yet.

    Of a remote one the first write tells.
    """
    if is_local(directory):
        with new_directory(directory if exists(directory) else parent(directory)):
            pass


@contextlib.contextmanager
def locked(directory: str) -> Iterator[None]:
    """Keeps other processes out of a local directory while the block runs; the system lets go when the process ends, however it does.

    Where the storage knows no locks, as buckets do not, nothing is kept out.

    Raises:
        StorageError: another process is at work there.
    """
    if not is_local(directory):
        yield
        return
    place = pathlib.Path(_filesystem(directory)[1])
    with _writing(directory):
        place.mkdir(parents=True, exist_ok=True)
        try:
            file = lock_file(place / _LOCK)
        except InUse as error:
            raise StorageError(
                f"{directory} is in use by {error}: wait for it, end it, or name another place"
            ) from error
    with file:
        yield


def remove_unfinished(destination: str) -> None:
    """Removes the directories that killed writers left in a local destination."""
    if is_local(destination):
        for directory in pathlib.Path(_filesystem(destination)[1]).glob(f"{_UNFINISHED}*"):
            shutil.rmtree(directory, ignore_errors=True)


def publish(file: pathlib.Path, path: str) -> None:
    """Moves a finished local file to its place, atomically. Raises `StorageError` when it cannot be put there."""
    if is_local(path):
        with _writing(path):
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
            os.replace(file, _filesystem(path)[1])
        return
    seconds = CALL_SECONDS + file.stat().st_size / _UPLOAD_BYTES_PER_SECOND
    within(seconds, lambda: _upload(file, path), f"cannot write {path}")


def _upload(file: pathlib.Path, path: str) -> None:
    store, name = _filesystem(path)
    if not _in_bucket(path):
        store.makedirs(parent(name), exist_ok=True)
    store.put_file(str(file), name)


def remove(path: str) -> None:
    """Removes a file."""
    _call(path, "remove", lambda store, name: store.rm_file(name))


def remove_tree(path: str) -> None:
    """Removes a directory and all in it, where there is one."""
    if is_local(path):
        shutil.rmtree(_filesystem(path)[1], ignore_errors=True)
    elif exists(path):
        _call(path, "remove", lambda store, name: store.rm(name, recursive=True))
