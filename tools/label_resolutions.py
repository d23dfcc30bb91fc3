"""`python -m tools.label_resolutions`: what a model loses on each image at ten resolutions, the labels of the compressor (VRC).

    record with one image ─► 10 ratios and once blind ─► packed into rows like training data ─► loss of the answer by segment

Each image is laid out by the training pipeline itself (`data_pipelines.transforms.fill_row`), so the model sees exactly what it
would see in training at that α. The whole curves are written, so that ε and floor can be chosen later:

    <output>/question.json         what was asked for; a run with another question is refused
    <output>/charts-00000.arrow    labels of the first records of `charts`, in their order; written whole by a rename
    <output>/labels.json           the question and how many images were left out; written last: the labels are complete

A killed run goes on with the first file that is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
from jaxtyping import Array, Float32
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from data_pipelines.packing import Budget, Sample, pack_row
from data_pipelines.records import Record, RecordError, content_hash, write_json
from data_pipelines.sources import Source
from data_pipelines.transforms import fill_row
from experiments import storage
from hypervl_jax import partitioning
from hypervl_jax.architecture import BRANCHES, ConfigError, TilingConfig, branch_parts
from hypervl_jax.inference.assistant import CAST_PARAMETERS, inference_dtypes, inference_runtime
from hypervl_jax.models.hypervl import HyperVL
from hypervl_jax.models.qwen3 import head_weights
from hypervl_jax.partitioning import MeshConfig
from hypervl_jax.text.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from hypervl_jax.training import checkpoint as checkpoints
from hypervl_jax.training import losses
from hypervl_jax.training.batch import Batch, BatchShape, empty_batch
from hypervl_jax.training.compression import DEFAULT_FLOOR, RATIOS, LabelSummary, ResolutionLabel, summarise_labels
from hypervl_jax.training.state import abstract_parameters
from hypervl_jax.training.step import branch_hidden
from hypervl_jax.vision.anyres import ALPHA_UNIT, PADDING_BYTE, alpha_to_milli
from hypervl_jax.vision.decoding import decode_image

FORMAT_VERSION = 1
QUESTION, MANIFEST = "question.json", "labels.json"
DEFAULT_EPSILON, DEFAULT_ROWS = 0.05, 8
IMAGES_PER_FILE = 128
"""What a killed run may lose."""

_WINDOW, _LOSS_CHUNK, _DECODED_IMAGES = 64, 512, 32
"""Samples that packing chooses from, positions of each row whose logits exist at one time, decoded images kept in memory."""

_SEEN, _BLIND = 0, 1
"""Numbers of the two views of a source in a batch."""

_MILLI = tuple(alpha_to_milli(alpha) for alpha in RATIOS)
_VARIANTS = (*((_SEEN, milli) for milli in _MILLI), (_BLIND, ALPHA_UNIT))
"""(view, α in thousandths) of the eleven samples that one image becomes."""

_FIELDS = (
    pa.field("content_hash", pa.string(), nullable=False),
    pa.field("source", pa.string(), nullable=False),
    pa.field("task", pa.string(), nullable=False),
    pa.field("height", pa.int32(), nullable=False),
    pa.field("width", pa.int32(), nullable=False),
    pa.field("losses", pa.list_(pa.float32(), len(RATIOS)), nullable=False),
    pa.field("blind_loss", pa.float32(), nullable=False),
    pa.field("tokens", pa.list_(pa.int32(), len(RATIOS)), nullable=False),
)

ReportProgress = Callable[[str, int, int], None]
"""Called with the source, the images done and the images in all."""


class LabelError(ValueError):
    """Labels that cannot be made or read; the message says why and what to do."""


EXPLAINED = (LabelError, checkpoints.CheckpointError, TokenizerError, ConfigError, storage.StorageError)
"""Errors that explain themselves."""

USAGE_ERROR = 2


class LabelRun(NamedTuple):
    """Labels in order; by source, the images left out (unreadable, or too large for a row); and labels found on disk."""

    labels: list[ResolutionLabel]
    left_out: dict[str, int]
    resumed: int


class BlindSource(Source):
    """A source whose images are mid-grey and keep their sizes."""

    def record(self, record: int) -> Record:
        """The record with its images replaced."""
        seen = super().record(record)
        return dataclasses.replace(seen, images=tuple(_grey_png(*size) for size in self.sizes(record).images))


@functools.lru_cache(maxsize=1024)
def _grey_png(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (PADDING_BYTE,) * 3).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def answer_losses(
    model: HyperVL, branch: str, params: Mapping[str, Any], batch: Batch
) -> tuple[Float32[Array, "b n"], Float32[Array, "b n"]]:
    """Summed cross-entropy and summed weight of the answer tokens of each segment; segment i of a row is column i.

    There are l + 1 columns, since a row of l positions has at most l samples; column 0 is padding.
    """
    hidden = branch_hidden(model, params, batch, branch)
    terms = losses.token_terms(hidden, head_weights(params["decoder"]), batch.targets, chunk=_LOSS_CHUNK)
    columns = batch.tokens.shape[1] + 1
    add = jax.vmap(lambda values, segments: jax.ops.segment_sum(values, segments, columns))
    return add(terms.cross_entropy * batch.loss_weights, batch.segments), add(batch.loss_weights, batch.segments)


class Labeller:
    """A model that labels records, on all devices of this process; one program, compiled at the first batch.

    Args:
        checkpoint: a run's `checkpoints` directory.
        step: which checkpoint.
        encoder: the branch that sees the images.
        shape: of a batch, `training_shape` when None; the rows are rounded up to the number of devices.
        tile_chunk: tiles of each row that pass through the tower together.

    Raises:
        CheckpointError, TokenizerError: the checkpoint cannot be read.
        ConfigError: an image of the model's tile budget fits no row.
        LabelError: neither the checkpoint nor `shape` says how long rows are.
    """

    def __init__(
        self, checkpoint: str | os.PathLike[str], step: int, encoder: str, shape: BatchShape | None, tile_chunk: int
    ) -> None:
        description, runtime = checkpoints.read_description(checkpoint), inference_runtime(tile_chunk)
        config, shape = description.architecture, shape or training_shape(description)
        shape.validate_with(config.tiling)
        self.mesh = partitioning.make_mesh(MeshConfig(data=-1, fsdp=1), jax.local_devices())
        self.shape = dataclasses.replace(shape, rows=-(-shape.rows // self.mesh.size) * self.mesh.size)
        self.tokenizer, self.tiling = checkpoint_tokenizer(checkpoint, description), config.tiling
        parts = branch_parts(encoder)
        abstract = {part: abstract_parameters(config, runtime)[0][part] for part in parts}
        whole = jax.tree.map(lambda _: partitioning.replicated(self.mesh), abstract)
        targets = checkpoints.abstract_like(inference_dtypes(abstract, runtime.dtype), whole)
        self.params = checkpoints.load_params(checkpoint, targets, step, parts)
        self.identity = {"checkpoint_step": step, "encoder": encoder, "weights": _weights_digest(self.params)}
        self._decode = functools.lru_cache(_DECODED_IMAGES)(decode_image)
        self._losses = jax.jit(functools.partial(answer_losses, HyperVL(config, runtime), encoder))

    def label(self, views: tuple[Source, BlindSource], records: Sequence[int]) -> list[ResolutionLabel]:
        """Labels of the records that can be read and fit a row, in their order."""
        values = dict(self._sample_losses(views, records))
        curves = {record: [values.get((view, record, milli)) for view, milli in _VARIANTS] for record in records}
        whole = {record: curve for record, curve in curves.items() if None not in curve}
        return [_make_label(views[_SEEN], record, curve, self.tiling) for record, curve in whole.items()]

    def _sample_losses(
        self, views: tuple[Source, BlindSource], records: Sequence[int]
    ) -> Iterator[tuple[tuple[int, int, int], float]]:
        """((view, record, α), mean loss of the answer) of every sample that could be laid out."""
        previous = None
        for rows in self._packed(views[_SEEN], records):
            batch = self._batch(rows, views)
            with jax.set_mesh(self.mesh):
                sums = self._losses(self.params, jax.device_put(batch, partitioning.row_sharding(self.mesh)))
            # The results of a batch are fetched when the next one is under way.
            yield from _collect(previous)
            previous = rows, sums
        yield from _collect(previous)

    def _packed(self, source: Source, records: Sequence[int]) -> Iterator[list[list[Sample]]]:
        """The samples of all records in packed rows, a batch of rows at a time."""
        budget, pending = Budget(self.shape.length, self.shape.tiles), []
        samples = (sample for record in records for sample in self._samples(source, record, budget))
        rows = iter(lambda: pack_row(pending, lambda: next(samples, None), budget, _WINDOW), [])
        while chunk := list(itertools.islice(rows, self.shape.rows)):
            yield chunk

    def _samples(self, source: Source, record: int, budget: Budget) -> list[Sample]:
        """The eleven samples of a record; none when one of them fits no row."""
        samples = [
            Sample(view, 0, record, milli, *source.cost(record, milli, self.tiling)) for view, milli in _VARIANTS
        ]
        return samples if all(map(budget.holds, samples)) else []

    def _batch(self, rows: Sequence[Sequence[Sample]], views: tuple[Source, BlindSource]) -> Batch:
        batch = empty_batch(self.shape, self.tiling.tile_size)
        for number, samples in enumerate(rows):
            # A sample that cannot be read leaves padding behind and is missed in `_collect`.
            fill_row(
                Batch(*(field[number] for field in batch)), samples, views, self.tokenizer, self.tiling, self._decode
            )
        return batch


def _collect(
    launched: tuple[list[list[Sample]], tuple[Array, Array]] | None,
) -> Iterator[tuple[tuple[int, int, int], float]]:
    if launched is None:
        return
    rows, (sums, weights) = launched[0], jax.device_get(launched[1])
    for number, samples in enumerate(rows):
        for segment, sample in enumerate(samples, start=1):
            total, weight = float(sums[number, segment]), float(weights[number, segment])
            if weight > 0 and math.isfinite(total):
                # Rounding can take the loss of a certain answer just below 0.
                yield (sample.source, sample.record, sample.alpha), max(0.0, total / weight)


def _make_label(source: Source, record: int, curve: Sequence[float], tiling: TilingConfig) -> ResolutionLabel:
    ((height, width),) = source.sizes(record).images
    content = source.record(record)
    return ResolutionLabel(
        content_hash=content_hash(content),
        source=source.name,
        task=content.task,
        height=height,
        width=width,
        losses=tuple(curve[:-1]),
        blind_loss=curve[-1],
        tokens=tuple(source.plans(record, milli, tiling)[0].tokens for milli in _MILLI),
    )


def checkpoint_tokenizer(checkpoint: str | os.PathLike[str], description: checkpoints.Description) -> Tokenizer:
    """The tokenizer beside a checkpoint. Raises `CheckpointError` when there is none."""
    if description.tokenizer_directory is None:
        raise checkpoints.CheckpointError(f"{checkpoint} holds no tokenizer; data cannot be read as in training")
    return load_tokenizer(pathlib.Path(description.tokenizer_directory))


def training_shape(description: checkpoints.Description) -> BatchShape:
    """Rows as long as those of the training run that wrote the checkpoint, `DEFAULT_ROWS` of them.

    Raises `LabelError` when the checkpoint does not say how long they were.
    """
    config = description.details.get("config", {})
    try:
        return BatchShape(DEFAULT_ROWS, int(config["batch.length"]), int(config["batch.tiles"]))
    except (KeyError, TypeError, ValueError) as error:
        raise LabelError(f"the checkpoint does not say its row length ({error}); give its shape to `label`") from error


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
    progress: ReportProgress = lambda source, done, total: None,
) -> LabelRun:
    """Labels the images of some sources, or goes on where a killed run stopped.

    Args:
        checkpoint: a run's workdir or its `checkpoints` directory.
        data: root of the data; sources lie in `data/split/name`.
        output: directory of the labels, made if need be.
        sources: by name, in the order of the labels.
        split: of the data.
        encoder: the branch that sees the images.
        limit: images of each source at most, spread evenly over it; 0 for all. Records with several images or none have no
            label of their own.
        step: which checkpoint; the newest when None.
        shape: of a batch; `training_shape` when None.
        tile_chunk: tiles of each row that pass through the tower together.
        progress: told after each file.

    Raises:
        LabelError: `output` holds labels of another question, or nothing could be labelled.
        CheckpointError, RecordError, TokenizerError, ConfigError: an input cannot be used.
    """
    checkpoint = checkpoints.checkpoint_home(checkpoint)
    model = Labeller(checkpoint, checkpoints.find_step(checkpoint, step), encoder, shape, tile_chunk)
    views = {name: _views(pathlib.Path(data) / split / name, model.tokenizer) for name in sources}
    chosen = {name: single_image_records(views[name][_SEEN], limit) for name in sources}
    pieces = [(name, piece) for name in sources for piece in _pieces(name, chosen[name])]
    question = {
        "format_version": FORMAT_VERSION,
        **model.identity,
        "split": split,
        "limit": limit,
        "sources": {name: _data_digest(view[_SEEN]) for name, view in views.items()},
        "files": [file for _, (file, _) in pieces],
    }
    directory = _claim(pathlib.Path(output), question)
    labels, left_out, resumed, done = [], dict.fromkeys(sources, 0), 0, 0
    for name, (file, records) in pieces:
        found, from_disk = _label_file(directory / file, model, views[name], records)
        labels += found
        resumed += len(found) * from_disk
        left_out[name] += len(records) - len(found)
        done += len(records)
        progress(name, done, sum(map(len, chosen.values())))
    if not labels:
        raise LabelError(
            f"no image of {', '.join(sources)} could be labelled ({done} tried); does any fit a row of the training run?"
        )
    write_json(directory / MANIFEST, {**question, "left_out": left_out})
    return LabelRun(labels, left_out, resumed)


def _views(directory: pathlib.Path, tokenizer: Tokenizer) -> tuple[Source, BlindSource]:
    return Source(directory, tokenizer.fingerprint), BlindSource(directory, tokenizer.fingerprint)


def _pieces(name: str, records: Sequence[int]) -> list[tuple[str, Sequence[int]]]:
    """(file, its records) of a source."""
    starts = range(0, len(records), IMAGES_PER_FILE)
    return [(f"{name}-{n:05d}.arrow", records[start : start + IMAGES_PER_FILE]) for n, start in enumerate(starts)]


def _label_file(
    path: pathlib.Path, model: Labeller, views: tuple[Source, BlindSource], records: Sequence[int]
) -> tuple[list[ResolutionLabel], bool]:
    """The labels of one file, and whether they were there already."""
    if path.exists():
        return _read_file(path), True
    found = model.label(views, records)
    _write_file(path, found)
    return found, False


def _data_digest(source: Source) -> str:
    """Names the records of a source and their order."""
    checksums = "".join(shard.checksum for shard in source.manifest.shards)
    return hashlib.blake2b(checksums.encode(), digest_size=8).hexdigest()


def _weights_digest(params: Mapping[str, Any]) -> str:
    """Names a model's weights by its norms and biases, which are float32 whatever the compute dtype is."""
    digest = hashlib.blake2b(digest_size=8)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key not in CAST_PARAMETERS:
            digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _claim(directory: pathlib.Path, question: Mapping[str, Any]) -> pathlib.Path:
    """Makes the directory, or checks that it was made for the same question."""
    path = directory / QUESTION
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_json(path, question)
        return directory
    before = _read_question(path)
    changed = [key for key in {**before, **question} if before.get(key) != question.get(key)]
    if changed:
        raise LabelError(
            f"{directory} holds labels that differ in {', '.join(changed)}; write elsewhere, or remove it to label again"
        )
    return directory


def _read_question(path: pathlib.Path) -> dict[str, Any]:
    try:
        question = json.loads(path.read_text("utf-8"))
        version, files = question["format_version"], question["files"]
        plain = all(isinstance(file, str) and pathlib.Path(file).name == file for file in files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabelError(
            f"{path} cannot be read ({error}); run `python -m tools.label_resolutions` to its end"
        ) from error
    if version != FORMAT_VERSION or not plain:
        raise LabelError(f"{path} has format version {version}, this code reads {FORMAT_VERSION}; label again")
    return question


def _write_file(path: pathlib.Path, labels: Sequence[ResolutionLabel]) -> None:
    table = pa.Table.from_pylist([dataclasses.asdict(found) for found in labels], pa.schema(_FIELDS))
    temporary = path.with_name(f"{path.name}.tmp")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    os.replace(temporary, path)


def _read_file(path: pathlib.Path) -> list[ResolutionLabel]:
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise LabelError(f"{path} cannot be read ({error}); remove it and run label_resolutions again") from error
    if not table.schema.equals(pa.schema(_FIELDS)):
        raise LabelError(f"{path} has other columns than labels of this version; label again")
    rows = table.to_pylist()
    return [ResolutionLabel(**{**row, "losses": tuple(row["losses"]), "tokens": tuple(row["tokens"])}) for row in rows]


def read_labels(directory: str | os.PathLike[str]) -> tuple[list[ResolutionLabel], dict[str, Any]]:
    """All labels of a complete directory, and the question they answer with the images left out (`labels.json`).

    Raises `LabelError` when labelling was not finished, or files are missing, damaged or of another version.
    """
    directory = pathlib.Path(directory)
    question = _read_question(directory / MANIFEST)
    return [found for file in question["files"] for found in _read_file(directory / file)], question


_DESCRIPTION = """\
Labels images for the compressor (VRC): the loss of the model's answer at ten resolutions, and without seeing the image. The
whole curves are written; --epsilon and --floor only choose what the table shows."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        with storage.explained(), progress_line() as progress:
            chosen = {name: getattr(options, name) for name in ("split", "encoder", "limit", "step")}
            sources = options.sources.split(",")
            run = label(options.checkpoint, options.data, options.output, sources=sources, progress=progress, **chosen)
        summaries = summarise_labels(run.labels, options.epsilon, options.floor)
    except (*EXPLAINED, RecordError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    if options.json:
        tasks = {task: dataclasses.asdict(summary) for task, summary in summaries.items()}
        print(json.dumps({"tasks": tasks, "left_out": run.left_out, "resumed": run.resumed}, indent=2))
    else:
        _print_summaries(summaries, run, options.epsilon, options.floor)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tools.label_resolutions", description=_DESCRIPTION)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a run's workdir or its checkpoints directory")
    add("--step", type=int, metavar="N", help="which checkpoint (default: the newest)")
    add("--data", required=True, metavar="ROOT", help="sources lie in ROOT/SPLIT/NAME")
    add("--split", default="train", help="of the data (default: train)")
    add("--sources", required=True, metavar="A,B", help="by name, separated by commas")
    add("--limit", type=int, default=0, metavar="N", help="images of each source, spread evenly over it (default: all)")
    add("--encoder", choices=BRANCHES, default="base", help="the branch that sees the images (default: base)")
    add("--output", required=True, metavar="DIR", help="of the labels; a killed run goes on where it stopped")
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
    caption = "α*: strongest compression within ε · floor: L(1) below it · blind: within ε without seeing the image"
    table = Table(title=f"labels at ε = {epsilon}, floor = {floor}", caption=caption, title_justify="left")
    table.add_column("task", no_wrap=True)
    for heading in ("images", "mean α*", "tokens saved", "floor", "blind", "α* 0.1 … 1.0"):
        table.add_column(heading, justify="right", no_wrap=True)
    for task, row in summaries.items():
        shares = (f"{share:.0%}" for share in (row.tokens_saved, row.on_floor, row.blind))
        table.add_row(task, f"{row.images:,}", f"{row.mean_optimal:.2f}", *shares, _bars(row.histogram))
    Console().print(table)
    print(f"left out: {sum(run.left_out.values())}; found on disk: {run.resumed}")


def _bars(counts: Sequence[int]) -> str:
    """A histogram as one character a bin; only an empty bin is a dot."""
    return "".join("·▁▂▃▄▅▆▇█"[-(-8 * count // max(1, *counts))] for count in counts)


if __name__ == "__main__":
    sys.exit(main())
