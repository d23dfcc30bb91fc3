"""WebDataset: tar files whose members `KEY.EXTENSION` with one KEY, side by side, are one sample. A tar is a unit.

img2dataset's output has this layout, which is how sets that are lists of URLs come in. Members are read in order, in memory
and within a size limit; nothing is written under a name that an archive gives, and nothing is unpickled. Several pictures of a
sample (`KEY.0.png`, `KEY.1.png`, …) are put in the order of the numbers in their names: writers sort names as text, 10 before 2.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

from data_pipelines.ingest import storage
from data_pipelines.ingest.errors import FILE_DAMAGED, Skip, unreadable
from data_pipelines.ingest.samples import Sample, natural_order

MAX_MEMBER_BYTES = 256 * 2**20
"""A larger member makes its sample a skip, whatever size its header claims."""

_IMAGES = frozenset(
    [
        "jpg",
        "jpeg",
        "png",
        "webp",
        "gif",
        "bmp",
        "img",
        "tif",
        "tiff",
        "ppm",
        "pgm",
        "avif",
        "heic",
        "heif",
        "jp2",
        "jxl",
        "svg",
    ]
)
"""Pictures by extension, those that cannot be decoded too: without its picture a sample must not pass for text."""


@dataclasses.dataclass(frozen=True)
class WebDatasetReader:
    """Reads `.tar`, `.tar.gz` and `.tgz`; fields are named by extension, those of a `.json` member by its keys."""

    location: str

    def units(self) -> list[str]:
        """The archives (img2dataset's `.parquet` and `_stats.json` beside them are left alone)."""
        return [path for path in storage.expand(self.location) if path.endswith((".tar", ".tar.gz", ".tgz"))]

    def read(self, unit: str) -> Iterator[Sample | Skip]:
        """One sample for each run of members with the same key."""
        with storage.local_copy(unit) as path:
            for key, group in itertools.groupby(members(str(path)), lambda member: member[0]):
                yield _sample(f"{unit}:{key}", [(extension, data) for _, extension, data in group])


class _Header(tarfile.TarInfo):
    """A header that must be sound: `tarfile` takes a damaged or missing one after the first member for the archive's end."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> _Header:
        """Parses a block; only one of zeros ends the archive."""
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf == bytes(tarfile.BLOCKSIZE):
                raise
            raise tarfile.ReadError(f"{error} where a member or the end of the archive is expected") from error


def members(path: str) -> Iterator[tuple[str, str, bytes | Skip]]:
    """(key, extension, content) of the files in an archive; a damaged archive ends with a skip.

    The skip has the key of the member before it: that member's sample may have lost the others, its picture among them.
    """
    key = ""
    try:
        with tarfile.open(path, "r|*", tarinfo=_Header) as archive:
            for member in archive:
                directory, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if not member.isdir() and stem and not directory.startswith("__"):
                    key = f"{directory}/{stem}"
                    yield key, extension.lower(), _content(archive, member)
            _check_end(archive)
    except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError) as error:
        yield key, "", unreadable(FILE_DAMAGED, f"{path}: {error}")


def _check_end(archive: tarfile.TarFile) -> None:
    """Raises `tarfile.ReadError` when something follows the block of zeros: a lone one is damage, or a second archive follows."""
    while block := archive.fileobj.read(tarfile.RECORDSIZE):
        if any(block):
            raise tarfile.ReadError("data after the end of the archive")


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | Skip:
    if not member.isfile():
        return unreadable("member_is_link", f"{member.name} is a link or a device; pack the files themselves (tar -h)")
    if member.size > MAX_MEMBER_BYTES:
        return unreadable("member_too_large", f"{member.name} has {member.size} bytes, the limit is {MAX_MEMBER_BYTES}")
    return archive.extractfile(member).read()


def _sample(key: str, members: list[tuple[str, bytes | Skip]]) -> Sample | Skip:
    # Damage of the file comes last, and must not hide behind a skip of one member.
    skip = next((data for _, data in reversed(members) if isinstance(data, Skip)), None)
    if skip is not None:
        return skip
    repeated = [extension for extension, count in collections.Counter(name for name, _ in members).items() if count > 1]
    if repeated:
        return unreadable("duplicate_member", f"{key}.{repeated[0]} occurs more than once, so it is not one sample")
    return _joined(key, members)


def _joined(key: str, members: list[tuple[str, bytes]]) -> Sample | Skip:
    pictures: list[tuple[list[str | int], bytes]] = []
    members_by_name: dict[str, Any] = {}
    described: dict[str, Any] = {}
    for extension, data in members:
        name, _, kind = extension.rpartition(".")
        if kind == "json":
            parsed = json_object(data)
            if parsed is None:
                return unreadable("not_json", f"{key}.{extension}")
            described |= parsed
        elif kind in _IMAGES:
            pictures.append((natural_order(name), data))
        else:
            members_by_name[extension] = data
    ordered = [data for _, data in sorted(pictures, key=lambda picture: picture[0])]
    return Sample(key, described | members_by_name | ({"images": ordered} if ordered else {}))


def json_object(data: bytes) -> dict[str, Any] | None:
    """The object in a `.json` member; None where it holds anything else."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None
