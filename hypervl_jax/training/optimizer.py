"""AdamW by optax, one instance per part: schedules run on the global step, bias correction on each part's own count."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float32

from hypervl_jax.architecture import BRANCHES, DECODER, PARTS, require, require_positive

SCHEDULES = ("constant", "cosine", "wsd")
PART_GROUPS = ("vision", "projector", "decoder")
NOT_DECAYED = ("scale", "bias", "position_embedding")
"""Leaf names without weight decay: norms, biases and the position embedding."""

_NOT_NEGATIVE = (
    "learning_rate",
    *(f"{group}_multiplier" for group in PART_GROUPS),
    "warmup_steps",
    "weight_decay",
)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule and which parts it moves.

    `learning_rate` is the peak; each part's is that times `vision_multiplier`, `projector_multiplier` or
    `decoder_multiplier`. `frozen` names part groups ("vision", "projector", "decoder") or single parts ("vision_base").
    `schedule`: linear warm-up over `warmup_steps`, then "constant", "cosine" to `final_fraction` of the peak, or "wsd"
    (warm-up, stable, linear decay to `final_fraction` over the last `decay_fraction` of the steps; arXiv 2404.06395).
    """

    learning_rate: float = 1e-3
    vision_multiplier: float = 1.0
    projector_multiplier: float = 1.0
    decoder_multiplier: float = 1.0
    frozen: tuple[str, ...] = ()
    schedule: str = "cosine"
    warmup_steps: int = 100
    final_fraction: float = 0.1
    decay_fraction: float = 0.2
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            require(0 <= value < math.inf, f"optimizer.{name} {value} must be finite and not negative")
        require_positive("optimizer", self, "eps")
        require(
            self.schedule in SCHEDULES, f"optimizer.schedule {self.schedule!r} is not one of {', '.join(SCHEDULES)}"
        )
        require(0 <= self.b1 < 1 and 0 <= self.b2 < 1, f"optimizer.b1 {self.b1} and b2 {self.b2} must lie in [0, 1)")
        require(
            self.clip_norm > 0, f"optimizer.clip_norm {self.clip_norm} must be positive (inf switches clipping off)"
        )
        require(0 <= self.final_fraction <= 1, f"optimizer.final_fraction {self.final_fraction} must lie in [0, 1]")
        require(0 < self.decay_fraction <= 1, f"optimizer.decay_fraction {self.decay_fraction} must lie in (0, 1]")
        for name in self.frozen:
            require(
                name in PART_GROUPS or name in PARTS,
                f"optimizer.frozen names {name!r}; known: {', '.join(PART_GROUPS + PARTS)}",
            )
        require(bool(self.trainable_parts), "optimizer.frozen freezes every part: nothing would be trained")

    @property
    def trainable_parts(self) -> tuple[str, ...]:
        """Parts that are not frozen, in the order of `PARTS`."""
        return tuple(part for part in PARTS if part not in self.frozen and part_group(part) not in self.frozen)

    def multiplier(self, part: str) -> float:
        """Factor of a part's learning rate."""
        return {
            "vision": self.vision_multiplier,
            "projector": self.projector_multiplier,
            "decoder": self.decoder_multiplier,
        }[part_group(part)]


def part_group(part: str) -> str:
    """Group of a part: "vision", "projector" or "decoder"."""
    return DECODER if part == DECODER else part.removesuffix(f"_{BRANCHES[0]}").removesuffix(f"_{BRANCHES[1]}")


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Peak learning rate as a function of the global step; constant at its last value after `steps`."""
    require(
        config.warmup_steps < steps or steps <= 1,
        f"optimizer.warmup_steps {config.warmup_steps} leaves nothing of {steps} steps",
    )
    peak, warmup = config.learning_rate, min(config.warmup_steps, steps - 1)
    ramp = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    rest = steps - warmup
    if config.schedule == "constant":
        after, boundaries = [optax.constant_schedule(peak)], [warmup]
    elif config.schedule == "cosine":
        after, boundaries = [optax.cosine_decay_schedule(peak, max(rest, 1), config.final_fraction)], [warmup]
    else:
        decay = max(round(config.decay_fraction * steps), 1)
        stable = max(steps - decay, warmup)
        after = [optax.constant_schedule(peak), optax.linear_schedule(peak, peak * config.final_fraction, decay)]
        boundaries = [warmup, stable]
    return optax.join_schedules([ramp, *after], boundaries) if warmup else optax.join_schedules(after, boundaries[1:])


def _decayed(params: Any) -> Any:
    """True for leaves with weight decay, by leaf name: stacked layers hide a norm's rank."""

    def decays(path: Any, _: Any) -> bool:
        return jax.tree_util.keystr(path[-1:], simple=True) not in NOT_DECAYED

    return jax.tree_util.tree_map_with_path(decays, params)


def adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW of one part without its learning rate."""
    return optax.chain(
        optax.scale_by_adam(config.b1, config.b2, config.eps), optax.add_decayed_weights(config.weight_decay, _decayed)
    )


def initial_moments(config: OptimizerConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """Optimizer state of each trainable part; frozen parts have none."""
    return {part: adam(config).init(params[part]) for part in config.trainable_parts}


def part_norms(gradients: Mapping[str, Any]) -> dict[str, Float32[Array, ""]]:
    """L2 norm of each part's gradient."""
    return {part: optax.global_norm(tree) for part, tree in gradients.items()}


def joint_norm(norms: Mapping[str, Float32[Array, ""]]) -> Float32[Array, ""]:
    """L2 norm over all parts, from theirs."""
    return jnp.sqrt(sum(value**2 for value in norms.values()))


def apply_gradients(
    config: OptimizerConfig,
    learning_rate: Float32[Array, ""],
    gradients: Mapping[str, Any],
    params: Mapping[str, Any],
    moments: Mapping[str, Any],
    norm: Float32[Array, ""],
    finite: Bool[Array, ""],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One AdamW update of the parts that have gradients, clipped by their joint norm `norm`.

    Returns new parameters and moments of those parts; the old ones, bit for bit, where `finite` is false.
    """
    scale = jnp.minimum(1.0, config.clip_norm / jnp.maximum(norm, 1e-12))

    def keep(new: Array, old: Array) -> Array:
        return jnp.where(finite, new, old)

    new_params, new_moments = {}, {}
    for part, gradient in gradients.items():
        rate = -learning_rate * config.multiplier(part)
        clipped = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradient)
        updates, advanced = adam(config).update(clipped, moments[part], params[part])
        moved = jax.tree.map(lambda p, u, rate=rate: p + rate * u, params[part], updates)
        new_params[part] = jax.tree.map(keep, moved, params[part])
        new_moments[part] = jax.tree.map(keep, advanced, moments[part])
    return new_params, new_moments
