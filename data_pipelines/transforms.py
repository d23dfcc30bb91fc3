"""From a packed row's plan to its arrays: pixels decoded, scaled by α and tiled; conversations tokenised, shifted, laid out."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from data_pipelines.packing import Sample
from data_pipelines.records import Record, RecordError
from data_pipelines.sources import DamagedShard, Source
from hypervl_jax.architecture import TilingConfig
from hypervl_jax.text.conversation import ConversationError, EncodedConversation, encode_conversation
from hypervl_jax.text.tokenizer import Tokenizer
from hypervl_jax.training.batch import TEXT_POSITION, Batch
from hypervl_jax.vision.anyres import ImagePlan, tile_image
from hypervl_jax.vision.decoding import UndecodableImage, decode_image

DecodeImage = Callable[[bytes], UInt8[np.ndarray, "h w 3"]]
"""An image file's bytes to RGB; raises `UndecodableImage`. The array is only read."""


class FailureReason(enum.IntEnum):
    """Why a sample was left out of its row."""

    IMAGE = 0
    """An image cannot be decoded."""
    RECORD = 1
    """The record cannot be read, has no valid conversation, or has other sizes than its index says."""


class Failure(NamedTuple):
    """A sample that was left out: the mixture's number of its source, and why."""

    source: int
    reason: FailureReason
    message: str


class _Content(NamedTuple):
    """A sample ready to be laid out; its tiles are those of all its images, in order."""

    conversation: EncodedConversation
    tiles: UInt8[np.ndarray, "t s s 3"]


def fill_row(
    row: Batch,
    samples: Sequence[Sample],
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    tiling: TilingConfig,
    decode: DecodeImage = decode_image,
) -> list[Failure]:
    """Writes the samples of one row into it, one after the other.

    Sample i is segment i + 1. A sample that fails leaves its place as padding, so that all others stand where they would
    have stood without the failure. Padding has segment 0; its `sources` are 0 too and mean nothing.

    Args:
        row: a row of `empty_batch` without its leading axis, views that are written in place.
        samples: as packed: together they fit the row.
        sources: of the mixture, by number.
        tokenizer: of the run.
        tiling: of the run.
        decode: `decode_image`, or one that remembers, for a caller that lays the same images out again and again.

    Returns:
        The samples that failed, in order.
    """
    failures = []
    start = first_tile = 0
    for segment, sample in enumerate(samples, start=1):
        try:
            content = _materialise(sample, sources[sample.source], tokenizer, tiling, decode)
        except _SampleError as error:
            failures.append(Failure(sample.source, error.reason, str(error)))
        else:
            _write_tokens(
                row, slice(start, start + sample.tokens), content.conversation, first_tile * tiling.tokens_per_tile
            )
            _write_tags(
                row,
                slice(start, start + sample.tokens),
                slice(first_tile, first_tile + sample.tiles),
                segment,
                sample.source,
            )
            row.tiles[first_tile : first_tile + sample.tiles] = content.tiles
        start, first_tile = start + sample.tokens, first_tile + sample.tiles
    return failures


class _SampleError(Exception):
    """One sample cannot be used."""

    def __init__(self, reason: FailureReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _materialise(
    sample: Sample, source: Source, tokenizer: Tokenizer, tiling: TilingConfig, decode: DecodeImage
) -> _Content:
    plans = source.plans(sample.record, sample.alpha, tiling)
    try:
        record = source.record(sample.record)
        tiles = _image_tiles(record, plans, tiling, decode)
        conversation = encode_conversation(record.turns, tokenizer, plans, tiling)
    except DamagedShard:
        raise
    except UndecodableImage as error:
        raise _SampleError(FailureReason.IMAGE, f"record {sample.record}: {error}") from error
    except (RecordError, ConversationError) as error:
        raise _SampleError(FailureReason.RECORD, f"record {sample.record}: {error}") from error
    if len(conversation.tokens) != sample.tokens:
        raise _SampleError(
            FailureReason.RECORD,
            f"record {sample.record} has {len(conversation.tokens)} tokens, its index says {sample.tokens}; make the source again",
        )
    return _Content(conversation, tiles)


def _image_tiles(
    record: Record, plans: Sequence[ImagePlan], tiling: TilingConfig, decode: DecodeImage
) -> UInt8[np.ndarray, "t s s 3"]:
    """Tiles of all images of a record. Raises `RecordError` when images are not those of the index."""
    if len(record.images) != len(plans):
        raise RecordError(f"{len(record.images)} images, its index says {len(plans)}; make the source again")
    tiles = [np.zeros((0, tiling.tile_size, tiling.tile_size, 3), np.uint8)]
    for image, plan in zip(record.images, plans, strict=True):
        rgb = decode(image)
        if rgb.shape[:2] != (plan.source_height, plan.source_width):
            raise RecordError(
                f"an image of {rgb.shape[:2]} pixels, its index says {(plan.source_height, plan.source_width)}; make the source again"
            )
        tiles.append(tile_image(rgb, plan, tiling))
    return np.concatenate(tiles)


def _write_tokens(row: Batch, place: slice, conversation: EncodedConversation, first_slot: int) -> None:
    """Tokens, and what each position predicts: the next token and its weight; a sample's last position predicts nothing."""
    predicting = slice(place.start, place.stop - 1)
    row.tokens[place] = conversation.tokens
    row.targets[predicting] = conversation.tokens[1:]
    row.loss_weights[predicting] = conversation.loss_weights[1:]
    visual = conversation.visual_index
    row.visual_index[place] = np.where(visual == TEXT_POSITION, TEXT_POSITION, visual + first_slot)


def _write_tags(row: Batch, place: slice, tiles: slice, segment: int, source: int) -> None:
    row.segments[place] = segment
    row.positions[place] = np.arange(place.stop - place.start)
    row.sources[place] = source
    row.tile_segments[tiles] = segment
