"""Public benchmarks by the names of their VLMEvalKit files: prompt, metric, how a task's score is made of its items' scores.

OpenCompass's average for multimodal models is the mean of eight scores on a scale of 100, each counted once (`OPENCOMPASS`). MMBench
is the mean of its English and Chinese test files; OCRBench's points of 1,000 are divided by 10; HallusionBench is the mean of its three
accuracies. Sources: the leaderboard's published list of default benchmarks and VLMEvalKit's evaluation code (commit of 2026-08-18).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from hypervl_jax.architecture import ConfigError, require
from hypervl_jax.evaluation.benchmarks import Item, TaskResult
from hypervl_jax.evaluation.metrics import MULTIPLE_CHOICE, UNSCORED
from hypervl_jax.evaluation.statistics import Estimate, mean_interval, mean_of_ratios

MEAN, CIRCULAR, HALLUSION, BY_GROUP = "mean", "circular", "hallusion", "by_group"

CIRCULAR_STEP = 1_000_000
"""The same question with its options in another order has an index larger by a multiple of this."""

_LETTER = "Answer with the option's letter from the given choices directly."
_SHORT = "Answer the question using a single word or phrase."


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: of its file, NAME.tsv.
        metric: of an item; `multiple_choice` where a row has options A, B, …
        instruction: written after the question.
        max_new_tokens: most tokens of an answer.
        aggregate: "mean"; "circular": a question counts when it is right in every order of its options (MMBench, arXiv
            2307.06281); "hallusion": the mean of the accuracy of answers, of figures and of questions, a figure or question being
            right when all its answers are (arXiv 2310.14566); "by_group": the mean of the means of the groups (ChartQA's human and
            augmented questions).
        split: only rows with this value in their column `split`; all when empty.
        judge: what the published numbers are judged with beyond the rule here; empty where the rule is theirs.
    """

    name: str
    metric: str
    instruction: str
    max_new_tokens: int
    aggregate: str = MEAN
    split: str = ""
    judge: str = ""


_FALLBACK = "a language model reads answers that name no option"

BENCHMARKS: Mapping[str, Benchmark] = {
    row.name: row
    for row in (
        *(
            Benchmark(f"MMBench_{part}_{language}_V11", MULTIPLE_CHOICE, _LETTER, 32, CIRCULAR, judge=_FALLBACK)
            for part in ("DEV", "TEST")
            for language in ("EN", "CN")
        ),
        Benchmark("MMStar", MULTIPLE_CHOICE, _LETTER, 32, judge=_FALLBACK),
        Benchmark("MMMU_DEV_VAL", MULTIPLE_CHOICE, _LETTER, 32, split="validation", judge=_FALLBACK),
        Benchmark(
            "MathVista_MINI", "numeric_or_exact", "", 256, judge="a language model extracts every answer from its text"
        ),
        Benchmark(
            "HallusionBench",
            "yes_no",
            "Please answer yes or no.",
            16,
            HALLUSION,
            judge="a language model reads answers without yes or no",
        ),
        Benchmark("AI2D_TEST", MULTIPLE_CHOICE, _LETTER, 32, judge=_FALLBACK),
        Benchmark("OCRBench", "ocr_bench", "", 128),
        Benchmark("MMVet", UNSCORED, "", 512, judge="GPT-4 rates every answer from 0 to 1"),
        Benchmark("ChartQA_TEST", "relaxed_accuracy", _SHORT, 32, BY_GROUP),
        Benchmark("DocVQA_VAL", "anls", _SHORT, 64),
        Benchmark("InfoVQA_VAL", "anls", _SHORT, 64),
    )
}
"""All benchmarks by name."""

OPENCOMPASS: Mapping[str, tuple[str, ...]] = {
    "MMBench v1.1": ("MMBench_TEST_EN_V11", "MMBench_TEST_CN_V11"),
    "MMStar": ("MMStar",),
    "MMMU (val)": ("MMMU_DEV_VAL",),
    "MathVista (mini)": ("MathVista_MINI",),
    "HallusionBench": ("HallusionBench",),
    "AI2D": ("AI2D_TEST",),
    "OCRBench": ("OCRBench",),
    "MMVet": ("MMVet",),
}
"""The eight scores of OpenCompass's average and the files whose mean each of them is."""

SHORT_NAMES = {
    "ChartQA": "ChartQA_TEST",
    "DocVQA": "DocVQA_VAL",
    "InfoVQA": "InfoVQA_VAL",
    "AI2D": "AI2D_TEST",
    "MathVista": "MathVista_MINI",
    "MMMU": "MMMU_DEV_VAL",
}
"""Benchmarks as papers name them, and the files that stand for them."""

OPENCOMPASS_NAME = "opencompass"
PAPER_AVERAGE = 64.5
"""HyperVL's published average of the eight (arXiv 2512.14052, 1.8B)."""


def benchmark(name: str) -> Benchmark:
    """The benchmark of that name. Raises `ConfigError` for an unknown one."""
    require(name in BENCHMARKS, f"unknown task {name!r}; known are {', '.join(BENCHMARKS)} and {OPENCOMPASS_NAME}")
    return BENCHMARKS[name]


def file_name(name: str) -> str:
    """The file of a benchmark by either of its names; any other name as it is."""
    return SHORT_NAMES.get(name, name)


def expand(names: Sequence[str]) -> list[str]:
    """Names of files, `opencompass` replaced by its nine, each once, in order."""
    every = [file for files in OPENCOMPASS.values() for file in files]
    files = (file for name in names for file in (every if name == OPENCOMPASS_NAME else [file_name(name)]))
    return list(dict.fromkeys(files))


def is_scored(task: Benchmark, items: Sequence[Item]) -> bool:
    """Whether this program can score a task: not where only a judge can, or where the file holds no answers."""
    return task.metric != UNSCORED and all(item.answers for item in items)


def benchmark_score(task: Benchmark, items: Sequence[Item], result: TaskResult) -> Estimate:
    """A task's score as its numbers are published, on a scale of 1, with its 95 % interval.

    Args:
        task: what is scored.
        items: of the task, with their groups.
        result: the answers to them.

    Raises:
        ConfigError: no answer, or an item without the groups that the score needs.
    """
    scores = {row.identity: row.score for row in result.items}
    answered = [(item, scores[item.identity]) for item in items if item.identity in scores]
    require(bool(answered), f"no item of {task.name} was answered")
    if task.aggregate == MEAN:
        return mean_interval([score for _, score in answered])
    try:
        if task.aggregate == CIRCULAR:
            return mean_interval(list(_all_right(answered, 0).values()))
        if task.aggregate == BY_GROUP:
            return mean_of_ratios(_by_group(answered))
        return mean_of_ratios(_hallusion(answered))
    except IndexError:
        raise ConfigError(
            f"an item of {task.name} lacks the columns that its score needs; see docs/evaluation.md"
        ) from None


def _all_right(answered: Sequence[tuple[Item, float]], place: int) -> dict[str, float]:
    """Of each group (the items' `groups[place]`): 1 where every answer is right."""
    lowest: dict[str, float] = {}
    for item, score in answered:
        group = item.groups[place]
        lowest[group] = min(score, lowest.get(group, 1.0))
    return lowest


def _by_group(answered: Sequence[tuple[Item, float]]) -> np.ndarray:
    """Parts for `mean_of_ratios`: an item is a unit, a group is a ratio."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(item.groups[0] for item, _ in answered))}
    parts = np.zeros((len(answered), len(numbers), 2))
    for unit, (item, score) in enumerate(answered):
        parts[unit, numbers[item.groups[0]]] = score, 1
    return parts


def _hallusion(answered: Sequence[tuple[Item, float]]) -> np.ndarray:
    """Parts for `mean_of_ratios`: a set of figures is a unit; answers, figures and questions are the ratios.

    An item's groups are its set, figure and question; figures and questions lie within a set.
    """
    units = {name: number for number, name in enumerate(dict.fromkeys(item.groups[0] for item, _ in answered))}
    parts = np.zeros((len(units), 3, 2))
    owner: dict[str, int] = {}
    for item, score in answered:
        unit = units[item.groups[0]]
        parts[unit, 0] += score, 1
        owner |= {item.groups[1]: unit, item.groups[2]: unit}
    for ratio in (1, 2):
        for group, right in _all_right(answered, ratio).items():
            parts[owner[group], ratio] += right, 1
    return parts


def opencompass_average(scores: Mapping[str, float]) -> tuple[dict[str, float], float | None]:
    """The eight scores as far as they are known, and their mean once all are. `scores` are by file, on a scale of 100."""
    found = {
        name: sum(scores[file] for file in files) / len(files)
        for name, files in OPENCOMPASS.items()
        if all(file in scores for file in files)
    }
    return found, sum(found.values()) / len(found) if len(found) == len(OPENCOMPASS) else None
