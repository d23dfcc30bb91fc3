"""`python -m tools.label_resolutions`: what a model loses on each image at ten resolutions, the labels of the compressor (VRC).

    record with one image ─► 10 ratios, once blind, and its paraphrased answers ─► packed into rows ─► loss of the answer by segment

Each image is laid out by the training pipeline itself (`data_pipelines.transforms.fill_row`), so the model sees exactly what it
would see in training at that α. The whole curves are written (`tools.label_files`), so that ε and floor can be chosen later. A killed
run goes on with the first file that is missing; with --shard, several hosts share the files among them and the directory is the same.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from data_pipelines.manifest import MANIFEST as RECORDS_MANIFEST
from data_pipelines.records import RecordError, write_json
from data_pipelines.sources import Source
from experiments import storage
from hypervl_jax.architecture import BRANCHES, ConfigError
from hypervl_jax.text.tokenizer import TokenizerError
from hypervl_jax.training import checkpoint as checkpoints
from hypervl_jax.training.batch import BatchShape
from hypervl_jax.training.compression import (
    DEFAULT_EPSILON,
    DEFAULT_FLOOR,
    LabelSummary,
    ResolutionLabel,
    summarise_labels,
)
from tools.label_files import FORMAT_VERSION, MANIFEST, SUFFIX, LabelError, claim, read_file, write_labels
from tools.label_models import Labeller, ReferenceModel

IMAGES_PER_FILE = 128
"""What a killed run may lose."""

ReportProgress = Callable[[str, int, int], None]
"""Called with the source, the images done and the images in all."""

EXPLAINED = (LabelError, checkpoints.CheckpointError, TokenizerError, ConfigError, storage.StorageError)
"""Errors that explain themselves."""

USAGE_ERROR = 2


class Shard(NamedTuple):
    """Which part of the files this process makes: every `count`-th from `index` on."""

    index: int
    count: int


WHOLE = Shard(0, 1)


class LabelRun(NamedTuple):
    """Labels that are there, in order; by source, the images left out; labels found on disk; files that other shards have yet to make.

    An image is left out when it cannot be read or is too large for a row.
    """

    labels: list[ResolutionLabel]
    left_out: dict[str, int]
    resumed: int
    missing: int


def single_image_records(source: Source, limit: int) -> list[int]:
    """Records with exactly one image, at most `limit` (0: all) spread evenly over the source."""
    records = [record for record in range(len(source)) if len(source.sizes(record).images) == 1]
    if not limit or limit >= len(records):
        return records
    return [records[place * len(records) // limit] for place in range(limit)]


def label(
    checkpoint: str | os.PathLike[str],
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    sources: Sequence[str],
    split: str = "train",
    encoder: str = "base",
    limit: int = 0,
    step: int | None = None,
    shape: BatchShape | None = None,
    tile_chunk: int = 8,
    shard: Shard = WHOLE,
    progress: ReportProgress = lambda source, done, total: None,
) -> LabelRun:
    """Labels the images of some sources with a checkpoint of ours; see `label_with` for what is not said here.

    Args:
        checkpoint: a run's workdir or its `checkpoints` directory.
        encoder: the branch that sees the images.
        step: which checkpoint; the newest when None.
        shape: of a batch; `training_shape` when None.
        tile_chunk: tiles of each row that pass through the tower together.

    Raises:
        LabelError: `output` holds labels of another question, or nothing could be labelled.
        CheckpointError, RecordError, TokenizerError, ConfigError: an input cannot be used.
    """
    home = checkpoints.checkpoint_home(checkpoint)
    model = Labeller(home, checkpoints.find_step(home, step), encoder, shape, tile_chunk)
    return label_with(model, data, output, sources=sources, split=split, limit=limit, shard=shard, progress=progress)


def label_with(
    model: ReferenceModel,
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    sources: Sequence[str],
    split: str = "train",
    limit: int = 0,
    shard: Shard = WHOLE,
    progress: ReportProgress = lambda source, done, total: None,
) -> LabelRun:
    """Labels the images of some sources, or goes on where a killed run stopped.

    Args:
        model: that is asked.
        data: root of the data; sources lie in `data/split/name`.
        output: directory of the labels, made if need be; several processes may share it, each with its `shard`.
        sources: by name, in the order of the labels.
        split: of the data.
        limit: images of each source at most, spread evenly over it; 0 for all. Records with several images or none have no
            label of their own.
        shard: part of the files that this process makes. Who makes the last one completes the directory.
        progress: told after each file.

    Raises:
        LabelError: `output` holds labels of another question, or nothing could be labelled.
        RecordError: a source cannot be used.
    """
    opened = {name: model.open(pathlib.Path(data) / split / name) for name in sources}
    chosen = {name: single_image_records(source, limit) for name, source in opened.items()}
    pieces = [(name, piece) for name in sources for piece in _pieces(name, chosen[name])]
    question = {
        "format_version": FORMAT_VERSION,
        **model.identity,
        "split": split,
        "limit": limit,
        "sources": {name: _data_digest(source) for name, source in opened.items()},
        "files": [file for _, (file, _) in pieces],
    }
    directory, resumed, done = claim(pathlib.Path(output), question), 0, 0
    mine = pieces[shard.index :: shard.count]
    for name, (file, records) in mine:
        resumed += _label_file(directory / file, model, opened[name], records)
        done += len(records)
        progress(name, done, sum(len(records) for _, (_, records) in mine))
    return _collect(directory, question, pieces, resumed)


def _collect(
    directory: pathlib.Path,
    question: Mapping[str, object],
    pieces: Sequence[tuple[str, tuple[str, Sequence[int]]]],
    resumed: int,
) -> LabelRun:
    """What all files hold that are there; the manifest is written when none is missing."""
    labels, left_out, missing = [], {name: 0 for name, _ in pieces}, 0
    for name, (file, records) in pieces:
        if not (directory / file).exists():
            missing += 1
            continue
        found = read_file(directory / file)
        labels += found
        left_out[name] += len(records) - len(found)
    if not missing and not labels:
        raise LabelError(
            f"no image of {', '.join(left_out)} could be labelled; does any fit a row of the training run?"
        )
    if not missing:
        write_json(directory / MANIFEST, {**question, "left_out": left_out})
    return LabelRun(labels, left_out, resumed, missing)


def _pieces(name: str, records: Sequence[int]) -> list[tuple[str, Sequence[int]]]:
    """(file, its records) of a source."""
    starts = range(0, len(records), IMAGES_PER_FILE)
    return [(f"{name}-{n:05d}{SUFFIX}", records[start : start + IMAGES_PER_FILE]) for n, start in enumerate(starts)]


def _label_file(path: pathlib.Path, model: ReferenceModel, source: Source, records: Sequence[int]) -> int:
    """Makes one file unless it is there; how many labels were found on disk."""
    if path.exists():
        return len(read_file(path))
    write_labels(path, model.label(source, records))
    return 0


def _data_digest(source: Source) -> str:
    """Names the records of a source and their order."""
    checksums = "".join(shard.checksum for shard in source.manifest.shards)
    return hashlib.blake2b(checksums.encode(), digest_size=8).hexdigest()


_DESCRIPTION = """\
Labels images for the compressor (VRC): the loss of the model's answer at ten resolutions, without seeing the image, and of paraphrased
answers where the data has them. The whole curves are written; --epsilon and --floor only choose what the table shows.

Several hosts share the work with --shard 0/4 … 3/4 and one --output: each makes whole files, so the directory is the same as by one
host. The one that makes the last file completes it; call any of them again after a crash."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        with storage.explained(), progress_line() as progress:
            run = label_with(
                _reference(options),
                options.data,
                _output(options),
                sources=_sources(options),
                split=options.split,
                limit=options.limit,
                shard=parse_shard(options.shard),
                progress=progress,
            )
        summaries = summarise_labels(run.labels, options.epsilon, options.floor)
    except (*EXPLAINED, RecordError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    if options.json:
        tasks = {task: dataclasses.asdict(summary) for task, summary in summaries.items()}
        counts = {"left_out": run.left_out, "resumed": run.resumed, "missing": run.missing}
        print(json.dumps({"tasks": tasks, **counts}, indent=2))
    else:
        _print_summaries(summaries, run, options.epsilon, options.floor)
    return 0


def _reference(options: argparse.Namespace) -> ReferenceModel:
    """The model that was asked for."""
    if options.reference is not None:
        # Imported late: torch takes seconds, and our own models do not need it.
        from tools.label_transformers import TransformersReference

        return TransformersReference(options.reference)
    home = checkpoints.checkpoint_home(options.checkpoint)
    return Labeller(home, checkpoints.find_step(home, options.step), options.encoder)


def _output(options: argparse.Namespace) -> pathlib.Path:
    """Where the labels go. Raises `LabelError` where that is not said and follows from nothing."""
    if options.output is None and options.checkpoint is None:
        raise LabelError("--reference needs --output DIR, for the labels")
    return pathlib.Path(options.output or checkpoints.checkpoint_home(options.checkpoint).parent / "labels")


def _sources(options: argparse.Namespace) -> list[str]:
    """The sources to label. Raises `LabelError` where there is none."""
    home = pathlib.Path(options.data) / options.split
    if options.sources is not None:
        return options.sources.split(",")
    found = sorted(path.parent.name for path in home.glob(f"*/{RECORDS_MANIFEST}"))
    if not found:
        raise LabelError(f"{home} holds no source; give --data ROOT with sources in ROOT/{options.split}")
    return found


def parse_shard(text: str) -> Shard:
    """A shard from I/N. Raises `LabelError`."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise LabelError(f"--shard {text!r} is not I/N with I from 0 to N - 1")
    return Shard(int(index), int(count))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m tools.label_resolutions",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, model = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", metavar="DIR", help="a run's workdir or its checkpoints directory")
    model.add_argument("--reference", metavar="DIR", help="a vision-language model of transformers, with its processor")
    add("--step", type=int, metavar="N", help="which checkpoint (default: the newest)")
    add("--data", required=True, metavar="ROOT", help="sources lie in ROOT/SPLIT/NAME")
    add("--split", default="train", help="of the data (default: train)")
    add(
        "--sources",
        metavar="A,B",
        help="by name, separated by commas (default: all of the split, in alphabetical order)",
    )
    add("--limit", type=int, default=0, metavar="N", help="images of each source, spread evenly over it (default: all)")
    add("--encoder", choices=BRANCHES, default="base", help="the branch that sees the images (default: base)")
    add("--shard", default="0/1", metavar="I/N", help="make only every N-th file, from the I-th on (default: 0/1)")
    add(
        "--output",
        metavar="DIR",
        help="of the labels; a killed run goes on where it stopped (default: labels/ in the run's directory)",
    )
    add("--epsilon", type=float, default=DEFAULT_EPSILON, help=f"of the table's α* (default: {DEFAULT_EPSILON})")
    add("--floor", type=float, default=DEFAULT_FLOOR, help=f"of the table's α* (default: {DEFAULT_FLOOR})")
    add("--json", action="store_true", help="print the table as JSON on standard output")
    return parser


@contextlib.contextmanager
def progress_line() -> Iterator[ReportProgress]:
    """A progress line on standard error while the block runs."""
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        line = progress.add_task("starting", total=None)
        yield lambda what, done, total: progress.update(line, description=what, completed=done, total=total)


def _print_summaries(summaries: Mapping[str, LabelSummary], run: LabelRun, epsilon: float, floor: float) -> None:
    caption = (
        "α*: strongest compression within ε · floor: L(1) below it · blind: within ε without seeing the image · wording: L(1) changes by "
        "more than ε with a paraphrase"
    )
    table = Table(title=f"labels at ε = {epsilon}, floor = {floor}", caption=caption, title_justify="left")
    table.add_column("task", no_wrap=True)
    for heading in ("images", "mean α*", "tokens saved", "floor", "blind", "wording", "α* 0.1 … 1.0"):
        table.add_column(heading, justify="right", no_wrap=True)
    for task, row in summaries.items():
        shares = (f"{share:.0%}" for share in (row.tokens_saved, row.on_floor, row.blind))
        drift = "" if row.drift is None else f"{row.drift:.0%}"
        table.add_row(task, f"{row.images:,}", f"{row.mean_optimal:.2f}", *shares, drift, _bars(row.histogram))
    Console().print(table)
    print(f"left out: {sum(run.left_out.values())}; found on disk: {run.resumed}")
    if run.missing:
        print(f"{run.missing} files of other shards are missing; the labels are complete when all are there")


def _bars(counts: Sequence[int]) -> str:
    """A histogram as one character a bin; only an empty bin is a dot."""
    return "".join("·▁▂▃▄▅▆▇█"[-(-8 * count // max(1, *counts))] for count in counts)


if __name__ == "__main__":
    sys.exit(main())
