"""Arms over seeds and items: what is paired, what is noise, and what could have been seen."""

import numpy as np
import pytest

from hypervl_jax.architecture import ConfigError
from hypervl_jax.evaluation.arm_study import CONTRASTS, HIDDEN, KL, SAME_ANSWER, ArmRun, Arms

TASKS = ["a"] * 60 + ["b"] * 40


def run(arm: str, seed: int, base: np.ndarray, large: np.ndarray | None = None) -> ArmRun:
    values = {"base": base, "large": base if large is None else large}
    values |= {SAME_ANSWER: np.ones(100), KL: np.zeros(100), HIDDEN: np.zeros(100)}
    return ArmRun(arm, seed, {"base": 10, "large": 5}, 1.5, values)


def question(value: str, arm: str, baseline: str):
    return next(each for each in CONTRASTS if (each.value, each.arm, each.baseline) == (value, arm, baseline))


def test_noise_that_two_arms_share_is_not_in_their_difference():
    rng = np.random.default_rng(0)
    common = {seed: rng.random(100) + seed for seed in range(3)}
    runs = [run("base", seed, values) for seed, values in common.items()]
    runs += [run("dcl", seed, values + 0.1) for seed, values in common.items()]
    found = Arms(runs, TASKS).contrast(question("base", "dcl", "base"))
    assert found["difference"]["mean"] == pytest.approx(0.1)
    assert found["difference"]["low"] == pytest.approx(0.1)
    assert found["detectable"] == pytest.approx(0, abs=1e-9)


def test_seeds_that_disagree_widen_the_interval():
    flat = [run("base", seed, np.full(100, 0.5)) for seed in range(3)]
    agree = Arms([*flat, *(run("dcl", seed, np.full(100, 0.6)) for seed in range(3))], TASKS)
    differ = Arms([*flat, *(run("dcl", seed, np.full(100, 0.4 + 0.2 * seed)) for seed in range(3))], TASKS)
    asked = question("base", "dcl", "base")
    assert agree.contrast(asked)["difference"]["low"] > 0
    assert differ.contrast(asked)["difference"]["mean"] == pytest.approx(0.1)
    assert differ.contrast(asked)["difference"]["low"] < 0
    # The standard error of the mean of (-0.1, 0.1, 0.3): their sample variance is 0.04.
    assert differ.contrast(asked)["detectable"] == pytest.approx((1.96 + 0.8416) * np.sqrt(0.04 / 3), rel=0.05)


def test_arms_are_reported_with_seeds_and_spread():
    runs = [run("dcl", seed, np.full(100, 0.4 + 0.1 * seed), np.full(100, 0.7)) for seed in range(3)]
    (arm,) = Arms(runs, TASKS).to_json()["arms"]
    assert arm["branches"]["base"]["seeds"] == pytest.approx([0.4, 0.5, 0.6])
    assert arm["branches"]["base"]["spread"] == pytest.approx(0.1)
    assert arm["branches"]["large"]["score"]["mean"] == pytest.approx(0.7)
    assert (arm["base_steps"], arm["large_steps"], arm["teraflops"]) == (10, 5, 1.5)


def test_only_seeds_that_both_arms_have_are_compared():
    runs = [run("dcl", 0, np.ones(100)), run("dcl", 1, np.zeros(100)), run("base", 0, np.zeros(100))]
    arms = Arms(runs, TASKS)
    assert arms.contrast(question("base", "dcl", "base"))["seeds"] == [0]
    assert arms.contrast(question("large", "dcl", "large")) is None


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ConfigError, match="no run"):
        Arms([], TASKS)
    with pytest.raises(ConfigError, match="twice"):
        Arms([run("dcl", 0, np.ones(100))] * 2, TASKS)
