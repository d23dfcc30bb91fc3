"""Dual consistency learning (DCL): which branch a step trains, and the KL from the large branch to the small one.

Source: HyperVL (arXiv 2512.14052), section on dual consistency learning. On a base step the loss is
CE + λ · T² · KL(softmax(z_large / T) ‖ softmax(z_base / T)), the teacher under `stop_gradient`; on a large step it is CE.
The alternation's frequency, λ and T are not published: they are settings, and run-time values of the compiled step.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from hypervl_jax.architecture import BRANCHES, require
from hypervl_jax.training.losses import KL_POSITIONS

ALTERNATIONS = ("ratio", "random", "base", "large", "joint")


@dataclasses.dataclass(frozen=True)
class ConsistencyConfig:
    """Settings of DCL.

    `alternation`: "ratio" repeats `base_steps` steps of the base branch, then `large_steps` of the large one; "random" draws
    the branch with those odds as a pure function of seed and step; "base" and "large" train one branch alone; "joint"
    trains both in every step. `kl_weight` is λ (0 switches the teacher pass off), `temperature` is T.
    """

    alternation: str = "ratio"
    base_steps: int = 1
    large_steps: int = 1
    kl_weight: float = 1.0
    temperature: float = 2.0
    kl_positions: str = "answer"

    def __post_init__(self) -> None:
        require(
            self.alternation in ALTERNATIONS,
            f"consistency.alternation {self.alternation!r} is not one of {', '.join(ALTERNATIONS)}",
        )
        require(
            self.kl_positions in KL_POSITIONS,
            f"consistency.kl_positions {self.kl_positions!r} is not one of {', '.join(KL_POSITIONS)}",
        )
        require(
            self.base_steps >= 1 and self.large_steps >= 1,
            "consistency.base_steps and large_steps must be 1 or more; use alternation=base or large to train one branch",
        )
        require(
            0 <= self.kl_weight < math.inf and 0 < self.temperature < math.inf,
            f"consistency.kl_weight {self.kl_weight} must be 0 or more and temperature {self.temperature} positive, both finite",
        )

    @property
    def arms(self) -> tuple[tuple[str, ...], ...]:
        """The branches that each arm of the step's switch trains."""
        if self.alternation == "joint":
            return (BRANCHES,)
        if self.alternation in BRANCHES:
            return ((self.alternation,),)
        return tuple((branch,) for branch in BRANCHES)

    @property
    def uses_teacher(self) -> bool:
        """Whether base steps carry the KL term. The base branch alone has no teacher."""
        return self.kl_weight > 0 and self.alternation not in BRANCHES


class Control(NamedTuple):
    """Run-time values of the step: changing them compiles nothing."""

    kl_weight: Float32[Array, ""]
    temperature: Float32[Array, ""]
    base_steps: Int32[Array, ""]
    large_steps: Int32[Array, ""]
    seed: Int32[Array, ""]


def make_control(config: ConsistencyConfig, seed: int) -> Control:
    """The step's run-time values, on the host."""
    real, whole = jnp.float32, jnp.int32
    return Control(
        real(config.kl_weight),
        real(config.temperature),
        whole(config.base_steps),
        whole(config.large_steps),
        whole(seed),
    )


def arm_index(step: Int32[Array, ""], config: ConsistencyConfig, control: Control) -> Int32[Array, ""]:
    """Which of `config.arms` step `step` trains: a pure function of the step and, for "random", the seed."""
    if len(config.arms) == 1:
        return jnp.zeros((), jnp.int32)
    period = control.base_steps + control.large_steps
    if config.alternation == "ratio":
        return (step % period >= control.base_steps).astype(jnp.int32)
    draw = jax.random.randint(jax.random.fold_in(jax.random.key(control.seed), step), (), 0, period)
    return (draw >= control.base_steps).astype(jnp.int32)
