"""The last stage: rows of the records that stay -> shards, by content hash, each written whole by one worker."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from data_pipelines.ingest import staging, storage
from data_pipelines.records import IndexRow, shard_stem, write_shard
from hypervl_jax.architecture import TilingConfig

_BATCH_BYTES = 64 * 2**20
"""Records that are read from staging at a time."""


@dataclasses.dataclass(frozen=True)
class ShardWriting:
    """What a worker needs to write shards. `fingerprint` is the tokenizer's; `tiling` counts the statistics."""

    staging: str
    output: str
    fingerprint: str
    tiling: TilingConfig


def shard_count(total_bytes: int, shard_bytes: int) -> int:
    """Shards of about `shard_bytes` each for so many bytes of records, at least one."""
    return max(1, -(-total_bytes // shard_bytes))


def shard_of(content_hash: str, shards: int) -> int:
    """The shard of a record: equal ranges of the hash, so that shards have equal sizes but for chance."""
    return int(content_hash, 16) * shards >> 128


def write_one_shard(writing: ShardWriting, shard: int, shards: int, rows: Iterable[staging.StagedRow]) -> None:
    """Writes a shard in the order of its content hashes, unless it is there already; its summary last."""
    if staging.read_shard(writing.staging, writing.output, shard) is not None:
        return
    ordered = sorted(rows, key=lambda row: row.content_hash)
    with storage.new_directory(writing.output) as directory:
        records = _records(writing.staging, ordered)
        summary = write_shard(directory, shard_stem(shard, shards), records, writing.fingerprint, writing.tiling)
        for name in (summary.entry.file, summary.entry.index_file):
            storage.publish(directory / name, storage.join(writing.output, name))
    staging.write_json(staging.shard_path(writing.staging, shard), dataclasses.asdict(summary))


def _records(directory: str, rows: Sequence[staging.StagedRow]) -> Iterator[tuple[bytes, IndexRow]]:
    for batch in _batches(rows):
        for row, data in zip(batch, staging.read_records(directory, batch), strict=True):
            yield data, row.index_row()


def _batches(rows: Sequence[staging.StagedRow]) -> Iterator[list[staging.StagedRow]]:
    """Runs of rows whose records have at most `_BATCH_BYTES` together (or are one)."""
    batch: list[staging.StagedRow] = []
    size = 0
    for row in rows:
        if batch and size + row.length > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += row.length
    if batch:
        yield batch
