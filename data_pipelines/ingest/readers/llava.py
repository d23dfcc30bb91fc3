"""LLaVA's layout: one JSON list of conversations, and a folder of pictures that it names. A unit is a part of the list."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from data_pipelines.ingest import storage
from data_pipelines.ingest.errors import IngestError, Skip, unreadable
from data_pipelines.ingest.samples import Sample


@dataclasses.dataclass(frozen=True)
class LlavaReader:
    """Reads a `.json` list whose entries name pictures by path below `images` (default: the folder of the list).

    `per_unit` entries are read in one go.
    """

    location: str
    images: str = ""
    per_unit: str = "10000"

    def units(self) -> list[str]:
        """`FIRST` entry of each part."""
        if not self.per_unit.isdecimal() or int(self.per_unit) < 1:
            raise IngestError(f"per_unit is {self.per_unit!r}; it must be a positive number of entries")
        return [str(first) for first in range(0, len(_entries(self.location)), int(self.per_unit))]

    def read(self, unit: str) -> Iterator[Sample | Skip]:
        """One sample an entry; pictures are read one by one."""
        first = int(unit)
        for number, entry in enumerate(_entries(self.location)[first : first + int(self.per_unit)], first):
            yield self._sample(f"{self.location}:{number}", entry)

    def _sample(self, key: str, entry: Any) -> Sample | Skip:
        if not isinstance(entry, dict):
            return unreadable("conversation_type", f"{key} is a {type(entry).__name__}")
        names = entry.get("image", entry.get("images")) or []
        try:
            pictures = [self._picture(name) for name in ([names] if isinstance(names, str) else names)]
        except Skip as skip:
            return skip
        fields = {name: value for name, value in entry.items() if name not in ("image", "images")}
        return Sample(key, fields | {"images": pictures})

    def _picture(self, name: object) -> bytes:
        path = PurePosixPath(name) if isinstance(name, str) else PurePosixPath("/")
        if path.is_absolute() or ".." in path.parts:
            raise unreadable("path_outside", f"{name!r} does not lie below the folder of pictures")
        place = storage.join(self.images or storage.parent(self.location), str(path))
        if not storage.exists(place):
            raise unreadable("missing_file", place)
        return storage.read_bytes(place)


@functools.lru_cache(1)
def _entries(location: str) -> list[Any]:
    """The whole list; a worker parses it once for all of its units."""
    try:
        entries = json.loads(storage.read_bytes(location))
    except (ValueError, RecursionError) as error:
        raise IngestError(f"{location} is not a JSON list of conversations: {error}") from error
    if not isinstance(entries, list):
        raise IngestError(f"{location} holds a {type(entries).__name__}, not a list; JSON Lines are read by `jsonl:`")
    return entries
