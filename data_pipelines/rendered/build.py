"""Builds the embedded data set: draws in processes, trains the tokenizer on the training texts, writes the sources.

DIR/rendered.json      what was built; says `complete` only at the very end
DIR/tokenizer.model    SentencePiece, and `conversation.json` with its chat template
DIR/train/<source>/    captions, digits, documents, charts, scenes, text
DIR/heldout/<source>/  the same without text
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import pathlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor

from data_pipelines.records import (
    Record,
    decode,
    encode,
    read_index,
    read_manifest,
    remove_source,
    write_json,
    write_source,
)
from data_pipelines.rendered import captions, text
from data_pipelines.rendered.pictures import HELD_OUT, TRAIN, VERSION
from data_pipelines.rendered.questions import TASKS, question_record
from hypervl_jax.architecture import hypervl_tiny
from hypervl_jax.text.conversation import IMAGE_SLOT
from hypervl_jax.text.tokenizer import SENTENCEPIECE_FILE, TEMPLATE_FILE, Tokenizer, load_tokenizer, train_sentencepiece
from hypervl_jax.vision.anyres import plan_image

MARKER = "rendered.json"
VOCAB_SIZE = 768

_CHUNK = 100
"""Items a process draws at a time: a fraction of a second."""

_TOKENIZER_RECORDS = {"captions": 600, "text": 100} | dict.fromkeys(TASKS, 1000)
"""Records of each training source that the tokenizer is trained on, passages few, since some 180 merges must do."""

_COMMON_ANSWER = 0.01
"""An answer of one word that comes so often, of a task's answers, is one token, alone as in a sentence: what captions teach
about its id then holds for answers."""

_MANY_TILES = 3


@dataclasses.dataclass(frozen=True)
class Size:
    """How many records each source has, and of what sizes their pictures are (a key of `pictures.FRAMINGS`)."""

    captions: int
    questions: int
    text: int
    heldout_captions: int
    heldout_questions: int
    pictures: str = "demo"

    def sources(self) -> dict[tuple[str, str], int]:
        """(split, source) -> records, in the order they are built."""
        train = {(TRAIN, "captions"): self.captions} | {(TRAIN, task): self.questions for task in TASKS}
        heldout = {(HELD_OUT, "captions"): self.heldout_captions} | {
            (HELD_OUT, task): self.heldout_questions for task in TASKS
        }
        return train | {(TRAIN, "text"): self.text} | heldout


SIZES: Mapping[str, Size] = {
    "demo": Size(captions=16_000, questions=8_000, text=2_000, heldout_captions=200, heldout_questions=300),
    "scores": Size(captions=16_000, questions=8_000, text=2_000, heldout_captions=200, heldout_questions=600),
    "test": Size(captions=300, questions=200, text=50, heldout_captions=10, heldout_questions=20),
    "study": Size(16_000, 8_000, 2_000, heldout_captions=200, heldout_questions=400, pictures="study"),
    "study_test": Size(300, 200, 50, heldout_captions=10, heldout_questions=20, pictures="study"),
}

_DESCRIPTIONS = {
    "captions": "Descriptions of rendered pictures of all four tasks.",
    "digits": "Real handwritten digits, alone, in strips and in forms, with questions.",
    "documents": "Rendered English documents with questions about titles, numbers, stamps, layout and words.",
    "charts": "Bar, line and pie charts with questions about colours, counts, trends and values.",
    "scenes": "Scenes of coloured shapes with questions about colours, shapes, counts and positions.",
    "text": "Text only: short passages, and small questions without a picture.",
}
_LICENCES = {task: module.LICENCE for task, module in {**TASKS, "captions": captions, "text": text}.items()}


@dataclasses.dataclass(frozen=True)
class SourceReport:
    """One line of the table: shares are of the records, `blind_accuracy` is None but for the held-out picture tasks.

    `blind_accuracy` is what the best guess without the picture scores: for each question the answer that its wording had most
    often in training.
    """

    split: str
    source: str
    records: int
    bytes: int
    level_shares: tuple[float, float, float]
    many_tiles_share: float
    blind_accuracy: float | None


@dataclasses.dataclass(frozen=True)
class Report:
    """What a directory holds; `already_complete` when nothing had to be built."""

    directory: str
    size: str
    sources: tuple[SourceReport, ...]
    already_complete: bool


class BuildError(ValueError):
    """The data set cannot be built; the message says why and what to do."""


def build(
    output: str | os.PathLike[str],
    size: str = "demo",
    workers: int | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Report:
    """Builds the data set, or keeps one that is complete and of the same version and size.

    The bytes depend on the version and size only (given the same library versions), not on `workers`.

    Args:
        output: the directory; it must be new, empty, or made by this function.
        size: a key of `SIZES`.
        workers: processes that draw; 0 draws in this one; None takes one per core, or 0 for the test size.
        progress: called with the stage, and how many of how many records are through it.

    Raises:
        BuildError: unknown size, or the directory holds something else.
    """
    if size not in SIZES:
        raise BuildError(f"unknown size {size!r}; sizes are {', '.join(SIZES)}")
    root = pathlib.Path(output)
    if report := _complete(root, size):
        return report
    _clear(root)
    write_json(root / MARKER, {"version": VERSION, "size": size, "complete": False})
    drawn = _draw_all(SIZES[size], _worker_count(workers, size), progress)
    tokenizer = _train_tokenizer(root, drawn)
    reports = tuple(_write_all(root, drawn, tokenizer, progress))
    rows = [dataclasses.asdict(report) for report in reports]
    write_json(root / MARKER, {"version": VERSION, "size": size, "complete": True, "sources": rows})
    return Report(str(root), size, reports, already_complete=False)


def draw_record(split: str, source: str, index: int, sizes: str = "demo") -> Record:
    """Record `index` of a source with pictures of `sizes`; the same whenever and wherever it is drawn."""
    if source == "captions":
        return captions.caption_record(split, index, sizes)
    return text.text_record(split, index) if source == "text" else question_record(split, source, index, sizes)


def _complete(root: pathlib.Path, size: str) -> Report | None:
    """The report of a complete directory of this version and size, else None."""
    try:
        marker = json.loads((root / MARKER).read_text("utf-8"))
        if (marker["version"], marker["size"], marker["complete"]) != (VERSION, size, True):
            return None
        fingerprint = load_tokenizer(root / SENTENCEPIECE_FILE).fingerprint
        intact = all(
            read_manifest(root / split / source).fingerprint == fingerprint for split, source in SIZES[size].sources()
        )
        rows = tuple(SourceReport(**{**row, "level_shares": tuple(row["level_shares"])}) for row in marker["sources"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Report(str(root), size, rows, already_complete=True) if intact else None


def _clear(root: pathlib.Path) -> None:
    """Makes the directory, or removes what an earlier build left in it; never anything else."""
    root.mkdir(parents=True, exist_ok=True)
    if not any((root / name).exists() for name in (MARKER, f"{MARKER}.tmp")) and any(root.iterdir()):
        raise BuildError(
            f"{root} is not empty and holds no {MARKER}; give a new directory, since a rebuild removes the old one's files"
        )
    for split, source in _all_sources():
        remove_source(root / split / source)
    for name in (SENTENCEPIECE_FILE, TEMPLATE_FILE):
        (root / name).unlink(missing_ok=True)


def _all_sources() -> set[tuple[str, str]]:
    return set(itertools.chain.from_iterable(size.sources() for size in SIZES.values()))


def _worker_count(workers: int | None, size: str) -> int:
    """Starting a process takes seconds, so what is for tests is drawn in this one."""
    if workers is not None:
        return workers
    return 0 if SIZES[size].questions <= 10 * _CHUNK else os.cpu_count() or 1


@dataclasses.dataclass(frozen=True)
class _Job:
    """Consecutive items of one source."""

    split: str
    source: str
    first: int
    count: int
    sizes: str


def _jobs(size: Size) -> list[_Job]:
    return [
        _Job(split, source, first, min(_CHUNK, records - first), size.pictures)
        for (split, source), records in size.sources().items()
        for first in range(0, records, _CHUNK)
    ]


def _draw(job: _Job) -> list[bytes]:
    """The encoded records of a job."""
    return [
        encode(draw_record(job.split, job.source, index, job.sizes))
        for index in range(job.first, job.first + job.count)
    ]


def _draw_all(
    size: Size, workers: int, progress: Callable[[str, int, int], None]
) -> dict[tuple[str, str], list[bytes]]:
    """The encoded records of every source, in order; all of them are held in memory (about 3 KB each)."""
    jobs, drawn, done = _jobs(size), defaultdict(list), 0
    for job, records in zip(jobs, _map_jobs(jobs, workers), strict=True):
        drawn[job.split, job.source] += records
        done += len(records)
        progress(f"drawing {job.split}/{job.source}", done, sum(job.count for job in jobs))
    return drawn


def _map_jobs(jobs: list[_Job], workers: int) -> Iterator[list[bytes]]:
    if workers == 0:
        yield from map(_draw, jobs)
        return
    # Processes are spawned, not forked: the caller may have threads.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_draw, jobs)


def _train_tokenizer(root: pathlib.Path, drawn: Mapping[tuple[str, str], list[bytes]]) -> Tokenizer:
    """Trains on the first records of each training source and saves the model with its template."""
    records = {source: [*map(decode, drawn[TRAIN, source][:count])] for source, count in _TOKENIZER_RECORDS.items()}
    texts = (
        turn.text.replace(IMAGE_SLOT, "") for record in itertools.chain(*records.values()) for turn in record.turns
    )
    answers = sorted(set().union(*(_common_answers(records[task]) for task in TASKS)))
    tokenizer = train_sentencepiece(texts, root / SENTENCEPIECE_FILE, VOCAB_SIZE, answers)
    tokenizer.save(root)
    return tokenizer


def _common_answers(records: Iterable[Record]) -> set[str]:
    """Answers of one word that come often among the answers of a task."""
    counts = Counter(answer for record in records for _, answer in _question_answers(record))
    return {word for word, count in counts.items() if word.isalpha() and count >= _COMMON_ANSWER * counts.total()}


def _write_all(
    root: pathlib.Path,
    drawn: Mapping[tuple[str, str], list[bytes]],
    tokenizer: Tokenizer,
    progress: Callable[[str, int, int], None],
) -> Iterator[SourceReport]:
    """Writes the sources and yields their lines of the table."""
    total, done = sum(map(len, drawn.values())), 0
    scored = {(HELD_OUT, task) for task in TASKS}
    guesses = {task: _best_guesses(drawn[TRAIN, task]) for task in TASKS}
    for (split, source), records in drawn.items():
        directory = root / split / source
        write_source(
            directory,
            map(decode, records),
            name=source,
            licence=_LICENCES[source],
            description=_DESCRIPTIONS[source],
            tokenizer=tokenizer,
            tiling=hypervl_tiny().tiling,
        )
        done += len(records)
        progress(f"writing {split}/{source}", done, total)
        yield _report(directory, split, source, records, guesses[source] if (split, source) in scored else None)


def _question_answers(record: Record) -> Iterator[tuple[str, str]]:
    """The (question, answer) pairs of a record."""
    for question, answer in zip(record.turns[::2], record.turns[1::2], strict=True):
        yield question.text.replace(IMAGE_SLOT, ""), answer.text


def _best_guesses(records: Iterable[bytes]) -> dict[str, str]:
    """The most frequent answer of each question's wording."""
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in itertools.chain.from_iterable(map(_question_answers, map(decode, records))):
        answers[question][answer] += 1
    return {question: counts.most_common(1)[0][0] for question, counts in answers.items()}


def _report(
    directory: pathlib.Path, split: str, source: str, encoded: list[bytes], guesses: Mapping[str, str] | None
) -> SourceReport:
    records = list(map(decode, encoded))
    levels = Counter(record.metadata["level"] for record in records)
    blind = None
    if guesses is not None:
        pairs = [pair for record in records for pair in _question_answers(record)]
        blind = sum(guesses.get(question) == answer for question, answer in pairs) / len(pairs)
    return SourceReport(
        split=split,
        source=source,
        records=len(records),
        bytes=sum(shard.bytes for shard in read_manifest(directory).shards),
        level_shares=tuple(levels[level] / len(records) for level in (1, 2, 3)),
        many_tiles_share=_many_tiles(directory) / len(records),
        blind_accuracy=blind,
    )


def _many_tiles(directory: pathlib.Path) -> int:
    """Records with a picture of `_MANY_TILES` tiles or more, at the tiny model's tile size."""
    tiling = hypervl_tiny().tiling
    indexes = (read_index(directory / shard.index_file) for shard in read_manifest(directory).shards)
    sizes = (index.image_sizes(record) for index in indexes for record in range(len(index)))
    return sum(any(plan_image(*size, 1.0, tiling).tiles >= _MANY_TILES for size in images) for images in sizes)
