"""Records that no row can hold, split where nothing is lost: conversations between exchanges, plain text between paragraphs.

An answer is never cut. A part that does not begin the conversation and brings no image of its own begins with the images that were
last shown, so that its questions still have something to refer to; a system turn stands before every part. An exchange or paragraph
that fits no row alone is left out. Parts are planned from the numbers in the index; the record is read when a row is filled.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.errors import require_record
from data_pipelines.lane_state import MAX_PARTS
from data_pipelines.packing import Budget, Sample
from data_pipelines.pieces import SLOT_TOKENS, Exchange, Pieces, cut_text, cut_turns, is_plain_text, showing
from data_pipelines.records import Record
from data_pipelines.sources import Source
from hypervl_jax.architecture import TilingConfig
from hypervl_jax.text.conversation import TEXT_POSITION, EncodedConversation, encode_conversation
from hypervl_jax.text.tokenizer import Tokenizer
from hypervl_jax.vision.anyres import ImagePlan, prompt_tokens


class Part(NamedTuple):
    """A part of a record, and its cost in a row.

    Attributes:
        first: its first exchange or paragraph.
        end: the one after its last.
        images: of the record, that it shows.
        again: how many of them were shown before and are shown again at its beginning.
        tokens: LLM positions.
        tiles: of its images.
    """

    first: int
    end: int
    images: tuple[int, ...]
    again: int
    tokens: int
    tiles: int


class SplitRecord(NamedTuple):
    """The parts of a record, in order, and how many stretches were left out because no row holds them."""

    parts: list[Part]
    left_out: int


class PartSample(NamedTuple):
    """A part, ready to be laid out: its encoded images, their plans, and its ids."""

    images: tuple[bytes, ...]
    plans: list[ImagePlan]
    conversation: EncodedConversation


def split_record(pieces: Pieces, plans: Sequence[ImagePlan], tiling: TilingConfig, budget: Budget) -> SplitRecord:
    """Splits a record into parts that each fit a row.

    Args:
        pieces: of a record that does not.
        plans: of its images.
        tiling: of the run.
        budget: of a row.

    Raises:
        RecordError: the pieces show other images than there are.
    """
    shown = sum(exchange.images for exchange in pieces.exchanges)
    require_record(
        shown <= len(plans), f"{shown} images in its pieces, {len(plans)} in its index; make the source again"
    )
    found = list(_texts(pieces, budget) if pieces.paragraphs else _talks(pieces, plans, tiling, budget))
    fitting = [part for part in found if budget.fits(part.tokens, part.tiles)]
    return SplitRecord(fitting[:MAX_PARTS], max(len(found), 1) - len(fitting[:MAX_PARTS]))


def split_sample(
    sample: Sample, source: Source, tokenizer: Tokenizer, tiling: TilingConfig, budget: Budget
) -> SplitRecord:
    """Splits a record of a source that no row can hold.

    Raises:
        DamagedShard, RecordError: as `Source.pieces` and `split_record`.
    """
    plans = source.plans(sample.record, sample.alpha, tiling)
    return split_record(source.pieces(sample.record, tokenizer), plans, tiling, budget)


def sample_part(sample: Sample, source: Source, tokenizer: Tokenizer, tiling: TilingConfig, budget: Budget) -> Part:
    """The part that a sample of a split record is.

    Raises:
        DamagedShard, RecordError: as `split_sample`; or the record has fewer parts.
    """
    parts = split_sample(sample, source, tokenizer, tiling, budget).parts
    found = f"part {sample.part} of {len(parts)} was packed, so the record is another now; make the source again"
    require_record(0 < sample.part <= len(parts), found)
    return parts[sample.part - 1]


def _texts(pieces: Pieces, budget: Budget) -> Iterator[Part]:
    """Runs of paragraphs that together, with the end of text, take the budget or less, or are one paragraph."""
    first, tokens = 0, 1
    for number, length in enumerate(pieces.paragraphs):
        if number > first and tokens + length > budget.tokens:
            yield Part(first, number, (), 0, tokens, 0)
            first, tokens = number, 1
        tokens += length
    yield Part(first, len(pieces.paragraphs), (), 0, tokens, 0)


@dataclasses.dataclass(frozen=True)
class _Run:
    """Exchanges that stand together: which, and what they take without the system turn and what ends a conversation."""

    first: int
    images: tuple[int, ...]
    again: int
    tokens: int
    query: int


def _talks(pieces: Pieces, plans: Sequence[ImagePlan], tiling: TilingConfig, budget: Budget) -> Iterator[Part]:
    """Runs of exchanges that together fit the budget, or are one exchange, each with the images it refers to."""
    run: _Run | None = None
    last = None
    shown, first_image = (), 0
    for number, exchange in enumerate(pieces.exchanges):
        images = tuple(range(first_image, first_image + exchange.images))
        longer = run and _extended(run, exchange, images)
        part = longer and _part(longer, number, exchange, pieces.system, plans, tiling)
        if not part or not budget.fits(part.tokens, part.tiles):
            if last:
                yield last
            longer = _begun(number, exchange, images, () if images else shown)
            part = _part(longer, number, exchange, pieces.system, plans, tiling)
        run, last = longer, part
        shown, first_image = images or shown, first_image + exchange.images
    if last:
        yield last


def _begun(number: int, exchange: Exchange, images: tuple[int, ...], again: tuple[int, ...]) -> _Run:
    """A run of one exchange, behind images that are shown again."""
    tokens = exchange.behind_images + SLOT_TOKENS * len(again) if again else exchange.tokens
    return _Run(number, again + images, len(again), tokens, 1 if again else exchange.query)


def _extended(run: _Run, exchange: Exchange, images: tuple[int, ...]) -> _Run:
    return dataclasses.replace(
        run,
        images=run.images + images,
        tokens=run.tokens + exchange.tokens,
        query=run.query | exchange.query,
    )


def _part(
    run: _Run, last: int, ending: Exchange, system: int, plans: Sequence[ImagePlan], tiling: TilingConfig
) -> Part:
    """A run up to exchange `last`, with its exact cost."""
    text = system + run.tokens + ending.closing * run.query
    visual = sum(prompt_tokens(plans[image], tiling) for image in run.images)
    tiles = sum(plans[image].tiles for image in run.images)
    return Part(run.first, last + 1, run.images, run.again, text + visual, tiles)


def take_part(
    record: Record, part: Part, plans: Sequence[ImagePlan], tokenizer: Tokenizer, tiling: TilingConfig
) -> PartSample:
    """A part of a record, encoded; `plans` has one for each of its images.

    Raises:
        RecordError, ConversationError: the record is not the one that was split.
    """
    images, own = tuple(record.images[image] for image in part.images), [plans[image] for image in part.images]
    if is_plain_text(record.turns):
        return PartSample(images, own, _encoded_text(cut_text(record.turns[0].text)[part.first : part.end], tokenizer))
    system, exchanges = cut_turns(record.turns)
    require_record(
        part.end <= len(exchanges),
        f"{len(exchanges)} exchanges, its index says {part.end} or more; make the source again",
    )
    first, *others = itertools.chain.from_iterable(exchanges[part.first : part.end])
    turns = (*system, showing(first, part.again), *others)
    return PartSample(images, own, encode_conversation(turns, tokenizer, own, tiling))


def _encoded_text(paragraphs: Sequence[str], tokenizer: Tokenizer) -> EncodedConversation:
    """Plain text as ids, paragraph by paragraph, so that its length is the sum of theirs; all weights 1."""
    ids = [*itertools.chain.from_iterable(map(tokenizer.encode, paragraphs)), tokenizer.end_of_text]
    tokens = np.array(ids, np.int32)
    return EncodedConversation(tokens, np.ones(len(ids), np.float32), np.full(len(ids), TEXT_POSITION, np.int32))
