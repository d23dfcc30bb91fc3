"""Parquet with the pictures' bytes inside, as Hugging Face `datasets` writes it (`{"bytes": …, "path": …}`). A file is a unit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet

from data_pipelines.ingest import storage
from data_pipelines.ingest.errors import FILE_DAMAGED, IngestError, Skip, unreadable
from data_pipelines.ingest.samples import Sample

_BATCH_ROWS = 64
"""Rows in memory at a time."""


@dataclasses.dataclass(frozen=True)
class ParquetReader:
    """Reads `.parquet`; `columns`, separated by commas, saves reading the others."""

    location: str
    columns: str = ""

    def units(self) -> list[str]:
        """The files."""
        return [path for path in storage.expand(self.location) if path.endswith(".parquet")]

    def read(self, unit: str) -> Iterator[Sample | Skip]:
        """One sample a row."""
        with storage.local_copy(unit) as path:
            number, rows = 0, "?"
            try:
                with pa.parquet.ParquetFile(path) as file:
                    rows = f"{file.metadata.num_rows}"
                    for batch in file.iter_batches(_BATCH_ROWS, columns=self._columns(file.schema_arrow.names)):
                        for fields in batch.to_pylist():
                            yield Sample(f"{unit}:{number}", fields)
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
