"""LLaVA's layout: conversations in a JSON list or in JSON Lines, and pictures beside it that they name. A unit is a part of a file."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipelines.ingest import storage
from data_pipelines.ingest.errors import IngestError, Skip, unreadable
from data_pipelines.ingest.readers import json_parts, pictures
from data_pipelines.ingest.samples import Sample

_PICTURES = ("image", "images", "img_filename")


@dataclasses.dataclass(frozen=True)
class LlavaReader:
    """Reads `.json` lists and `.jsonl` of any size, whose entries name pictures by path.

    `images` says where those lie, as `pictures.find` reads it (default: the folder of the list); `per_unit` entries are read in
    one go.
    """

    location: str
    images: str = "{folder}"
    per_unit: str = "10000"

    def units(self) -> list[str]:
        """`FILE:FIRST:START-END` of each part: the file's place in the order of names, and a `json_parts.Part`."""
        if not self.per_unit.isdecimal() or int(self.per_unit) < 1:
            raise IngestError(f"per_unit is {self.per_unit!r}; it must be a positive number of entries")
        files = enumerate(storage.expand(self.location))
        return [f"{place}:{part}" for place, file in files for part in json_parts.split(file, int(self.per_unit))]

    def read(self, unit: str) -> Iterator[Sample | Skip]:
        """One sample an entry, and `video` for one that shows a video, which is no failure; pictures are read one by one."""
        place, _, part = unit.partition(":")
        path = _files(self.location)[int(place)]
        places = pictures.find(self.images, storage.parent(path))
        for number, entry in json_parts.read(path, json_parts.Part.parse(part)):
            yield entry if isinstance(entry, Skip) else _sample(f"{path}:{number}", entry, places)


# A worker lists the files once, not for each of its units.
@functools.lru_cache(1)
def _files(location: str) -> list[str]:
    return storage.expand(location)


def _sample(key: str, entry: Any, places: Sequence[pictures.Pictures]) -> Sample | Skip:
    if not isinstance(entry, dict):
        return unreadable("conversation_type", f"{key} is a {type(entry).__name__}")
    if entry.get("video"):
        return Skip("video", key)
    named = next((entry[name] for name in _PICTURES if entry.get(name)), [])
    try:
        shown = [pictures.read(places, name) for name in (named if isinstance(named, list) else [named])]
    except Skip as skip:
        return skip
    return Sample(key, {name: value for name, value in entry.items() if name not in _PICTURES} | {"images": shown})
