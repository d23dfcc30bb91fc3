"""Records that no row can hold, split where nothing is lost: conversations between exchanges, plain text between paragraphs.

An answer is never cut. An exchange is what a user says and what is answered. A part that does not begin the conversation and
brings no image of its own begins with the images that were last shown, so that its questions still have something to refer to;
a system turn stands before every part. An exchange or paragraph that fits no row alone is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from data_pipelines.errors import RecordError
from data_pipelines.lane_state import MAX_PARTS
from data_pipelines.packing import Budget, Sample
from data_pipelines.records import Record
from data_pipelines.sources import Source
from hypervl_jax.architecture import TilingConfig
from hypervl_jax.text.conversation import IMAGE_SLOT, Turn, count_image_slots, text_length
from hypervl_jax.text.tokenizer import Tokenizer
from hypervl_jax.vision.anyres import ImagePlan, prompt_tokens

_PARAGRAPH = "\n\n"


class Part(NamedTuple):
    """A part of a record: its turns, which of the record's images they show, and its cost in a row."""

    turns: tuple[Turn, ...]
    images: tuple[int, ...]
    tokens: int
    tiles: int


class _Exchange(NamedTuple):
    """Turns up to the last answer before the next question, and the images that they show."""

    turns: tuple[Turn, ...]
    images: tuple[int, ...]


class SplitRecord(NamedTuple):
    """The parts of a record, in order, and how many stretches were left out because no row holds them."""

    parts: list[Part]
    left_out: int


def split_record(
    record: Record, plans: Sequence[ImagePlan], tokenizer: Tokenizer, tiling: TilingConfig, budget: Budget
) -> SplitRecord:
    """Splits a record into parts that each fit a row.

    Args:
        record: one that does not.
        plans: of its images.
        tokenizer: of the run.
        tiling: of the run.
        budget: of a row.

    Raises:
        ConversationError: the turns are no conversation.
    """
    if len(record.turns) == 1 and record.turns[0].role == "assistant":
        found = list(_paragraphs(record.turns[0].text, tokenizer, budget))
    else:
        found = list(_exchange_groups(record.turns, plans, tokenizer, tiling, budget))
    measured = [_measured(part, plans, tokenizer, tiling) for part in found]
    fitting = [part for part in measured if budget.fits(part.tokens, part.tiles)]
    return SplitRecord(fitting[:MAX_PARTS], max(len(measured), 1) - len(fitting[:MAX_PARTS]))


def read_split(
    sample: Sample, source: Source, tokenizer: Tokenizer, tiling: TilingConfig, budget: Budget
) -> SplitRecord:
    """Reads a record that no row can hold, and splits it. No pixel is decoded.

    Raises:
        DamagedShard: its whole shard cannot be used.
        RecordError, ConversationError: it alone cannot be read, or is no conversation.
    """
    plans, record = source.plans(sample.record, sample.alpha, tiling), source.record(sample.record)
    _check_images(record, plans)
    return split_record(record, plans, tokenizer, tiling, budget)


def take_part(
    record: Record, plans: Sequence[ImagePlan], part: int, tokenizer: Tokenizer, tiling: TilingConfig, budget: Budget
) -> tuple[Record, list[ImagePlan]]:
    """Part number `part`, from 1, of a split record as a record of its own, with the plans of its images.

    Raises:
        RecordError, ConversationError: the record is not the one that was split.
    """
    _check_images(record, plans)
    parts = split_record(record, plans, tokenizer, tiling, budget).parts
    if part > len(parts):
        raise RecordError(
            f"part {part} of {len(parts)} was packed, so the record is another now; make the source again"
        )
    turns, images = parts[part - 1].turns, parts[part - 1].images
    shown = tuple(record.images[image] for image in images)
    return dataclasses.replace(record, turns=turns, images=shown), [plans[image] for image in images]


def _check_images(record: Record, plans: Sequence[ImagePlan]) -> None:
    if len(record.images) != len(plans):
        raise RecordError(f"{len(record.images)} images, its index says {len(plans)}; make the source again")


def _measured(part: _Exchange, plans: Sequence[ImagePlan], tokenizer: Tokenizer, tiling: TilingConfig) -> Part:
    """The part with its exact cost."""
    visual = sum(prompt_tokens(plans[image], tiling) for image in part.images)
    tiles = sum(plans[image].tiles for image in part.images)
    return Part(part.turns, part.images, text_length(part.turns, tokenizer) + visual, tiles)


def _paragraphs(text: str, tokenizer: Tokenizer, budget: Budget) -> Iterator[_Exchange]:
    """Runs of paragraphs that together take about the budget or less; none of a text without paragraphs."""
    paragraphs = text.split(_PARAGRAPH)
    if len(paragraphs) == 1:
        return
    run, tokens = [], 1
    for paragraph in paragraphs:
        needed = len(tokenizer.encode(paragraph + _PARAGRAPH))
        if run and tokens + needed > budget.tokens:
            yield from _plain_text(run)
            run, tokens = [], 1
        run.append(paragraph)
        tokens += needed
    yield from _plain_text(run)


def _plain_text(paragraphs: Sequence[str]) -> Iterator[_Exchange]:
    text = _PARAGRAPH.join(paragraphs)
    if text.strip():
        yield _Exchange((Turn("assistant", text),), ())


def _exchange_groups(
    turns: Sequence[Turn], plans: Sequence[ImagePlan], tokenizer: Tokenizer, tiling: TilingConfig, budget: Budget
) -> Iterator[_Exchange]:
    """Runs of exchanges that together fit the budget, each with its system turn and the images it refers to; none of a single one."""
    system, exchanges = _exchanges(turns)
    if len(exchanges) == 1 and len(system) + len(exchanges[0].turns) == len(turns):
        return  # the whole record, which is known not to fit: nothing to tokenise
    run: list[_Exchange] = []
    shown: tuple[int, ...] = ()
    used = Budget(0, 0)
    for exchange in exchanges:
        # Each alone, with system turn and think block: a little more than it adds to the run, never less.
        cost = _measured(_Exchange((*system, *exchange.turns), exchange.images), plans, tokenizer, tiling)
        if run and not budget.fits(used.tokens + cost.tokens, used.tiles + cost.tiles):
            yield _joined(system, run)
            run, used = [], Budget(0, 0)
            if not exchange.images:
                exchange = _showing(exchange, shown)
                cost = _measured(_Exchange((*system, *exchange.turns), exchange.images), plans, tokenizer, tiling)
        run.append(exchange)
        used = Budget(used.tokens + cost.tokens, used.tiles + cost.tiles)
        shown = exchange.images or shown
    if run:
        yield _joined(system, run)


def _joined(system: tuple[Turn, ...], run: Sequence[_Exchange]) -> _Exchange:
    turns = tuple(turn for exchange in run for turn in exchange.turns)
    return _Exchange((*system, *turns), tuple(image for exchange in run for image in exchange.images))


def _showing(exchange: _Exchange, images: tuple[int, ...]) -> _Exchange:
    """The exchange with images before its first words."""
    if not images:
        return exchange
    first, *others = exchange.turns
    return _Exchange((Turn(first.role, f"{IMAGE_SLOT * len(images)}\n{first.text}"), *others), images)


def _exchanges(turns: Sequence[Turn]) -> tuple[tuple[Turn, ...], list[_Exchange]]:
    """(system turn, exchanges). A question at the end that nobody answers is left out: nothing is learned from it."""
    system = tuple(turn for turn in turns[:1] if turn.role == "system")
    exchanges, current, first_image = [], [], 0
    for turn, following in zip(turns[len(system) :], [*turns[len(system) + 1 :], None], strict=True):
        current.append(turn)
        if turn.role == "assistant" and (following is None or following.role != "assistant"):
            images = count_image_slots(current)
            exchanges.append(_Exchange(tuple(current), tuple(range(first_image, first_image + images))))
            current, first_image = [], first_image + images
    return system, exchanges
