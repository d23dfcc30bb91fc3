"""One source on disk, open for reading: sizes from the memory-mapped index, records by random access, predicted α by hash."""

from __future__ import annotations

import bisect
import functools
import itertools
import os
import pathlib
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
from array_record.python import array_record_module
from jaxtyping import Int16

from data_pipelines.errors import RecordError
from data_pipelines.packing import Budget
from data_pipelines.pieces import Pieces, measure_pieces
from data_pipelines.records import MANIFEST, Record, ShardEntry, decode, file_checksum, read_manifest, verify_source
from data_pipelines.shard_index import ShardIndex, read_index
from data_pipelines.staged import fetched
from hypervl_jax.architecture import TilingConfig
from hypervl_jax.text.tokenizer import Tokenizer
from hypervl_jax.vision.anyres import ALPHA_UNIT, ImagePlan, alpha_to_milli, plan_image, prompt_tokens

_READER_OPTIONS = "readahead_buffer_size:0"
_READER_BUFFER = 32_768
_OPEN_READERS = 48
"""Shards of a source that a process keeps open: with twenty sources still below the usual limit of 1024 files."""

_OPEN_INDEXES = 1024
"""Indexes of a source that a process keeps mapped. A mapped index holds no file open."""

_CLUSTERS, _CLUSTER = 64, 64
"""Places in a source, and records at each, that statistics are taken from: few shards are opened however many there are."""

_CHECK_HELP = "copy the source again, or make it again"


class DamagedShard(RecordError):
    """A whole shard that cannot be used: no skip, the run stops."""


class Sizes(NamedTuple):
    """What packing knows of a record: (height, width) of its images in pixels, and its tokens without them."""

    images: list[tuple[int, int]]
    text_length: int


class Source:
    """A source directory, open for reading. Pickles as its path: every process maps the index and opens shards itself.

    Args:
        directory: holds the manifest, the shards and their indexes.
        fingerprint: of the tokenizer of this run, chat template included.
        check: whether to compare the record count of every index with the manifest; an index that is used is compared with its checksum.

    Raises:
        RecordError: not a complete source; a file has another size, or an index other records, than the manifest says; or
            the text was counted with another tokenizer or template.
    """

    def __init__(self, directory: str | os.PathLike[str], fingerprint: str, check: bool = True) -> None:
        self.directory = pathlib.Path(directory)
        self.fingerprint = fingerprint
        self.manifest = read_manifest(directory)
        if self.manifest.fingerprint != fingerprint:
            raise RecordError(
                f"{self.directory / MANIFEST} was counted with tokenizer and template {self.manifest.fingerprint!r}, this run uses {fingerprint!r}; "
                f"the packed lengths would be wrong: make the source again with this tokenizer, or use the tokenizer that lies with the data"
            )
        self._shards = [shard for shard in self.manifest.shards if shard.records]
        for shard in self._shards if check else ():
            self._check_count(shard, _index_rows(self.directory / shard.index_file))
        self._starts = list(itertools.accumulate((shard.records for shard in self._shards), initial=0))
        self._index = functools.lru_cache(_OPEN_INDEXES)(self._open_index)
        self._reader = functools.lru_cache(_OPEN_READERS)(self._open_reader)

    def __reduce__(self) -> tuple[type[Source], tuple[pathlib.Path, str, bool]]:
        return Source, (self.directory, self.fingerprint, False)

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def name(self) -> str:
        """The source's name: that of its directory, as mixtures call it."""
        return self.directory.name

    def sizes(self, record: int) -> Sizes:
        """Sizes of a record, from the index alone. Raises `DamagedShard` when that differs from its checksum."""
        shard, row = self._locate(record)
        index = self._index(shard)
        return Sizes(index.image_sizes(row), int(index.text_lengths[row]))

    def spread(self) -> list[int]:
        """Records from all over the source, for statistics: all of a small one, else 64 runs of 64 within one shard each."""
        if len(self) <= _CLUSTERS * _CLUSTER:
            return list(range(len(self)))
        places = (self._locate(cluster * len(self) // _CLUSTERS) for cluster in range(_CLUSTERS))
        runs = ((self._starts[shard], self._shards[shard].records, row) for shard, row in places)
        step = lambda records: max(1, records // _CLUSTER)
        return [
            start + (row + step(records) * i) % records
            for start, records, row in runs
            for i in range(min(_CLUSTER, records))
        ]

    def pieces(self, record: int, tokenizer: Tokenizer) -> Pieces:
        """Where a record may be cut, from the index; in a source that was made before indexes kept it, from the record.

        Raises:
            DamagedShard, RecordError: as `record`, in such a source; or the index is wrong.
        """
        shard, row = self._locate(record)
        numbers = self._index(shard).pieces(row)
        return measure_pieces(self.record(record).turns, tokenizer) if numbers is None else Pieces.from_numbers(numbers)

    def plans(self, record: int, alpha: int, tiling: TilingConfig) -> list[ImagePlan]:
        """AnyRes plan of each image of a record. `alpha` is in thousandths."""
        return _plans(self.sizes(record), alpha, tiling)

    def cost(self, record: int, alpha: int, tiling: TilingConfig) -> tuple[int, int]:
        """(LLM positions, tiles) that a record takes in a row. `alpha` is in thousandths."""
        sizes = self.sizes(record)
        plans = _plans(sizes, alpha, tiling)
        tokens = sizes.text_length + sum(prompt_tokens(plan, tiling) for plan in plans)
        return tokens, sum(plan.tiles for plan in plans)

    def record(self, record: int) -> Record:
        """Reads one record.

        Raises:
            DamagedShard: its whole shard cannot be used.
            RecordError: it alone cannot be read, or is no record of ours.
        """
        shard, row = self._locate(record)
        reader = self._reader(shard)
        try:
            data = reader.read([row])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            raise RecordError(f"record {row} of {self._path(shard)} cannot be read ({error}); {_CHECK_HELP}") from error
        return decode(data)

    def verify(self) -> None:
        """Compares every file with its checksum. Raises `RecordError` that names the first one that differs."""
        verify_source(self.directory)

    def alphas(self, table: pa.Table) -> Int16[np.ndarray, "n"]:
        """α of each record in thousandths by its content hash; 1000 where the table (`read_alphas`) has none."""
        hashes = pa.chunked_array(
            [self._index(shard).content_hashes for shard in range(len(self._shards))], pa.string()
        )
        places = pa.compute.index_in(hashes, value_set=table["content_hash"].combine_chunks())
        found = table["alpha"].combine_chunks().take(places.combine_chunks())
        return found.fill_null(ALPHA_UNIT).to_numpy(zero_copy_only=False).astype(np.int16)

    def _locate(self, record: int) -> tuple[int, int]:
        """(shard, row in the shard) of a record."""
        if not 0 <= record < len(self):
            raise IndexError(f"record {record} of source {self.name!r}, which has {len(self)}")
        shard = bisect.bisect_right(self._starts, record) - 1
        return shard, record - self._starts[shard]

    def _path(self, shard: int) -> pathlib.Path:
        return self.directory / self._shards[shard].file

    def _open_index(self, shard: int) -> ShardIndex:
        path = self.directory / self._shards[shard].index_file
        # This reads the file into the page cache, from which it is then mapped.
        if not path.is_file() or file_checksum(path) != self._shards[shard].index_checksum:
            raise DamagedShard(f"{path} is missing or differs from its checksum in the manifest; {_CHECK_HELP}")
        index = read_index(path, self.fingerprint)
        self._check_count(self._shards[shard], len(index))
        return index

    def _check_count(self, shard: ShardEntry, found: int) -> None:
        if found != shard.records:
            raise RecordError(
                f"{self.directory / shard.index_file} has {found} records, the manifest says {shard.records}; {_CHECK_HELP}"
            )

    def _open_reader(self, shard: int) -> array_record_module.ArrayRecordReader:
        # A truncated ArrayRecord opens without an error and says it has 0 records.
        expected = self._shards[shard].records
        try:
            path = fetched(self._path(shard), self._shards[shard].bytes)
        except RecordError as error:
            raise DamagedShard(str(error)) from error
        try:
            reader = array_record_module.ArrayRecordReader(
                str(path), options=_READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise DamagedShard(f"{path} cannot be opened ({error}); {_CHECK_HELP}") from error
        if reader.num_records() != expected:
            raise DamagedShard(
                f"{path} has {reader.num_records()} records, the manifest says {expected}; {_CHECK_HELP}"
            )
        return reader


def _plans(sizes: Sizes, alpha: int, tiling: TilingConfig) -> list[ImagePlan]:
    return [plan_image(height, width, alpha / ALPHA_UNIT, tiling) for height, width in sizes.images]


def _index_rows(path: pathlib.Path) -> int:
    """Records that an index says it has, from its metadata alone."""
    try:
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_file(file).get_batch(0).num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise RecordError(f"{path} is not a readable index ({error}); {_CHECK_HELP}") from error


def sampled_lengths(source: Source, budget: Budget, tiling: TilingConfig, splits: bool) -> list[int]:
    """LLM positions at α = 1 of records from all over a source, those that fit a row. What is to be split counts as whole rows.

    Raises:
        RecordError: the source is empty, or no record fits a row and none is to be split.
    """
    costs = [source.cost(record, ALPHA_UNIT, tiling) for record in source.spread()]
    fitting = [tokens for tokens, tiles in costs if budget.fits(tokens, tiles)]
    if not fitting and not (splits and costs):
        raise RecordError(
            f"source {source.name!r} has no record that fits a row of {budget.tokens} tokens and {budget.tiles} tiles ({len(costs)} tried); raise batch.length or batch.tiles"
        )
    return fitting or [budget.tokens]


def read_alphas(path: str | os.PathLike[str]) -> pa.Table:
    """The side table of predicted α: `content_hash` (32 hex digits) and `alpha`, in thousandths (int16).

    The file is Arrow IPC with the columns `content_hash` (string) and `alpha` (floating, in (0, 1]).

    Raises:
        RecordError: not such a file, or an α out of range.
    """
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all().select(["content_hash", "alpha"])
        table.validate(full=True)
        milli = [alpha_to_milli(alpha) for alpha in table["alpha"].to_pylist()]
        hashes = table["content_hash"].cast(pa.string())
    except (pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError) as error:
        raise RecordError(
            f"{path} is no table of predicted α ({error}); write an Arrow IPC file with columns content_hash and alpha"
        ) from error
    return pa.table({"content_hash": hashes, "alpha": pa.array(milli, pa.int16())})
