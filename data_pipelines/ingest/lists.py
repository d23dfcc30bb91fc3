"""What must not be in the training data: opt-outs, and the pictures and questions of benchmarks that are held out.

Both lists are small beside a data set: they are compiled once, and every worker holds them whole as sorted 64-bit hashes.

An opt-out file has a URL, a domain (its subdomains with it), the SHA-256 of a picture's bytes or a content hash a line. A held-out
list is a source directory, or JSON Lines whose objects have any of `image` (a path below the file's folder, or base64),
`image_hash` (16 hex digits, as `imagehash.phash` prints them) and `question`, and nothing else.

A held-out picture is looked for as it is and mirrored, left for right: of an `image` both hashes are kept. From a hash alone that of the
mirror image does not follow (signs of the odd columns change, but also the median that all are compared with).

Questions are compared by their runs of words (n-gram overlap, as in "Language Models are Few-Shot Learners", appendix C). Many
share an instruction, such as "Answer the question using a single word or phrase.": a run that stands in the questions of many
pictures is such a template and tells nothing about any of them, so it is not looked for.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import xxhash
from jaxtyping import UInt64

from data_pipelines.ingest import storage
from data_pipelines.ingest.config import IngestConfig
from data_pipelines.ingest.errors import IngestError, Skip
from data_pipelines.ingest.signatures import hamming, image_hash, image_keys, word_hashes, words
from data_pipelines.records import MANIFEST, Record, RecordError, content_hash, read_manifest
from data_pipelines.sources import Source
from data_pipelines.staged import local_directory
from hypervl_jax.text.conversation import IMAGE_SLOT, Turn
from hypervl_jax.vision.decoding import UndecodableImage, decode_image

_Entry = tuple[list[int], list[str]]
"""(hashes of the pictures, questions) of an entry of a held-out list."""
_KEYS = ("image", "image_hash", "question")
_DOMAIN = re.compile(r"[\w-]+(\.[\w-]+)+")
_HEX = re.compile(r"[0-9a-f]{32}|[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class Exclusions:
    """Both lists, compiled: sorted hashes of opted-out names, held-out pictures with their mirror images, and runs of words of questions."""

    opt_out: UInt64[np.ndarray, "n"]
    pictures: UInt64[np.ndarray, "p"]
    questions: UInt64[np.ndarray, "q"]
    distance: int
    run_words: int

    def save(self, path: str) -> None:
        """Writes the compiled lists, so that workers need not hash the pictures again."""
        buffer = io.BytesIO()
        np.savez(buffer, **dataclasses.asdict(self))
        storage.write_bytes(path, buffer.getvalue())

    def counts(self) -> dict[str, int]:
        """How much each list came to, for people who want to see that it was read."""
        return {
            "opt_outs": len(self.opt_out),
            "hashes of held-out pictures and their mirror images": len(self.pictures),
            "runs of words of held-out questions": len(self.questions),
        }

    def check(self, record: Record, image_hashes: Iterable[int]) -> None:
        """Raises `Skip` for a record that is opted out, has a picture close to a held-out one, or a held-out question."""
        if len(self.opt_out) and any(_contains(self.opt_out, _hash(name)) for name in _names(record)):
            raise Skip("opted_out")
        if any(map(self._near, image_hashes)):
            raise Skip("held_out:image")
        if len(self.questions) and any(map(self._asks, _asked_turns(record))):
            raise Skip("held_out:question")

    def _near(self, value: int) -> bool:
        candidates = (other for key in image_keys(value, self.distance) for other in self._by_key.get(key, ()))
        return any(hamming(value, other) <= self.distance for other in candidates)

    def _asks(self, turn: Turn) -> bool:
        return any(_contains(self.questions, value) for value in _runs(turn.text, self.run_words))

    @functools.cached_property
    def _by_key(self) -> dict[tuple[int, int], list[int]]:
        """The held-out pictures by the keys of their hashes."""
        groups: dict[tuple[int, int], list[int]] = {}
        for value in self.pictures.tolist():
            for key in image_keys(value, self.distance):
                groups.setdefault(key, []).append(value)
        return groups


def compile_lists(config: IngestConfig) -> Exclusions:
    """Reads the lists that a configuration names. Raises `IngestError` for one that cannot be read."""
    pictures: set[int] = set()
    questions: set[int] = set()
    templates = set(_runs(config.prompt, config.held_out_words))
    for path in config.held_out:
        entries = list(_entries(path))
        of_list = {value for hashes, _ in entries for value in hashes}
        runs, repeated = _question_runs(entries, config)
        if not of_list and not runs - repeated:
            raise IngestError(
                f"held-out list {path} would keep nothing out: of {len(entries)} entries none has a picture, or a question of "
                f"{config.held_out_words} words (held_out_words) that is not a template of many"
            )
        pictures |= of_list
        questions |= runs
        templates |= repeated
    return Exclusions(
        opt_out=_sorted_hashes(_opt_out_entry(path, line) for path in config.opt_out for line in _lines(path)),
        pictures=_sorted_hashes(pictures),
        questions=_sorted_hashes(questions - templates),
        distance=config.held_out_distance,
        run_words=config.held_out_words,
    )


def _question_runs(entries: Sequence[_Entry], config: IngestConfig) -> tuple[set[int], set[int]]:
    """(all runs of words in the questions of a list, those that are templates).

    A run is a template when more than `held_out_repeats` pictures (of entries without one, more questions) share it; in a list
    of few entries, more than a tenth of them. The same question about one picture, its options in another order, is one.
    """
    owners: dict[int, set[object]] = {}
    for hashes, turns in entries:
        owner = tuple(hashes) or tuple(turns)
        for value in itertools.chain.from_iterable(_runs(turn, config.held_out_words) for turn in turns):
            owners.setdefault(value, set()).add(owner)
    most = max(1, min(config.held_out_repeats, len(entries) // 10))
    return set(owners), {value for value, found in owners.items() if len(found) > most}


def _asked_turns(record: Record) -> list[Turn]:
    """The turns that may repeat a held-out question: the user's; all of a plain text."""
    return [turn for turn in record.turns if turn.role == "user"] or list(record.turns)


def load_lists(path: str) -> Exclusions:
    """The lists that `Exclusions.save` wrote."""
    with np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False) as arrays:
        whole = {name: int(arrays[name]) for name in ("distance", "run_words")}
        return Exclusions(**{name: arrays[name] for name in ("opt_out", "pictures", "questions")}, **whole)


def _lines(path: str) -> Iterator[str]:
    lines = (line.strip() for line in storage.read_bytes(path).decode("utf-8", "replace").splitlines())
    return (line for line in lines if line and not line.startswith("#"))


def _opt_out_entry(path: str, line: str) -> int:
    """Hash of an opt-out line in the form in which `_names` gives it. Raises `IngestError` for one that could never match."""
    if "://" in line:
        host, name = _host(line), _normal_url(line)
    elif "/" in line:
        host, name = _host(f"//{line}"), _normal_url(f"//{line}")
    else:
        host = name = line.lower().removeprefix("*.").removeprefix("www.")
    if not (_DOMAIN.fullmatch(host) and "*" not in name) and not _HEX.fullmatch(name):
        raise IngestError(f"opt-out list {path}: {line!r} is no URL, domain, SHA-256 of a picture or content hash")
    return _hash(name)


def _hash(name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode())


def _names(record: Record) -> Iterator[str]:
    """Everything by which a record may have been opted out."""
    yield content_hash(record)
    for image in record.images:
        yield hashlib.sha256(image).hexdigest()
    url = str(record.metadata.get("url", ""))
    if url:
        yield _normal_url(url)
        labels = _host(url).split(".")
        yield from (".".join(labels[start:]) for start in range(len(labels)))


def _host(url: str) -> str:
    try:
        return (urllib.parse.urlsplit(url).hostname or "").removeprefix("www.")
    except ValueError:
        return ""


def _normal_url(url: str) -> str:
    """Without scheme, fragment and the host's case: what a list and a source may write differently."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return url
    return f"{_host(url)}{parts.path.rstrip('/')}?{parts.query}"


def _runs(text: str, count: int) -> Iterator[int]:
    """Hashes of the runs of `count` words; none of a shorter text, which many benchmarks share by chance."""
    tokens = words(text.replace(IMAGE_SLOT, " "))
    return word_hashes(tokens, count) if len(tokens) >= count else iter(())


def _entries(path: str) -> Iterator[_Entry]:
    """The entries of a held-out list."""
    if storage.exists(storage.join(path, MANIFEST)):
        yield from _source_entries(path)
    elif path.endswith((".parquet", ".tar")):
        raise IngestError(
            f"held-out list {path} is not JSON Lines; ingest it first, and name the directory that this makes"
        )
    else:
        for number, line in enumerate(storage.read_bytes(path).splitlines(), 1):
            if line.strip():
                yield _line_entry(path, number, line)


def _source_entries(path: str) -> Iterator[_Entry]:
    try:
        directory = local_directory(path)
        source = Source(directory, read_manifest(directory).fingerprint)
        for number in range(len(source)):
            record = source.record(number)
            hashes = [value for image in record.images for value in _both_hashes(image)]
            yield hashes, [turn.text for turn in record.turns if turn.role == "user"]
    except (RecordError, UndecodableImage) as error:
        raise IngestError(f"held-out source {path}: {error}") from error


def _line_entry(path: str, number: int, line: bytes) -> _Entry:
    try:
        entry = _checked(json.loads(line))
        hashes = [int(entry["image_hash"], 16)] if "image_hash" in entry else []
        if "image" in entry:
            hashes += _both_hashes(_picture(path, entry["image"]))
        return hashes, [entry.get("question", "")]
    except (ValueError, TypeError, AttributeError, UndecodableImage) as error:
        raise IngestError(f"line {number} of held-out list {path}: {error}") from error


def _both_hashes(image: bytes) -> list[int]:
    """Perceptual hashes of a picture and of its mirror image. Raises `UndecodableImage`."""
    rgb = decode_image(image)
    return [image_hash(rgb), image_hash(np.ascontiguousarray(rgb[:, ::-1]))]


def _checked(entry: object) -> dict[str, str]:
    """An entry that has nothing but what is compared: what is passed over in silence would not be kept out."""
    if not isinstance(entry, dict) or not entry or not all(isinstance(value, str) for value in entry.values()):
        raise ValueError(f"an entry is an object of texts under any of {', '.join(_KEYS)}")
    unknown = sorted(entry.keys() - set(_KEYS))
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; an entry has any of {', '.join(_KEYS)} and nothing else")
    return entry


def _picture(path: str, value: str) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        return storage.read_bytes(storage.join(storage.parent(path), value))


def _sorted_hashes(values: Iterable[int]) -> UInt64[np.ndarray, "n"]:
    return np.unique(np.fromiter(values, np.uint64))


def _contains(hashes: UInt64[np.ndarray, "n"], value: int) -> bool:
    place = int(np.searchsorted(hashes, np.uint64(value)))
    return place < len(hashes) and int(hashes[place]) == value
