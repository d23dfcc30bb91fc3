"""Web pages as OBELICS keeps them: Parquet with two lists side by side, `texts` and `images`, of which one has an entry where the
other has none; the images are addresses. A file is a unit.

The pictures are fetched by img2dataset, a folder for each Parquet file, whose own tables say which address became which member of
which tar. So a unit needs nothing but its folder: the addresses of one file are looked up in memory, and neither pictures nor rows are
moved between workers. What that costs is that a picture which two files show is fetched twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from data_pipelines.ingest import storage
from data_pipelines.ingest.errors import IngestError, Skip, unreadable
from data_pipelines.ingest.readers import pictures
from data_pipelines.ingest.readers.parquet import ParquetReader
from data_pipelines.ingest.samples import Sample
from data_pipelines.records import MAX_IMAGES
from hypervl_jax.text.conversation import IMAGE_SLOT

_FETCHED = "success"


@dataclasses.dataclass(frozen=True)
class InterleavedReader:
    """Reads `.parquet` of interleaved pages; `pictures` is a folder that has, for `NAME.parquet`, img2dataset's output in `NAME/`."""

    location: str
    pictures: str = ""

    def units(self) -> list[str]:
        """The files."""
        if not self.pictures:
            raise IngestError(
                "reader interleaved needs --option pictures=FOLDER, with img2dataset's output for each file"
            )
        return self._pages().units()

    def read(self, unit: str) -> Iterator[Sample | Skip]:
        """One sample a page that has a picture left; `no_picture_left` for the others, which is no failure: addresses die."""
        folder = storage.join(self.pictures, unit.rpartition("/")[2].removesuffix(".parquet"))
        members, places = _members(folder), pictures.find(f"{folder}/*.tar", folder)
        for item in self._pages().read(unit):
            yield item if isinstance(item, Skip) else _sample(item, members, places)

    def _pages(self) -> ParquetReader:
        return ParquetReader(self.location, columns="texts,images")


def _members(folder: str) -> dict[str, str]:
    """Address -> member of a tar, of all that img2dataset fetched into a folder."""
    found: dict[str, str] = {}
    for table in (path for path in storage.expand(folder) if path.endswith(".parquet")):
        with storage.local_copy(table) as path:
            try:
                columns = pa.parquet.read_table(path, columns=["url", "key", "status"]).to_pydict()
            except (pa.ArrowException, OSError) as error:
                raise IngestError(f"{table} is not a table of img2dataset: {error}") from error
        rows = zip(columns["url"], columns["key"], columns["status"], strict=True)
        found |= {url: f"{key}.jpg" for url, key, status in rows if status == _FETCHED}
    return found


def _sample(page: Sample, members: Mapping[str, str], places: Sequence[pictures.Pictures]) -> Sample | Skip:
    texts, addresses = page.fields["texts"], page.fields["images"]
    if not isinstance(texts, list) or not isinstance(addresses, list) or len(texts) != len(addresses):
        return unreadable("field_type", f"{page.key}: texts and images are not two lists of one length")
    turns, names = _turns(list(_entries(texts, addresses, members)))
    if not names:
        return Skip("no_picture_left", page.key)
    if len(names) > MAX_IMAGES:
        return unreadable("too_many_images", f"{page.key}: {len(names)}, the limit is {MAX_IMAGES}")
    try:
        return Sample(page.key, {"images": [pictures.read(places, name) for name in names], "conversation": turns})
    except Skip as skip:
        return skip


def _entries(
    texts: Sequence[str | None], addresses: Sequence[str | None], members: Mapping[str, str]
) -> Iterator[tuple[str, bool]]:
    """(text, False) or (member of a picture, True) in the page's order, without the pictures that were not fetched."""
    for text, address in zip(texts, addresses, strict=True):
        if text:
            yield text, False
        elif address in members:
            yield members[address], True


def _turns(entries: Sequence[tuple[str, bool]]) -> tuple[list[dict[str, Any]], list[str]]:
    """(turns, members of the pictures) of a page in its order: pictures are what a user shows, texts what is said to them.

    Pictures after the last text are left out: nothing would be learnt from them. That a text before the first picture has no
    user's turn before it, and that the loss counts all texts, is our choice.
    """
    last = max((place for place, (_, show) in enumerate(entries) if not show), default=-1)
    turns: list[dict[str, Any]] = []
    for entry, show in entries[: last + 1]:
        role, content, between = ("user", IMAGE_SLOT, "") if show else ("assistant", entry, "\n\n")
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += between + content
        else:
            turns.append({"role": role, "content": content})
    return turns, [entry for entry, show in entries[: last + 1] if show]
