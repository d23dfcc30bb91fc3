"""Byte-level BPE by tiktoken, for loaders and ingest: the ids of `tokenizers`, Qwen3's above all, in a fifth of the time.

`tokenizers` keeps for every piece where it stands in the text and how its letters are written, which no loader asks; its expression
for Qwen's pieces takes most of its time. Both libraries merge the pair with the lowest rank first. They agree where the ranks of a
`tokenizer.json` are its ids and nothing but Unicode's NFC, one expression and the merges stands between text and ids; for other
tokenizers, and for texts that name an added token or are very long, `tokenizers` is asked.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import normalizers

from hypervl_jax.text.qwen import byte_letters
from hypervl_jax.text.tokenizer import HuggingFaceTokenizer, Tokenizer

if TYPE_CHECKING:
    import tiktoken

_MAX_CHARACTERS = 100_000
"""tiktoken's expressions run out of stack in a million spaces."""

_SHORT, _SHORT_TEXTS = 64, 4096
"""Characters of a text whose ids are kept, and how many are kept: what the chat template writes stands in every sample."""

_UNSET = {
    "BPE": ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"),
    "ByteLevel": ("add_prefix_space", "use_regex"),
}
"""Settings that would change ids; files write them as null, false or an empty text."""


def bulk_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, faster where it is a `tokenizer.json` that tiktoken reads the same way."""
    return BulkTokenizer(tokenizer) if isinstance(tokenizer, HuggingFaceTokenizer) else tokenizer


class BulkTokenizer(Tokenizer):
    """A `HuggingFaceTokenizer` that encodes by tiktoken. Pickles as that tokenizer; tables are made with the first text."""

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        self._tokenizer, self._normalise = tokenizer, normalizers.NFC().normalize_str
        self._short = functools.lru_cache(_SHORT_TEXTS)(lambda text: tuple(self._encode(text)))
        for name in Tokenizer.__annotations__:
            setattr(self, name, getattr(tokenizer, name))

    def __reduce__(self) -> tuple[type[BulkTokenizer], tuple[HuggingFaceTokenizer]]:
        return BulkTokenizer, (self._tokenizer,)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; special tokens written in the text stay text."""
        return list(self._short(text)) if len(text) <= _SHORT else self._encode(text)

    def _encode(self, text: str) -> list[int]:
        pieces, starts, added = self._pieces
        named = any(map(text.__contains__, starts)) and any(map(text.__contains__, added))
        if pieces is None or named or len(text) > _MAX_CHARACTERS:
            return self._tokenizer.encode(text)
        return pieces.encode_ordinary(text if text.isascii() else self._normalise(text))

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(ids, skip_special)

    def save(self, directory: str | Path) -> None:
        """Writes the files that `load_tokenizer(directory)` reads back, with the same fingerprint."""
        self._tokenizer.save(directory)

    @functools.cached_property
    def _pieces(self) -> tuple[tiktoken.Encoding | None, tuple[str, ...], tuple[str, ...]]:
        """tiktoken's tables, None where they could give other ids, and the added tokens after what they begin with."""
        raw = json.loads(self._tokenizer.file_bytes)
        added = tuple(token["content"] for token in raw["added_tokens"])
        starts = tuple(sorted({token[:1] for token in added}))
        return (_encoding(raw) if _is_plain(raw) else None), starts, added


def _is_plain(raw: Mapping[str, Any]) -> bool:
    """Whether a `tokenizer.json` is NFC, one expression that cuts the text, bytes, and merges in the order of their ids."""
    match raw["pre_tokenizer"]:
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _}, "behavior": "Isolated", "invert": False},
                last,
            ],
        }:
            plain_bytes = _unset(last, "ByteLevel")
        case _:
            plain_bytes = False
    model, normalised = raw["model"], raw["normalizer"] == {"type": "NFC"}
    return plain_bytes and normalised and _unset(model, "BPE") and _in_order(model["vocab"], model["merges"])


def _unset(found: Mapping[str, Any], kind: str) -> bool:
    return found["type"] == kind and not any(map(found.get, _UNSET[kind]))


def _in_order(vocabulary: Mapping[str, int], merges: Sequence[Sequence[str] | str]) -> bool:
    """Whether every token but the 256 bytes has one rule, and the rules stand in the order of the ids that they make."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    ids = [vocabulary["".join(pair)] for pair in pairs]
    return len(ids) + 256 == len(vocabulary) and all(low < high for low, high in itertools.pairwise([255, *ids]))


def _encoding(raw: Mapping[str, Any]) -> tiktoken.Encoding:
    import tiktoken

    letters = {ord(letter): chr(byte) for byte, letter in byte_letters().items()}
    ranks = {token.translate(letters).encode("latin-1"): rank for token, rank in raw["model"]["vocab"].items()}
    pattern = raw["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    return tiktoken.Encoding("tokenizer.json", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
