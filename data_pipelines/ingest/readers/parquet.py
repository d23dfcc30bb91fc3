"""Parquet with the pictures' bytes inside, as Hugging Face `datasets` writes it (`{"bytes": …, "path": …}`), or with their paths in an
archive or a folder beside it. A file is a unit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from data_pipelines.ingest import storage
from data_pipelines.ingest.errors import FILE_DAMAGED, IngestError, Skip, unreadable
from data_pipelines.ingest.readers import pictures
from data_pipelines.ingest.samples import Sample

_BATCH_ROWS = 64
"""Rows in memory at a time."""


@dataclasses.dataclass(frozen=True)
class ParquetReader:
    """Reads `.parquet`; `columns`, separated by commas, saves reading the others.

    `images` says where the pictures lie of which the table has the path only, as `pictures.find` reads it.
    """

    location: str
    columns: str = ""
    images: str = ""

    def units(self) -> list[str]:
        """The files."""
        return [path for path in storage.expand(self.location) if path.endswith(".parquet")]

    def read(self, unit: str) -> Iterator[Sample | Skip]:
        """One sample a row."""
        places = pictures.find(self.images, storage.parent(unit)) if self.images else ()
        with storage.local_copy(unit) as path:
            number, rows = 0, "?"
            try:
                with pa.parquet.ParquetFile(path) as file:
                    rows = f"{file.metadata.num_rows}"
                    for batch in file.iter_batches(_BATCH_ROWS, columns=self._columns(file.schema_arrow.names)):
                        for fields in batch.to_pylist():
                            yield _sample(f"{unit}:{number}", fields, places)
                            number += 1
            except (pa.ArrowException, OSError) as error:
                yield unreadable(FILE_DAMAGED, f"{unit} after {number} of {rows} rows: {error}")

    def _columns(self, names: Sequence[str]) -> list[str] | None:
        """The columns to read; None for all. pyarrow leaves out, without a word, those that a file does not have."""
        columns = self.columns.split(",") if self.columns else None
        for column in columns or ():
            if column not in names and column.partition(".")[0] not in names:
                raise IngestError(f"there is no column {column!r}; there are {', '.join(names)}")
        return columns


def _sample(key: str, fields: Mapping[str, Any], places: Sequence[pictures.Pictures]) -> Sample | Skip:
    try:
        return Sample(key, {name: _with_bytes(value, places) for name, value in fields.items()} if places else fields)
    except Skip as skip:
        return skip


def _with_bytes(value: Any, places: Sequence[pictures.Pictures]) -> Any:
    """The same value, with the bytes of each picture that has only a path."""
    if isinstance(value, list):
        return [_with_bytes(item, places) for item in value]
    if isinstance(value, dict) and value.keys() == {"bytes", "path"} and value["bytes"] is None:
        return value | {"bytes": pictures.read(places, value["path"])}
    return value
