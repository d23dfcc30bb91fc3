"""WebDataset: tar files whose members `KEY.EXTENSION` with one KEY, side by side, are one sample. A tar is a unit.

img2dataset's output has this layout, which is how sets that are lists of URLs come in. Members are read in order, in memory
and within a size limit; nothing is written under a name that an archive gives, and nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

from data_pipelines.ingest import storage
from data_pipelines.ingest.errors import Skip, unreadable
from data_pipelines.ingest.samples import Sample

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
            for key, members in itertools.groupby(_members(str(path)), lambda member: member[0]):
                yield _sample(f"{unit}:{key}", [(extension, data) for _, extension, data in members])


def _members(path: str) -> Iterator[tuple[str, str, bytes | Skip]]:
    """(key, extension, content) of the regular files in an archive; a damaged archive ends with a skip."""
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                directory, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if member.isfile() and stem and not directory.startswith("__"):
                    yield f"{directory}/{stem}", extension.lower(), _content(archive, member)
    except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError) as error:
        yield "", "", unreadable("archive_damaged", f"{path}: {error}")


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | Skip:
    if member.size > MAX_MEMBER_BYTES:
        return unreadable("member_too_large", f"{member.name} has {member.size} bytes, the limit is {MAX_MEMBER_BYTES}")
    return archive.extractfile(member).read()


def _sample(key: str, members: list[tuple[str, bytes | Skip]]) -> Sample | Skip:
    pictures: list[bytes] = []
    members_by_name: dict[str, Any] = {}
    described: dict[str, Any] = {}
    for extension, data in members:
        if isinstance(data, Skip):
            return data
        kind = extension.rpartition(".")[2]
        if kind == "json":
            parsed = _object(data)
            if parsed is None:
                return unreadable("not_json", f"{key}.{extension}")
            described |= parsed
        elif kind in _IMAGES:
            pictures.append(data)
        else:
            members_by_name[extension] = data
    return Sample(key, described | members_by_name | ({"images": pictures} if pictures else {}))


def _object(data: bytes) -> dict[str, Any] | None:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None
