"""Quality filters: each looks at one sample and raises the `Skip` that counts it out. Thresholds are in `IngestConfig`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np
import py3langid.langid
from jaxtyping import UInt8

from data_pipelines.ingest.config import IngestConfig
from data_pipelines.ingest.errors import IngestError, Skip, unreadable
from data_pipelines.ingest.signatures import words
from data_pipelines.records import Record
from hypervl_jax.text.conversation import IMAGE_SLOT
from hypervl_jax.vision.decoding import UndecodableImage, decode_image, image_size

NGRAM_WORDS, REPETITION_WORDS = 4, 50
"""Repetition is measured on n-grams of so many words, in texts of at least so many."""


def check_sizes(record: Record, config: IngestConfig) -> None:
    """Pictures by their headers: too small, too large, too long. Raises `Skip`."""
    for data in record.images:
        try:
            height, width = image_size(data, config.max_pixels)
        except UndecodableImage as error:
            raise _undecodable(error) from error
        if min(height, width) < config.min_side:
            raise Skip("too_small", f"{height} x {width} pixels")
        if max(height, width) > config.max_aspect * min(height, width):
            raise Skip("extreme_aspect", f"{height} x {width} pixels")


def decode_pictures(record: Record, config: IngestConfig) -> list[UInt8[np.ndarray, "h w 3"]]:
    """The pictures of a record, decoded whole. Raises `Skip` for one that cannot be decoded or shows nothing."""
    pictures = []
    for data in record.images:
        try:
            pictures.append(decode_image(data, config.max_pixels))
        except UndecodableImage as error:
            raise _undecodable(error) from error
        if _deviation(pictures[-1]) < config.blank_deviation:
            raise Skip("blank")
    return pictures


def _undecodable(error: UndecodableImage) -> Skip:
    # A large picture is sound; the source is not to blame.
    return (
        Skip("too_large", error.detail)
        if error.reason == "too_large"
        else unreadable(f"undecodable:{error.reason}", error.detail)
    )


def _deviation(rgb: UInt8[np.ndarray, "h w 3"]) -> float:
    """Standard deviation of the grey levels, from at most some 250 thousand pixels spread over the picture."""
    step = max(1, max(rgb.shape[:2]) // 512)
    return float(rgb[::step, ::step].mean(axis=2, dtype=np.float32).std())


def check_text(record: Record, config: IngestConfig) -> None:
    """Words that mean something to the chat template, lengths, repetition, an answer that stands in its question. Raises `Skip`."""
    _check_marks(record)
    answers = [turn.text for turn in record.turns if turn.role == "assistant"]
    if sum(map(len, answers)) < config.min_characters:
        raise Skip("text_too_short")
    if sum(len(turn.text) for turn in record.turns) > config.max_characters:
        raise Skip("text_too_long")
    if any(repeated_share(words(text)) > config.repeated_ngrams for text in answers):
        raise Skip("repetitive")
    if config.leaked_words and _leaked(record, config.leaked_words):
        raise Skip("answer_leaked")


def _check_marks(record: Record) -> None:
    """A sound text, of HTML or of another model's reasoning, may hold what the template cannot tell from its own marks."""
    for turn in record.turns:
        if turn.role != "user" and IMAGE_SLOT in turn.text:
            raise Skip("image_mark_in_text", f"{IMAGE_SLOT} in a turn of the {turn.role}")
        if turn.role == "assistant" and "</think>" in turn.text:
            raise Skip("reasoning", "</think> in an answer")


def repeated_share(tokens: Sequence[str]) -> float:
    """Share of a text's word 4-grams that occurred before in it; 0 for texts under 50 words."""
    if len(tokens) < REPETITION_WORDS:
        return 0.0
    grams = [tuple(tokens[start : start + NGRAM_WORDS]) for start in range(len(tokens) - NGRAM_WORDS + 1)]
    return 1 - len(set(grams)) / len(grams)


def _leaked(record: Record, least: int) -> bool:
    """Whether an answer of at least so many words stands word for word in the turn before it."""
    for question, answer in itertools.pairwise(record.turns):
        said = words(answer.text)
        if (question.role, answer.role) == ("user", "assistant") and len(said) >= least:
            asked = f" {' '.join(words(question.text.replace(IMAGE_SLOT, ' ')))} "
            if f" {' '.join(said)} " in asked:
                return True
    return False


def with_language(record: Record, config: IngestConfig) -> Record:
    """The record with its language: the source's, else the detected one, else `und` for texts too short to judge.

    Detection runs where the source says nothing, and always where `config.languages` asks for some: sources are often wrong.

    Raises:
        Skip: it is none of `config.languages`.
    """
    if record.language and not config.languages:
        return record
    language = detect_language(record, config.language_characters) or record.language or "und"
    if config.languages and language != "und" and language.partition("-")[0] not in config.languages:
        raise Skip("language", language)
    return dataclasses.replace(record, language=language)


def check_languages(config: IngestConfig) -> None:
    """Raises `IngestError` for a tag of `config.languages` that is never detected: all of its records would be left out."""
    known = set(map(str, _identifier().nb_classes)) if config.languages else set()
    for tag in config.languages:
        if tag not in known:
            raise IngestError(f"languages: {tag!r} is none of py3langid's tags, which are {', '.join(sorted(known))}")


def detect_language(record: Record, least: int) -> str | None:
    """ISO 639-1 code of the turns together (py3langid, after Lui and Baldwin 2012); None under `least` characters."""
    text = "\n".join(turn.text.replace(IMAGE_SLOT, " ") for turn in record.turns).strip()
    return _identifier().classify(text)[0] if len(text) >= least else None


@functools.cache
def _identifier() -> py3langid.langid.LanguageIdentifier:
    return py3langid.langid.LanguageIdentifier.from_model_file(py3langid.langid.MODEL_FILE, norm_probs=True)
