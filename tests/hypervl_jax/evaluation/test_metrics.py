"""Metrics against their definitions and against cases that published evaluation scripts decide."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervl_jax.architecture import ConfigError
from hypervl_jax.evaluation.metrics import (
    anls,
    chosen_letter,
    exact_match,
    metric_name,
    normalise,
    relaxed_accuracy,
    score,
)

TEXT = st.text("abcd 12", max_size=7)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("Red.", "red"),
        ("  left\nof ", "left of"),
        ("Left-of", "left of"),
        ("1,200", "1200"),
        ("3.5.", "3.5"),
        ("“Harbour”", "harbour"),
        ("−3", "-3"),
        ("ﬁve", "five"),
        ("Straße", "STRASSE"),
    ],
)
def test_same_answers_written_differently_match(left: str, right: str) -> None:
    assert normalise(left) == normalise(right)


@pytest.mark.parametrize(("left", "right"), [("3.5", "35"), ("-3", "3"), ("1 2", "12"), ("1,2", "12"), ("", "0")])
def test_different_answers_stay_different(left: str, right: str) -> None:
    assert exact_match(left, [right]) == 0


@given(st.text(max_size=20))
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


def test_any_right_answer_counts() -> None:
    assert exact_match("pie chart", ["pie", "Pie chart"]) == 1
    assert exact_match("pie", []) == 0


@functools.cache
def recursive_distance(left: str, right: str) -> int:
    """The textbook recursion."""
    if not left or not right:
        return len(left) + len(right)
    substituted = recursive_distance(left[1:], right[1:]) + (left[0] != right[0])
    return min(substituted, recursive_distance(left[1:], right) + 1, recursive_distance(left, right[1:]) + 1)


@given(TEXT, TEXT)
def test_anls_is_its_formula(left: str, right: str) -> None:
    said, meant = (" ".join(text.split()) for text in (left, right))
    longer = max(len(said), len(meant))
    similar = 1 - recursive_distance(said, meant) / longer if longer else 1.0
    assert anls(left, [right]) == pytest.approx(similar if similar >= 0.5 else 0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Hello  World", ["hello world"], 1.0),
        ("hello wurld", ["hello world"], 1 - 1 / 11),
        ("hello wurld", ["nothing", "hello world"], 1 - 1 / 11),
        ("ab", ["ac"], 0.5),  # the evaluation scripts keep exactly one half
        ("abc", ["axy"], 0.0),
        ("", ["yes"], 0.0),
        ("", [""], 1.0),
        ("42", [], 0.0),
        ("hello, world", ["hello world"], 1 - 1 / 12),  # punctuation counts, unlike in exact match
    ],
)
def test_anls(prediction: str, answers: list[str], expected: float) -> None:
    assert anls(prediction, answers) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("105", "100", 1),
        ("95", "100", 1),
        ("105.1", "100", 0),
        ("-95", "-100", 1),
        ("100", "-100", 0),
        ("5%", "0.05", 1),
        ("5%", "5", 0),
        ("1,020", "1000", 1),
        ("0", "0", 1),
        ("0.0001", "0", 0),
        ("nan", "3", 0),
        ("inf", "3", 0),
        ("Brazil.", "brazil", 1),
        ("Brasil", "Brazil", 0),
        ("about 100", "100", 0),
    ],
)
def test_relaxed_accuracy(prediction: str, answer: str, expected: float) -> None:
    assert relaxed_accuracy(prediction, [answer]) == expected


def test_each_task_has_its_published_metric() -> None:
    assert [metric_name(task) for task in ("chartqa", "docvqa", "digits", "new")] == [
        "relaxed_accuracy",
        "anls",
        "exact_match",
        "exact_match",
    ]
    assert score("anls", "ab", ["ab"]) == 1
    with pytest.raises(ConfigError, match="unknown metric 'bleu'"):
        score("bleu", "a", ["a"])


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. a dog", "B"),
        ("The answer is B.", "B"),
        ("the correct answer is **b**, for it barks and barks and barks", "B"),
        ("It is a dog", "B"),
        ("A or B", None),
        ("a cat or a dog", None),
        ("", None),
        ("Neither", None),
        ("D", None),  # there are three options
        ("B: one can see it by the long ears, the tail and the collar", None),  # the letter stands too far from the end
    ],
)
def test_the_letter_that_is_chosen(prediction: str, letter: str | None) -> None:
    choices = ("a cat", "a dog", "a horse")
    assert chosen_letter(prediction, choices) == letter
    assert score("multiple_choice", prediction, ["B"], choices) == float(letter == "B")


@pytest.mark.parametrize(
    ("metric", "prediction", "answers", "expected"),
    [
        ("ocr_bench", "The sign says\nCENTRE street", ["centre"], 1.0),
        ("ocr_bench", "The sign says\nold", ["says old"], 1.0),
        ("ocr_bench", "centr", ["centre"], 0.0),
        ("ocr_bench_formula", "x ^ 2 + Y", ["x^2+Y"], 1.0),
        ("ocr_bench_formula", "x^2+y", ["x^2+Y"], 0.0),
        ("yes_no", "Yes, it is.", ["Yes"], 1.0),
        ("yes_no", "No", ["Yes"], 0.0),
        ("yes_no", "yes and no", ["Yes"], 0.0),
        ("yes_no", "nothing", ["No"], 0.0),
        ("numeric_or_exact", "So it is 1,200.", ["1200"], 1.0),
        ("numeric_or_exact", "1.2", ["1.20"], 1.0),
        ("numeric_or_exact", "12 minus 3", ["12"], 0.0),
        ("numeric_or_exact", "isosceles", ["Isosceles"], 1.0),
        ("unscored", "anything", ["anything"], 0.0),
    ],
)
def test_rules_of_benchmarks(metric: str, prediction: str, answers: list[str], expected: float) -> None:
    assert score(metric, prediction, answers) == expected
