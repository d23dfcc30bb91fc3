"""What an ingest leaves between its two pipelines, so that a killed one goes on where it was.

    STAGING/settings.json            what is ingested and how; a restart with anything else is refused
    STAGING/run                      a name that no other run has; `OWNER` in the output bears it too
    STAGING/exclusions.npz           opt-out and held-out lists, compiled
    STAGING/tokenizer/               counts the text
    STAGING/units/00012.records      encoded records of one unit, one after another
    STAGING/units/00012.rows         Arrow: place, index row and signatures of each of them
    STAGING/units/00012.json         counts, and checksums of both files; written last: without it the unit is not there
    STAGING/drops.json               duplicates left out, and the number of shards
    STAGING/shards/00003.json        summary of a finished shard, whose files lie in the output already

Records are written once here and once in their shard; between the two only rows travel. A row has some 200 bytes (700 for plain
text, whose MinHash it holds), so grouping a set by its signatures moves no pictures.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import xxhash

from data_pipelines.bulk_tokenizer import bulk_tokenizer
from data_pipelines.ingest import storage
from data_pipelines.ingest.errors import IngestError, Skip
from data_pipelines.records import IndexRow, ShardSummary, file_checksum
from hypervl_jax.text.tokenizer import Tokenizer, load_tokenizer

OWNER = "unfinished.json"
"""In an output that is not complete: which run writes there, and where its staging lies."""

_LISTED = pa.list_(pa.int32())
_ROW_SCHEMA = pa.schema(
    [
        ("unit", pa.int32()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("checksum", pa.uint64()),
        ("image_heights", _LISTED),
        ("image_widths", _LISTED),
        ("text_length", pa.int32()),
        ("task", pa.string()),
        ("content_hash", pa.string()),
        ("pieces", _LISTED),
        ("licence", pa.string()),
        ("language", pa.string()),
        ("image_hashes", pa.list_(pa.uint64())),
        ("text_fingerprint", pa.uint64()),
        ("text_signature", pa.binary()),
    ]
)


class StagedRow(NamedTuple):
    """One staged record: where its bytes lie, its index row, and its signatures.

    `checksum` is XXH3-64 of its bytes. `text_fingerprint` is equal for records of the same words. `text_signature` is the
    MinHash of a record without pictures, empty for others.
    """

    unit: int
    offset: int
    length: int
    checksum: int
    image_heights: tuple[int, ...]
    image_widths: tuple[int, ...]
    text_length: int
    task: str
    content_hash: str
    pieces: tuple[int, ...]
    licence: str
    language: str
    image_hashes: tuple[int, ...]
    text_fingerprint: int
    text_signature: bytes

    @property
    def earlier(self) -> bool:
        """Whether it is of a source that was ingested before: it has no bytes here, and is never written again."""
        return not self.length

    def index_row(self) -> IndexRow:
        """What index and manifest keep of it."""
        return IndexRow(**{field.name: getattr(self, field.name) for field in dataclasses.fields(IndexRow)})


@dataclasses.dataclass(frozen=True)
class UnitReport:
    """What became of one unit's samples.

    `failures` are those of the `drops` that count against the failure limit; `examples` has one sample of each reason.
    """

    samples: int
    records: int
    failures: Mapping[str, int]
    drops: Mapping[str, int]
    examples: Mapping[str, str]


def unit_path(staging: str, unit: int, ending: str) -> str:
    """A file of a unit."""
    return storage.join(staging, "units", f"{unit:05d}.{ending}")


def shard_path(staging: str, shard: int) -> str:
    """The summary of a shard."""
    return storage.join(staging, "shards", f"{shard:05d}.json")


def write_unit(staging: str, unit: int, records: Iterator[tuple[bytes, StagedRow]], tally: UnitTally) -> UnitReport:
    """Writes the files of a unit, its JSON last. `tally` counts while `records` are drawn."""
    with storage.new_directory(storage.join(staging, "units")) as directory:
        rows = []
        with (directory / "records").open("wb") as file:
            for data, row in records:
                file.write(data)
                rows.append(row)
        (directory / "rows").write_bytes(_rows_bytes(rows))
        report = tally.report(len(rows))
        checksums = {name: file_checksum(directory / name) for name in ("records", "rows")}
        for name in checksums:
            storage.publish(directory / name, unit_path(staging, unit, name))
    sidecar = dataclasses.asdict(report) | {"checksums": checksums}
    storage.write_bytes(unit_path(staging, unit, "json"), json.dumps(sidecar, sort_keys=True).encode())
    return report


class UnitTally:
    """Counts a unit's samples while they pass."""

    def __init__(self) -> None:
        self.samples = 0
        self.failures: Counter[str] = Counter()
        self._drops: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def drop(self, skip: Skip, key: str) -> None:
        """Counts a skip; the first of each reason is kept as an example."""
        self._drops[skip.reason] += 1
        self.failures[skip.reason] += skip.failure
        self._examples.setdefault(skip.reason, f"{key} {skip.detail}".strip()[:200])

    def report(self, records: int) -> UnitReport:
        """The counts."""
        return UnitReport(self.samples, records, dict(+self.failures), dict(self._drops), dict(self._examples))


def read_unit(staging: str, unit: int) -> UnitReport | None:
    """The report of a finished unit; None when it is not there, or its rows are not those that were written.

    Its records have checksums of their own, which are compared when they are read.
    """
    try:
        raw = json.loads(storage.read_bytes(unit_path(staging, unit, "json")))
        rows = storage.read_bytes(unit_path(staging, unit, "rows"))
        intact = xxhash.xxh3_128_hexdigest(rows) == raw.pop("checksums")["rows"]
        whole = storage.size(unit_path(staging, unit, "records")) == sum(row.length for row in _parse_rows(rows))
        return UnitReport(**raw) if intact and whole else None
    except (storage.StorageError, ValueError, KeyError, TypeError, AttributeError):
        return None


def read_rows(staging: str, unit: int) -> list[StagedRow]:
    """The rows of a finished unit."""
    return _parse_rows(storage.read_bytes(unit_path(staging, unit, "rows")))


def _rows_bytes(rows: Sequence[StagedRow]) -> bytes:
    buffer = io.BytesIO()
    table = pa.Table.from_pylist([row._asdict() for row in rows], _ROW_SCHEMA)
    with pa.ipc.new_file(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


def _parse_rows(data: bytes) -> list[StagedRow]:
    columns = pa.ipc.open_file(data).read_all().to_pydict()
    lists = ("image_heights", "image_widths", "pieces", "image_hashes")
    values = [map(tuple, columns[name]) if name in lists else columns[name] for name in StagedRow._fields]
    return list(map(StagedRow, *values))


def read_records(staging: str, rows: Sequence[StagedRow]) -> list[bytes]:
    """The encoded records of some rows, in their order; each unit is asked once.

    Raises:
        IngestError: bytes differ from their checksum.
    """
    found: dict[tuple[int, int], bytes] = {}
    for unit in sorted({row.unit for row in rows}):
        wanted = [row for row in rows if row.unit == unit]
        path = unit_path(staging, unit, "records")
        pieces = storage.read_ranges(path, [(row.offset, row.offset + row.length) for row in wanted])
        for row, data in zip(wanted, pieces, strict=True):
            if xxhash.xxh3_64_intdigest(data) != row.checksum:
                raise IngestError(f"{path} is damaged at byte {row.offset}; remove it and give the same command again")
            found[unit, row.offset] = data
    return [found[row.unit, row.offset] for row in rows]


def read_shard(staging: str, output: str, shard: int) -> ShardSummary | None:
    """The summary of a finished shard; None when it is not there, or its files are not those that were written."""
    try:
        summary = ShardSummary.from_json(json.loads(storage.read_bytes(shard_path(staging, shard))))
        entry = summary.entry
        for name, checksum in ((entry.file, entry.checksum), (entry.index_file, entry.index_checksum)):
            with storage.local_copy(storage.join(output, name)) as path:
                if file_checksum(path) != checksum:
                    return None
        return summary
    except (storage.StorageError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_json(path: str, value: Any) -> None:
    """Writes JSON whole or not at all."""
    storage.write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def open_staging(staging: str, settings: Mapping[str, Any]) -> None:
    """Begins a staging directory, or goes on with one of the same settings.

    Raises:
        IngestError: it was begun with other settings; the message names the first that differs, with both values.
    """
    path, wanted = storage.join(staging, "settings.json"), json.loads(json.dumps(settings))
    if not storage.exists(path):
        write_json(path, wanted)
        return
    found = json.loads(storage.read_bytes(path))
    if found != wanted:
        name, before, now = _first_difference(found, wanted)
        raise IngestError(
            f"{staging} was begun with another {name.removeprefix('.')} ({_short(before)}, now {_short(now)}); "
            f"give the command that began it, or remove the directory and the unfinished output to start again"
        )


def _first_difference(found: Any, wanted: Any) -> tuple[str, Any, Any]:
    """The first leaf in which two JSON values differ: its place as in `.config.scorers[0].maximum`, and both values."""
    both = (found, wanted)
    if all(isinstance(value, dict) for value in both):
        places = [(f".{name}", found.get(name), wanted.get(name)) for name in sorted(found.keys() | wanted.keys())]
    elif all(isinstance(value, list) for value in both) and len(found) == len(wanted):
        places = [(f"[{place}]", *pair) for place, pair in enumerate(zip(*both, strict=True))]
    else:
        return "", found, wanted
    place, *values = next(item for item in places if item[1] != item[2])
    below, before, now = _first_difference(*values)
    return place + below, before, now


def claim(output: str, staging: str) -> None:
    """Makes an output that of the run in `staging`, until `release`; a restart of that run has it already.

    Raises:
        IngestError: another run has it.
    """
    owner = {"run": _run_name(staging), "staging": staging}
    if not storage.create(storage.join(output, OWNER), json.dumps(owner).encode()):
        check_owner(output, staging)


def check_owner(output: str, staging: str) -> None:
    """Raises `IngestError` if an output is that of another run than the one in `staging`."""
    path = storage.join(output, OWNER)
    if not storage.exists(path):
        return
    try:
        owner = json.loads(storage.read_bytes(path))
        run, where = owner["run"], owner["staging"]
    except (ValueError, KeyError, TypeError):
        run, where = None, "an unknown place"
    if run != _run_name(staging):
        raise IngestError(
            f"another ingest writes {output}, with its staging in {where}; wait for it, or finish it by the command that began it, "
            f"or, if it is given up and no longer runs, remove {output} and that staging directory"
        )


def release(output: str) -> None:
    """Ends the claim of `claim`."""
    storage.remove(storage.join(output, OWNER))


def _run_name(staging: str) -> str:
    """The name of the run in a staging directory: made when it is first asked for, and kept over restarts."""
    path = storage.join(staging, "run")
    storage.create(path, uuid.uuid4().hex.encode())
    return storage.read_bytes(path).decode()


def write_tokenizer(staging: str, tokenizer: Tokenizer) -> None:
    """Puts the tokenizer where workers find it: it is too large to travel with the description of a pipeline."""
    with tempfile.TemporaryDirectory(prefix="hypervl-ingest-") as directory:
        tokenizer.save(directory)
        for path in pathlib.Path(directory).iterdir():
            storage.write_bytes(storage.join(staging, "tokenizer", path.name), path.read_bytes())


def read_tokenizer(staging: str) -> Tokenizer:
    """The tokenizer that `write_tokenizer` put there."""
    where = storage.join(staging, "tokenizer")
    with tempfile.TemporaryDirectory(prefix="hypervl-ingest-") as directory:
        for name in storage.names_in(where):
            (pathlib.Path(directory) / name).write_bytes(storage.read_bytes(storage.join(where, name)))
        return bulk_tokenizer(load_tokenizer(directory))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
