"""Settings of an ingest: one table of thresholds, read from YAML, and where a source's fields are found."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

import yaml

from data_pipelines.ingest import storage
from data_pipelines.ingest.errors import IngestError
from hypervl_jax.vision.decoding import MAX_PIXELS

SAME_IMAGE_RULES = ("drop", "same_text", "keep")
IMAGES_RULES = ("any", "required", "none")


@dataclasses.dataclass(frozen=True)
class ScorerConfig:
    """One scorer (`scorers.Scorer`), and the scores that are kept.

    Attributes:
        name: key in `Record.quality`, and the reason `score:NAME` of its drops.
        factory: `module:attribute` of a function without arguments that makes the scorer, once in each worker.
        minimum: records below are dropped; None keeps all.
        maximum: records above are dropped; None keeps all.
    """

    name: str
    factory: str
    minimum: float | None = None
    maximum: float | None = None

    def __post_init__(self) -> None:
        low = -math.inf if self.minimum is None else self.minimum
        high = math.inf if self.maximum is None else self.maximum
        _require(low <= high, f"scorer {self.name!r}: minimum", self.minimum, f"no more than maximum, {self.maximum}")


@dataclasses.dataclass(frozen=True)
class FieldNames:
    """Names under which a source may keep a field; the first that a sample has is taken.

    Attributes:
        images: one picture or a list; bytes, or Hugging Face's `{"bytes": …, "path": …}`. A name with `*`, such as `image_*`, takes
            all fields that match, in the order of their numbers.
        conversation: a list of turns, `from`/`value` (LLaVA), `role`/`content` (chat) or `user`/`assistant` (The Cauldron).
        question: with `answer`, one turn each.
        answer: a text, or a list of which the commonest is taken.
        caption: describes the pictures.
        text: plain text, where there is no picture.
        url: where the sample came from; kept in the metadata and held against the opt-out list.
        licence: of the sample.
        language: of the sample, a BCP 47 tag.
        places: a caption with boxes in BLIP-3's marks, in several versions (`boxes.marked_caption`).
        elements: a list of objects that have a question and a `box` each; one exchange an object.
        box: four fractions, left, top, right, bottom: the answer to the question (`boxes.box_text`).
        ignored: fields that hold pictures which are left out on purpose; any other picture that is not used is a failure.
    """

    images: tuple[str, ...] = ("images", "image", "jpg", "jpeg", "png", "webp", "gif", "img")
    conversation: tuple[str, ...] = ("conversations", "conversation", "messages", "texts")
    question: tuple[str, ...] = ("question", "query", "instruction")
    answer: tuple[str, ...] = ("answer", "answers", "label", "response", "output")
    caption: tuple[str, ...] = ("caption", "txt", "text", "alt_text", "description")
    text: tuple[str, ...] = ("text", "txt", "content")
    url: tuple[str, ...] = ("url", "source_url", "image_url")
    licence: tuple[str, ...] = ("licence", "license")
    language: tuple[str, ...] = ("language", "lang")
    places: tuple[str, ...] = ()
    elements: tuple[str, ...] = ()
    box: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class IngestConfig:
    """Thresholds of every filter, and how samples become records. Written as YAML with these names.

    Attributes:
        fields: names of the source's fields.
        images: `required`, a sample without a picture is a failure; `none`, one with a picture is; or `any`.
        prompt: what the user says of a captioned picture; empty, the picture alone is the user's turn.
        failure_limit: the ingest stops when more than this share of the samples cannot be read.
        damaged_files: the ingest stops when more files than this are damaged: each may have lost any number of samples.
        min_side: pixels; the shorter side of every picture has at least as many.
        max_pixels: of one picture.
        max_aspect: longer side over shorter side.
        blank_deviation: a picture whose grey levels (0–255) deviate less than this from their mean is blank; 0 keeps all.
        min_characters: of the assistant's turns together.
        max_characters: of all turns together.
        repeated_ngrams: largest share of word 4-grams that occurred before in the same text (after Gopher, arXiv 2112.11446,
            table A1), of texts of 50 words or more; 1 keeps all.
        languages: tags that are kept, as py3langid names them (ISO 639-1); empty keeps all.
        language_characters: shorter texts are not judged and keep the source's language.
        leaked_words: an answer of at least so many words that stands word for word in its question is leaked; 0 keeps all.
        scorers: scores to compute, and their limits.
        image_distance: two pictures whose 64-bit perceptual hashes differ in so many bits or fewer are near duplicates;
            -1 looks for none.
        same_image: what becomes of records with near-duplicate pictures: `drop` all but one, drop those with the `same_text`,
            or `keep` them. Sets with several questions about a picture want `same_text`.
        text_similarity: texts without a picture whose word sets of 5-grams have at least this Jaccard similarity (estimated
            by MinHash) are near duplicates; 0 looks for none.
        permutations: of MinHash; the estimate's standard error is at most 1 / (2 √permutations).
        held_out: source directories or JSON Lines (`lists`) whose pictures and questions are kept out.
        held_out_distance: as `image_distance`, against the held-out pictures.
        held_out_words: a question that shares so many words in a row with a held-out question is left out.
        held_out_repeats: words in a row that the questions of more held-out pictures than this share are a template, and are not
            looked for; in a list of under 50 entries, of more than a tenth of them (at least two).
        earlier: directories of sources that were ingested before; what they hold is a duplicate here.
        opt_out: files with one URL, domain, SHA-256 of a picture or content hash a line.
    """

    fields: FieldNames = dataclasses.field(default_factory=FieldNames)
    images: str = "any"
    prompt: str = ""
    failure_limit: float = 0.05
    damaged_files: int = 0
    min_side: int = 32
    max_pixels: int = MAX_PIXELS
    max_aspect: float = 20.0
    blank_deviation: float = 2.0
    min_characters: int = 1
    max_characters: int = 200_000
    repeated_ngrams: float = 0.3
    languages: tuple[str, ...] = ()
    language_characters: int = 40
    leaked_words: int = 4
    scorers: tuple[ScorerConfig, ...] = ()
    image_distance: int = 3
    same_image: str = "same_text"
    text_similarity: float = 0.8
    permutations: int = 128
    held_out: tuple[str, ...] = ()
    held_out_distance: int = 3
    held_out_words: int = 8
    held_out_repeats: int = 5
    earlier: tuple[str, ...] = ()
    opt_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require(self.images in IMAGES_RULES, "images", self.images, " or ".join(IMAGES_RULES))
        _require(0 <= self.failure_limit <= 1, "failure_limit", self.failure_limit, "a share in 0..1")
        _require(self.damaged_files >= 0, "damaged_files", self.damaged_files, "at least 0")
        _require(self.min_side >= 1, "min_side", self.min_side, "at least 1")
        _require(1 <= self.max_pixels <= MAX_PIXELS, "max_pixels", self.max_pixels, f"in 1..{MAX_PIXELS}")
        _require(self.max_aspect >= 1, "max_aspect", self.max_aspect, "at least 1")
        _require(0 <= self.blank_deviation <= 127, "blank_deviation", self.blank_deviation, "in 0..127 grey levels")
        _require(0 <= self.repeated_ngrams <= 1, "repeated_ngrams", self.repeated_ngrams, "a share in 0..1")
        _require(-1 <= self.image_distance <= 8, "image_distance", self.image_distance, "in -1..8")
        _require(0 <= self.held_out_distance <= 8, "held_out_distance", self.held_out_distance, "in 0..8")
        _require(self.same_image in SAME_IMAGE_RULES, "same_image", self.same_image, " or ".join(SAME_IMAGE_RULES))
        _require(0 <= self.text_similarity <= 1, "text_similarity", self.text_similarity, "in 0..1")
        _require(16 <= self.permutations <= 1024, "permutations", self.permutations, "in 16..1024")
        _require(self.held_out_words >= 3, "held_out_words", self.held_out_words, "at least 3")
        _require(self.held_out_repeats >= 1, "held_out_repeats", self.held_out_repeats, "at least 1")
        self._check_texts()

    def _check_texts(self) -> None:
        _require(self.min_characters >= 0, "min_characters", self.min_characters, "at least 0")
        _require(
            self.max_characters >= max(1, self.min_characters),
            "max_characters",
            self.max_characters,
            f"at least 1 and at least min_characters, {self.min_characters}",
        )
        _require(self.language_characters >= 0, "language_characters", self.language_characters, "at least 0")
        _require(self.leaked_words >= 0, "leaked_words", self.leaked_words, "at least 0")
        names = [scorer.name for scorer in self.scorers]
        _require(len(set(names)) == len(names), "scorers", names, "of different names")


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise IngestError(f"{name} is {value!r}; it must be {rule}")


def load_config(path: str | None) -> IngestConfig:
    """The settings in a YAML file; those that it does not name keep their defaults.

    Raises:
        IngestError: no such file, no YAML, an unknown name (the message gives the nearest), or a value out of range.
    """
    if path is None:
        return IngestConfig()
    try:
        raw = yaml.safe_load(storage.read_bytes(path)) or {}
    except yaml.YAMLError as error:
        raise IngestError(f"{path} is not YAML: {error}") from error
    try:
        return _build(IngestConfig, raw)
    except IngestError as error:
        raise IngestError(f"{path}: {error}") from error


def _build(kind: type[Any], raw: object) -> Any:
    """A dataclass from a mapping; lists become tuples, and the two nested kinds are built in turn."""
    if not isinstance(raw, Mapping):
        raise IngestError(f"{kind.__name__} must be a mapping of names to values, this is {raw!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in raw:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, 1)
            raise IngestError(f"unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    try:
        return kind(**{name: _value(name, fields[name].type, value) for name, value in raw.items()})
    except TypeError as error:
        raise IngestError(f"{kind.__name__}: {error}") from error


def _value(name: str, kind: str, value: object) -> object:
    if kind == "FieldNames":
        return _build(FieldNames, value)
    if kind == "tuple[ScorerConfig, ...]":
        _require(isinstance(value, list), name, value, "a list of scorers")
        return tuple(_build(ScorerConfig, item) for item in value)
    if kind == "tuple[str, ...]":
        texts = [value] if isinstance(value, str) else value
        _require(
            isinstance(texts, list) and all(isinstance(text, str) for text in texts), name, value, "a list of texts"
        )
        return tuple(texts)
    allowed = {"int": int, "float": (int, float), "str": str, "float | None": (int, float, type(None))}[kind]
    _require(isinstance(value, allowed) and not isinstance(value, bool), name, value, f"of type {kind}")
    return value
