"""`python -m tools.train_compressor`: trains the compressor (VRC) on labels of `tools.label_resolutions`.

    labels ─ε, floor─► α* ─► targets ┐
    data ─► proxies ─────────────────┴► training ─► calibration on pictures kept out ─► <output>/ (models.compressor_io)

With --alphas-output it also writes α for every record of the labelled sources, by content hash: the side table that
`data.alphas` of a training run reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, UInt8
from rich.console import Console
from rich.table import Table

from data_pipelines.records import RecordError, content_hash, read_index
from data_pipelines.sources import DamagedShard, Source
from experiments import storage
from hypervl_jax.architecture import CompressorConfig
from hypervl_jax.mobilenet import BACKBONES, mobilenet_config
from hypervl_jax.models.compressor_io import check_unused, predict_log_areas, save_compressor
from hypervl_jax.models.mobilenet_weights import load_mobilenet
from hypervl_jax.training.checkpoint import checkpoint_home, read_description
from hypervl_jax.training.compression import (
    DEFAULT_EPSILON,
    DEFAULT_FLOOR,
    CompressorMetrics,
    ResolutionLabel,
    compressor_metrics,
    compressor_targets,
    is_blind_guess,
    longest_sides,
    loss_curves,
)
from hypervl_jax.training.compressor_training import (
    LOSSES,
    CompressorTrainConfig,
    Lesson,
    train_compressor,
)
from hypervl_jax.vision.decoding import UndecodableImage, decode_image
from hypervl_jax.vision.resolution import alpha_from_prediction, make_proxies, make_proxy
from tools.label_files import LabelError, read_labels
from tools.label_models import checkpoint_tokenizer
from tools.label_resolutions import EXPLAINED, USAGE_ERROR, ReportProgress, progress_line

_RECORDS_AT_ONCE = 256


class Backbone(NamedTuple):
    """A backbone by name and width, that of the checkpoint's configuration without a name; `pretrained` is timm's file of it."""

    name: str = ""
    width: float = 1.0
    pretrained: str = ""

    def config(self, configured: CompressorConfig) -> CompressorConfig:
        """The compressor's architecture with this backbone. Raises `ConfigError`."""
        chosen = mobilenet_config(configured, self.name, self.width) if self.name else configured
        return dataclasses.replace(chosen, norm="affine") if self.pretrained else chosen


class TrainReport(NamedTuple):
    """What came of a training: validation metrics by task, validation pictures only; see `TrainedCompressor`.

    `alphas` is the number of records in the side table, 0 without one; `unreadable` those left out of it.
    """

    metrics: dict[str, CompressorMetrics]
    history: list[dict[str, float]]
    calibration_bias: float
    alphas: int
    unreadable: int


def train(
    labels: str | os.PathLike[str],
    data: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    epsilon: float = DEFAULT_EPSILON,
    floor: float = DEFAULT_FLOOR,
    settings: CompressorTrainConfig | None = None,
    left_out: Sequence[str] = (),
    drop_blind: bool = False,
    backbone: Backbone | None = None,
    alphas_output: str | os.PathLike[str] | None = None,
    progress: ReportProgress = lambda what, done, total: None,
) -> TrainReport:
    """Trains, calibrates and saves a compressor.

    Args:
        labels: directory that `tools.label_resolutions` filled.
        data: root of the data that was labelled.
        checkpoint: a run's workdir or its `checkpoints` directory, for the compressor's architecture, the tiling and the tokenizer.
        output: directory of the compressor; must not exist.
        epsilon: of α*.
        floor: of Δ.
        settings: of the training.
        backbone: of the compressor, and where its first weights come from.
        drop_blind: leaves out labels whose answer costs within ε without seeing the image, training and validation alike.
        left_out: tasks whose labels are not used, to see what the compressor makes of content that it never saw.
        alphas_output: file of the side table, with a row for every record of the labelled sources that has an image.
        progress: told what is being done, and how much of it is.

    Raises:
        LabelError: the labels cannot be read, or are of other data.
        CheckpointError: the checkpoint cannot be read, or `output` exists.
        RecordError, TokenizerError, ConfigError: an input cannot be used.
    """
    check_unused(output)
    checkpoint = checkpoint_home(checkpoint)
    settings = settings or CompressorTrainConfig()
    description, (every, question) = read_description(checkpoint), read_labels(labels)
    seen = [each for each in every if each.task not in left_out]
    found = [each for each in seen if not (drop_blind and is_blind_guess(each, epsilon, floor))]
    if unknown := set(left_out) - {each.task for each in every}:
        raise LabelError(f"{labels} has no label of task {', '.join(sorted(unknown))}, so it cannot be left out")
    backbone, tiling = backbone or Backbone(), description.architecture.tiling
    config = backbone.config(description.architecture.compressor)
    first = load_mobilenet(backbone.pretrained, config) if backbone.pretrained else {}
    fingerprint = checkpoint_tokenizer(checkpoint, description).fingerprint
    sources = [Source(pathlib.Path(data) / question["split"] / name, fingerprint) for name in question["sources"]]
    lesson = make_lesson(found, sources, epsilon, floor, config.proxy_size, progress)
    trained = train_compressor(config, lesson, settings, functools.partial(progress, "training"), first)
    chosen = np.flatnonzero(trained.validation)
    outputs = predict_log_areas(config, trained.params, lesson.proxies[chosen])
    alphas = alpha_from_prediction(outputs, lesson.longest_sides[chosen], config.proxy_size)
    metrics = compressor_metrics([found[i] for i in chosen], alphas, epsilon, floor, tiling)
    details = {
        "epsilon": epsilon,
        "floor": floor,
        "left_out": list(left_out),
        "blind_dropped": len(seen) - len(found),
        "backbone": backbone._asdict(),
        "settings": dataclasses.asdict(settings),
        "labels": {key: value for key, value in question.items() if key != "files"},
        "validation": _as_json(metrics),
        "calibration_bias": trained.calibration_bias,
    }
    save_compressor(output, config, trained.params, details)
    rows = unreadable = 0
    if alphas_output is not None:
        rows, unreadable = write_alphas(alphas_output, sources, config, trained.params, progress)
    return TrainReport(metrics, trained.history, trained.calibration_bias, rows, unreadable)


def make_lesson(
    labels: Sequence[ResolutionLabel],
    sources: Sequence[Source],
    epsilon: float,
    floor: float,
    proxy_size: int,
    progress: ReportProgress,
) -> Lesson:
    """Proxies, targets and curves of the labelled images, in the order of the labels.

    Raises `LabelError` when the data does not hold a labelled record.
    """
    places = {(source.name, digest): (source, i) for source in sources for i, digest in enumerate(_hashes(source))}
    proxies = np.zeros((len(labels), proxy_size, proxy_size, 3), np.uint8)
    for number, label in enumerate(labels):
        if (label.source, label.content_hash) not in places:
            raise LabelError(
                f"source {label.source!r} has no record {label.content_hash}: the labels are of other data"
            )
        source, record = places[label.source, label.content_hash]
        proxies[number] = make_proxy(decode_image(source.record(record).images[0]), proxy_size)
        if number % _RECORDS_AT_ONCE == 0:
            progress("proxies", number, len(labels))
    return Lesson(
        proxies,
        compressor_targets(labels, epsilon, floor, proxy_size),
        longest_sides(labels),
        loss_curves(labels).astype(np.float32),
    )


def _hashes(source: Source) -> Iterator[str]:
    """Content hash of every record of a source, from its indexes."""
    for shard in source.manifest.shards:
        if shard.records:
            yield from read_index(source.directory / shard.index_file).content_hashes.to_pylist()


def write_alphas(
    path: str | os.PathLike[str],
    sources: Sequence[Source],
    config: CompressorConfig,
    params: Mapping[str, Any],
    progress: ReportProgress = lambda what, done, total: None,
) -> tuple[int, int]:
    """Writes α by content hash for every record with an image, as `data_pipelines.sources.read_alphas` reads it.

    A record's α holds for all its images, so it is the largest of theirs: none is compressed further than predicted.

    Returns:
        Records written, and records left out since they cannot be read.
    """
    hashes, alphas, unreadable, done = [], [], 0, 0
    total = sum(map(len, sources))
    for source in sources:
        for first in range(0, len(source), _RECORDS_AT_ONCE):
            block = range(first, min(first + _RECORDS_AT_ONCE, len(source)))
            pictures = [_pictures(source, record, config.proxy_size) for record in block]
            unreadable += pictures.count(None)
            seen = [record for record in pictures if record is not None and len(record.sides)]
            hashes += [record.content_hash for record in seen]
            alphas += _record_alphas(seen, config, params)
            done += len(block)
            progress("predicting α", done, total)
    _write_table(pathlib.Path(path), hashes, alphas)
    return len(hashes), unreadable


class _Pictures(NamedTuple):
    """What the compressor needs of one record's images."""

    content_hash: str
    proxies: UInt8[np.ndarray, "i s s 3"]
    sides: Float32[np.ndarray, "i"]


def _pictures(source: Source, record: int, proxy_size: int) -> _Pictures | None:
    """The images of one record; None when it cannot be read."""
    try:
        content = source.record(record)
        return _Pictures(content_hash(content), *make_proxies([*map(decode_image, content.images)], proxy_size))
    except DamagedShard:
        raise
    except (RecordError, UndecodableImage):
        return None


def _record_alphas(pictures: Sequence[_Pictures], config: CompressorConfig, params: Mapping[str, Any]) -> list[float]:
    """α of each record: the largest of its images'."""
    if not pictures:
        return []
    outputs = predict_log_areas(config, params, np.concatenate([record.proxies for record in pictures]))
    sides = np.concatenate([record.sides for record in pictures])
    alphas = alpha_from_prediction(outputs, sides, config.proxy_size)
    starts = np.cumsum([0, *(len(record.sides) for record in pictures[:-1])])
    return np.maximum.reduceat(alphas, starts).tolist()


def _write_table(path: pathlib.Path, hashes: Sequence[str], alphas: Sequence[float]) -> None:
    table = pa.table({"content_hash": pa.array(hashes, pa.string()), "alpha": pa.array(alphas, pa.float32())})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    os.replace(temporary, path)


_DESCRIPTION = """\
Trains the compressor (VRC) on labels made by `python -m tools.label_resolutions`, calibrates it on pictures kept out of
training so that at most --allowed-loss is lost, and saves it with the calibration inside."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        fields = {field.name for field in dataclasses.fields(CompressorTrainConfig)}
        settings = CompressorTrainConfig(**{key: value for key, value in vars(options).items() if key in fields})
        with storage.explained(), progress_line() as progress:
            report = train(
                options.labels,
                options.data,
                options.checkpoint,
                options.output,
                epsilon=options.epsilon,
                floor=options.floor,
                settings=settings,
                backbone=Backbone(options.backbone or "", options.width, options.pretrained or ""),
                drop_blind=options.drop_blind,
                left_out=[name for name in options.leave_out.split(",") if name],
                alphas_output=options.alphas_output,
                progress=progress,
            )
    except (*EXPLAINED, RecordError, UndecodableImage, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    if options.json:
        print(json.dumps({**report._asdict(), "metrics": _as_json(report.metrics)}, indent=2))
    else:
        _print_report(report, options.output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tools.train_compressor", description=_DESCRIPTION)
    add, default = parser.add_argument, CompressorTrainConfig()
    add("--labels", required=True, metavar="DIR", help="what `python -m tools.label_resolutions` wrote")
    add("--data", required=True, metavar="ROOT", help="the data that was labelled")
    add(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a run's workdir or checkpoints directory: architecture, tiling, tokenizer",
    )
    add("--output", required=True, metavar="DIR", help="of the compressor; must not exist")
    add("--alphas-output", metavar="FILE", help="also write α of every record of the labelled sources (Arrow IPC)")
    add("--epsilon", type=float, default=DEFAULT_EPSILON, help=f"of α* (default: {DEFAULT_EPSILON})")
    add("--floor", type=float, default=DEFAULT_FLOOR, help=f"of the relative increase (default: {DEFAULT_FLOOR})")
    add(
        "--backbone",
        choices=tuple(BACKBONES),
        help="MobileNetV3 of this size, or a convolutional MobileNetV4 (default: the checkpoint's configuration)",
    )
    add("--width", type=float, default=1.0, metavar="FACTOR", help="of the backbone's channels (default: 1)")
    add(
        "--pretrained",
        metavar="FILE",
        help="timm's model.safetensors of that backbone; its norms become fixed affine maps",
    )
    add("--leave-out", default="", metavar="A,B", help="tasks whose labels are not used (default: none)")
    add("--drop-blind", action="store_true", help="leave out labels whose answer can be guessed without the image")
    add("--loss", choices=LOSSES, default=default.loss, help=f"(default: {default.loss})")
    for name, what in _NUMBERS.items():
        value = getattr(default, name)
        add(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"{what} (default: {value})")
    add("--json", action="store_true", help="print the report as JSON on standard output")
    return parser


_NUMBERS = {
    "steps": "updates",
    "batch_size": "images a step",
    "learning_rate": "its highest value",
    "warmup_steps": "of a linear rise from 0",
    "weight_decay": "of the kernels",
    "over_compression_weight": "how much worse too small an area is than too large a one",
    "huber_delta": "where the Huber loss turns linear, in log area",
    "ordinal_scale": "width of the ordinal loss's steps, in log area",
    "validation_share": "of the pictures, kept out of training",
    "evaluate_every": "steps between validations",
    "allowed_loss": "share of the right answers' chance that calibration allows to lose",
    "seed": "of parameters and order",
}
"""Settings of `CompressorTrainConfig` that are flags, and what they are."""


def _as_json(metrics: Mapping[str, CompressorMetrics]) -> dict[str, dict[str, Any]]:
    return {task: dataclasses.asdict(row) for task, row in metrics.items()}


def _print_report(report: TrainReport, output: str) -> None:
    table = Table(
        title="pictures kept out of training",
        caption="means of α and α* · shares of tokens and tiles saved · rank correlation of α and α* · share over-compressed",
        title_justify="left",
    )
    table.add_column("task", no_wrap=True)
    headings = ("images", "α", "α*", "tokens", "tiles", "rank", "Δ > ε", "lost")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for task, row in report.metrics.items():
        means = (
            f"{row.mean_alpha:.2f}",
            f"{row.mean_optimal:.2f}",
            f"{row.tokens_saved:.0%}",
            f"{row.tiles_saved:.0%}",
        )
        correlation = "" if row.rank_correlation is None else f"{row.rank_correlation:.2f}"
        table.add_row(
            task, f"{row.images:,}", *means, correlation, f"{row.over_compressed:.0%}", f"{row.chance_lost:.1%}"
        )
    Console().print(table)
    print(f"calibration bias {report.calibration_bias:+.2f}; compressor in {output}")
    if report.alphas:
        print(f"α of {report.alphas:,} records written; {report.unreadable} left out")


if __name__ == "__main__":
    sys.exit(main())
