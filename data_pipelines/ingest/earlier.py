"""Sources that were ingested before: what they hold is left out of the next one.

Their records become rows without bytes, with the same signatures, so that they take part in every comparison and are never written.
A shard is a unit, done once and kept like the others when a run is killed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from data_pipelines.ingest.config import IngestConfig
from data_pipelines.ingest.errors import IngestError
from data_pipelines.ingest.signatures import image_hash, text_fingerprint, text_signature
from data_pipelines.ingest.staging import StagedRow
from data_pipelines.records import Record, RecordError, content_hash, read_manifest
from data_pipelines.sources import Source
from data_pipelines.staged import local_directory
from hypervl_jax.vision.decoding import UndecodableImage, decode_image, image_size


class EarlierShard(NamedTuple):
    """A shard of an earlier source: its records `first` to `end`, and the checksum in the manifest."""

    source: str
    first: int
    end: int
    checksum: str


def earlier_shards(sources: Sequence[str]) -> Iterator[EarlierShard]:
    """The shards of some source directories or their URLs. Raises `IngestError` for one that cannot be used."""
    for source in sources:
        end = 0
        for shard in _opened(source).manifest.shards:
            yield EarlierShard(source, end, end + shard.records, shard.checksum)
            end += shard.records


def _opened(source: str) -> Source:
    try:
        directory = local_directory(source)
        return Source(directory, read_manifest(directory).fingerprint, check=False)
    except RecordError as error:
        raise IngestError(f"earlier source {source}: {error}") from error


def earlier_rows(shard: EarlierShard, unit: int, config: IngestConfig) -> Iterator[StagedRow]:
    """The records of a shard as rows of unit `unit` that have no bytes."""
    source = _opened(shard.source)
    for number in range(shard.first, shard.end):
        try:
            yield _row(source.record(number), unit, number, config)
        except (RecordError, UndecodableImage) as error:
            raise IngestError(f"earlier source {shard.source}: {error}") from error


def _row(record: Record, unit: int, number: int, config: IngestConfig) -> StagedRow:
    heights, widths = zip(*map(image_size, record.images), strict=True) if record.images else ((), ())
    compared = config.image_distance >= 0 and config.same_image != "keep"
    hashes = tuple(image_hash(decode_image(image)) for image in record.images) if compared else ()
    return StagedRow(
        unit=unit,
        offset=number,
        length=0,
        checksum=0,
        image_heights=heights,
        image_widths=widths,
        text_length=0,
        task="",
        content_hash=content_hash(record),
        pieces=(),
        licence="",
        language="",
        **signatures(record, hashes, config),
    )


def signatures(record: Record, image_hashes: tuple[int, ...], config: IngestConfig) -> dict[str, Any]:
    """What near duplicates of a record are found by, as fields of a row."""
    text = "\n".join(turn.text for turn in record.turns)
    plain = not record.images and config.text_similarity > 0
    return {
        "image_hashes": image_hashes,
        "text_fingerprint": text_fingerprint(text),
        "text_signature": text_signature(text, config.permutations) if plain else b"",
    }
