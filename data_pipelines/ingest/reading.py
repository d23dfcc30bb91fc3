"""One unit of a source, from its reader through every filter to staged records with signatures."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

import numpy as np
import xxhash
from jaxtyping import UInt8

from data_pipelines.ingest import filters, lists, staging
from data_pipelines.ingest.config import IngestConfig
from data_pipelines.ingest.earlier import EarlierShard, earlier_rows, signatures
from data_pipelines.ingest.errors import FILE_DAMAGED, IngestError, Skip, unreadable
from data_pipelines.ingest.readers.registry import make_reader
from data_pipelines.ingest.samples import Sample, SourceTags, to_record
from data_pipelines.ingest.scorers import BATCH, Scorer, load_scorer, score
from data_pipelines.ingest.signatures import image_hash
from data_pipelines.records import Record, RecordError, encode, index_row
from hypervl_jax.text.conversation import ConversationError

FAILURES_THAT_STOP = 1000
"""A single unit stops the ingest only after so many failures; the whole source is judged when all is read."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a worker needs to stage units.

    Attributes:
        staging: the staging directory.
        source: `KIND:LOCATION`.
        options: of the reader.
        units: all units of the source.
        earlier: shards of sources that were ingested before, units too, after those of the source.
        tags: common to all records.
        config: thresholds.
    """

    staging: str
    source: str
    options: Mapping[str, str]
    units: tuple[str, ...]
    earlier: tuple[EarlierShard, ...]
    tags: SourceTags
    config: IngestConfig

    @property
    def count(self) -> int:
        """Units in all."""
        return len(self.units) + len(self.earlier)


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A record that has passed all filters but the scorers."""

    record: Record
    pictures: list[UInt8[np.ndarray, "h w 3"]]
    image_hashes: tuple[int, ...]


class UnitStager:
    """Stages units, one after another; made once in each worker."""

    def __init__(self, reading: Reading) -> None:
        filters.check_languages(reading.config)
        self._reading = reading
        self._reader = make_reader(reading.source, reading.options)
        self._exclusions = lists.load_lists(exclusions_path(reading.staging))
        self._tokenizer = staging.read_tokenizer(reading.staging)
        self._scorers: list[Scorer] = [load_scorer(config) for config in reading.config.scorers]

    def stage(self, unit: int) -> staging.UnitReport:
        """Reads a unit and writes its files.

        Raises:
            IngestError: the unit cannot be opened, or too many of its samples cannot be read.
        """
        tally = staging.UnitTally()
        if unit >= len(self._reading.units):
            shard = self._reading.earlier[unit - len(self._reading.units)]
            rows = earlier_rows(shard, unit, self._reading.config)
            return staging.write_unit(self._reading.staging, unit, ((b"", row) for row in rows), tally)
        records = self._rows(unit, self._scored(self._candidates(unit, tally), tally), tally)
        return staging.write_unit(self._reading.staging, unit, records, tally)

    def _candidates(self, unit: int, tally: staging.UnitTally) -> Iterator[_Candidate]:
        for item in self._reader.read(self._reading.units[unit]):
            tally.samples += 1
            try:
                yield self._candidate(item)
            except Skip as skip:
                tally.drop(skip, item.key if isinstance(item, Sample) else "")
                self._check_failures(tally)

    def _candidate(self, item: Sample | Skip) -> _Candidate:
        """Filters from cheap to dear: sizes and text first, pictures decoded after them."""
        if isinstance(item, Skip):
            raise item
        config = self._reading.config
        record = to_record(item, self._reading.tags, config)
        filters.check_sizes(record, config)
        filters.check_text(record, config)
        record = filters.with_language(record, config)
        pictures = filters.decode_pictures(record, config)
        hashes = tuple(map(image_hash, pictures))
        self._exclusions.check(record, hashes)
        return _Candidate(record, pictures if self._scorers else [], hashes)

    def _scored(self, candidates: Iterator[_Candidate], tally: staging.UnitTally) -> Iterator[_Candidate]:
        """The candidates with their scores, less those beyond the limits."""
        if not self._scorers:
            yield from candidates
            return
        while batch := list(itertools.islice(candidates, BATCH)):
            records, pictures = [item.record for item in batch], [item.pictures for item in batch]
            named = zip(self._reading.config.scorers, self._scorers, strict=True)
            columns = [score(config.name, scorer, records, pictures) for config, scorer in named]
            for item, *scores in zip(batch, *columns, strict=True):
                try:
                    yield dataclasses.replace(item, record=self._with_scores(item.record, scores))
                except Skip as skip:
                    tally.drop(skip, str(item.record.metadata["key"]))

    def _with_scores(self, record: Record, scores: list[float]) -> Record:
        for config, value in zip(self._reading.config.scorers, scores, strict=True):
            low = config.minimum is not None and value < config.minimum
            if low or (config.maximum is not None and value > config.maximum):
                raise Skip(f"score:{config.name}", f"{value:g}")
        names = (config.name for config in self._reading.config.scorers)
        return dataclasses.replace(record, quality=dict(zip(names, scores, strict=True)))

    def _rows(
        self, unit: int, candidates: Iterator[_Candidate], tally: staging.UnitTally
    ) -> Iterator[tuple[bytes, staging.StagedRow]]:
        """Encoded records with their rows."""
        offset = 0
        for candidate in candidates:
            try:
                data, row = self._row(unit, offset, candidate)
            except Skip as skip:
                tally.drop(skip, str(candidate.record.metadata["key"]))
                self._check_failures(tally)
                continue
            offset += len(data)
            yield data, row

    def _row(self, unit: int, offset: int, candidate: _Candidate) -> tuple[bytes, staging.StagedRow]:
        record = candidate.record
        try:
            data, row = encode(record), index_row(record, self._tokenizer)
        except (RecordError, ConversationError) as error:
            raise unreadable("not_a_record", str(error)) from error
        signed = signatures(record, candidate.image_hashes, self._reading.config)
        checksum = xxhash.xxh3_64_intdigest(data)
        row = staging.StagedRow(unit, offset, len(data), checksum, **signed, **dataclasses.asdict(row))
        return data, row

    def _check_failures(self, tally: staging.UnitTally) -> None:
        if tally.failures.total() >= FAILURES_THAT_STOP:
            check_failure_rate(tally.report(0), self._reading.config)


def exclusions_path(directory: str) -> str:
    """The compiled lists in a staging directory."""
    return f"{directory.rstrip('/')}/exclusions.npz"


def check_failure_rate(report: staging.UnitReport, config: IngestConfig) -> None:
    """Raises `IngestError` with the commonest reasons when too large a share of samples, or too many files, cannot be read."""
    damaged = report.failures.get(FILE_DAMAGED, 0)
    if damaged > config.damaged_files:
        raise IngestError(
            f"damaged files: {damaged}, such as {report.examples.get(FILE_DAMAGED)}; what follows the damage is lost, however "
            f"many samples that is: fetch the files again, or set damaged_files to {damaged}"
        )
    failures = sum(report.failures.values()) - damaged
    if failures <= config.failure_limit * report.samples:
        return
    commonest = sorted(report.failures.items(), key=lambda item: (-item[1], item[0]))[:3]
    reasons = "; ".join(f"{reason} {count}, such as {report.examples.get(reason)}" for reason, count in commonest)
    raise IngestError(
        f"{failures} of {report.samples} samples cannot be read, over the limit of {config.failure_limit:.1%}: {reasons}; "
        f"check that the source is what --source says, or raise failure_limit"
    )
