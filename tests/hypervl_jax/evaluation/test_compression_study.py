"""Ways to choose α: costs, budgets, paired differences and the correlation with α*."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hypervl_jax.architecture import hypervl_tiny
from hypervl_jax.evaluation import compression_study as study
from hypervl_jax.evaluation.compression_study import Resampling, Way
from hypervl_jax.evaluation.statistics import paired_difference
from hypervl_jax.vision.anyres import plan_image

TILING = hypervl_tiny().tiling
SIZES = [(64, 64), (128, 128), (192, 192), (100, 60), (64, 190)] * 4


def way(alphas, scores, sizes=None, kind=study.VRC, name="vrc") -> Way:
    sizes = sizes or [(128, 128)] * len(scores)
    tokens, tiles = study.costs(sizes, np.asarray(alphas, float), TILING)
    return Way(name, kind, "c", np.asarray(alphas, float), np.asarray(scores, float), tokens, tiles)


def test_a_task_counts_once_however_many_items_it_has():
    items = Resampling(["a"] * 90 + ["b"] * 10)
    assert items.mean(np.array([1.0] * 90 + [0.0] * 10)).mean == pytest.approx(0.5)


def test_intervals_of_one_task_are_those_of_the_paired_bootstrap():
    rng = np.random.default_rng(0)
    first, second = rng.random(200), rng.random(200)
    ours, reference = Resampling(["a"] * 200).mean(first - second), paired_difference(first, second)
    assert ours.mean == pytest.approx(reference.mean)
    assert ours.low == pytest.approx(reference.low, abs=0.01)
    assert ours.high == pytest.approx(reference.high, abs=0.01)


def test_retention_is_the_ratio_of_the_means():
    full = way([1.0] * 4, [1, 1, 1, 0])
    half = way([0.25] * 4, [1, 1, 0, 0])
    other = dataclasses.replace(half, name="other", scores=np.array([0.0, 0, 0, 0]))
    found = study.compare(half, full, [other], Resampling(["a", "a", "b", "b"]))
    assert found.retention.mean == pytest.approx(0.5 / 0.75)
    assert found.tokens_saved == pytest.approx(0.75)
    assert found.against["other"].mean == pytest.approx(0.5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, sum(plan_image(*size, 1.0, TILING).tokens for size in SIZES)))
def test_uniform_scaling_gets_no_fewer_tokens_and_the_best_alpha_of_that_cost(budget):
    total = lambda alpha: int(study.costs(SIZES, np.full(len(SIZES), alpha), TILING)[0].sum())
    alpha = study.uniform_alpha(SIZES, budget, TILING)
    assert 0.1 <= alpha <= 1
    assert total(alpha) >= budget
    below = [milli / 1000 for milli in range(100, 1001, 13) if total(milli / 1000) >= budget]
    assert total(alpha) <= min(map(total, below))
    assert alpha == 1 or total(round(alpha + 0.001, 3)) > total(alpha)


def test_a_rule_gives_more_to_more_detail_within_its_budget():
    detail = np.linspace(0, 1, len(SIZES))
    budget = 600
    alphas = study.rule_alphas(detail, SIZES, budget, TILING)
    assert np.all(np.diff(alphas) >= 0)
    assert alphas[0] == 0.1
    taken = int(study.costs(SIZES, alphas, TILING)[0].sum())
    assert budget <= taken < 1.1 * budget


def test_adaptivity_is_spearmans_over_tasks_and_items():
    tasks = [task for task in "abcd" for _ in range(5)]
    rng = np.random.default_rng(1)
    best = np.repeat([0.2, 0.5, 0.9, 0.4], 5) + rng.uniform(0, 0.05, 20)
    follows, against = way(best * 0.9, np.ones(20)), way(1.1 - best, np.ones(20))
    oracle = way(best, np.ones(20), kind=study.ORACLE)
    items = Resampling(tasks)
    assert study.adaptivity(follows, oracle, items) == pytest.approx({"tasks": 1.0, "items": 1.0})
    found = study.adaptivity(against, oracle, items)
    assert found["tasks"] == pytest.approx(-1.0)
    assert found["items"] == pytest.approx(stats.spearmanr(against.alphas, best).statistic)


def test_by_task_tells_where_score_and_tokens_went():
    full = way([1.0] * 4, [1, 1, 1, 1])
    found = way([1.0, 1.0, 0.25, 0.25], [1, 1, 0, 1])
    over = np.array([False, False, True, False])
    kept, lost = study.by_task(found, full, found, over, Resampling(["kept", "kept", "lost", "lost"]))
    assert (kept.task, kept.tokens_saved, kept.change.mean, kept.over_compressed) == ("kept", 0, 0, 0)
    assert (lost.tokens_saved, lost.change.mean, lost.over_compressed) == (0.75, -0.5, 0.5)
    assert lost.to_json()["change"]["mean"] == -0.5


def test_dense_items_are_the_quarter_with_the_most_edges():
    assert study.dense_items(np.arange(8.0)).tolist() == [False] * 6 + [True] * 2


def test_the_front_is_what_nothing_beats():
    assert study.on_front([(10, 0.5), (20, 0.9), (20, 0.8), (30, 0.9)]) == [True, True, False, False]
