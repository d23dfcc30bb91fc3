"""The two Beam pipelines of an ingest, and the order in which they run.

    1. units of the source ─► read, filter, score, sign ─► staged records, a file per unit
    2. staged rows ─► exact duplicates ─► near duplicates ─► group by shard ─► shards and their indexes
    3. the manifest, from what 1 and 2 left; written last

A restart takes finished units and shards as they are and does the rest, so it ends with the same bytes. Before 2 the run makes the
output its own, so that of two runs into one output only one writes there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, StandardOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.transforms.environments import SubprocessSDKEnvironment

from data_pipelines.ingest import lists, staging, storage
from data_pipelines.ingest.config import IngestConfig
from data_pipelines.ingest.deduplication import DropExactDuplicates, NearDuplicates, rank
from data_pipelines.ingest.earlier import earlier_shards
from data_pipelines.ingest.errors import EXPECTED, IngestError
from data_pipelines.ingest.readers.registry import make_reader
from data_pipelines.ingest.reading import Reading, UnitStager, check_failure_rate, exclusions_path
from data_pipelines.ingest.samples import SourceTags
from data_pipelines.ingest.shards import ShardWriting, shard_count, shard_of, write_one_shard
from data_pipelines.records import MANIFEST, Manifest, ShardSummary, make_manifest
from hypervl_jax.architecture import TilingConfig
from hypervl_jax.text.tokenizer import Tokenizer

_NAMESPACE = "ingest"
_LIMITS = ("failure_limit", "damaged_files")
_LOCAL = "FnApiRunner"
"""Beam's engine on this machine. DirectRunner by its own name would first try to download another one (Prism)."""

_OUR_ERROR = re.compile(
    rf"(?:StorageError|{'|'.join(kind.__name__ for kind in EXPECTED)}): (.+?)(?: \[while running|\n|$)"
)


@dataclasses.dataclass(frozen=True)
class Ingest:
    """What to ingest, and where to.

    Attributes:
        source: `KIND:LOCATION`, a kind of `readers.registry.READERS`.
        options: of the reader.
        output: the source directory to make, `ROOT/train/NAME`.
        staging: where unfinished work lies.
        tags: name, task and language of the records.
        licence: of the source as a whole.
        description: one sentence for people.
        config: thresholds.
        tokenizer: counts the text.
        tiling: counts the manifest's statistics.
        shard_bytes: of records in a shard, about.
    """

    source: str
    options: Mapping[str, str]
    output: str
    staging: str
    tags: SourceTags
    licence: str
    description: str
    config: IngestConfig
    tokenizer: Tokenizer
    tiling: TilingConfig
    shard_bytes: int


def run(ingest: Ingest, options: PipelineOptions) -> Manifest:
    """Ingests a source, or what is left of it after a killed run, and returns the manifest.

    Raises:
        IngestError: the source cannot be read, too many of its samples cannot, nothing is left after filtering, the output
            cannot be written, is a complete source already or that of another run, another process is at work in the staging
            directory, or an unfinished ingest had other settings or other files.
    """
    _check_incomplete(ingest.output)
    storage.check_writable(ingest.output)
    units = tuple(make_reader(ingest.source, ingest.options).units())
    if not units:
        raise IngestError(f"{ingest.source} holds nothing of that kind; check the location")
    exclusions = lists.compile_lists(ingest.config)
    with storage.locked(ingest.staging):
        manifest = _run_alone(ingest, units, exclusions, options)
    storage.remove_tree(ingest.staging)
    return manifest


def _run_alone(
    ingest: Ingest, units: tuple[str, ...], exclusions: lists.Exclusions, options: PipelineOptions
) -> Manifest:
    """Runs what is left to run in the staging directory, which no other process of this machine uses meanwhile."""
    _check_incomplete(ingest.output)  # another process may have had the directory since the first look
    staging.open_staging(ingest.staging, _settings(ingest, units, exclusions))
    staging.check_owner(ingest.output, ingest.staging)
    exclusions.save(exclusions_path(ingest.staging))
    staging.write_tokenizer(ingest.staging, ingest.tokenizer)
    reading = _reading(ingest, units)
    reports = _stage_units(reading, options)[: len(units)]
    _check_reports(reports, ingest)
    _claim(ingest)
    selection = _write_shards(ingest, reading.count, options)
    return _finish(ingest, reports, selection)


def _check_incomplete(output: str) -> None:
    if storage.exists(storage.join(output, MANIFEST)):
        raise IngestError(f"{output} already holds a complete source; remove it or name another output")


def _claim(ingest: Ingest) -> None:
    """Makes the output ours. Another run may have completed it since the first look."""
    staging.claim(ingest.output, ingest.staging)
    try:
        _check_incomplete(ingest.output)
    except IngestError:
        staging.release(ingest.output)
        raise


def beam_options(runner: str, workers: int, flags: Sequence[str] = ()) -> PipelineOptions:
    """Beam's options for a runner; on this machine, `workers` processes."""
    if runner != "DirectRunner":
        return PipelineOptions([f"--runner={runner}", *flags])
    return PipelineOptions([f"--runner={_LOCAL}", f"--direct_num_workers={workers}", *flags])


def unknown_flags(flags: Sequence[str]) -> list[str]:
    """Those of Beam's flags that none of its runners knows. An ill value of a known one ends the process, as argparse does."""
    parsers: list[argparse.ArgumentParser] = []
    PipelineOptions(list(flags)).get_all_options(add_extra_args_fn=parsers.append)
    return parsers[0].parse_known_args(list(flags))[1]


def _runner(options: PipelineOptions) -> FnApiRunner | None:
    """Several processes on this machine, which end when this one does, however it does; None leaves the choice to the options."""
    if options.view_as(StandardOptions).runner != _LOCAL or options.view_as(DirectOptions).direct_num_workers == 1:
        return None
    # Beam's own worker processes outlive a killed parent by a minute and a half. `exec`: Beam starts them in a shell.
    command = f"exec {shlex.quote(sys.executable)} -m data_pipelines.ingest.beam_worker {os.getpid()}"
    return FnApiRunner(SubprocessSDKEnvironment.from_command_string(command))


def _reading(ingest: Ingest, units: tuple[str, ...]) -> Reading:
    return Reading(
        staging=ingest.staging,
        source=ingest.source,
        options=ingest.options,
        units=units,
        earlier=tuple(earlier_shards(ingest.config.earlier)),
        tags=ingest.tags,
        config=ingest.config,
    )


def _settings(ingest: Ingest, units: tuple[str, ...], exclusions: lists.Exclusions) -> dict[str, Any]:
    """Everything that the records depend on: not the limits, which may be raised when a run has stopped for one."""
    config = {name: value for name, value in dataclasses.asdict(ingest.config).items() if name not in _LIMITS}
    arrays = (exclusions.opt_out, exclusions.pictures, exclusions.questions)
    return {
        "source": ingest.source,
        "options": dict(ingest.options),
        "units": hashlib.sha256("\0".join(units).encode()).hexdigest(),
        "state of the source's files": _files_digest(ingest, units),
        "earlier": [shard.checksum for shard in earlier_shards(ingest.config.earlier)],
        "tags": dataclasses.asdict(ingest.tags),
        "licence": ingest.licence,
        "config": config,
        "exclusions": hashlib.sha256(b"\0".join(array.tobytes() for array in arrays)).hexdigest(),
        "tokenizer": ingest.tokenizer.fingerprint,
        "tiling": dataclasses.asdict(ingest.tiling),
        "shard_bytes": ingest.shard_bytes,
    }


def _files_digest(ingest: Ingest, units: Sequence[str]) -> str:
    """SHA-256 of size and version of the files that the units are, or that they are parts of."""
    files = units if all("/" in unit for unit in units) else storage.expand(ingest.source.partition(":")[2])
    return hashlib.sha256(json.dumps(storage.versions(files), sort_keys=True).encode()).hexdigest()


class _StageUnit(beam.DoFn):
    """Unit number -> its report, with its files staged."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    def setup(self) -> None:
        self._stager = UnitStager(self._reading)

    def process(self, unit: int) -> Iterator[staging.UnitReport]:
        report = self._stager.stage(unit)
        for name, count in {"records": report.records, **report.drops}.items():
            beam.metrics.Metrics.counter(_NAMESPACE, name).inc(count)
        yield report


def _stage_units(reading: Reading, options: PipelineOptions) -> list[staging.UnitReport]:
    """Stages the units that are not there yet; returns the reports of all, in order."""
    todo = [unit for unit in range(reading.count) if staging.read_unit(reading.staging, unit) is None]
    if todo:
        with _pipeline(options) as pipeline:
            units = pipeline | "units" >> beam.Create(todo) | "spread" >> beam.Reshuffle()
            _ = units | "read and filter" >> beam.ParDo(_StageUnit(reading))
    reports = [staging.read_unit(reading.staging, unit) for unit in range(reading.count)]
    missing = [unit for unit, report in enumerate(reports) if report is None]
    if missing:
        raise IngestError(f"unit {missing[0]} of {reading.staging} is missing or damaged; give the same command again")
    return reports


def _check_reports(reports: Sequence[staging.UnitReport], ingest: Ingest) -> None:
    total = sum_reports(reports)
    check_failure_rate(total, ingest.config)
    if not total.samples:
        raise IngestError(
            f"{ingest.source} holds no sample at all (units read: {len(reports)}); check that it is what --source says"
        )
    if not total.records:
        raise IngestError(
            f"no sample is left of {total.samples}: {dict(sorted(total.drops.items()))}; loosen the filters"
        )


def sum_reports(reports: Iterable[staging.UnitReport]) -> staging.UnitReport:
    """The counts of several units together."""
    reports = list(reports)
    examples = {reason: detail for report in reversed(reports) for reason, detail in report.examples.items()}
    return staging.UnitReport(
        samples=sum(report.samples for report in reports),
        records=sum(report.records for report in reports),
        failures=sum((Counter(report.failures) for report in reports), Counter()),
        drops=sum((Counter(report.drops) for report in reports), Counter()),
        examples=examples,
    )


def _write_shards(ingest: Ingest, units: int, options: PipelineOptions) -> dict[str, Any]:
    """Runs the second pipeline; returns the number of shards and the duplicates left out."""
    writing = ShardWriting(ingest.staging, ingest.output, ingest.tokenizer.fingerprint, ingest.tiling)
    with _pipeline(options) as pipeline:
        numbers = pipeline | "units" >> beam.Create(range(units)) | "spread" >> beam.Reshuffle()
        rows = numbers | "rows" >> beam.FlatMap(lambda unit, where: staging.read_rows(where, unit), ingest.staging)
        unique = rows | "exact" >> DropExactDuplicates()
        near = unique | "near" >> NearDuplicates(ingest.config)
        # What follows compares no texts, and their signatures are most of a row.
        ranked = unique | "by rank" >> beam.Map(lambda row: (rank(row), row._replace(text_signature=b"")))
        marks = near | "marks" >> beam.Map(lambda name: (name, True))
        judged = {"row": ranked, "mark": marks} | "join" >> beam.CoGroupByKey() | "judge" >> beam.FlatMap(_judge)
        kept = judged | "stay" >> beam.Filter(lambda item: not item[0]) | "kept rows" >> beam.Map(lambda item: item[1])
        count = kept | "lengths" >> beam.Map(lambda row: row.length) | "bytes" >> beam.CombineGlobally(sum)
        shards = beam.pvalue.AsSingleton(count | "shards" >> beam.Map(shard_count, ingest.shard_bytes))
        by_shard = kept | "by shard" >> beam.Map(lambda row, shards: (shard_of(row.content_hash, shards), row), shards)
        _ = by_shard | "group" >> beam.GroupByKey() | "write" >> beam.ParDo(_WriteShard(writing), shards)
        _save_selection(pipeline, rows, judged, shards, storage.join(ingest.staging, "drops.json"))
    return json.loads(storage.read_bytes(storage.join(ingest.staging, "drops.json")))


def _judge(item: tuple[str, Mapping[str, Iterable[Any]]]) -> Iterator[tuple[str, staging.StagedRow]]:
    """(reason to leave it out or empty, row); nothing for a row of an earlier source."""
    _, found = item
    dropped = any(True for _ in found["mark"])
    for row in found["row"]:
        if row.earlier:
            continue
        kind = "image" if row.image_hashes else "text"
        yield f"duplicate:{kind}" if dropped else "", row


class _WriteShard(beam.DoFn):
    """(shard, its rows) -> nothing, with its files written."""

    def __init__(self, writing: ShardWriting) -> None:
        self._writing = writing

    def process(self, group: tuple[int, Iterable[staging.StagedRow]], shards: int) -> None:
        shard, rows = group
        write_one_shard(self._writing, shard, shards, rows)
        beam.metrics.Metrics.counter(_NAMESPACE, "shards").inc()


def _save_selection(
    pipeline: beam.Pipeline,
    rows: beam.PCollection[staging.StagedRow],
    judged: beam.PCollection[tuple[str, staging.StagedRow]],
    shards: beam.pvalue.AsSingleton,
    path: str,
) -> None:
    """Writes how many rows there were, how many were judged how, and the number of shards."""
    reasons = judged | "reasons" >> beam.Map(lambda item: item[0]) | "counts" >> beam.combiners.Count.PerElement()
    own = rows | "own rows" >> beam.Filter(lambda row: not row.earlier)
    total = own | "staged rows" >> beam.combiners.Count.Globally()
    _ = (
        pipeline
        | "once" >> beam.Create([path])
        | "save" >> beam.Map(_save, beam.pvalue.AsDict(reasons), beam.pvalue.AsSingleton(total), shards)
    )


def _save(path: str, reasons: Mapping[str, int], rows: int, shards: int) -> None:
    drops = {reason: count for reason, count in reasons.items() if reason}
    exact = rows - sum(reasons.values())
    staging.write_json(path, {"shards": shards, "drops": drops | ({"duplicate:exact": exact} if exact else {})})


def _finish(ingest: Ingest, reports: Iterable[staging.UnitReport], selection: Mapping[str, Any]) -> Manifest:
    """Checks that all shards are there, removes what is not theirs, and writes the manifest."""
    total = sum_reports(reports)
    shards = [staging.read_shard(ingest.staging, ingest.output, shard) for shard in range(selection["shards"])]
    manifest = make_manifest(
        # A small set may leave a range of hashes empty: that shard does not exist.
        [shard for shard in shards if shard is not None],
        name=ingest.tags.name,
        licence=ingest.licence,
        description=ingest.description,
        fingerprint=ingest.tokenizer.fingerprint,
        tiling=ingest.tiling,
        drops=Counter(total.drops) + Counter(selection["drops"]),
        origin=_origin(ingest),
    )
    if manifest.samples_read != total.samples:
        raise IngestError(
            f"{ingest.output}: {manifest.samples_read} records and drops for {total.samples} samples, so a shard is missing; "
            f"give the same command again"
        )
    if not manifest.records:
        raise IngestError(
            f"all {manifest.samples_read} samples are left out: {dict(manifest.drops)}; nothing is new here"
        )
    staging.check_owner(ingest.output, ingest.staging)
    _check_incomplete(ingest.output)
    _remove_strangers(ingest.output, [shard for shard in shards if shard is not None])
    staging.write_json(storage.join(ingest.output, MANIFEST), dataclasses.asdict(manifest))
    staging.release(ingest.output)
    return manifest


def _origin(ingest: Ingest) -> dict[str, str]:
    settings = json.dumps(dataclasses.asdict(ingest.config), sort_keys=True)
    options = json.dumps(dict(ingest.options), sort_keys=True)
    excluded = json.dumps(lists.load_lists(exclusions_path(ingest.staging)).counts())
    return {"source": ingest.source, "options": options, "config": settings, "excluded": excluded}


def _remove_strangers(output: str, shards: Iterable[ShardSummary]) -> None:
    """Removes what killed runs left in the output: files in the making, and shards of another number of shards."""
    storage.remove_unfinished(output)
    ours = {name for shard in shards for name in (shard.entry.file, shard.entry.index_file)}
    for name in storage.names_in(output):
        if name.startswith("shard-") and name not in ours:
            storage.remove(storage.join(output, name))


@contextlib.contextmanager
def _pipeline(options: PipelineOptions) -> Iterator[beam.Pipeline]:
    """A Beam pipeline whose failure is the one sentence of ours that a worker raised, where there is one."""
    try:
        with beam.Pipeline(_runner(options), options) as pipeline:
            yield pipeline
    except EXPECTED as failure:
        raise IngestError(str(failure).partition(" [while running")[0]) from failure
    except Exception as failure:
        # Workers in processes of their own send a traceback as text, and every runner has its own error for it.
        found = _OUR_ERROR.findall(str(failure))
        if not found:
            raise
        raise IngestError(found[-1]) from failure
