"""Models that label records: ours, on packed rows of the training pipeline; anything else behind the same small protocol."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Array, Float32
from PIL import Image

from data_pipelines.packing import Budget, Sample, pack_row
from data_pipelines.records import PARAPHRASE_SEPARATOR, Record, RecordError, content_hash
from data_pipelines.sources import Sizes, Source
from data_pipelines.transforms import fill_row
from hypervl_jax import partitioning
from hypervl_jax.architecture import TilingConfig, branch_parts
from hypervl_jax.inference.assistant import CAST_PARAMETERS, inference_dtypes, inference_runtime
from hypervl_jax.models.hypervl import HyperVL
from hypervl_jax.models.qwen3 import head_weights
from hypervl_jax.partitioning import MeshConfig
from hypervl_jax.text.conversation import Turn, text_length
from hypervl_jax.text.tokenizer import Tokenizer, load_tokenizer
from hypervl_jax.training import checkpoint as checkpoints
from hypervl_jax.training import losses
from hypervl_jax.training.batch import Batch, BatchShape, empty_batch
from hypervl_jax.training.compression import RATIOS, ResolutionLabel
from hypervl_jax.training.state import abstract_parameters
from hypervl_jax.training.step import branch_hidden
from hypervl_jax.vision.anyres import ALPHA_UNIT, PADDING_BYTE, alpha_to_milli
from hypervl_jax.vision.decoding import decode_image
from tools.label_files import LabelError

DEFAULT_ROWS = 8
MOST_PARAPHRASES = 3

_WINDOW, _LOSS_CHUNK, _DECODED_IMAGES = 64, 512, 32
"""Samples that packing chooses from, positions of each row whose logits exist at one time, decoded images kept in memory."""

_SEEN, _BLIND, _FIRST_PARAPHRASE = 0, 1, 2
"""Numbers of the views of a source in a batch; each paraphrase has its own."""

_MILLI = tuple(alpha_to_milli(alpha) for alpha in RATIOS)
_VARIANTS = (*((_SEEN, milli) for milli in _MILLI), (_BLIND, ALPHA_UNIT))
"""(view, α in thousandths) of the eleven samples that every image becomes."""


class ReferenceModel(Protocol):
    """What `label_resolutions` asks of a model."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """JSON values that name the model and its weights: labels of another are not mixed in."""

    def open(self, directory: pathlib.Path) -> Source:
        """A source with the records to label. Raises `RecordError`."""

    def label(self, source: Source, records: Sequence[int]) -> list[ResolutionLabel]:
        """Labels of the records that can be read and fit the model, in their order; the same whatever else is labelled."""


class BlindSource(Source):
    """A source whose images are mid-grey and keep their sizes."""

    def record(self, record: int) -> Record:
        """The record with its images replaced."""
        seen = super().record(record)
        return dataclasses.replace(seen, images=tuple(grey_png(*size) for size in self.sizes(record).images))


class ParaphrasedSource(Source):
    """A source whose last answers are the paraphrase with this number, where the records have one."""

    def __init__(self, directory: str | os.PathLike[str], tokenizer: Tokenizer, number: int) -> None:
        super().__init__(directory, tokenizer.fingerprint)
        self._tokenizer, self._number = tokenizer, number

    def record(self, record: int) -> Record:
        """The record with its last answer replaced."""
        seen = super().record(record)
        answer = Turn("assistant", paraphrases(seen)[self._number])
        return dataclasses.replace(seen, turns=(*seen.turns[:-1], answer))

    def sizes(self, record: int) -> Sizes:
        """Sizes with the paraphrase's tokens, which no index holds."""
        return super().sizes(record)._replace(text_length=text_length(self.record(record).turns, self._tokenizer))


def paraphrases(record: Record) -> tuple[str, ...]:
    """Other right answers of a record's last turn, at most `MOST_PARAPHRASES`."""
    found = str(record.metadata.get("paraphrases", "")).split(PARAPHRASE_SEPARATOR)
    return tuple(text for text in found if text)[:MOST_PARAPHRASES]


@functools.lru_cache(maxsize=1024)
def grey_png(height: int, width: int) -> bytes:
    """A mid-grey picture."""
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
        self,
        checkpoint: str | os.PathLike[str],
        step: int,
        encoder: str,
        shape: BatchShape | None = None,
        tile_chunk: int = 8,
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

    def open(self, directory: pathlib.Path) -> Source:
        """A source that was counted with the checkpoint's tokenizer."""
        return Source(directory, self.tokenizer.fingerprint)

    def label(self, source: Source, records: Sequence[int]) -> list[ResolutionLabel]:
        """Labels of the records that can be read and fit a row, in their order."""
        views = self._views(source)
        values = dict(self._sample_losses(views, records))
        curves = {record: [values.get((view, record, milli)) for view, milli in _VARIANTS] for record in records}
        others = {
            record: [values.get((view, record, ALPHA_UNIT)) for view in range(_FIRST_PARAPHRASE, len(views))]
            for record in records
        }
        return [
            _make_label(source, record, curve, [loss for loss in others[record] if loss is not None], self.tiling)
            for record, curve in curves.items()
            if None not in curve
        ]

    def _views(self, source: Source) -> tuple[Source, ...]:
        paraphrased = (ParaphrasedSource(source.directory, self.tokenizer, n) for n in range(MOST_PARAPHRASES))
        return source, BlindSource(source.directory, source.fingerprint), *paraphrased

    def _sample_losses(
        self, views: Sequence[Source], records: Sequence[int]
    ) -> Iterator[tuple[tuple[int, int, int], float]]:
        """((view, record, α), mean loss of the answer) of every sample that could be laid out."""
        previous = None
        for rows in self._packed(views, records):
            batch = self._batch(rows, views)
            with jax.set_mesh(self.mesh):
                sums = self._losses(self.params, jax.device_put(batch, partitioning.row_sharding(self.mesh)))
            # The results of a batch are fetched when the next one is under way.
            yield from _collect(previous)
            previous = rows, sums
        yield from _collect(previous)

    def _packed(self, views: Sequence[Source], records: Sequence[int]) -> Iterator[list[list[Sample]]]:
        """The samples of all records in packed rows, a batch of rows at a time."""
        budget, pending = Budget(self.shape.length, self.shape.tiles), []
        samples = (sample for record in records for sample in self._samples(views, record, budget))
        rows = iter(lambda: pack_row(pending, lambda: next(samples, None), budget, _WINDOW), [])
        while chunk := list(itertools.islice(rows, self.shape.rows)):
            yield chunk

    def _samples(self, views: Sequence[Source], record: int, budget: Budget) -> list[Sample]:
        """The samples of a record; none when one of the eleven fits no row. Paraphrases that fit no row are left out."""
        sample = lambda view, milli: Sample(view, 0, record, milli, *views[view].cost(record, milli, self.tiling))
        samples = [sample(view, milli) for view, milli in _VARIANTS]
        if not all(map(budget.holds, samples)):
            return []
        others = range(_FIRST_PARAPHRASE, _FIRST_PARAPHRASE + _count_paraphrases(views[_SEEN], record))
        return samples + [found for view in others if budget.holds(found := sample(view, ALPHA_UNIT))]

    def _batch(self, rows: Sequence[Sequence[Sample]], views: Sequence[Source]) -> Batch:
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


def _count_paraphrases(source: Source, record: int) -> int:
    """How many paraphrases a record has; none where it cannot be read, which `_collect` then misses."""
    try:
        return len(paraphrases(source.record(record)))
    except RecordError:
        return 0


def _make_label(
    source: Source, record: int, curve: Sequence[float], others: Sequence[float], tiling: TilingConfig
) -> ResolutionLabel:
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
        paraphrase_losses=tuple(others),
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


def _weights_digest(params: Mapping[str, Any]) -> str:
    """Names a model's weights by its norms and biases, which are float32 whatever the compute dtype is."""
    digest = hashlib.blake2b(digest_size=8)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key not in CAST_PARAMETERS:
            digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
