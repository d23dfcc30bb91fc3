"""Where a record may be cut, in numbers: indexes keep them, so that rows are planned without opening a record.

A conversation is cut between exchanges (what a user says and what is answered), plain text between paragraphs. The chat template writes
each turn by itself, so the tokens of any run of exchanges are a sum.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from data_pipelines.errors import require_record
from hypervl_jax.text.conversation import IMAGE_SLOT, Turn, count_image_slots, is_query, turn_length
from hypervl_jax.text.tokenizer import Tokenizer

_PLAIN_TEXT = -1
_PARAGRAPH = re.compile(r"\s*\S.*?(?:\n\n+(?:\s*\Z)?|\Z)", re.DOTALL)

SLOT_TOKENS = 2
"""Tokens around an image: where it starts and where it ends."""


class Exchange(NamedTuple):
    """One exchange of a conversation, in text tokens.

    Attributes:
        images: that it shows.
        tokens: of its turns, as they stand in the middle of a conversation.
        behind_images: the same, were images shown before its first words; without the slots' own tokens.
        closing: how many more they are when its last answer ends the conversation after a user's question.
        query: 1 when it holds a user's question, which a tool's answer is not; else 0.
    """

    images: int
    tokens: int
    behind_images: int
    closing: int
    query: int


class Pieces(NamedTuple):
    """The pieces of a record, either exchanges or paragraphs; neither where nothing can be cut.

    Attributes:
        system: text tokens of the system turn before the exchanges.
        exchanges: in order.
        paragraphs: tokens of each paragraph of a plain text, the empty lines after it included.
    """

    system: int
    exchanges: tuple[Exchange, ...]
    paragraphs: tuple[int, ...]

    def to_numbers(self) -> tuple[int, ...]:
        """As an index keeps them; none for a record that cannot be cut."""
        if self.paragraphs:
            return _PLAIN_TEXT, *self.paragraphs
        return (self.system, *(number for exchange in self.exchanges for number in exchange)) if self.exchanges else ()

    @staticmethod
    def from_numbers(numbers: Sequence[int]) -> Pieces:
        """What `to_numbers` gave. Raises `RecordError` for anything else."""
        if not numbers:
            return Pieces(0, (), ())
        first, *others = numbers
        if first == _PLAIN_TEXT:
            return Pieces(0, (), tuple(others))
        width = len(Exchange._fields)
        whole = first >= 0 and len(others) % width == 0
        require_record(whole, "an index tells wrongly where a record may be cut; make the source again")
        return Pieces(first, tuple(Exchange(*others[at : at + width]) for at in range(0, len(others), width)), ())


def measure_pieces(turns: Sequence[Turn], tokenizer: Tokenizer) -> Pieces:
    """Where a record may be cut, and what its pieces take."""
    if is_plain_text(turns):
        paragraphs = cut_text(turns[0].text)
        lengths = tuple(len(tokenizer.encode(text)) for text in paragraphs) if len(paragraphs) > 1 else ()
        return Pieces(0, (), lengths)
    system, exchanges = cut_turns(turns)
    if [*system, *(turn for exchange in exchanges[:1] for turn in exchange)] == list(turns):
        return Pieces(0, (), ())
    default = tokenizer.template.default_system
    opening = system or ((Turn("system", default),) if default is not None else ())
    before = sum(turn_length(turn, tokenizer) for turn in opening)
    return Pieces(before, tuple(_measured(exchange, tokenizer) for exchange in exchanges), ())


def _measured(turns: Sequence[Turn], tokenizer: Tokenizer) -> Exchange:
    first, last = turns[0], turns[-1]
    tokens = sum(turn_length(turn, tokenizer) for turn in turns)
    behind = turn_length(showing(first, 1), tokenizer) - SLOT_TOKENS - turn_length(first, tokenizer)
    closing = turn_length(last, tokenizer, tokenizer.template.think_block) - turn_length(last, tokenizer)
    return Exchange(count_image_slots(turns), tokens, tokens + behind, closing, int(any(map(is_query, turns))))


def is_plain_text(turns: Sequence[Turn]) -> bool:
    """Whether a record is text for pretraining: one turn of the assistant's and nothing else."""
    return len(turns) == 1 and turns[0].role == "assistant"


def cut_text(text: str) -> list[str]:
    """The paragraphs of a text, each with the empty lines after it, none blank; joined, they are the text."""
    return _PARAGRAPH.findall(text)


def cut_turns(turns: Sequence[Turn]) -> tuple[tuple[Turn, ...], list[tuple[Turn, ...]]]:
    """(system turn, exchanges).

    Words of the assistant's before anyone has asked belong to the first exchange: alone they would be plain text. A question at the
    end that nobody answers is left out: nothing is learned from it.
    """
    system = tuple(turn for turn in turns[:1] if turn.role == "system")
    exchanges, current = [], []
    for turn, following in zip(turns[len(system) :], [*turns[len(system) + 1 :], None], strict=True):
        current.append(turn)
        answered = turn.role == "assistant" and (following is None or following.role != "assistant")
        if answered and any(earlier.role == "user" for earlier in current):
            exchanges.append(tuple(current))
            current = []
    return system, exchanges


def showing(turn: Turn, images: int) -> Turn:
    """The turn with slots for images before its first words."""
    return Turn(turn.role, f"{IMAGE_SLOT * images}\n{turn.text}") if images else turn
