"""Sources on a remote store (`gs://`, `s3://`, whatever fsspec opens) as local files: ArrayRecord and mapped indexes need those.

    CACHE/<hash of the root>/train/kale/
      origin.json                          the URL
      manifest.json, *.index.arrow         copied when the source is opened, the manifest last
      shard-00007-of-00100.array_record    copied when a record of it is first read

CACHE is `HYPERVL_DATA_CACHE`, else a directory of the user's among the temporary ones. A shard comes whole and stays: this suits data
that fits the disks of the hosts. For more, mount the bucket (docs/pods.md): a record is then one small read.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import xxhash

from data_pipelines.errors import RecordError, require_record
from data_pipelines.ingest import storage

MANIFEST, _ORIGIN = "manifest.json", "origin.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "conversation.json")

_COPIES = 16
"""Indexes that are copied at a time."""

_SPARE_BYTES = 2**30
"""What a copied shard must leave free on the disk."""


def is_remote(location: str | os.PathLike[str]) -> bool:
    """Whether a location is a URL."""
    return "://" in os.fspath(location)


def cache_directory() -> pathlib.Path:
    """Where copies of remote files lie."""
    named = os.environ.get("HYPERVL_DATA_CACHE")
    return pathlib.Path(named or pathlib.Path(tempfile.gettempdir()) / f"hypervl-data-{getpass.getuser()}")


def _cached(root: str) -> pathlib.Path:
    return cache_directory() / xxhash.xxh3_64_hexdigest(root.rstrip("/").encode())


@functools.cache
def local_source(root: str, split: str, name: str) -> pathlib.Path:
    """The local directory of a source: itself, or one with the manifest and the indexes of a remote source.

    Where there is no such source, the directory has no manifest. A remote source is looked at once in a process.

    Raises:
        RecordError: the store cannot be reached, does not answer in time, or has other files than the manifest says.
    """
    if not is_remote(root):
        return pathlib.Path(root) / split / name
    directory, url = _cached(root) / split / name, storage.join(root, split, name)
    with _storage_errors():
        directory.mkdir(parents=True, exist_ok=True)
        there = storage.exists(storage.join(url, MANIFEST))
        manifest = storage.read_bytes(storage.join(url, MANIFEST)) if there else b""
        found = directory / MANIFEST
        if found.is_file() and found.read_bytes() != manifest:
            _forget(directory)
        if there and not found.is_file():
            _copy_indexes(url, directory, manifest)
    return directory


def local_directory(location: str) -> pathlib.Path:
    """`local_source` of a source's directory or URL, ROOT/SPLIT/NAME."""
    if not is_remote(location):
        return pathlib.Path(location)
    return local_source(*location.rstrip("/").rsplit("/", 2))


def _forget(directory: pathlib.Path) -> None:
    """Removes what was copied of another source of that name, the manifest last: without it nothing of that source is left."""
    for path in (*directory.glob("shard-*"), directory / MANIFEST):
        path.unlink(missing_ok=True)


def _copy_indexes(url: str, directory: pathlib.Path, manifest: bytes) -> None:
    try:
        shards = {shard["file"]: shard["bytes"] for shard in json.loads(manifest)["shards"]}
        indexes = [name.removesuffix(".array_record") + ".index.arrow" for name in shards]
        plain = all(pathlib.PurePosixPath(name).name == name for name in shards)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"{url}/{MANIFEST} is no manifest ({error!r}); make the source again") from error
    require_record(plain, f"{url}/{MANIFEST} names a shard with a path; make the source again")
    _check_sizes(url, shards)
    with ThreadPoolExecutor(_COPIES) as pool:
        list(pool.map(lambda name: _copy(storage.join(url, name), directory / name), indexes))
    (directory / _ORIGIN).write_text(json.dumps({"url": url}), "utf-8")
    _write(directory / MANIFEST, manifest)


def _check_sizes(url: str, shards: dict[str, int]) -> None:
    found = storage.sizes_in(url)
    for name, expected in shards.items():
        size = found.get(name, 0)
        require_record(
            size in (expected, None), f"{url}/{name} has {size} bytes, the manifest says {expected}; copy it again"
        )


def is_staged(path: pathlib.Path) -> bool:
    """Whether a file that is not there is one of a remote source, which `fetched` brings."""
    return (path.parent / _ORIGIN).is_file()


def fetched(path: pathlib.Path, size: int) -> pathlib.Path:
    """The file, brought from its remote source first where it is not there yet.

    Args:
        path: in a directory of `local_source`, or any local file.
        size: in bytes, as the manifest has it.

    Raises:
        RecordError: the store does not give it, or the disk has no room for it.
    """
    if path.is_file() or not is_staged(path):
        return path
    url = storage.join(json.loads((path.parent / _ORIGIN).read_text("utf-8"))["url"], path.name)
    free = shutil.disk_usage(path.parent).free
    require_record(
        free >= size + _SPARE_BYTES,
        f"{path.parent} has {free} bytes left, {url} has {size}; set HYPERVL_DATA_CACHE to a larger disk, or mount the bucket and give its path",
    )
    with _storage_errors():
        _copy(url, path)
    return path


def local_tokenizer(location: str) -> pathlib.Path:
    """The path of a tokenizer, or a local directory with the tokenizer's files of a remote one. Raises `RecordError`."""
    if not is_remote(location):
        return pathlib.Path(location)
    directory = _cached(location)
    directory.mkdir(parents=True, exist_ok=True)
    with _storage_errors():
        for name in TOKENIZER_FILES:
            url = storage.join(location, name)
            if storage.exists(url):
                _write(directory / name, storage.read_bytes(url))
    return directory


def _copy(url: str, path: pathlib.Path) -> None:
    """Copies a file so that `path` is whole or not there, whichever processes copy it at the same time."""
    with _replacing(path) as beside:
        storage.download(url, beside)


def _write(path: pathlib.Path, data: bytes) -> None:
    with _replacing(path) as beside:
        beside.write_bytes(data)


@contextlib.contextmanager
def _replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path to write to; what is written takes the place of `path` when the block ends without an error."""
    with tempfile.TemporaryDirectory(prefix=".copy-", dir=path.parent) as directory:
        beside = pathlib.Path(directory) / path.name
        yield beside
        os.replace(beside, path)


@contextlib.contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except storage.StorageError as error:
        raise RecordError(str(error)) from error
