"""JSON Lines: one object a line, plain or gzipped; text corpora, or conversations without pictures. A file is a unit."""

from __future__ import annotations

import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterator
from typing import IO

from data_pipelines.ingest import storage
from data_pipelines.ingest.errors import FILE_DAMAGED, Skip, unreadable
from data_pipelines.ingest.samples import Sample

_LINE_BYTES = 64 * 2**20
"""A longer line is no sample; without a limit it could take all memory."""


@dataclasses.dataclass(frozen=True)
class JsonLinesReader:
    """Reads `.jsonl`, and `.jsonl.gz` by its ending."""

    location: str

    def units(self) -> list[str]:
        """The files."""
        return storage.expand(self.location)

    def read(self, unit: str) -> Iterator[Sample | Skip]:
        """One sample a line that is not blank."""
        with storage.local_copy(unit) as path, (gzip.open if unit.endswith(".gz") else open)(path, "rb") as file:
            number = 0
            try:
                for number, line in enumerate(_lines(file), 1):
                    if line is None:
                        yield unreadable("line_too_long", f"line {number} of {unit}")
                    elif line.strip():
                        yield _sample(f"{unit}:{number}", line)
            except (EOFError, OSError, zlib.error) as error:
                yield unreadable(FILE_DAMAGED, f"{unit} after line {number}: {error}")


def _lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """The lines; None for one over the limit, which is read to its end in pieces."""
    while line := file.readline(_LINE_BYTES):
        if len(line) < _LINE_BYTES or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(_LINE_BYTES)
        yield None


def _sample(key: str, line: bytes) -> Sample | Skip:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        return unreadable("not_json", f"{key}: {error}")
    if not isinstance(fields, dict):
        return unreadable("not_json", f"{key}: a {type(fields).__name__}, not an object")
    return Sample(key, fields)
