"""From a packed row's plan to its arrays: pixels decoded, scaled by α and tiled; conversations tokenised, shifted, laid out."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from data_pipelines.errors import RecordError
from data_pipelines.packing import Budget, Sample
from data_pipelines.sources import DamagedShard, Source
from data_pipelines.splitting import PartSample, sample_part, take_part
from hypervl_jax.architecture import TilingConfig
from hypervl_jax.text.conversation import ConversationError, EncodedConversation, encode_conversation
from hypervl_jax.text.tokenizer import Tokenizer
from hypervl_jax.training.batch import TEXT_POSITION, Batch
from hypervl_jax.vision.anyres import ImagePlan, Picture, picture_size, write_tiles
from hypervl_jax.vision.decoding import UndecodableImage, decode_image, decode_picture

DecodeImage = Callable[[bytes], Picture]
"""An image file's bytes to its pixels; raises `UndecodableImage`. They are only read."""


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


def fill_row(
    row: Batch,
    samples: Sequence[Sample],
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    tiling: TilingConfig,
    decode: DecodeImage | None = None,
) -> list[Failure]:
    """Writes the samples of one row into it, one after the other.

    Sample i is segment i + 1. A sample that fails leaves its place as padding, so that all others stand where they would
    have stood without the failure. Padding has segment 0; its `sources` are 0 too and mean nothing.

    Args:
        row: a row of `unfilled_batch` without its leading axis, views that are written in place.
        samples: as packed: together they fit the row.
        sources: of the mixture, by number.
        tokenizer: of the run.
        tiling: of the run.
        decode: one that remembers, for a caller that lays the same images out again and again; else `decode_for` each plan.

    Returns:
        The samples that failed, in order.
    """
    failures = []
    budget = Budget(len(row.tokens), len(row.tiles))
    # All texts first: pictures push the tokenizer's tables out of the processor's caches.
    texts = [_read(sample, sources[sample.source], tokenizer, tiling, budget) for sample in samples]
    start = first_tile = 0
    for segment, (sample, text) in enumerate(zip(samples, texts, strict=True), start=1):
        place = slice(start, start + sample.tokens)
        tiles = slice(first_tile, first_tile + sample.tiles)
        written = text if isinstance(text, Failure) else _write_images(sample, text, decode, row.tiles[tiles])
        if isinstance(written, Failure):
            row.tiles[tiles] = 0
            failures.append(written)
        else:
            _write_tokens(row, place, written, first_tile * tiling.tokens_per_tile)
            _write_tags(row, place, tiles, segment, sample.source)
        start, first_tile = place.stop, tiles.stop
    row.tiles[first_tile:] = 0
    return failures


def _read(
    sample: Sample, source: Source, tokenizer: Tokenizer, tiling: TilingConfig, budget: Budget
) -> PartSample | Failure:
    """Reads and tokenises a sample. Raises `DamagedShard`."""
    plans = source.plans(sample.record, sample.alpha, tiling)
    try:
        record = source.record(sample.record)
        if len(record.images) != len(plans):
            raise RecordError(f"{len(record.images)} images, its index says {len(plans)}; make the source again")
        if sample.part:
            part = sample_part(sample, source, tokenizer, tiling, budget)
            text = take_part(record, part, plans, tokenizer, tiling)
        else:
            text = PartSample(record.images, plans, encode_conversation(record.turns, tokenizer, plans, tiling))
    except DamagedShard:
        raise
    except (RecordError, ConversationError) as error:
        return Failure(sample.source, FailureReason.RECORD, f"record {sample.record}: {error}")
    if len(text.conversation.tokens) != sample.tokens:
        return Failure(
            sample.source,
            FailureReason.RECORD,
            f"record {sample.record} has {len(text.conversation.tokens)} tokens, its index says {sample.tokens}; make the source again",
        )
    return text


def _write_images(
    sample: Sample, text: PartSample, decode: DecodeImage | None, tiles: UInt8[np.ndarray, "t s s 3"]
) -> EncodedConversation | Failure:
    """Writes the tiles of all images of a sample, one after the other, and gives its text. After a failure `tiles` may hold anything."""
    first = 0
    for image, plan in zip(text.images, text.plans, strict=True):
        try:
            picture = decode(image) if decode else decode_for(image, plan)
        except UndecodableImage as error:
            return Failure(sample.source, FailureReason.IMAGE, f"record {sample.record}: {error}")
        size = picture_size(picture)
        if size != (plan.source_height, plan.source_width):
            return Failure(
                sample.source,
                FailureReason.RECORD,
                f"record {sample.record}: an image of {size} pixels, its index says {(plan.source_height, plan.source_width)}; make the source again",
            )
        write_tiles(picture, plan, tiles[first : first + plan.tiles])
        first += plan.tiles
    return text.conversation


def decode_for(image: bytes, plan: ImagePlan) -> Picture:
    """The pixels of an image file, held so that what its plan does with them takes the fewest copies. Raises `UndecodableImage`."""
    return decode_picture(image) if plan.scales else decode_image(image)


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
