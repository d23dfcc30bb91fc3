"""Scores of whole benchmarks from scores of items, checked by counting by hand."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from hypervl_jax.architecture import ConfigError
from hypervl_jax.evaluation.benchmarks import TaskResult
from hypervl_jax.evaluation.registry import (
    OPENCOMPASS,
    benchmark,
    benchmark_score,
    expand,
    is_scored,
    opencompass_average,
)
from hypervl_jax.evaluation.statistics import mean_of_ratios
from tests.hypervl_jax.evaluation import examples


def scored(name: str, rows: list[tuple[tuple[str, ...], float]]) -> float:
    items = [
        dataclasses.replace(examples.item(number), task=name, groups=groups) for number, (groups, _) in enumerate(rows)
    ]
    results = [examples.result(number, score, task=name) for number, (_, score) in enumerate(rows)]
    return benchmark_score(benchmark(name), items, TaskResult(name, results[0].measurement, tuple(results))).mean


def test_a_question_counts_when_every_order_of_its_options_is_right() -> None:
    assert scored("MMBench_DEV_EN_V11", [(("1",), 1), (("1",), 0), (("2",), 1), (("2",), 1)]) == 0.5


def test_hallusion_bench_is_the_mean_of_three_accuracies() -> None:
    rows = [
        (("s0", "s0f0", "s0q0"), 1.0),
        (("s0", "s0f0", "s0q1"), 0.0),
        (("s0", "s0f1", "s0q0"), 1.0),
        (("s0", "s0f1", "s0q1"), 1.0),
        (("s1", "s1f0", "s1q0"), 1.0),
    ]
    answers, figures, questions = 4 / 5, 2 / 3, 2 / 3
    assert scored("HallusionBench", rows) == pytest.approx((answers + figures + questions) / 3)


def test_chartqa_weighs_its_halves_equally() -> None:
    assert scored(
        "ChartQA_TEST", [(("human",), 0), (("augmented",), 1), (("augmented",), 1), (("augmented",), 0)]
    ) == pytest.approx(1 / 3)


def test_an_item_without_its_group_is_an_error() -> None:
    with pytest.raises(ConfigError, match="lacks the columns"):
        scored("HallusionBench", [((), 1.0)])


def test_the_interval_of_one_ratio_is_that_of_its_units() -> None:
    rng = np.random.default_rng(1)
    values = rng.random(200)
    parts = np.stack([values, np.ones(200)], -1)[:, None]
    found = mean_of_ratios(parts)
    half = 1.96 * values.std() / np.sqrt(200)
    assert found.mean == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)


def test_whole_units_are_resampled() -> None:
    values = np.repeat([0.0, 1.0], 50)
    alone = np.stack([values, np.ones(100)], -1)[:, None]
    together = alone.reshape(10, 10, 1, 2).sum(1)
    widths = [found.high - found.low for found in map(mean_of_ratios, (alone, together))]
    assert widths[1] > 2 * widths[0]


def test_the_average_needs_all_eight() -> None:
    files = list(itertools.chain(*OPENCOMPASS.values()))
    parts, average = opencompass_average({file: 60.0 for file in files[:-1]})
    assert (len(parts), average) == (7, None)
    parts, average = opencompass_average({file: 60.0 + (file == "MMBench_TEST_EN_V11") * 16 for file in files})
    assert (parts["MMBench v1.1"], average) == (68.0, 61.0)


def test_files_without_answers_are_not_scored() -> None:
    secret = dataclasses.replace(examples.item(0), answers=())
    assert not is_scored(benchmark("MMBench_TEST_EN_V11"), [secret])
    assert is_scored(benchmark("MMBench_DEV_EN_V11"), [examples.item(0)])
    assert not is_scored(benchmark("MMVet"), [examples.item(0)])


def test_benchmarks_have_the_names_of_papers_too() -> None:
    assert expand(["DocVQA", "OCRBench", "DocVQA_VAL", "ChartQA"]) == ["DocVQA_VAL", "OCRBench", "ChartQA_TEST"]
    assert len(expand(["opencompass", "AI2D"])) == 9
