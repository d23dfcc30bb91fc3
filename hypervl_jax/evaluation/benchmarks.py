"""Tasks that are scored by real generation: items, batched answering, and a results file that a killed run resumes from.

    items ─► batches by size ─► Assistant.answer ─► score ─► one JSON line an item ─► TaskResult

A `Measurement` says how the items are answered. Its controls show what the pictures are worth: `blank` is the same model shown
mid-grey pictures of the same sizes, `untrained` the same architecture with random parameters.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from hypervl_jax.architecture import BRANCHES, TilingConfig, require
from hypervl_jax.evaluation.metrics import metric_name, score
from hypervl_jax.evaluation.statistics import Estimate, mean_interval
from hypervl_jax.inference.assistant import AUTO, Answer, Assistant, Options, Request
from hypervl_jax.text.conversation import Turn
from hypervl_jax.text.tokenizer import Tokenizer
from hypervl_jax.vision.anyres import plan_image
from hypervl_jax.vision.decoding import image_size
from hypervl_jax.vision.resolution import MAX_ALPHA

FORMAT_VERSION = 1
IMAGE, BLANK, UNTRAINED = "image", "blank", "untrained"
CONDITIONS = (IMAGE, BLANK, UNTRAINED)
BATCH_ROWS = 64


class ResultsError(ValueError):
    """A results file that cannot be used; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One question to answer.

    Attributes:
        identity: content hash of the record it came from.
        task: its name.
        turns: the conversation up to the question; the last turn is the user's.
        images: encoded, one for each image slot.
        answers: right answers; letters where there are choices.
        kind, level: what is asked, and how hard it is (1 easy, 3 hard), for reports.
        choices: texts of the options A, B, C, …; none for a free answer.
        metric: where it differs from the task's.
        groups: what the item is part of, for scores of groups (`registry`).
    """

    identity: str
    task: str
    turns: tuple[Turn, ...]
    images: tuple[bytes, ...]
    answers: tuple[str, ...]
    kind: str = ""
    level: int = 0
    choices: tuple[str, ...] = ()
    metric: str = ""
    groups: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class HeldoutTask:
    """Items of one task with its metric and the most tokens that an answer may have."""

    name: str
    items: tuple[Item, ...]
    metric: str
    max_new_tokens: int


class Measurement(NamedTuple):
    """How items are answered: by which branch, seeing what (`CONDITIONS`), at which α (a number, or "auto")."""

    encoder: str
    condition: str
    alpha: float | str

    def options(self, max_new_tokens: int) -> Options:
        """Greedy answers of at most `max_new_tokens`."""
        return Options(
            encoder=self.encoder,
            alpha=self.alpha,
            max_new_tokens=max_new_tokens,
            blank=self.condition == BLANK,
        )


@dataclasses.dataclass(frozen=True)
class ItemResult:
    """One line of a results file: an item, how it was answered, the answer and its score.

    Attributes:
        identity, task, kind, level: of the item.
        encoder, condition, alpha: the measurement.
        prediction: the generated text.
        score: by the task's metric, in [0, 1].
        stopped: False where the token limit cut the answer.
        alphas: α used for each image.
        tiles, visual_tokens: of the prompt.
        milliseconds: of each step, the batch's time shared out among its items.
    """

    identity: str
    task: str
    kind: str
    level: int
    encoder: str
    condition: str
    alpha: float | str
    prediction: str
    score: float
    stopped: bool
    alphas: tuple[float, ...]
    tiles: int
    visual_tokens: int
    milliseconds: Mapping[str, float]

    @property
    def measurement(self) -> Measurement:
        """How it was answered."""
        return Measurement(self.encoder, self.condition, self.alpha)

    @property
    def key(self) -> tuple[str, str, Measurement]:
        """What a results file holds once."""
        return self.task, self.identity, self.measurement


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """All items of one task, answered in one way."""

    task: str
    measurement: Measurement
    items: tuple[ItemResult, ...]

    @property
    def score(self) -> Estimate:
        """The mean score with its 95 % interval."""
        return mean_interval([item.score for item in self.items])


class ResultsFile:
    """JSON lines: first what was measured (`subject`), then one `ItemResult` a line, each item and measurement once.

    A process that is killed breaks at most the last line, which is dropped on opening.

    Args:
        path: made if need be.
        subject: names the model and the data; results of another subject are not mixed in.

    Raises:
        ResultsError: the file holds something else, or results of another subject.
    """

    def __init__(self, path: str | os.PathLike[str], subject: Mapping[str, Any]) -> None:
        self.path = pathlib.Path(path)
        self.subject = json.loads(json.dumps(subject))
        self._rows: dict[tuple[str, str, Measurement], ItemResult] = {}
        if self.path.exists() and self.path.stat().st_size:
            self._open_existing()
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._rewrite()
        self._file = self.path.open("ab", buffering=0)

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def find(self, item: Item, measurement: Measurement) -> ItemResult | None:
        """The result that is already there."""
        return self._rows.get((item.task, item.identity, measurement))

    def append(self, rows: Iterable[ItemResult]) -> None:
        """Adds results; each line reaches the operating system in one write."""
        for row in rows:
            self._rows[row.key] = row
            self._file.write(_line(dataclasses.asdict(row)))

    def close(self) -> None:
        """Forces the lines to disk; safe to call twice."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def _open_existing(self) -> None:
        found, rows = read_results(self.path)
        if found != self.subject:
            names = [name for name in {**found, **self.subject} if found.get(name) != self.subject.get(name)]
            raise ResultsError(
                f"{self.path} holds results of another model or data set ({', '.join(names)} differ); "
                f"write these elsewhere, or remove that file"
            )
        self._rows = {row.key: row for row in rows}
        self._rewrite()

    def _rewrite(self) -> None:
        """Writes the header and all whole lines to a new file and renames it."""
        temporary = self.path.with_name(f"{self.path.name}.writing")
        header = {"format_version": FORMAT_VERSION, "subject": self.subject}
        with temporary.open("wb") as file:
            file.writelines(map(_line, [header, *map(dataclasses.asdict, self._rows.values())]))
        temporary.replace(self.path)


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def read_results(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[ItemResult]]:
    """The subject and all results of a file; a last line without its end is left out.

    Raises:
        ResultsError: there is no such file, it is no results file of this version, or a line within it is damaged.
    """
    path = pathlib.Path(path)
    try:
        header, *lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        values = json.loads(header)
        if values["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {values['format_version']}, this code reads {FORMAT_VERSION}")
        return values["subject"], [_parse(json.loads(line)) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{path} is no results file ({error}); remove it and evaluate again") from error


def _parse(values: Mapping[str, Any]) -> ItemResult:
    return ItemResult(**{**values, "alphas": tuple(values["alphas"])})


def heldout_task(name: str, items: Sequence[Item], tokenizer: Tokenizer) -> HeldoutTask:
    """A task whose answers may be one token longer than its longest right answer, so that running on is seen as wrong."""
    require(bool(items), f"task {name!r} has no item to evaluate")
    longest = max(len(tokenizer.encode(answer)) for item in items for answer in item.answers)
    return HeldoutTask(name, tuple(items), metric_name(name), longest + 1)


def measurements(
    encoders: Sequence[str], conditions: Sequence[str], alphas: Sequence[float | str]
) -> list[Measurement]:
    """All ways to answer, in the order they are run: the real images at every α, the controls at the first α only.

    Raises:
        ConfigError: an unknown encoder or condition, or nothing to do.
    """
    for encoder in encoders:
        require(encoder in BRANCHES, f"encoder {encoder!r} is not one of {', '.join(BRANCHES)}")
    for condition in conditions:
        require(condition in CONDITIONS, f"condition {condition!r} is not one of {', '.join(CONDITIONS)}")
    require(bool(encoders and conditions and alphas), "give at least one encoder, condition and alpha")
    return [
        Measurement(encoder, condition, alpha)
        for condition in conditions
        for encoder in encoders
        for alpha in (alphas if condition == IMAGE else alphas[:1])
    ]


def evaluate(
    assistant: Assistant,
    task: HeldoutTask,
    measurement: Measurement,
    results: ResultsFile,
    progress: Callable[[int], None] = lambda items: None,
    rows: int = BATCH_ROWS,
    alphas: Mapping[str, float] | None = None,
) -> TaskResult:
    """Answers the items of a task that `results` does not hold yet, and scores them.

    Args:
        assistant: with the parameters that the measurement's condition means.
        task: what to answer.
        measurement: how.
        results: gets each batch as soon as it is answered.
        progress: called with the number of items that are through.
        rows: items answered at once; they are taken by size, so that a batch holds little padding.
        alphas: of each item's images by identity, where they differ from item to item; the measurement's `alpha` then names them.

    Raises:
        As `Assistant.answer`.
    """
    missing = [item for item in task.items if results.find(item, measurement) is None]
    progress(len(task.items) - len(missing))
    ordered = sorted(missing, key=lambda item: _visual_tokens(item, assistant.config.tiling))
    options = (measurement if alphas is None else measurement._replace(alpha=MAX_ALPHA)).options(task.max_new_tokens)
    for batch in equal_batches(ordered, rows):
        answers = assistant.answer([_request(item, alphas) for item in batch], options, rows=rows)
        pairs = zip(batch, answers, strict=True)
        results.append(_item_result(item, answer, task.metric, measurement) for item, answer in pairs)
        progress(len(batch))
    found = (results.find(item, measurement) for item in task.items)
    return TaskResult(task.name, measurement, tuple(result for result in found if result is not None))


def _request(item: Item, alphas: Mapping[str, float] | None) -> Request:
    given = () if alphas is None else (alphas[item.identity],) * len(item.images)
    return Request(item.turns, item.images, given)


def equal_batches(items: Sequence[Item], rows: int) -> list[Sequence[Item]]:
    """The fewest batches of at most `rows` items, as equal as can be, so that all take the same compiled programs."""
    batches = -(-len(items) // rows)
    return [items[len(items) * i // batches : len(items) * (i + 1) // batches] for i in range(batches)]


def _visual_tokens(item: Item, tiling: TilingConfig) -> int:
    """Visual tokens at α = 1, from the images' headers."""
    return sum(plan_image(*image_size(image), 1.0, tiling).tokens for image in item.images)


def _item_result(item: Item, answer: Answer, metric: str, measurement: Measurement) -> ItemResult:
    return ItemResult(
        identity=item.identity,
        task=item.task,
        kind=item.kind,
        level=item.level,
        **measurement._asdict(),
        prediction=answer.text,
        score=score(item.metric or metric, answer.text, item.answers, item.choices),
        stopped=answer.stopped,
        alphas=tuple(round(alpha, 4) for alpha in answer.alphas),
        tiles=answer.tiles,
        visual_tokens=answer.visual_tokens,
        milliseconds={step: round(value, 4) for step, value in answer.milliseconds.items()},
    )


def group(rows: Iterable[ItemResult]) -> dict[tuple[str, Measurement], TaskResult]:
    """Results by task and measurement, in the order they first appear."""
    groups: dict[tuple[str, Measurement], list[ItemResult]] = {}
    for row in rows:
        groups.setdefault((row.task, row.measurement), []).append(row)
    return {key: TaskResult(*key, tuple(items)) for key, items in groups.items()}


def is_auto(measurement: Measurement) -> bool:
    """Whether the VRC chose α."""
    return measurement.alpha == AUTO
