r"""From conversations to ids: Qwen3's chat template (thinking off), loss weights, and image slots at their exact size.

    <|im_start|>user\n<|vision_start|> image tokens <|vision_end|>What is this?<|im_end|>\n
    <|im_start|>assistant\n<think>\n\n</think>\n\nA cat.<|im_end|>\n

The empty think block stands where Qwen3's published template writes it: before the last turn, if that is an assistant's and
answers a user. Loss weights are 1 on the assistant's words and their `<|im_end|>`, else 0.

Ids are those of the published template's text, with one exception: an answer that begins with a line break keeps it as its own
token, because generation starts after the opening's.

A record that is one assistant turn and nothing else is plain text for pretraining: its ids and `<|endoftext|>`, all weights 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float32, Int32

from hypervl_jax.architecture import TilingConfig
from hypervl_jax.text.tokenizer import Tokenizer
from hypervl_jax.vision.anyres import ImagePlan, prompt_tokens, row_breaks, separator_count, visual_slots

IMAGE_SLOT = "<image>"
"""Marks in a user turn where an image goes."""

ROLES = ("system", "user", "assistant")
THINK_BLOCK = "<think>\n\n</think>\n\n"
"""Qwen3's empty block before an answer: thinking off."""

TEXT_POSITION = -1


class ConversationError(ValueError):
    """A conversation that cannot become ids; the message says why. Data pipelines skip and count such records."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn. `role` is one of `ROLES`; each `IMAGE_SLOT` in a user's text stands for the next image."""

    role: str
    text: str


@dataclasses.dataclass(frozen=True)
class EncodedConversation:
    """A conversation as ids.

    Attributes:
        tokens: ids; visual tokens carry the image id.
        loss_weights: of the token that is predicted, at that token's own place; packing shifts it with the targets.
        visual_index: -1 for text, else the index into the flattened tile tokens of this sample, whose images' tiles are
            concatenated in order (tile · tokens_per_tile + cell).
    """

    tokens: Int32[np.ndarray, "l"]
    loss_weights: Float32[np.ndarray, "l"]
    visual_index: Int32[np.ndarray, "l"]


@dataclasses.dataclass(frozen=True)
class _Span:
    """Ids that share a loss weight. `opens_image`: the next image's visual tokens follow."""

    ids: list[int]
    weight: float = 0.0
    opens_image: bool = False


def encode_conversation(
    turns: Sequence[Turn], tokenizer: Tokenizer, plans: Sequence[ImagePlan], tiling: TilingConfig
) -> EncodedConversation:
    """Encodes a training sample.

    Args:
        turns: the conversation.
        tokenizer: with its chat template settings.
        plans: one for each image slot, in order.
        tiling: the settings the plans were made with.

    Raises:
        ConversationError: no turns, none of the assistant's, blank text, unknown role, a slot outside a user turn, reasoning in
            an assistant turn, or slots and images that differ in number.
    """
    return _expand(list(_render(turns, tokenizer)), tokenizer, plans, tiling)


def encode_prompt(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    plans: Sequence[ImagePlan],
    tiling: TilingConfig,
    add_generation_prompt: bool = True,
) -> EncodedConversation:
    """Encodes turns to be answered; all loss weights are 0.

    With the generation prompt after a user turn, the ids are a prefix of `encode_conversation` of the same turns and an
    answer.

    Raises:
        ConversationError: as `encode_conversation`.
    """
    spans = list(_render_turns(turns, tokenizer))
    if add_generation_prompt:
        spans += _assistant_opening(tokenizer, tokenizer.template.think_block)
    encoded = _expand(spans, tokenizer, plans, tiling)
    return dataclasses.replace(encoded, loss_weights=np.zeros_like(encoded.loss_weights))


def text_length(turns: Sequence[Turn], tokenizer: Tokenizer) -> int:
    """Tokens of a sample without visual tokens and separators.

    `text_length + sum(prompt_tokens(plan, tiling))` is the length of `encode_conversation`.

    Raises:
        ConversationError: as `encode_conversation`, but for the number of images.
    """
    return sum(len(span.ids) for span in _render(turns, tokenizer))


def turn_length(turn: Turn, tokenizer: Tokenizer, think_block: bool = False) -> int:
    """Tokens of one turn as the template writes it; `text_length` is their sum. `think_block`: before an answer."""
    assistant = turn.role == "assistant"
    spans = _render_assistant(turn, tokenizer, think_block) if assistant else _render_given(turn, tokenizer)
    return sum(len(span.ids) for span in spans)


def count_image_slots(turns: Sequence[Turn]) -> int:
    """Image slots in the user turns."""
    return sum(turn.text.count(IMAGE_SLOT) for turn in turns if turn.role == "user")


def _render(turns: Sequence[Turn], tokenizer: Tokenizer) -> Iterator[_Span]:
    if len(turns) == 1 and turns[0].role == "assistant":
        _validate(turns)
        yield _Span([*tokenizer.encode(turns[0].text), tokenizer.end_of_text], weight=1.0)
    elif turns and all(turn.role != "assistant" for turn in turns):
        raise ConversationError("no assistant turn to learn from")
    else:
        yield from _render_turns(turns, tokenizer)


def _render_turns(turns: Sequence[Turn], tokenizer: Tokenizer) -> Iterator[_Span]:
    _validate(turns)
    if tokenizer.template.default_system is not None and turns[0].role != "system":
        turns = [Turn("system", tokenizer.template.default_system), *turns]
    for index, turn in enumerate(turns):
        if turn.role == "assistant":
            final_answer = index == len(turns) - 1 and any(map(is_query, turns))
            yield from _render_assistant(turn, tokenizer, final_answer and tokenizer.template.think_block)
        else:
            yield from _render_given(turn, tokenizer)


def is_query(turn: Turn) -> bool:
    """Whether a turn is a user's question. Qwen3 does not count a tool's answer, wrapped in a user turn, as one."""
    return turn.role == "user" and not (
        turn.text.startswith("<tool_response>") and turn.text.endswith("</tool_response>")
    )


def _render_given(turn: Turn, tokenizer: Tokenizer) -> Iterator[_Span]:
    """A system or user turn. The role and the first words are one text, as in Qwen3's template."""
    first, *others = turn.text.split(IMAGE_SLOT) if turn.role == "user" else [turn.text]
    yield _Span([tokenizer.start_of_turn, *tokenizer.encode(f"{turn.role}\n{first}")])
    for text in others:
        yield _Span([tokenizer.vision_start], opens_image=True)
        yield _Span([tokenizer.vision_end, *tokenizer.encode(text)])
    yield _Span([tokenizer.end_of_turn, *tokenizer.encode("\n")])


def _render_assistant(turn: Turn, tokenizer: Tokenizer, think_block: bool) -> Iterator[_Span]:
    """An answer. Its words are encoded apart from the opening, so that training sees the ids that generation starts from."""
    yield from _assistant_opening(tokenizer, think_block)
    answer = turn.text.lstrip("\n") if think_block else turn.text
    yield _Span([*tokenizer.encode(answer), tokenizer.end_of_turn], weight=1.0)
    yield _Span(tokenizer.encode("\n"))


def _assistant_opening(tokenizer: Tokenizer, think_block: bool) -> list[_Span]:
    block = THINK_BLOCK if think_block else ""
    return [_Span([tokenizer.start_of_turn, *tokenizer.encode(f"assistant\n{block}")])]


def _expand(
    spans: Sequence[_Span], tokenizer: Tokenizer, plans: Sequence[ImagePlan], tiling: TilingConfig
) -> EncodedConversation:
    """Puts each image's visual tokens after the span that opens it."""
    slots = sum(span.opens_image for span in spans)
    if slots != len(plans):
        raise ConversationError(
            f"{slots} image slots ({IMAGE_SLOT}) but {len(plans)} images; write one slot in a user turn for each image"
        )
    length = sum(len(span.ids) for span in spans) + sum(prompt_tokens(plan, tiling) for plan in plans)
    tokens, weights = np.empty(length, np.int32), np.zeros(length, np.float32)
    visual = np.full(length, TEXT_POSITION, np.int32)
    remaining, start, first_tile = iter(plans), 0, 0
    for span in spans:
        end = start + len(span.ids)
        tokens[start:end], weights[start:end] = span.ids, span.weight
        start = end
        if span.opens_image:
            plan = next(remaining)
            end += prompt_tokens(plan, tiling)
            visual[start:end] = _image_positions(plan, first_tile, tiling)
            tokens[start:end] = tokenizer.image
            if separator_count(plan, tiling):
                tokens[start:end][visual[start:end] == TEXT_POSITION] = _separator(tokenizer)
            start, first_tile = end, first_tile + plan.tiles
    return EncodedConversation(tokens, weights, visual)


def _image_positions(plan: ImagePlan, first_tile: int, tiling: TilingConfig) -> Int32[np.ndarray, "v"]:
    """`visual_index` of one image: its slots, with -1 where a separator stands."""
    slots = visual_slots(plan, tiling) + np.int32(first_tile * tiling.tokens_per_tile)
    return np.insert(slots, row_breaks(plan, tiling), TEXT_POSITION) if separator_count(plan, tiling) else slots


def _separator(tokenizer: Tokenizer) -> int:
    """The id of a newline."""
    ids = tokenizer.encode("\n")
    if len(ids) != 1:
        raise ConversationError(
            f"the tokenizer writes a newline as {len(ids)} tokens; separators need one, so set tiling.separators to False"
        )
    return ids[0]


def _validate(turns: Sequence[Turn]) -> None:
    if not turns:
        raise ConversationError("a conversation without turns")
    for turn in turns:
        if turn.role not in ROLES:
            raise ConversationError(f"unknown role {turn.role!r}; roles are {', '.join(ROLES)}")
        named = f"{'an' if turn.role == 'assistant' else 'a'} {turn.role} turn"
        if not turn.text.strip():
            raise ConversationError(f"{named} without text")
        if turn.role != "user" and IMAGE_SLOT in turn.text:
            raise ConversationError(f"{IMAGE_SLOT} in {named}; image slots belong in user turns")
        if turn.role == "assistant" and "</think>" in turn.text:
            raise ConversationError(
                "reasoning (</think>) in an assistant turn; the model is trained with thinking off, so strip it first"
            )
