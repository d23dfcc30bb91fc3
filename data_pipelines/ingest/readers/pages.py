"""Documents in WebDataset shards: `KEY.pdf` or `KEY.tif` with `KEY.json`, the text of its pages. A page is a sample, a tar a unit.

So pdfa-eng-wds and idl-wds are kept. The picture of a page is its PDF drawn at a resolution of our choice, or the page of the TIFF
as it is; its text is what the set has in lines, in the set's own order. Of a document that has both files the TIFF is taken.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import msgpack

from data_pipelines.ingest import page_pictures, storage
from data_pipelines.ingest.errors import IngestError, Skip, unreadable
from data_pipelines.ingest.readers import webdataset
from data_pipelines.ingest.samples import Sample

_KINDS = ("tif", "tiff", "pdf")
_SECONDS = 4 * page_pictures.CPU_SECONDS
"""By the clock: other processes may have the core."""


@dataclasses.dataclass(frozen=True)
class PagesReader:
    """Reads tar shards of documents; PDF files are drawn at `resolution` dots an inch, and the first `pages` of a document are read."""

    location: str
    resolution: str = "150"
    pages: str = "50"

    def units(self) -> list[str]:
        """The archives."""
        for name in ("resolution", "pages"):
            value = getattr(self, name)
            if not value.isdecimal() or int(value) < 1:
                raise IngestError(f"{name} is {value!r}; it must be a positive whole number")
        return webdataset.WebDatasetReader(self.location).units()

    def read(self, unit: str) -> Iterator[Sample | Skip]:
        """One sample for each page that has text; `page_without_text` for the others, which is no failure."""
        with storage.local_copy(unit) as path:
            for key, group in itertools.groupby(webdataset.members(str(path)), lambda member: member[0]):
                files = {extension: data for _, extension, data in group}
                skip = next((data for data in files.values() if isinstance(data, Skip)), None)
                yield from [skip] if skip else self._pages(f"{unit}:{key}", files)

    def _pages(self, key: str, files: Mapping[str, bytes]) -> Iterator[Sample | Skip]:
        try:
            texts = _texts(key, files.get("json"))
            pictures = self._pictures(key, files, len(texts))
        except Skip as skip:
            yield skip
            return
        for number, (text, (picture, reason)) in enumerate(zip(texts, pictures, strict=False)):
            where = f"{key}:{number}"
            if reason:
                yield unreadable(reason, where)
            elif text:
                yield Sample(where, {"images": [picture], "caption": text})
            else:
                yield Skip("page_without_text", where)

    def _pictures(self, key: str, files: Mapping[str, bytes], texts: int) -> list[tuple[bytes, str]]:
        """(picture, why there is none) of each page, made by a process of its own."""
        kind = next((kind for kind in _KINDS if kind in files), None)
        if kind is None:
            raise unreadable("missing_fields", f"{key} has only {', '.join(sorted(files))}")
        count, *pages = _run("pdf" if kind == "pdf" else "tif", self.resolution, self.pages, files[kind], key)
        if count != texts:
            raise unreadable("page_count", f"{key} has {count} pages, and the text of {texts}")
        return pages


def _run(kind: str, resolution: str, pages: str, data: bytes, key: str) -> list[Any]:
    command = [sys.executable, "-P", page_pictures.__file__, kind, resolution, pages]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise unreadable("document_too_slow", f"{key} took over {_SECONDS} seconds") from error
    if done.returncode == -signal.SIGXCPU:
        raise unreadable("document_too_slow", f"{key} took over {page_pictures.CPU_SECONDS} seconds of a core")
    if done.returncode:
        message = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        if message.startswith("ModuleNotFoundError"):
            raise IngestError(f"reader pages: {message}; pip install 'hypervl-jax[data]'")
        raise unreadable("document_damaged", f"{key}: {message or f'ended with {done.returncode}'}")
    return list(msgpack.Unpacker(io.BytesIO(done.stdout), max_buffer_size=0))


def _texts(key: str, data: bytes | None) -> list[str]:
    """The text of each page: empty where it has none."""
    described = None if data is None else webdataset.json_object(data)
    pages = described.get("pages") if described else None
    if not isinstance(pages, list) or not all(isinstance(page, dict) for page in pages):
        raise unreadable("missing_fields", f"{key} has no JSON with pages")
    return [_text(page) for page in pages]


def _text(page: Mapping[str, Any]) -> str:
    """Lines (of pdfa, or of idl, which keeps them in the page itself), else words."""
    for holder, between in ((page.get("lines"), "\n"), (page, "\n"), (page.get("words"), " ")):
        texts = holder.get("text") if isinstance(holder, dict) else None
        if isinstance(texts, list):
            return between.join(text.strip() for text in texts if isinstance(text, str)).strip()
    return ""
