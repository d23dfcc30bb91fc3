"""A `tokenizer.json` for every tokenizer of ours, so that `transformers` and others read the same ids.

Qwen's is one already. A SentencePiece byte-pair model is rewritten: SentencePiece merges the pair whose *result* has the best score,
`tokenizers` the pair with the lowest rank; so every way to cut a piece into two pieces becomes a rule, in the order of the
pieces' scores. Special tokens written in a text stay text in our tokenizer, and become themselves in a `tokenizer.json`.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from hypervl_jax.text.tokenizer import HUGGING_FACE_FILE, SENTENCEPIECE_FILE, Tokenizer, TokenizerError

SPACE = "\u2581"
"""What SentencePiece writes for a space."""

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Kinds of pieces, as `sentencepiece_model.proto` numbers them."""

_BYTE_PAIRS = 2


class Piece(NamedTuple):
    """A piece of a SentencePiece vocabulary."""

    text: str
    score: float
    kind: int


def write_tokenizer_json(tokenizer: Tokenizer, directory: str | Path) -> Path:
    """Writes `tokenizer.json` with the ids of `tokenizer` into a directory; returns the file's path.

    Raises:
        TokenizerError: a SentencePiece model of a kind that `train_sentencepiece` does not make.
    """
    path = Path(directory) / HUGGING_FACE_FILE
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save(scratch)
        own = Path(scratch) / HUGGING_FACE_FILE
        if own.exists():
            path.write_bytes(own.read_bytes())
        else:
            byte_pairs((Path(scratch) / SENTENCEPIECE_FILE).read_bytes()).save(str(path))
    return path


def byte_pairs(model: bytes) -> tokenizers.Tokenizer:
    """The tokenizer of the `tokenizers` library that a SentencePiece byte-pair model is."""
    pieces, unknown = read_model(model)
    ids = {piece.text: number for number, piece in enumerate(pieces)}
    scores = {piece.text: piece.score for piece in pieces if piece.kind == NORMAL}
    made = tokenizers.Tokenizer(models.BPE(ids, list(merges(scores)), unk_token=unknown, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", SPACE)
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    for kind, add in {CONTROL: made.add_special_tokens, USER_DEFINED: made.add_tokens}.items():
        words = [piece.text for piece in pieces if piece.kind == kind]
        add([AddedToken(word, normalized=False, special=kind == CONTROL) for word in words])
    return made


def read_model(model: bytes) -> tuple[list[Piece], str]:
    """Pieces of a model file, and its name of the unknown one. Field numbers are those of `sentencepiece_model.proto`.

    Read by hand, because the module that SentencePiece ships for it refuses to be imported beside older protobuf packages.

    Raises:
        TokenizerError: another kind of model than `train_sentencepiece` makes.
    """
    fields = list(wire_fields(model))
    trainer, normaliser = (dict(wire_fields(last(fields, number, b""))) for number in (2, 3))
    if trainer.get(3) != _BYTE_PAIRS or not trainer.get(35):
        raise TokenizerError(
            "only byte-pair SentencePiece models with byte fallback can be written as a tokenizer.json"
        )
    if normaliser.get(1) != b"identity" or normaliser.get(3, 1) or normaliser.get(4, 1):
        raise TokenizerError(
            "only SentencePiece models that leave the text as it is can be written as a tokenizer.json"
        )
    found = [dict(wire_fields(value)) for number, value in fields if number == 1]
    pieces = [Piece(piece[1].decode(), piece.get(2, 0.0), piece.get(3, NORMAL)) for piece in found]
    return pieces, trainer.get(45, b"<unk>").decode()


def last(fields: list[tuple[int, Any]], number: int, default: Any) -> Any:
    """The last value of a field, which is the one that counts."""
    return next((value for found, value in reversed(fields) if found == number), default)


def wire_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protobuf message (protobuf.dev/programming-guides/encoding).

    Integers, float32 numbers, and bytes for strings and messages; the model was read by SentencePiece before, so it is whole.
    """
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(message, place)
        elif kind == 5:
            value, place = struct.unpack_from("<f", message, place)[0], place + 4
        elif kind == 2:
            size, place = _varint(message, place)
            value, place = message[place : place + size], place + size
        else:
            raise TokenizerError(
                f"the SentencePiece model has a field of wire type {kind}, which no published version writes"
            )
        yield key >> 3, value


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """An integer in groups of seven bits, the lowest first, and the place after it."""
    value = shift = 0
    while message[place] & 0x80:
        value |= (message[place] & 0x7F) << shift
        place, shift = place + 1, shift + 7
    return value | message[place] << shift, place + 1


def merges(scores: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Merge rules in order: the pieces by falling score, each cut in every way into two pieces, the longest left part first."""
    for piece in sorted(scores, key=lambda word: -scores[word]):
        for cut in range(len(piece) - 1, 0, -1):
            if piece[:cut] in scores and piece[cut:] in scores:
                yield piece[:cut], piece[cut:]
