"""SentencePiece models and Hugging Face `tokenizer.json` files behind one protocol.

Text from users never becomes a special token: `encode` reads `<|im_end|>` in a text as the characters it is made of, and only
the chat template (`conversation.py`) writes special ids.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import sentencepiece
import tokenizers

END_OF_TEXT = "<|endoftext|>"
START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE = "<|image_pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, START_OF_TURN, END_OF_TURN, VISION_START, VISION_END, IMAGE)
"""Special tokens that every tokenizer must have, as Qwen3 writes them."""

TEMPLATE_VERSION = 1
"""Rises when `conversation.py` turns the same turns into other ids; part of every fingerprint."""

TEMPLATE_FILE = "conversation.json"
SENTENCEPIECE_FILE = "tokenizer.model"
HUGGING_FACE_FILE = "tokenizer.json"


class TokenizerError(ValueError):
    """A tokenizer that cannot serve; the message says what is missing."""


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    r"""Settings of the chat template, saved beside the tokenizer.

    `think_block` writes Qwen3's empty `<think>\n\n</think>\n\n` before the final answer (thinking off).
    `default_system` is the system turn of conversations without one; Qwen3 has none.
    """

    think_block: bool
    default_system: str | None = None


class Tokenizer(Protocol):
    """What the rest of the code asks of a tokenizer. There is no beginning-of-text token; `pad` is `end_of_text`."""

    vocab_size: int
    template: ChatTemplate
    fingerprint: str
    end_of_text: int
    start_of_turn: int
    end_of_turn: int
    vision_start: int
    vision_end: int
    image: int
    pad: int

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; special tokens written in the text stay text."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""

    def save(self, directory: str | Path) -> None:
        """Writes the files that `load_tokenizer(directory)` reads back, with the same fingerprint."""


class _FileTokenizer(abc.ABC):
    """What both kinds share: the file's bytes, the template, the fingerprint, saving and pickling by bytes."""

    file_name: ClassVar[str]

    def __init__(self, path: str | Path, template: ChatTemplate | None = None) -> None:
        path = Path(path)
        path = path / self.file_name if path.is_dir() else path
        self._restore(_read(path), template or _saved_template(path.parent / TEMPLATE_FILE))

    def _restore(self, data: bytes, template: ChatTemplate | None) -> None:
        self._data = data
        self.vocab_size = self._load(data)
        self.end_of_text = self.pad = self._special_id(END_OF_TEXT)
        self.start_of_turn = self._special_id(START_OF_TURN)
        self.end_of_turn = self._special_id(END_OF_TURN)
        self.vision_start = self._special_id(VISION_START)
        self.vision_end = self._special_id(VISION_END)
        self.image = self._special_id(IMAGE)
        self.template = template or ChatTemplate(think_block=self._has_think_tokens())
        self.fingerprint = _fingerprint(self.file_name, data, self.template)

    @property
    def file_bytes(self) -> bytes:
        """The tokenizer's file."""
        return self._data

    @abc.abstractmethod
    def _load(self, data: bytes) -> int:
        """Reads the file; returns the number of ids."""

    @abc.abstractmethod
    def _special_id(self, token: str) -> int:
        """The id of a special token; raises `TokenizerError` when text could become it or it is missing."""

    @abc.abstractmethod
    def _has_think_tokens(self) -> bool:
        """Whether `<think>` is one token."""

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer's file and the template's settings into `directory`, which is made if needed."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / self.file_name).write_bytes(self._data)
        (directory / TEMPLATE_FILE).write_text(
            json.dumps(dataclasses.asdict(self.template), indent=2) + "\n", encoding="utf-8"
        )

    def __getstate__(self) -> tuple[bytes, ChatTemplate]:
        return self._data, self.template

    def __setstate__(self, state: tuple[bytes, ChatTemplate]) -> None:
        self._restore(*state)


class SentencePieceTokenizer(_FileTokenizer):
    """A SentencePiece model (arXiv 1808.06226) whose special tokens are control symbols, which text can never become."""

    file_name = SENTENCEPIECE_FILE

    def _load(self, data: bytes) -> int:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise TokenizerError(f"not a SentencePiece model: {error}") from error
        return self._processor.vocab_size()

    def _special_id(self, token: str) -> int:
        index = self._processor.piece_to_id(token)
        if not self._processor.is_control(index):
            raise TokenizerError(
                f"the SentencePiece model has no control symbol {token}; train it with train_sentencepiece"
            )
        return index

    def _has_think_tokens(self) -> bool:
        return not self._processor.is_unknown(self._processor.piece_to_id("<think>"))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text."""
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids. Control symbols are left out or written by name; the unknown piece and ids past the vocabulary are left out."""
        known = [int(index) for index in ids if index < self.vocab_size and not self._processor.is_unknown(int(index))]
        runs = itertools.groupby(known, self._processor.is_control)
        return "".join(
            self._control_text(run, skip_special) if control else self._processor.decode(list(run))
            for control, run in runs
        )

    def _control_text(self, ids: Iterable[int], skip_special: bool) -> str:
        return "" if skip_special else "".join(map(self._processor.id_to_piece, ids))


class HuggingFaceTokenizer(_FileTokenizer):
    """A `tokenizer.json` read by the `tokenizers` library, Qwen's above all.

    Added tokens that are not *special*, such as Qwen3's `<think>`, are still read from text, as Qwen3 does.
    """

    file_name = HUGGING_FACE_FILE

    def _load(self, data: bytes) -> int:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except ValueError as error:
            raise TokenizerError(f"not a tokenizer.json that this version of `tokenizers` can read: {error}") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._specials = {
            token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special
        }
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def _special_id(self, token: str) -> int:
        index = self._tokenizer.token_to_id(token)
        if index is None or token not in self._specials:
            raise TokenizerError(
                f'the tokenizer.json has no added token {token} marked "special": true, which keeps user text from becoming it; add it'
            )
        return index

    def _has_think_tokens(self) -> bool:
        return self._tokenizer.token_to_id("<think>") is not None

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without the post-processor's tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids; ids past the vocabulary are left out."""
        return self._tokenizer.decode([int(index) for index in ids], skip_special_tokens=skip_special)


class StreamDecoder:
    """Decodes ids one by one: text comes out as soon as its UTF-8 characters are whole.

    The pieces joined, with `finish()`, equal `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Ids since the last whole character, after a context that lets SentencePiece see it is not at the text's start.
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, index: int) -> str:
        """The text that this id completes; empty while a character is unfinished."""
        self._pending.append(index)
        text = self._new_text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def finish(self) -> str:
        """What is left at the end, unfinished bytes as U+FFFD."""
        text = self._new_text()
        self._context, self._pending = [], []
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]


def load_tokenizer(
    path: str | Path, template: ChatTemplate | None = None
) -> SentencePieceTokenizer | HuggingFaceTokenizer:
    """Loads a tokenizer from a `.model` file, a `.json` file, or a directory with `tokenizer.json` or `tokenizer.model`.

    Args:
        path: the file or directory; a directory with both files gives the `tokenizer.json`.
        template: chat template settings; when None those saved beside the file, or else a think block exactly when the
            vocabulary has `<think>`.

    Raises:
        TokenizerError: no such file, not a tokenizer, or one without the special tokens.
    """
    path = Path(path)
    if path.is_dir():
        path = path / (HUGGING_FACE_FILE if (path / HUGGING_FACE_FILE).exists() else SENTENCEPIECE_FILE)
    kind = {".model": SentencePieceTokenizer, ".json": HuggingFaceTokenizer}.get(path.suffix)
    if kind is None:
        raise TokenizerError(f"{path} is neither a SentencePiece .model nor a Hugging Face tokenizer.json")
    return kind(path, template)


def train_sentencepiece(
    texts: Iterable[str], path: str | Path, vocab_size: int, whole_words: Sequence[str] = ()
) -> SentencePieceTokenizer:
    """Trains a byte-pair SentencePiece model and writes it to `path` (a `.model` file). The same texts give the same bytes.

    No normalisation, spaces kept, unknown characters as bytes, so decoding gives the text back (but for U+2581, which
    SentencePiece uses for the space). Digits are split, as in Qwen3.

    Args:
        texts: training texts, read line by line.
        path: where the model goes.
        vocab_size: ids in all, at least 256 bytes, the special tokens and every distinct character of the texts.
        whole_words: words that are one piece of their own wherever they stand, also after a space.

    Raises:
        TokenizerError: the texts are too few or too many-charactered for `vocab_size`.
    """
    model = io.BytesIO()
    lines = (line for text in texts for line in text.splitlines() if line)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, vocab_size=vocab_size, **_training_options(whole_words)
        )
    except RuntimeError as error:
        raise TokenizerError(
            f"SentencePiece could not make {vocab_size} pieces from these texts; change vocab_size or the texts: {error}"
        ) from error
    Path(path).write_bytes(model.getvalue())
    return SentencePieceTokenizer(path)


ROLE_WORDS = ("system", "user", "assistant")
"""The template writes them in every turn, the training texts hardly ever: each gets a piece of its own."""


def _training_options(whole_words: Sequence[str]) -> dict[str, Any]:
    return {
        "model_type": "bpe",
        "control_symbols": list(SPECIAL_TOKENS),
        "user_defined_symbols": [*ROLE_WORDS, *whole_words],
        "unk_id": 0,
        "bos_id": -1,
        "eos_id": -1,
        "pad_id": -1,
        "byte_fallback": True,
        "split_digits": True,
        "character_coverage": 1.0,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "shuffle_input_sentence": False,
        "max_sentence_length": 1 << 20,
        "num_threads": 1,
        "minloglevel": 2,
    }


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"cannot read a tokenizer from {path}: {error.strerror}") from error


def _saved_template(path: Path) -> ChatTemplate | None:
    if not path.exists():
        return None
    try:
        return ChatTemplate(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise TokenizerError(f"{path} does not hold chat template settings: {error}") from error


def _fingerprint(kind: str, data: bytes, template: ChatTemplate) -> str:
    settings = {"kind": kind, "template": dataclasses.asdict(template), "template_version": TEMPLATE_VERSION}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()
