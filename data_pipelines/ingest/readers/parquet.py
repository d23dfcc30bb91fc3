"""Parquet with the pictures' bytes inside, as Hugging Face `datasets` writes it (`{"bytes": …, "path": …}`). A file is a unit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet

from data_pipelines.ingest import storage
from data_pipelines.ingest.errors import Skip, unreadable
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
            number = 0
            try:
                with pa.parquet.ParquetFile(path) as file:
                    for batch in file.iter_batches(
                        _BATCH_ROWS, columns=self.columns.split(",") if self.columns else None
                    ):
                        for fields in batch.to_pylist():
                            yield Sample(f"{unit}:{number}", fields)
                            number += 1
            except (pa.ArrowException, OSError) as error:
                yield unreadable("file_damaged", f"{unit} after {number} rows: {error}")
