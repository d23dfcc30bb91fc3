"""The Arrow file beside a shard: sizes of images, text lengths, tasks, hashes and pieces of its records, in their order."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Int32

from data_pipelines.errors import RecordError, require_intact, require_record

_FINGERPRINT_KEY = b"text_fingerprint"
_SIDES = pa.list_(pa.field("item", pa.int32(), nullable=False))
_INDEX_FIELDS = (
    pa.field("image_heights", _SIDES, nullable=False),
    pa.field("image_widths", _SIDES, nullable=False),
    pa.field("text_length", pa.int32(), nullable=False),
    pa.field("task", pa.dictionary(pa.int32(), pa.string()), nullable=False),
    pa.field("content_hash", pa.string(), nullable=False),
)
_PIECES = pa.field("pieces", _SIDES, nullable=False)
"""Indexes of sources that were made before November 2026 lack this column."""


@dataclasses.dataclass(frozen=True)
class IndexRow:
    """What index and manifest keep of one record.

    Attributes:
        image_heights: pixels, one for each image.
        image_widths: pixels, one for each image.
        text_length: text tokens, image slots not counted.
        task: of the record.
        content_hash: `records.content_hash`, 32 hex digits.
        pieces: where it may be cut (`pieces.Pieces.to_numbers`).
        licence: of the record; empty where it is the source's. Counted in the manifest, not kept in the index.
        language: BCP 47 tag. Counted in the manifest, not kept in the index.
    """

    image_heights: tuple[int, ...]
    image_widths: tuple[int, ...]
    text_length: int
    task: str
    content_hash: str
    pieces: tuple[int, ...]
    licence: str
    language: str


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """The memory-mapped index of one shard of n records with i images in all.

    Attributes:
        image_offsets: record r owns images `image_offsets[r]` to `image_offsets[r + 1]`.
        image_heights: pixels.
        image_widths: pixels.
        text_lengths: text tokens of each record, image slots not counted.
        task_codes: position of each record's task in `tasks`.
        tasks: the names of the tasks.
        content_hashes: `content_hash` of each record.
        piece_numbers: where each record may be cut; None in an index that was made before it was kept.
        fingerprint: of the tokenizer and template that counted `text_lengths`.
    """

    image_offsets: Int32[np.ndarray, "n+1"]
    image_heights: Int32[np.ndarray, "i"]
    image_widths: Int32[np.ndarray, "i"]
    text_lengths: Int32[np.ndarray, "n"]
    task_codes: Int32[np.ndarray, "n"]
    tasks: tuple[str, ...]
    content_hashes: pa.StringArray
    piece_numbers: pa.ListArray | None
    fingerprint: str

    def __len__(self) -> int:
        return len(self.text_lengths)

    def image_sizes(self, record: int) -> list[tuple[int, int]]:
        """(height, width) in pixels of each image of a record."""
        images = slice(self.image_offsets[record], self.image_offsets[record + 1])
        return list(zip(self.image_heights[images].tolist(), self.image_widths[images].tolist(), strict=True))

    def task(self, record: int) -> str:
        """Task of a record."""
        return self.tasks[self.task_codes[record]]

    def content_hash(self, record: int) -> str:
        """`content_hash` of a record, 32 hex digits."""
        return self.content_hashes[record].as_py()

    def pieces(self, record: int) -> Sequence[int] | None:
        """Where a record may be cut (`pieces.Pieces.from_numbers`); None in an index that does not know."""
        return None if self.piece_numbers is None else self.piece_numbers[record].as_py()


def write_index(path: str | os.PathLike[str], rows: Sequence[IndexRow], fingerprint: str) -> None:
    """Writes the index of a shard whose records are `rows`; equal rows give equal bytes."""
    schema = pa.schema((*_INDEX_FIELDS, _PIECES), {_FINGERPRINT_KEY: fingerprint.encode()})
    table = pa.Table.from_pydict({name: [getattr(row, name) for row in rows] for name in schema.names}, schema)
    with pa.OSFile(os.fspath(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as index:
        index.write_table(table)


def read_index(path: str | os.PathLike[str], fingerprint: str | None = None) -> ShardIndex:
    """Maps the index beside a shard into memory; the arrays are views of the file and cannot be written.

    Args:
        path: the `.index.arrow` file.
        fingerprint: of the tokenizer that the caller uses; an index counted with anything else is refused.

    Raises:
        RecordError: not an index of ours, damaged, or counted with another tokenizer or template.
    """
    path = pathlib.Path(path)
    table = _map_table(path)
    found = (table.schema.metadata or {}).get(_FINGERPRINT_KEY, b"").decode("utf-8", "replace")
    require_record(
        fingerprint in (None, found),
        f"{path} counted its text with tokenizer and template {found!r}, this run uses {fingerprint!r}, so packed lengths "
        f"would be wrong: make the source again with this tokenizer, or use the tokenizer that lies with the data",
    )
    heights, widths, lengths, tasks, hashes = (table.column(field.name).chunk(0) for field in _INDEX_FIELDS)
    offsets = heights.offsets.to_numpy()
    require_intact(np.array_equal(offsets, widths.offsets.to_numpy()), path, "has more heights than widths, or fewer")
    first, last = offsets[0], offsets[-1]
    return ShardIndex(
        image_offsets=offsets - first,
        image_heights=heights.values.to_numpy()[first:last],
        image_widths=widths.values.to_numpy()[first:last],
        text_lengths=lengths.to_numpy(),
        task_codes=tasks.indices.to_numpy(),
        tasks=tuple(tasks.dictionary.to_pylist()),
        content_hashes=hashes,
        piece_numbers=table.column(_PIECES.name).chunk(0) if _PIECES.name in table.schema.names else None,
        fingerprint=found,
    )


def _map_table(path: pathlib.Path) -> pa.Table:
    """The one-chunk table in an index file, with offsets, text and dictionary codes checked."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        raise RecordError(f"{path} is not a readable index ({error}); make the source again") from error
    known = (pa.schema((*_INDEX_FIELDS, _PIECES)), pa.schema(_INDEX_FIELDS))
    require_intact(any(map(table.schema.equals, known)), path, "has other columns than an index of this version")
    require_intact(table.num_rows > 0 and table.column(0).num_chunks == 1, path, "is empty or in several pieces")
    require_intact(not any(column.null_count for column in table.columns), path, "has empty cells")
    return table
