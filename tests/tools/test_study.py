"""The study's steps are commands that their tools accept, the claims are marked by their rules, and the page holds them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import pathlib

import pytest

from experiments import sweep
from experiments.config import ExperimentConfig
from experiments.launch import parse, resolve
from experiments.named import load_config
from experiments.overrides import from_config_dict
from experiments.sweeps import dcl_arms, dcl_settings, vrc_epsilon
from hypervl_jax.architecture import ConfigError
from hypervl_jax.evaluation import claims, study_plots
from tools import ablate_compressor, compare_arms, label_resolutions, study, study_page, train_compressor
from tools.demo import StepRecord, step_keys, write_record
from tools.study import SCALES, steps


def estimate(mean: float, half: float = 0.01) -> dict:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def way(name: str, kind: str, saved: float, score: float) -> dict:
    return {
        "name": name,
        "kind": kind,
        "compressor": "epsilon=0.05",
        "mean_alpha": 0.6,
        "tokens_saved": saved,
        "mean_tokens_saved": saved,
        "tiles_saved": saved,
        "score": estimate(score),
        "retention": estimate(score / 0.6),
        "against": {},
    }


@pytest.fixture
def vrc() -> dict:
    others = [way(f"{kind} at the tokens of epsilon=0.05", kind, 0.3, 0.4) for kind in ("uniform", "entropy", "edges")]
    found = way("epsilon=0.05", "vrc", 0.3, 0.6) | {"against": {other["name"]: estimate(0.2) for other in others}}
    task = {"task": "charts", "items": 5, "tokens_saved": 0.1, "tiles_saved": 0.0, "full_score": 0.6, "score": 0.6}
    task |= {"change": estimate(0.0), "mean_alpha": 0.7, "mean_optimal": 0.6, "over_compressed": 0.1}
    dense = {"items": 2, "change": estimate(0.0), "rest": estimate(0.0), "over_compressed": 0.0, "mean_alpha": 0.9}
    row = {
        "name": "epsilon=0.05",
        "epsilon": 0.05,
        "left_out": [],
        "vrc": found,
        "same_tokens": others,
        "oracle": way("oracle", "oracle", 0.4, 0.6),
        "unsure": {"spread": 0.5, "share": 0.1}
        | way("careful", "unsure", 0.2, 0.6)
        | {"against": {"epsilon=0.05": estimate(0.0)}},
        "tasks": [task, task | {"task": "documents", "mean_optimal": 0.3}],
        "adaptivity": {"tasks": 1.0, "items": 0.6},
        "over_compressed": 0.1,
        "dense": dense,
        "latency": {"full": {"encoder": 3.0}, "vrc": {"compressor": 1.0, "encoder": 1.0}, "uniform": {"encoder": 1.0}},
    }
    return {
        "encoder": "base",
        "tasks": {"charts": 5, "documents": 5},
        "left_out": 0,
        "floor": 0.1,
        "full_score": estimate(0.6),
        "reads": estimate(0.4),
        "uniform": [
            way(f"uniform {alpha}", "uniform", 1 - alpha, 0.6 * alpha) | {"alpha": alpha} for alpha in (0.5, 1.0)
        ],
        "compressors": [row],
        "flops": {"compressor": 2, "base_tile": 10},
        "warnings": ["compressor overhead: 20 %"],
    }


@pytest.fixture
def arms() -> dict:
    branch = {"score": estimate(0.6), "seeds": [0.5, 0.7], "spread": 0.1}
    arm = {"name": "dcl", "runs": [0, 1], "base_steps": 9, "large_steps": 9, "teraflops": 1.0}
    arm |= {"branches": {"base": branch, "large": branch}, "same_answer": estimate(0.95), "kl": estimate(0.1)}
    arm["hidden_distance"] = estimate(0.2)
    contrasts = [
        {
            **dict(zip(("question", "branch", "arm", "baseline"), asked, strict=True)),
            "seeds": [0, 1],
            "difference": estimate(mean),
        }
        for asked, mean in zip(compare_arms_questions(), (0.05, 0.0), strict=True)
    ]
    return {
        "tasks": {"charts": 5},
        "arms": [arm],
        "contrasts": [row | {"detectable": 0.03} for row in contrasts],
        "warnings": {},
    }


def compare_arms_questions():
    from hypervl_jax.evaluation.arm_study import CONTRASTS

    better = next(each for each in CONTRASTS if each.baseline == "base")
    return better, next(each for each in CONTRASTS if each.value == "large" and each.baseline == "large")


def test_claims_are_held_by_their_rules_alone(vrc: dict, arms: dict) -> None:
    assert {claim.mark for claim in claims.vrc_claims(vrc, 0.001)} == {claims.HELD}
    assert {claim.mark for claim in claims.dcl_claims(arms, 0.2)} == {claims.HELD}, (
        "a difference of 0 ± 1 point is not worse"
    )
    for number, change in enumerate(
        (
            lambda row: row["vrc"].update(tokens_saved=0.2),
            lambda row: row["adaptivity"].update(tasks=0.7),
            lambda row: row["vrc"]["against"].update({row["same_tokens"][0]["name"]: estimate(0.005)}),
            lambda row: row["vrc"]["against"].update({row["same_tokens"][2]["name"]: estimate(-0.1)}),
        )
    ):
        broken = copy.deepcopy(vrc)
        change(broken["compressors"][0])
        marks = [claim.mark for claim in claims.vrc_claims(broken, 0.001)]
        assert [place for place, mark in enumerate(marks) if mark == claims.NOT_HELD] == [number]
    assert claims.vrc_claims(vrc, 0.03)[4].mark == claims.NOT_HELD
    blind = claims.vrc_claims(vrc | {"reads": estimate(0.1)}, 0.001)
    assert [claim.mark for claim in blind] == [claims.NOT_TESTABLE] * 4 + [claims.HELD] * 2, (
        "it loses nothing, for it sees nothing"
    )
    assert {claim.mark for claim in claims.dcl_claims(arms, 0.5)} == {claims.NOT_TESTABLE}, (
        "two branches that guess agree"
    )
    arms["contrasts"][0]["difference"] = estimate(0.005)
    arms["contrasts"][1]["difference"] = estimate(-0.015)
    arms["arms"][0]["same_answer"] = estimate(0.85)
    assert {claim.mark for claim in claims.dcl_claims(arms, 0.2)} == {claims.NOT_HELD}


def test_the_claims_are_about_the_epsilon_that_was_chosen_before(vrc: dict) -> None:
    better = copy.deepcopy(vrc["compressors"][0]) | {"epsilon": 0.1, "name": "epsilon=0.1"}
    unseen = copy.deepcopy(vrc["compressors"][0]) | {"left_out": ["charts"]}
    assert (
        claims.main_compressor(vrc | {"compressors": [better, unseen, vrc["compressors"][0]]})["name"] == "epsilon=0.05"
    )
    assert claims.main_compressor(vrc | {"compressors": [unseen]}) is None


def test_the_page_says_every_claim_and_has_its_plots(vrc: dict, arms: dict, tmp_path: pathlib.Path) -> None:
    for home, name, values in (("vrc", ablate_compressor.SUMMARY, vrc), ("arms", compare_arms.SUMMARY, arms)):
        (tmp_path / home).mkdir()
        (tmp_path / home / name).write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="no complete study"):
        study_page.build(tmp_path / "vrc", "make study")
    study_plots.pareto(vrc, tmp_path / "vrc" / study_plots.PARETO)
    study_plots.adaptivity(vrc, tmp_path / "vrc" / study_plots.ADAPTIVITY)
    study_plots.arms(arms["arms"], tmp_path / "arms" / study_plots.ARMS)
    write_record(tmp_path, {"data": StepRecord("k", "python -m data", 61.0, True)})
    assert study_page.main(["--workdir", str(tmp_path), "--output", str(tmp_path / "docs" / "study.md")]) == 0
    text = (tmp_path / "docs" / "study.md").read_text()
    for claim in study_page.found_claims(vrc, arms, 0.0):
        assert claim.text in text
        assert claim.mark in text
    assert "1:01 minutes" in text
    assert sorted(path.name for path in (tmp_path / "docs" / "study").iterdir()) == [
        "adaptivity.png",
        "arms.png",
        "pareto.png",
    ]


@pytest.mark.parametrize("scale", SCALES)
def test_the_steps_are_commands_that_their_tools_accept(scale: str, tmp_path: pathlib.Path) -> None:
    commands = {step.name: step.command for step in steps(tmp_path, SCALES[scale])}
    for name, config in (("stage1", "tiny_stage1"), ("reference", "tiny_stage2")):
        assert resolve(*parse(commands[name][1:])).name == config
    assert label_resolutions._parser().parse_args(commands["labels"][1:]).output == str(tmp_path / "labels")
    assert train_compressor._parser().parse_args(commands["unseen"][1:]).leave_out == study.UNSEEN
    found = ablate_compressor.parser().parse_args(commands["vrc"][1:])
    assert found.compressor[1] == str(tmp_path / f"without_{study.UNSEEN}")
    assert compare_arms.parser().parse_args(commands["arms"][1:]).output == str(tmp_path / "arms")
    for name in ("compressors", "dcl_arms", *(("dcl_settings",) if SCALES[scale].exploratory else ())):
        options, extra = sweep.parser().parse_known_args(commands[name][1:])
        from experiments.sweep_runs import choose, expand

        home = pathlib.Path(options.workdir) / options.config / options.sweep
        runs = choose(expand(options.config, options.sweep, home, extra), options.only)
        product = {step.name: step.product for step in steps(tmp_path, SCALES[scale])}[name]
        assert runs[-1].proof == product, "the step is complete with its last run"


def test_the_names_of_the_arms_are_those_of_the_sweeps() -> None:
    config = from_config_dict(ExperimentConfig, load_config("tiny_stage2"))
    assert study._runs(SCALES["study"]) == [variant.name for variant in dcl_arms(config)]
    assert [variant.name for variant in dcl_settings(config)][-1] == "random=1-1"
    assert {f"epsilon={epsilon}" for epsilon in study.EPSILONS} <= {variant.name for variant in vrc_epsilon(config)}


def test_base_trained_longer_takes_the_compute_of_dcl() -> None:
    config = from_config_dict(ExperimentConfig, load_config("tiny_stage2"))
    settings = {variant.name: variant.settings for variant in dcl_arms(dataclasses.replace(config))}
    steps_of = lambda arm: int(settings[f"{arm}.seed=0"]["loop.steps"])
    assert steps_of("base") == steps_of("large") == steps_of("joint") == config.loop.steps // 2
    assert steps_of("dcl") == config.loop.steps
    # One Base step 5.3 GFLOP, with the teacher's forward pass 8.0, one Large step 7.9: (8.0 + 7.9) / 2 / 5.3.
    assert steps_of("base_longer") / config.loop.steps == pytest.approx(1.487, abs=0.01)


def test_the_keys_of_the_steps_do_not_depend_on_the_workdir() -> None:
    plan = functools.partial(steps, scale=SCALES["smoke"])
    keys = step_keys(plan)
    assert len(set(keys.values())) == len(keys)
    assert step_keys(plan) == keys
