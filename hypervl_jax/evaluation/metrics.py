"""Scores of one generated answer against its right answers, in [0, 1], and which score each task is reported with.

A right answer is any of several texts; the best one counts.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Mapping, Sequence

from rapidfuzz.distance import Levenshtein

from hypervl_jax.architecture import ConfigError

Metric = Callable[[str, Sequence[str]], float]

MULTIPLE_CHOICE, UNSCORED = "multiple_choice", "unscored"

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05

_THOUSANDS_SEPARATOR = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_PUNCTUATION = re.compile(r"\.(?!\d)|(?<=\w)-|-(?!\.?\d)|[^\w\s.-]|_")
"""All but the point and the minus sign of a number."""

_NUMBER = re.compile(r"-?(?:\d+\.?\d*|\.\d+)")
_ANSWER_IS = re.compile(r"answer\s+is\W*([A-Z])\b", re.IGNORECASE)
_TO_SPACES = str.maketrans(dict.fromkeys(string.punctuation, " "))


def normalise(text: str) -> str:
    """Text without what transcriptions of the same answer differ in: case, punctuation, runs of spaces, Unicode forms.

    Numbers keep their value: the point of 3.5 and the minus of -3 stay, the comma of 1,200 goes without a space.
    """
    folded = unicodedata.normalize("NFKC", text).casefold().replace("−", "-")
    return " ".join(_PUNCTUATION.sub(" ", _THOUSANDS_SEPARATOR.sub("", folded)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 where the normalised prediction is one of the normalised answers."""
    return float(normalise(prediction) in map(normalise, answers))


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Average Normalised Levenshtein Similarity of one question (ST-VQA, arXiv 1905.13648; DocVQA's metric).

    1 - distance / longer length after lower-casing and joining words by single spaces; 0 when that is below
    `ANLS_THRESHOLD`. At exactly one half the paper's formula gives 0 and the benchmarks' evaluation scripts give 0.5; this
    follows the scripts, with which the published numbers were made.
    """
    predicted = _spaced(prediction)
    similar = (Levenshtein.normalized_similarity(predicted, _spaced(answer)) for answer in answers)
    best = max(similar, default=0.0)
    return best if best >= ANLS_THRESHOLD else 0.0


def _spaced(text: str) -> str:
    return " ".join(text.lower().split())


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """ChartQA's metric (arXiv 2203.10244): a number may be off by 5 % of the right one; other answers must match exactly.

    A percentage is its hundredth ("5%" is 0.05). A right answer of 0 allows no tolerance and is compared as text.
    """
    return float(any(_relaxed_match(prediction, answer) for answer in answers))


def _relaxed_match(prediction: str, answer: str) -> bool:
    predicted, right = _number(prediction), _number(answer)
    if predicted is not None and right:
        return abs(predicted - right) <= RELAXED_TOLERANCE * abs(right)
    return normalise(prediction) == normalise(answer)


def _number(text: str) -> float | None:
    """The finite number that a text is, else None."""
    plain = _THOUSANDS_SEPARATOR.sub("", text.strip().rstrip("."))
    try:
        value = float(plain.removesuffix("%")) / (100 if plain.endswith("%") else 1)
    except ValueError:
        return None
    return value if abs(value) < float("inf") else None


def ocr_bench(prediction: str, answers: Sequence[str]) -> float:
    """OCRBench's rule (arXiv 2305.07895): a right answer occurs in the prediction, letter case and line breaks aside."""
    said = _one_line(prediction)
    return float(any(_one_line(answer) in said for answer in answers))


def ocr_bench_formula(prediction: str, answers: Sequence[str]) -> float:
    """OCRBench's rule for handwritten formulas: as `ocr_bench`, but letter case counts and spaces do not."""
    said = "".join(prediction.split())
    return float(any("".join(answer.split()) in said for answer in answers))


def _one_line(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def yes_no(prediction: str, answers: Sequence[str]) -> float:
    """1 where exactly one of the words yes and no occurs, and it is the right one (as VLMEvalKit reads HallusionBench)."""
    said = {"yes", "no"} & set(_words(prediction))
    return float(len(said) == 1 and said <= {answer.lower() for answer in answers})


def numeric_or_exact(prediction: str, answers: Sequence[str]) -> float:
    """MathVista's rule for free answers: the same number, or the same text. Its own scores let a judge find the answer in a
    sentence; here the last number of the prediction counts.
    """
    numbers = _NUMBER.findall(_THOUSANDS_SEPARATOR.sub("", prediction))
    said = float(numbers[-1]) if numbers else None
    right = [_number(answer) for answer in answers]
    return float((said is not None and said in right) or exact_match(prediction, answers))


def multiple_choice(prediction: str, answers: Sequence[str], choices: Sequence[str]) -> float:
    """1 where `chosen_letter` is a right letter."""
    return float(chosen_letter(prediction, choices) in set(answers))


def chosen_letter(prediction: str, choices: Sequence[str]) -> str | None:
    """The letter of the option that a prediction chooses, None where it names none or several.

    The rules of VLMEvalKit before it asks a judge: one option's letter alone stands as a word, among the last five words; else
    "answer is X"; else one option's text alone occurs in a text at most twice as long as all options together.
    """
    letters = string.ascii_uppercase[: len(choices)]
    words = prediction.translate(_TO_SPACES).split()
    standing = [letter for letter in letters if letter in words]
    if len(standing) == 1 and words.index(standing[0]) > len(words) - 5:
        return standing[0]
    said = _ANSWER_IS.search(prediction)
    if said and said[1].upper() in letters:
        return said[1].upper()
    if len(prediction) > 2 * sum(map(len, choices)):
        return None
    named = [letter for letter, text in zip(letters, choices, strict=True) if text.lower() in prediction.lower()]
    return named[0] if len(named) == 1 else None


def unscored(prediction: str, answers: Sequence[str]) -> float:
    """0: only a judge or a server can score this task, from the predictions."""
    return 0.0


METRICS: Mapping[str, Metric] = {
    "exact_match": exact_match,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
    "ocr_bench": ocr_bench,
    "ocr_bench_formula": ocr_bench_formula,
    "yes_no": yes_no,
    "numeric_or_exact": numeric_or_exact,
    UNSCORED: unscored,
}
"""All metrics by name, but for `MULTIPLE_CHOICE`, which needs the options."""

TASK_METRICS: Mapping[str, str] = {
    "digits": "exact_match",
    "documents": "exact_match",
    "charts": "exact_match",
    "scenes": "exact_match",
    "chartqa": "relaxed_accuracy",
    "docvqa": "anls",
    "infographicvqa": "anls",
    "ai2d": "exact_match",
}
"""The metric that a task's numbers are published with; the embedded tasks have one short right answer."""


def metric_name(task: str) -> str:
    """Name of a task's metric; `exact_match` for tasks that `TASK_METRICS` does not know."""
    return TASK_METRICS.get(task, "exact_match")


def score(metric: str, prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """A prediction's score by the metric of that name; where there are `choices` the answers are letters.

    Raises `ConfigError` for an unknown name.
    """
    if choices and metric != UNSCORED:
        return multiple_choice(prediction, answers, choices)
    if metric not in METRICS:
        raise ConfigError(f"unknown metric {metric!r}; metrics are {', '.join(METRICS)}")
    return METRICS[metric](prediction, answers)


def _words(text: str) -> list[str]:
    return text.lower().translate(_TO_SPACES).split()
