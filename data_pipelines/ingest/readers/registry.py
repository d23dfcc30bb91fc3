"""The readers by name, and what a reader is."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from typing import Protocol

from data_pipelines.ingest.errors import IngestError, Skip
from data_pipelines.ingest.samples import Sample

READERS: Mapping[str, str] = {
    "interleaved": "data_pipelines.ingest.readers.interleaved:InterleavedReader",
    "jsonl": "data_pipelines.ingest.readers.jsonl:JsonLinesReader",
    "llava": "data_pipelines.ingest.readers.llava:LlavaReader",
    "pages": "data_pipelines.ingest.readers.pages:PagesReader",
    "parquet": "data_pipelines.ingest.readers.parquet:ParquetReader",
    "tfds": "data_pipelines.ingest.readers.tfds:TfdsReader",
    "webdataset": "data_pipelines.ingest.readers.webdataset:WebDatasetReader",
}
"""KIND of `--source KIND:LOCATION` -> `module:class`; a module is imported when its kind is asked for."""


class Reader(Protocol):
    """A kind of source: a frozen dataclass whose first field is the location; its other fields, with defaults, are options.

    A unit is what one worker reads in one go and what a restart does not repeat: a file, or a part of one. Units and the
    samples in them have an order that depends on nothing but the source.
    """

    def units(self) -> list[str]:
        """The units, on the machine that starts the ingest. Raises `IngestError` when the source cannot be found."""

    def read(self, unit: str) -> Iterator[Sample | Skip]:
        """The samples of a unit; a `Skip` for each that cannot be read. Raises `IngestError` when the unit cannot be opened."""


def make_reader(source: str, options: Mapping[str, str]) -> Reader:
    """The reader of `KIND:LOCATION`.

    Raises:
        IngestError: no such kind, or an option that it does not know.
    """
    kind, _, location = source.partition(":")
    if kind not in READERS or not location:
        raise IngestError(f"source {source!r} is not KIND:LOCATION; kinds are {', '.join(READERS)}")
    module, _, name = READERS[kind].partition(":")
    try:
        reader = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise IngestError(f"reader {kind} needs {error.name}: pip install 'hypervl-jax[data]'") from error
    known = [field.name for field in dataclasses.fields(reader)[1:]]
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise IngestError(f"reader {kind} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    return reader(location, **options)
