"""Pictures that a list names by path: in folders, in zip archives (also those that come in parts), and in plain tar archives.

An archive's members are looked up in its directory and read where they lie. Nothing is unpacked, so no name in an archive can
write anywhere, and a size in a header is a limit, never an allocation.
"""

from __future__ import annotations

import functools
import io
import itertools
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Protocol

from data_pipelines.ingest import storage
from data_pipelines.ingest.errors import IngestError, unreadable

PICTURE_BYTES = 256 * 2**20
"""A larger member is no picture, whatever size its header claims."""

_BUFFER = 2**16
_ZIP, _TAR = ".zip", ".tar"
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")


class Pictures(Protocol):
    """A place that holds pictures by path."""

    def read(self, name: str) -> bytes | None:
        """The bytes of a picture; None where there is none of that name. Raises `Skip` for one that cannot be read."""


# A worker reads an archive's directory once for many units, and forgets those of other places.
@functools.lru_cache(4)
def find(location: str, folder: str) -> tuple[Pictures, ...]:
    """The places of a location: paths separated by commas, each a folder, an archive, or a pattern for archives or for an archive's parts.

    Files that a pattern finds and whose names end neither in `.zip` nor in `.tar` are the parts of one zip, in the order of their names.

    Args:
        location: with `{folder}` for the folder of the file that names the pictures.
        folder: that folder.

    Raises:
        IngestError: an archive that cannot be opened or read at any place.
    """
    return tuple(place for path in location.split(",") for place in _places(path.replace("{folder}", folder)))


def read(places: Sequence[Pictures], name: object) -> bytes:
    """The picture of that name from the first place that has it.

    Raises:
        Skip: a failure: no such picture, a damaged one, or a name that leads outside.
    """
    path = PurePosixPath(name) if isinstance(name, str) else PurePosixPath("/")
    if path.is_absolute() or ".." in path.parts:
        raise unreadable("path_outside", f"{name!r} does not lie below the folder of pictures")
    found = (place.read(str(path)) for place in places)
    data = next((data for data in found if data is not None), None)
    if data is None:
        raise unreadable("missing_file", str(path))
    return data


def _places(path: str) -> Iterator[Pictures]:
    if not any(mark in path for mark in "*{") and not path.endswith((_ZIP, _TAR, *_COMPRESSED)):
        yield _Folder(path)
        return
    files = storage.expand(path)
    compressed = next((file for file in files if file.endswith(_COMPRESSED)), None)
    if compressed:
        raise IngestError(f"{compressed} can only be read from its start; unpack it, or gunzip it to a .tar")
    yield from (_zip_archive((file,)) for file in files if file.endswith(_ZIP))
    yield from (_tar_archive(file) for file in files if file.endswith(_TAR))
    parts = tuple(file for file in files if not file.endswith((_ZIP, _TAR)))
    if parts:
        yield _zip_archive(parts)


class _Folder:
    def __init__(self, path: str) -> None:
        self._path = path

    def read(self, name: str) -> bytes | None:
        if "::" in name:  # fsspec would take it for a chain of file systems
            raise unreadable("path_outside", f"{name!r} has the mark '::', which no file below the folder may have")
        place = storage.join(self._path, name)
        if not storage.exists(place):
            return None
        try:
            return storage.read_bytes(place)
        except storage.StorageError as error:
            # An object store knows no folder by name: it finds no file there.
            if isinstance(error.__cause__, IsADirectoryError | FileNotFoundError):
                raise unreadable("not_a_file", f"{name!r} names a folder") from error
            raise


class _Members:
    """Names of an archive's members; a name may leave out the folders that the archive puts before it, if that fits one member only."""

    def __init__(self, names: Iterable[str]) -> None:
        self._by_name = {PurePosixPath(name).as_posix(): name for name in names}

    def member(self, name: str) -> str | None:
        """The member that is meant. Raises `Skip` if several could be."""
        if name in self._by_name:
            return self._by_name[name]
        longer = [path for path in self._by_last.get(PurePosixPath(name).name, ()) if path.endswith(f"/{name}")]
        if len(longer) > 1:
            raise unreadable("ambiguous_name", f"{name} could be {longer[0]} or {longer[1]}")
        return self._by_name[longer[0]] if longer else None

    @functools.cached_property
    def _by_last(self) -> Mapping[str, list[str]]:
        found: dict[str, list[str]] = {}
        for path in self._by_name:
            found.setdefault(path.rpartition("/")[2], []).append(path)
        return found


class _Zip:
    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._members = _Members(info.filename for info in archive.infolist() if not info.is_dir())

    def read(self, name: str) -> bytes | None:
        member = self._members.member(name)
        if member is None:
            return None
        _check_size(member, self._archive.getinfo(member).file_size)
        try:
            # zipfile stops at the size that the directory names and checks the checksum.
            return self._archive.read(member)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
            raise unreadable("member_damaged", f"{member}: {error}") from error


class _Tar:
    def __init__(self, path: str, members: Mapping[str, tuple[int, int]]) -> None:
        self._path, self._places = path, members
        self._members = _Members(members)

    def read(self, name: str) -> bytes | None:
        member = self._members.member(name)
        if member is None:
            return None
        start, size = self._places[member]
        _check_size(member, size)
        return storage.read_ranges(self._path, [(start, start + size)])[0]


def _check_size(member: str, size: int) -> None:
    if size > PICTURE_BYTES:
        raise unreadable("member_too_large", f"{member} has {size} bytes, the limit is {PICTURE_BYTES}")


def _zip_archive(files: tuple[str, ...]) -> _Zip:
    try:
        return _Zip(zipfile.ZipFile(_joined(files)))
    except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
        raise IngestError(f"{files[0]} is not a whole zip archive: {error}") from error


def _tar_archive(path: str) -> _Tar:
    try:
        with tarfile.open(fileobj=_joined((path,)), mode="r:") as archive:
            whole = (member for member in archive if member.isreg() and not member.issparse())
            return _Tar(path, {member.name: (member.offset_data, member.size) for member in whole})
    except (tarfile.TarError, OSError, EOFError) as error:
        raise IngestError(f"{path} is not a whole tar archive: {error}") from error


def _joined(paths: Sequence[str]) -> io.BufferedReader:
    return io.BufferedReader(_Joined(paths), _BUFFER)


class _Joined(io.RawIOBase):
    """Files read as if they were one, in order; each read is a call of the store, with its time limit."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self._ends = list(itertools.accumulate(map(storage.size, paths)))
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._ends[-1]}[whence]
        if base + offset < 0:
            raise OSError(f"seek to byte {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        starts = [0, *self._ends[:-1]]
        for path, start, end in zip(self._paths, starts, self._ends, strict=True):
            if self._position < end:
                first, last = self._position - start, min(self._position + len(buffer), end) - start
                (data,) = storage.read_ranges(path, [(first, last)])
                buffer[: len(data)] = data
                self._position += len(data)
                return len(data)
        return 0
