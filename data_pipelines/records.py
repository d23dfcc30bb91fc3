"""The record every source is stored as, its bytes, and the directory layout of a source.

    <source>/
      shard-00000-of-00004.array_record   msgpack records, `group_size:1`: any record is one cheap read
      shard-00000-of-00004.index.arrow    sizes, text lengths, tasks, hashes and pieces of the same records, in the same order
      manifest.json                       what is there, with checksums; written last

Packing reads only the memory-mapped index, so it decides before a single pixel is decoded. A directory without a manifest
is not a source: a writer that was killed leaves none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgpack
import xxhash
from array_record.python import array_record_module

from data_pipelines.errors import RecordError, require_record
from data_pipelines.manifest import (
    MANIFEST,
    Manifest,
    ShardEntry,
    ShardSummary,
    file_checksum,
    make_manifest,
    remove_source,
    shard_stem,
    write_json,
)
from data_pipelines.manifest import read_manifest as read_manifest
from data_pipelines.manifest import source_statistics as source_statistics
from data_pipelines.manifest import verify_source as verify_source
from data_pipelines.pieces import measure_pieces
from data_pipelines.shard_index import IndexRow, write_index
from data_pipelines.shard_index import read_index as read_index
from data_pipelines.statistics import count_rows
from hypervl_jax.architecture import TilingConfig
from hypervl_jax.text.conversation import IMAGE_SLOT, ConversationError, Turn, count_image_slots, text_length
from hypervl_jax.text.tokenizer import Tokenizer
from hypervl_jax.vision.decoding import UndecodableImage, image_size

MAX_RECORD_BYTES, MAX_IMAGES, MAX_TURNS, MAX_ENTRIES = 256 * 2**20, 1024, 4096, 1024
"""Limits of a record; entries are keys of `quality` or `metadata`. They bound what a damaged or hostile file can make a worker allocate."""

_WRITER_OPTIONS = "group_size:1"
_FULL_SIZE_TILING = TilingConfig()

PARAPHRASE_SEPARATOR = "|"
"""Joins the other right answers of a question in `Record.metadata["paraphrases"]`."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One training or evaluation sample.

    Attributes:
        images: encoded pictures (JPEG, PNG, ...), in the order of the image slots in `turns`.
        turns: the conversation; the texts hold one `IMAGE_SLOT` per image.
        source: name of the source it came from.
        task: what it asks for, for per-task reports.
        licence: licence of this sample, where it differs from the source's.
        language: BCP 47 tag.
        quality: scores by name, as filters left them.
        metadata: everything else a report or filter may want.
    """

    images: tuple[bytes, ...]
    turns: tuple[Turn, ...]
    source: str
    task: str = ""
    licence: str = ""
    language: str = "en"
    quality: Mapping[str, float] = dataclasses.field(default_factory=dict)
    metadata: Mapping[str, str | int | float] = dataclasses.field(default_factory=dict)


_FIELDS = tuple(field.name for field in dataclasses.fields(Record))


def content_hash(record: Record) -> str:
    """XXH3-128 over the images and turns, as 32 hex digits: the identity of a sample, whatever its tags say."""
    digest = xxhash.xxh3_128()
    parts = [*record.images, *(text.encode() for turn in record.turns for text in (turn.role, turn.text))]
    digest.update(len(record.images).to_bytes(8, "little"))
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def encode(record: Record) -> bytes:
    """The msgpack bytes of a record; equal records give equal bytes.

    Raises:
        RecordError: a value has a type or size that `decode` would refuse.
    """
    _check_slots(record)
    raw = {name: getattr(record, name) for name in _FIELDS}
    raw["images"] = list(record.images)
    raw["turns"] = [[turn.role, turn.text] for turn in record.turns]
    raw["quality"], raw["metadata"] = (dict(sorted(tags.items())) for tags in (record.quality, record.metadata))
    _check_raw(raw)
    try:
        data = msgpack.packb(raw, use_bin_type=True)
    except (TypeError, ValueError, OverflowError) as error:
        raise RecordError(f"a record of source {record.source!r} cannot be written: {error}") from error
    require_record(
        len(data) <= MAX_RECORD_BYTES,
        f"a record has {len(data)} bytes, more than {MAX_RECORD_BYTES}; shrink its images",
    )
    return data


def decode(data: bytes) -> Record:
    """The record in `data`; strict, since the bytes may come from anywhere.

    Raises:
        RecordError: damaged bytes, an unknown or missing key, a wrong type, or a size beyond the limits above.
    """
    require_record(len(data) <= MAX_RECORD_BYTES, f"a record has {len(data)} bytes; the shard is damaged or not ours")
    try:
        # Text and bytes longer than `data` are refused by msgpack itself.
        raw = msgpack.unpackb(data, max_array_len=MAX_TURNS, max_map_len=MAX_ENTRIES, max_ext_len=0)
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise RecordError(f"a record's bytes are not a record: {error}; the shard is damaged or not ours") from error
    _check_raw(raw)
    turns = tuple(Turn(role, text) for role, text in raw["turns"])
    record = Record(**{**raw, "images": tuple(raw["images"]), "turns": turns})
    _check_slots(record)
    return record


def _check_raw(raw: Any) -> None:
    """Raises `RecordError` unless `raw` is a record as plain lists, maps, strings, bytes and numbers."""
    require_record(type(raw) is dict, f"a record must be a map, this is a {type(raw).__name__}")
    missing, unknown = sorted(set(_FIELDS) - raw.keys()), sorted(map(str, raw.keys() - set(_FIELDS)))
    require_record(not missing, f"a record has no {', '.join(missing)}; it was written by another version")
    require_record(not unknown, f"a record has unknown keys {', '.join(unknown)}; it was written by another version")
    for name in ("source", "task", "licence", "language"):
        require_record(type(raw[name]) is str, f"record.{name} must be text, this is a {type(raw[name]).__name__}")
    _check_list(raw["images"], "images", MAX_IMAGES, lambda item: type(item) is bytes and bool(item), "non-empty bytes")
    _check_list(raw["turns"], "turns", MAX_TURNS, _is_pair, "a [role, text] pair of texts")
    _check_map(raw["quality"], "quality", (float,))
    _check_map(raw["metadata"], "metadata", (str, int, float))


def _check_slots(record: Record) -> None:
    slots, images = count_image_slots(record.turns), len(record.images)
    message = f"a record of source {record.source!r} has {images} images and {slots} image slots"
    require_record(slots == images, f"{message}; write one {IMAGE_SLOT} in a user turn per image")


def _is_pair(item: Any) -> bool:
    return type(item) is list and list(map(type, item)) == [str, str]


def _check_list(value: Any, name: str, limit: int, valid: Callable[[Any], bool], kind: str) -> None:
    require_record(type(value) is list, f"record.{name} must be a list, this is a {type(value).__name__}")
    require_record(len(value) <= limit, f"record.{name} has {len(value)} items, the limit is {limit}")
    require_record(all(map(valid, value)), f"each of record.{name} must be {kind}")


def _check_map(value: Any, name: str, types: tuple[type, ...]) -> None:
    require_record(type(value) is dict, f"record.{name} must be a map, this is a {type(value).__name__}")
    require_record(len(value) <= MAX_ENTRIES, f"record.{name} has {len(value)} keys, the limit is {MAX_ENTRIES}")
    for key, entry in value.items():
        where, allowed = f"record.{name}[{key!r}]", " or ".join(kind.__name__ for kind in types)
        require_record(
            type(key) is str and type(entry) in types, f"{where} has type {type(entry).__name__}, not {allowed}"
        )
        require_record(
            type(entry) is not float or math.isfinite(entry), f"{where} is {entry}; only finite numbers are kept"
        )


def index_row(record: Record, tokenizer: Tokenizer) -> IndexRow:
    """What index and manifest keep of a record.

    Raises:
        UndecodableImage: the header of a picture cannot be read.
        ConversationError: the turns cannot become ids.
    """
    sizes = [image_size(image) for image in record.images]
    return IndexRow(
        image_heights=tuple(height for height, _ in sizes),
        image_widths=tuple(width for _, width in sizes),
        text_length=text_length(record.turns, tokenizer),
        task=record.task,
        content_hash=content_hash(record),
        pieces=measure_pieces(record.turns, tokenizer).to_numbers(),
        licence=record.licence,
        language=record.language,
    )


def write_source(
    directory: str | os.PathLike[str],
    records: Iterable[Record],
    *,
    name: str,
    licence: str,
    description: str,
    tokenizer: Tokenizer,
    records_per_shard: int = 4096,
    tiling: TilingConfig = _FULL_SIZE_TILING,
) -> Manifest:
    """Writes records, in order, as a source directory.

    Shards go to temporary names and are renamed when all are there; the manifest comes last, atomically. Equal records give
    equal files.

    Args:
        directory: made if need be; leftovers of a killed writer are replaced.
        records: the samples; one shard's index rows are held in memory, never the records.
        name: of the source, as mixtures call it.
        licence: of the source as a whole.
        description: one sentence for people.
        tokenizer: with its chat template, counts the text tokens; its fingerprint goes into index and manifest.
        records_per_shard: every shard but the last has this many.
        tiling: counts the manifest's statistics.

    Raises:
        RecordError: the directory already holds a complete source, there is no record, or a record cannot be written.
    """
    require_record(records_per_shard > 0, f"records_per_shard is {records_per_shard}; it must be positive")
    root = pathlib.Path(directory)
    complete = (root / MANIFEST).exists()
    require_record(
        not complete, f"{root} already holds a complete source; remove it (`remove_source`) or write elsewhere"
    )
    root.mkdir(parents=True, exist_ok=True)
    remove_source(root)
    rows = ((encode(record), _writable_row(record, tokenizer)) for record in records)
    shards: list[ShardSummary] = []
    while (first := next(rows, None)) is not None:
        part = itertools.chain((first,), itertools.islice(rows, records_per_shard - 1))
        shards.append(write_shard(root, f"shard-{len(shards):05d}", part, tokenizer.fingerprint, tiling))
    require_record(bool(shards), f"source {name!r} has no record; nothing was written to {root}")
    named = [_rename_shard(root, shard, place, len(shards)) for place, shard in enumerate(shards)]
    manifest = make_manifest(
        named, name=name, licence=licence, description=description, fingerprint=tokenizer.fingerprint, tiling=tiling
    )
    write_json(root / MANIFEST, dataclasses.asdict(manifest))
    return manifest


def _writable_row(record: Record, tokenizer: Tokenizer) -> IndexRow:
    try:
        return index_row(record, tokenizer)
    except (UndecodableImage, ConversationError) as error:
        raise RecordError(f"source {record.source!r}: {error}; leave the record out before writing") from error


def write_shard(
    root: pathlib.Path,
    stem: str,
    records: Iterable[tuple[bytes, IndexRow]],
    fingerprint: str,
    tiling: TilingConfig,
) -> ShardSummary:
    """Writes `stem.array_record` and `stem.index.arrow` into `root`, under temporary names until both are whole.

    Args:
        root: an existing local directory.
        stem: of the file names, `shard-00000-of-00004` or `shard-00000`.
        records: encoded records with their rows, in order, at least one; only the rows are held in memory.
        fingerprint: of the tokenizer and template that counted the text.
        tiling: counts the statistics.
    """
    shard, index = root / f"{stem}.array_record", root / f"{stem}.index.arrow"
    rows: list[IndexRow] = []
    with contextlib.closing(array_record_module.ArrayRecordWriter(f"{shard}.tmp", _WRITER_OPTIONS)) as writer:
        for data, row in records:
            writer.write(data)
            rows.append(row)
    write_index(f"{index}.tmp", rows, fingerprint)
    for path in (shard, index):
        os.replace(f"{path}.tmp", path)
    entry = ShardEntry(shard.name, len(rows), shard.stat().st_size, file_checksum(shard), file_checksum(index))
    return ShardSummary(
        entry=entry,
        images=sum(len(row.image_heights) for row in rows),
        text_tokens=sum(row.text_length for row in rows),
        tasks=_count(row.task for row in rows),
        licences=_count(row.licence for row in rows),
        languages=_count(row.language for row in rows),
        statistics=count_rows(rows, tiling),
    )


def _count(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names))


def _rename_shard(root: pathlib.Path, shard: ShardSummary, place: int, shards: int) -> ShardSummary:
    """Gives a shard and its index their final names, now that the number of shards is known."""
    stem = shard_stem(place, shards)
    entry = dataclasses.replace(shard.entry, file=f"{stem}.array_record")
    os.replace(root / shard.entry.index_file, root / entry.index_file)
    os.replace(root / shard.entry.file, root / entry.file)
    return dataclasses.replace(shard, entry=entry)
