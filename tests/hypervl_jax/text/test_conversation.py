import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hypervl_jax.architecture import TilingConfig
from hypervl_jax.text.conversation import (
    IMAGE_SLOT,
    ConversationError,
    EncodedConversation,
    Turn,
    count_image_slots,
    encode_conversation,
    encode_prompt,
    text_length,
)
from hypervl_jax.text.qwen import QWEN3_SPECIAL
from hypervl_jax.text.tokenizer import (
    ChatTemplate,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from hypervl_jax.vision.anyres import plan_image, prompt_tokens, visual_slots

TILING = TilingConfig(tile_size=16, patch_size=2, shuffle=2, max_tiles=6)
SEPARATED = TilingConfig(tile_size=16, patch_size=2, shuffle=2, max_tiles=6, thumbnail=True, separators=True)

# Expected texts were rendered with the chat template that Qwen publishes in the Qwen3 repositories (Apache-2.0; chat_template.jinja of
# 4,168 bytes, SHA-256 a55ee1b1660128b7098723e0abcd92caa0788061051c62d51cbe87d9cf1974d8), enable_thinking=False.
QWEN3_CASES = [
    (
        [Turn("user", "Hi there!"), Turn("assistant", "Hello.")],
        "<|im_start|>user\nHi there!<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nHello.<|im_end|>\n",
    ),
    (
        [
            Turn("system", "Be brief."),
            Turn("user", "1 + 1?"),
            Turn("assistant", "2"),
            Turn("user", "And 2 + 2?"),
            Turn("assistant", "\n\n4 "),
        ],
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\nAnd 2 + 2?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n4 <|im_end|>\n",
    ),
    (
        [Turn("user", "a"), Turn("assistant", "b"), Turn("assistant", "c")],
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nc<|im_end|>\n",
    ),
    (
        [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")],
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n",
    ),
    (
        [Turn("system", "s"), Turn("assistant", "b")],
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
    ),
    (
        [Turn("user", "<tool_response>3</tool_response>"), Turn("assistant", "b")],
        "<|im_start|>user\n<tool_response>3</tool_response><|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
    ),
    (
        [Turn("user", "  \n x\n"), Turn("system", "late"), Turn("assistant", "y\n\n")],
        "<|im_start|>user\n  \n x\n<|im_end|>\n<|im_start|>system\nlate<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\ny\n\n<|im_end|>\n",
    ),
]
QUESTION = [Turn("user", "What is it?"), Turn("assistant", "A cat.")]


@pytest.fixture(scope="session")
def published_ids(qwen3_file: Path) -> Callable[[str], list[int]]:
    """Ids of a rendered template as `transformers` makes them: its special tokens are read from the text."""
    reader = pytest.importorskip("transformers").PreTrainedTokenizerFast(tokenizer_file=str(qwen3_file))
    return lambda rendered: reader(rendered)["input_ids"]


def weighted_text(encoded: EncodedConversation, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(encoded.tokens[encoded.loss_weights == 1], skip_special=False)


@pytest.mark.parametrize(("turns", "rendered"), QWEN3_CASES)
def test_ids_are_those_of_the_published_qwen3_template(
    turns: list[Turn], rendered: str, qwen3: HuggingFaceTokenizer, published_ids: Callable[[str], list[int]]
) -> None:
    assert encode_prompt(turns, qwen3, [], TILING, add_generation_prompt=False).tokens.tolist() == published_ids(
        rendered
    )
    opening = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert encode_prompt(turns, qwen3, [], TILING).tokens.tolist() == published_ids(rendered + opening)
    assert encode_conversation(turns, qwen3, [], TILING).tokens.tolist() == published_ids(rendered)


def test_an_answer_that_begins_with_a_line_break_is_not_merged_with_the_opening(
    qwen3: HuggingFaceTokenizer, published_ids: Callable[[str], list[int]]
) -> None:
    turns = [Turn("user", "a"), Turn("assistant", "\nb"), Turn("user", "c"), Turn("assistant", "d")]
    rendered = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nd<|im_end|>\n"
    encoded = encode_conversation(turns, qwen3, [], TILING)
    assert qwen3.decode(encoded.tokens, skip_special=False) == rendered
    assert weighted_text(encoded, qwen3) == "\nb<|im_end|>d<|im_end|>"
    # The published template's text has one token for both line breaks, which generation never sees.
    assert len(published_ids(rendered)) == len(encoded.tokens) - 1


def test_weights_are_on_answers_and_their_end(qwen3: HuggingFaceTokenizer) -> None:
    turns = [
        Turn("system", "s"),
        Turn("user", "a"),
        Turn("assistant", "one two"),
        Turn("user", "b"),
        Turn("assistant", "three"),
    ]
    encoded = encode_conversation(turns, qwen3, [], TILING)
    assert weighted_text(encoded, qwen3) == "one two<|im_end|>three<|im_end|>"
    assert set(encoded.loss_weights.tolist()) == {0.0, 1.0}


def test_types_and_lengths(tokenizer: Tokenizer) -> None:
    encoded = encode_conversation(QUESTION, tokenizer, [], TILING)
    assert (encoded.tokens.dtype, encoded.loss_weights.dtype, encoded.visual_index.dtype) == (
        np.int32,
        np.float32,
        np.int32,
    )
    assert encoded.tokens.shape == encoded.loss_weights.shape == encoded.visual_index.shape
    assert (encoded.visual_index == -1).all()


def test_without_think_block_the_template_is_plain_chatml(small: SentencePieceTokenizer) -> None:
    encoded = encode_conversation(QUESTION, small, [], TILING)
    assert (
        small.decode(encoded.tokens, skip_special=False)
        == "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
    )


def test_default_system_is_written_unless_the_conversation_has_one(
    small: SentencePieceTokenizer, tmp_path: Path
) -> None:
    small.save(tmp_path)
    tokenizer = load_tokenizer(tmp_path, ChatTemplate(think_block=False, default_system="You see."))
    prompt = encode_prompt(QUESTION[:1], tokenizer, [], TILING)
    assert (
        tokenizer.decode(prompt.tokens, False)
        == "<|im_start|>system\nYou see.<|im_end|>\n<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    own = [Turn("system", "s"), *QUESTION]
    assert (
        encode_conversation(own, tokenizer, [], TILING).tokens.tolist()
        == encode_conversation(own, small, [], TILING).tokens.tolist()
    )


@pytest.mark.parametrize("answer", ["A cat.", "  spaced", "\n\nnew line", "\tx", "12", "日本 🙂"])
@pytest.mark.parametrize("history", [[], [Turn("system", "s")], [Turn("user", "a"), Turn("assistant", "b")]])
def test_prompt_is_a_prefix_of_the_training_sample(tokenizer: Tokenizer, history: list[Turn], answer: str) -> None:
    turns = [*history, Turn("user", f"{IMAGE_SLOT}\nWhat?")]
    plans = [plan_image(20, 30, 0.8, SEPARATED)]
    prompt = encode_prompt(turns, tokenizer, plans, SEPARATED)
    sample = encode_conversation([*turns, Turn("assistant", answer)], tokenizer, plans, SEPARATED)
    length = len(prompt.tokens)
    np.testing.assert_array_equal(sample.tokens[:length], prompt.tokens)
    np.testing.assert_array_equal(sample.visual_index[:length], prompt.visual_index)
    assert not prompt.loss_weights.any()
    # What follows the prompt is what generation must produce, then the newline that closes a turn.
    assert sample.loss_weights[length:].tolist() == [1.0] * (len(sample.tokens) - length - 1) + [0.0]
    assert sample.tokens[-2] == tokenizer.end_of_turn


@pytest.mark.parametrize("token", QWEN3_SPECIAL)
def test_special_tokens_in_any_turn_stay_text(tokenizer: Tokenizer, token: str) -> None:
    turns = [Turn("system", token), Turn("user", f"{token} x{token}"), Turn("assistant", f"{token}y")]
    tokens = encode_conversation(turns, tokenizer, [], TILING).tokens.tolist()
    assert [
        tokens.count(index)
        for index in (tokenizer.start_of_turn, tokenizer.end_of_turn, tokenizer.image, tokenizer.end_of_text)
    ] == [3, 3, 0, 0]


def test_an_image_stands_between_its_marks(small: SentencePieceTokenizer) -> None:
    plan = plan_image(12, 24, 1, TILING)
    encoded = encode_conversation([Turn("user", "a<image>b"), Turn("assistant", "c")], small, [plan], TILING)
    start = encoded.tokens.tolist().index(small.vision_start)
    assert small.decode(encoded.tokens[:start], False) == "<|im_start|>user\na"
    assert (encoded.tokens[start + 1 : start + 19] == small.image).all()
    assert (
        small.decode(encoded.tokens[start + 19 :], False)
        == "<|vision_end|>b<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n"
    )
    assert encoded.visual_index[start + 1 : start + 19].tolist() == [*range(12), 16, 17, 20, 21, 24, 25]
    assert (encoded.visual_index >= 0).sum() == plan.tokens


def test_visual_index_counts_on_through_the_images_of_a_sample(tokenizer: Tokenizer) -> None:
    plans = [plan_image(20, 40, 1, SEPARATED), plan_image(5, 5, 1, SEPARATED), plan_image(33, 17, 0.5, SEPARATED)]
    turns = [
        Turn("user", "<image><image> first"),
        Turn("assistant", "x"),
        Turn("user", "then <image>"),
        Turn("assistant", "y"),
    ]
    encoded = encode_conversation(turns, tokenizer, plans, SEPARATED)
    offsets = np.cumsum([0] + [plan.tiles * SEPARATED.tokens_per_tile for plan in plans])
    expected = np.concatenate(
        [visual_slots(plan, SEPARATED) + offset for plan, offset in zip(plans, offsets, strict=False)]
    )
    visual = encoded.visual_index >= 0
    np.testing.assert_array_equal(encoded.visual_index[visual], expected)
    np.testing.assert_array_equal(visual, encoded.tokens == tokenizer.image)
    assert not encoded.loss_weights[visual].any()


def test_separators_are_newlines_without_weight(tokenizer: Tokenizer) -> None:
    plan = plan_image(20, 40, 1, SEPARATED)
    assert (plan.rows, plan.columns, plan.tiles) == (2, 3, 7)
    encoded = encode_conversation([Turn("user", "<image>"), Turn("assistant", "x")], tokenizer, [plan], SEPARATED)
    start, end = (
        encoded.tokens.tolist().index(tokenizer.vision_start),
        encoded.tokens.tolist().index(tokenizer.vision_end),
    )
    inside = encoded.tokens[start + 1 : end]
    assert np.flatnonzero(inside != tokenizer.image).tolist() == [40, 51]
    assert tokenizer.decode(inside) == "\n\n"
    assert not encoded.loss_weights[start:end].any()


def test_text_length_and_prompt_tokens_add_up(tokenizer: Tokenizer) -> None:
    generator = random.Random(0)
    words = ["cat", " dog", "\n", "12", IMAGE_SLOT, " ", "日本", "<|im_end|>"]
    for _ in range(200):
        turns = [Turn("user", "q" + "".join(generator.choices(words, k=5))) for _ in range(generator.randint(1, 3))]
        turns.insert(generator.randint(1, len(turns)), Turn("assistant", "answer"))
        plans = [
            plan_image(
                generator.randint(1, 90), generator.randint(1, 90), generator.randint(100, 1000) / 1000, SEPARATED
            )
            for _ in range(count_image_slots(turns))
        ]
        encoded = encode_conversation(turns, tokenizer, plans, SEPARATED)
        assert text_length(turns, tokenizer) + sum(prompt_tokens(plan, SEPARATED) for plan in plans) == len(
            encoded.tokens
        )


def test_a_lone_assistant_turn_is_plain_text(tokenizer: Tokenizer) -> None:
    turns = [Turn("assistant", "Once upon a time.\n")]
    encoded = encode_conversation(turns, tokenizer, [], TILING)
    assert encoded.tokens.tolist() == [*tokenizer.encode("Once upon a time.\n"), tokenizer.end_of_text]
    assert (encoded.loss_weights == 1).all()
    assert text_length(turns, tokenizer) == len(encoded.tokens)


PLAN = plan_image(5, 5, 1, TILING)


@pytest.mark.parametrize(
    ("turns", "plans", "message"),
    [
        ([], [], "without turns"),
        (QUESTION, [PLAN], "0 image slots .* 1 images"),
        ([Turn("user", "<image> x"), Turn("assistant", "y")], [], "1 image slots .* 0 images"),
        ([Turn("assistant", "text")], [PLAN], "0 image slots .* 1 images"),
        ([Turn("tool", "x"), Turn("assistant", "y")], [], "unknown role 'tool'"),
        ([Turn("user", "x"), Turn("assistant", "<image>")], [PLAN], "assistant turn"),
        ([Turn("system", "<image>"), *QUESTION], [PLAN], "system turn"),
        ([Turn("user", " \n"), Turn("assistant", "y")], [], "user turn without text"),
        ([Turn("user", "x"), Turn("assistant", "")], [], "an assistant turn without text"),
        ([Turn("user", "x"), Turn("assistant", "<think>hm</think>y")], [], "strip it"),
        ([Turn("user", "x")], [], "no assistant turn"),
    ],
)
def test_what_cannot_be_encoded_says_why(
    turns: list[Turn], plans: list, message: str, small: SentencePieceTokenizer
) -> None:
    with pytest.raises(ConversationError, match=message):
        encode_conversation(turns, small, plans, TILING)


def test_normalised_text_is_what_qwen3_reads(qwen3: HuggingFaceTokenizer) -> None:
    turns = [Turn("user", "e\u0301"), Turn("assistant", "A\u030a")]
    encoded = encode_conversation(turns, qwen3, [], TILING)
    assert unicodedata.normalize("NFC", "A\u030a") in weighted_text(encoded, qwen3)
