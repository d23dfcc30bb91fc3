"""The study of DCL: arms of training compared over several seeds and the same held-out items.

A run is one arm with one seed; runs of the same seed saw their data in the same order. Scores are means over tasks of the tasks'
means. Intervals are 95 % percentile bootstraps over items within tasks and over seeds, both drawn anew in each resample; what two
arms share (the items, the order of a seed's data) is drawn together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from hypervl_jax.architecture import BRANCHES, require
from hypervl_jax.evaluation.statistics import CONFIDENCE, RESAMPLES, Estimate

POWER = 0.8
"""With which the smallest detectable difference would be seen."""

MARGIN = 0.02
"""How much worse a branch may be and still count as not worse: two points."""

SAME_ANSWER, KL, HIDDEN = "same_answer", "kl", "hidden_distance"


@dataclasses.dataclass(frozen=True)
class ArmRun:
    """One run, measured on the items in their common order.

    Attributes:
        arm, seed: which.
        steps: of each branch.
        teraflops: of the whole training.
        values: by name: "base" and "large" are scores of answers in [0, 1]; `SAME_ANSWER` is 1 where both branches say the same; `KL` is
            KL(large ‖ base) over the right answer, nats; `HIDDEN` is 1 − cosine of the last hidden states.
    """

    arm: str
    seed: int
    steps: Mapping[str, int]
    teraflops: float
    values: Mapping[str, Float64[np.ndarray, "n"]]


class Contrast(NamedTuple):
    """A question, and the two arms whose difference answers it on one value (`ArmRun.values`)."""

    question: str
    value: str
    arm: str
    baseline: str


CONTRASTS = (
    Contrast("DCL lifts Base over training it alone, at equal Base steps", "base", "dcl", "base"),
    Contrast("DCL lifts Base over training it alone, at equal compute", "base", "dcl", "base_longer"),
    Contrast("turns without KL lift Base, at equal Base steps", "base", "alternating", "base"),
    Contrast("the KL term lifts Base over turns without it", "base", "dcl", "alternating"),
    Contrast("joint steps lift Base over turns, at equal Base steps", "base", "joint", "dcl"),
    Contrast("Large does not lose by sharing the LLM, at equal Large steps", "large", "dcl", "large"),
    Contrast("the KL term does not cost Large", "large", "dcl", "alternating"),
    Contrast("the KL term keeps answers when encoders are switched", SAME_ANSWER, "dcl", "alternating"),
)
"""The questions of the main arms."""


class Arms:
    """All runs, and the bootstrap that they share.

    Args:
        runs: all measured on items of these tasks, in one order.
        tasks: of each item.

    Raises `ConfigError` for no runs, or an arm that was run twice with one seed.
    """

    def __init__(self, runs: Sequence[ArmRun], tasks: Sequence[str]) -> None:
        require(bool(runs), "there is no run to compare")
        keys = [(run.arm, run.seed) for run in runs]
        require(len(set(keys)) == len(keys), "an arm was run twice with one seed; compare one sweep")
        self.runs = runs
        self.names = list(dict.fromkeys(run.arm for run in runs))
        tasks_of, names = np.array(tasks), sorted(set(tasks))
        rng = np.random.default_rng(0)
        self._weights, self._draws = np.zeros(len(tasks)), np.zeros((RESAMPLES, len(tasks)))
        for name in names:
            members = np.flatnonzero(tasks_of == name)
            share = 1 / (len(members) * len(names))
            counts = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), RESAMPLES)
            self._weights[members], self._draws[:, members] = share, counts * share
        self._seed_choice = rng.random((RESAMPLES, len(keys)))

    def of(self, arm: str) -> dict[int, ArmRun]:
        """The runs of an arm by seed."""
        return {run.seed: run for run in self.runs if run.arm == arm}

    def estimate(self, values: Float64[np.ndarray, "s n"]) -> tuple[Estimate, float]:
        """Mean over seeds and tasks with its interval, and the standard error."""
        drawn = self._drawn(values)
        low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return Estimate(float((values @ self._weights).mean()), float(low), float(high)), float(drawn.std(ddof=1))

    def _drawn(self, values: Float64[np.ndarray, "s n"]) -> Float64[np.ndarray, "r"]:
        """Means of all resamples. The spread of s seeds is widened by √(s / (s − 1)), by which drawing s of them anew understates it."""
        by_seed, seeds = self._draws @ values.T, len(values)
        centre = by_seed.mean(1, keepdims=True)
        by_seed = centre + (by_seed - centre) * np.sqrt(seeds / max(seeds - 1, 1))
        chosen = (self._seed_choice[:, :seeds] * seeds).astype(int)
        return np.take_along_axis(by_seed, chosen, axis=1).mean(1)

    def arm(self, name: str) -> dict[str, Any]:
        """One arm as plain values."""
        runs = list(self.of(name).values())
        stacked = lambda value: np.stack([run.values[value] for run in runs])
        branches = {}
        for branch in BRANCHES:
            seeds = (stacked(branch) @ self._weights).tolist()
            score = self.estimate(stacked(branch))[0]
            spread = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else 0.0
            branches[branch] = {"score": score._asdict(), "seeds": seeds, "spread": spread}
        agreement = {value: self.estimate(stacked(value))[0]._asdict() for value in (SAME_ANSWER, KL, HIDDEN)}
        return {
            "name": name,
            "runs": [run.seed for run in runs],
            **{f"{branch}_steps": runs[0].steps[branch] for branch in BRANCHES},
            "teraflops": runs[0].teraflops,
            "branches": branches,
            **agreement,
        }

    def contrast(self, asked: Contrast) -> dict[str, Any] | None:
        """The paired difference that answers a question; None where an arm is missing or no seed is shared.

        `detectable` is the smallest difference that would be seen with `POWER` at this noise: (z₀.₉₇₅ + z₀.₈) standard errors.
        """
        first, second = self.of(asked.arm), self.of(asked.baseline)
        seeds = sorted(first.keys() & second.keys())
        if not seeds:
            return None
        differences = np.stack([first[seed].values[asked.value] - second[seed].values[asked.value] for seed in seeds])
        found, error = self.estimate(differences)
        factor = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) + NormalDist().inv_cdf(POWER)
        return {
            "question": asked.question,
            "branch": asked.value,
            "arm": asked.arm,
            "baseline": asked.baseline,
            "seeds": seeds,
            "difference": found._asdict(),
            "detectable": factor * error,
        }

    def to_json(self) -> dict[str, Any]:
        """All arms and all contrasts that can be answered."""
        contrasts = [self.contrast(asked) for asked in CONTRASTS]
        return {
            "arms": [self.arm(name) for name in self.names],
            "contrasts": [found for found in contrasts if found is not None],
        }
