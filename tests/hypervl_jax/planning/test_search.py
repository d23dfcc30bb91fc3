"""The search for a layout: what it considers, and that it finds the best that fits in few plans."""

import argparse
import dataclasses
from collections import Counter

import pytest

from experiments import launch, plan_search
from experiments.config import ExperimentConfig
from experiments.plan_report import to_json
from experiments.plan_tables import tables
from experiments.planning import ArmPlan, Memory, Plan, useful_flops
from hypervl_jax.architecture import ConfigError
from hypervl_jax.planning.bounds import Demand, budget, floors
from hypervl_jax.planning.chips import topology
from hypervl_jax.planning.flops import FORWARD, Work

V5E = topology("v5e-256")


@pytest.fixture(scope="module")
def stage2() -> ExperimentConfig:
    return launch.resolve(argparse.Namespace(config="stage2", debug=False, data=None, hardware=V5E.name), ())


def test_rows_never_change_the_global_batch(stage2: ExperimentConfig) -> None:
    each = stage2.batch.rows // 256
    assert plan_search.row_choices(stage2, V5E)[-1] == each
    for rows in plan_search.row_choices(stage2, V5E):
        laid_out = plan_search.with_rows(stage2, V5E, rows)
        assert laid_out.batch == stage2.batch
        assert laid_out.objective.accumulation * rows == each
    with pytest.raises(ConfigError, match="--rows-per-chip 7"):
        plan_search.with_rows(stage2, V5E, 7)


def test_a_mesh_with_more_shards_than_rows_is_refused(stage2: ExperimentConfig) -> None:
    with pytest.raises(ConfigError, match="512 rows do not split over 2048 row shards"):
        plan_search.row_choices(stage2, topology("v5p-4096"))


def test_keeping_more_costs_memory_and_saves_time(stage2: ExperimentConfig) -> None:
    keeping = lambda **changes: dataclasses.replace(stage2, runtime=dataclasses.replace(stage2.runtime, **changes))
    for field, policies in (
        ("decoder_remat", plan_search.DECODER_POLICIES),
        ("tower_remat", ("nested", "layer", "none")),
    ):
        memory = [plan_search.predicted_memory(keeping(**{field: policy}), 2) for policy in policies]
        seconds = [plan_search.predicted_seconds(keeping(**{field: policy}), V5E) for policy in policies]
        assert memory == sorted(memory)
        assert seconds == sorted(seconds, reverse=True)


def pretended(config: ExperimentConfig, limit: float) -> Plan:
    """A plan in which the predictions come true on devices with `limit` bytes."""
    arms = []
    rows = config.batch.rows // 256 // config.objective.accumulation
    for arm in config.consistency.arms:
        demand = Demand(plan_search.predicted_seconds(config, V5E) * V5E.chip.flops)
        needed = useful_flops(config, arm)
        compiled = Counter({Work(*what, FORWARD): count for what, count in needed.items()})
        arms.append(ArmPlan(arm, compiled, needed, (), demand, floors(V5E.chip, demand)))
    needed = int(plan_search.predicted_memory(config, rows))
    memory = Memory(0, 0, 0, 0, needed, 0, int(limit), needed)
    mesh = {"slice": 1, "data": 1, "fsdp": 256, "context": 1, "tensor": 1}
    return Plan(config, V5E, mesh, memory, tuple(arms), budget(V5E, 1.0, 1.0, 1.0, 0.4))


@pytest.mark.parametrize("limit", [6e9, 15e9, 60e9])
def test_search_finds_the_fastest_that_fits_in_few_plans(stage2: ExperimentConfig, limit: float) -> None:
    best, tried = plan_search.search(stage2, V5E, lambda config: pretended(config, limit))
    everything = [pretended(candidate.config, limit) for candidate in plan_search.candidates(stage2, V5E)]
    fitting = [plan.step_floor for plan in everything if plan.memory.fits]
    assert best.memory.fits
    assert best.step_floor == min(fitting)
    assert len(tried) <= 6 < len(everything) / 4


def test_search_says_when_nothing_fits(stage2: ExperimentConfig) -> None:
    best, tried = plan_search.search(stage2, V5E, lambda config: pretended(config, 1e6))
    assert not best.memory.fits
    assert "does not fit" in tables([to_json(plan) for plan in tried])


def test_a_layout_at_which_the_compiler_fails_is_left_out(stage2: ExperimentConfig) -> None:
    fails = lambda config: config.runtime.decoder_remat == "dots"
    best, tried = plan_search.search(stage2, V5E, lambda config: None if fails(config) else pretended(config, 60e9))
    others = (one.config for one in plan_search.candidates(stage2, V5E) if not fails(one.config))
    fitting = [plan.step_floor for plan in (pretended(config, 60e9) for config in others) if plan.memory.fits]
    assert best.step_floor == min(fitting)
    assert not any(fails(plan.config) for plan in tried)
    with pytest.raises(ConfigError, match="fails at every layout of stage2 on v5e-256"):
        plan_search.search(stage2, V5E, lambda config: None)
