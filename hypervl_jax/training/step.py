"""The training step: one jitted function, `lax.switch` on the branch, gradients only of the parts that move.

    counts of the whole batch ─► for each micro-batch: loss sums / counts, gradients summed ─► clip ─► AdamW per part

The idle branch's parameters, moments and count pass through the switch untouched; frozen parts are never differentiated.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float32

from hypervl_jax.architecture import BRANCHES, HyperVLConfig, branch_parts, require
from hypervl_jax.models.hypervl import HyperVL
from hypervl_jax.models.qwen3 import head_weights
from hypervl_jax.models.runtime import RuntimeConfig
from hypervl_jax.training import losses, optimizer
from hypervl_jax.training.batch import Batch
from hypervl_jax.training.consistency import ConsistencyConfig, Control, arm_index
from hypervl_jax.training.loss_chunks import LossWeights, TokenTerms
from hypervl_jax.training.optimizer import OptimizerConfig
from hypervl_jax.training.state import TrainState, add_tokens

Metrics = dict[str, Float32[Array, ""]]


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """`loss_chunk_tokens`: tokens of each chip whose logits exist at one time; `z_loss`: weight of the squared log-partition
    (PaLM, arXiv 2204.02311); `accumulation`: micro-batches a step, each of rows / accumulation rows.
    """

    loss_chunk_tokens: int = 1024
    z_loss: float = 0.0
    accumulation: int = 1

    def __post_init__(self) -> None:
        require(self.loss_chunk_tokens >= 1, f"objective.loss_chunk_tokens {self.loss_chunk_tokens} must be positive")
        require(0 <= self.z_loss < math.inf, f"objective.z_loss {self.z_loss} must be finite and not negative")
        require(self.accumulation >= 1, f"objective.accumulation {self.accumulation} must be positive")


class Counts(NamedTuple):
    """Global denominators of a step, fixed before any micro-batch runs."""

    loss: Float32[Array, ""]
    kl: Float32[Array, ""]


def branch_hidden(model: HyperVL, params: Mapping[str, Any], batch: Batch, branch: str) -> Float32[Array, "b l d"]:
    """Final hidden states of a batch seen through one branch; reads only that branch's parts."""
    parts = {part: params[part] for part in branch_parts(branch)}
    return model.apply({"params": parts}, batch, branch, method="hidden_states")


class StepFunctions:
    """Builds the pure step and evaluation functions of one configuration; holds no arrays."""

    def __init__(
        self,
        architecture: HyperVLConfig,
        runtime: RuntimeConfig,
        optimizer_config: OptimizerConfig,
        consistency: ConsistencyConfig,
        objective: ObjectiveConfig,
        learning_rate: optax.Schedule,
        num_sources: int,
    ):
        self.model = HyperVL(architecture, runtime)
        self.optimizer = optimizer_config
        self.consistency = consistency
        self.objective = objective
        self.learning_rate = learning_rate
        self.num_sources = num_sources

    def active_parts(self, arm: tuple[str, ...]) -> tuple[str, ...]:
        """Parts that an arm of the switch moves."""
        read = {part for branch in arm for part in branch_parts(branch)}
        return tuple(part for part in self.optimizer.trainable_parts if part in read)

    def branch_loss(
        self, params: Mapping[str, Any], batch: Batch, branch: str, weights: LossWeights, control: Control
    ) -> tuple[Float32[Array, ""], TokenTerms]:
        """Weighted loss of one micro-batch, and the terms at each position; a base branch that has a teacher runs it too."""
        hidden = branch_hidden(self.model, params, batch, branch)
        teacher = None
        if branch == "base" and self.consistency.uses_teacher:
            teacher = branch_hidden(self.model, jax.lax.stop_gradient(params), batch, "large")
        return losses.weighted_loss(
            hidden,
            head_weights(params["decoder"]),
            batch.targets,
            weights,
            chunk=self.objective.loss_chunk_tokens,
            teacher_hidden=teacher,
            temperature=control.temperature,
        )

    def arm_loss(
        self, moving: Any, still: Any, batch: Batch, arm: tuple[str, ...], counts: Counts, control: Control
    ) -> tuple[Float32[Array, ""], dict[str, TokenTerms]]:
        """One micro-batch's share of the step's loss, and the sums behind it: all over the whole step's counts."""
        params = {**still, **moving}
        mask = losses.kl_mask(batch, self.consistency.kl_positions)
        weights = self.loss_weights(batch, mask, counts, control)
        total, shares = jnp.zeros((), jnp.float32), {}
        for branch in arm:
            loss, terms = self.branch_loss(params, batch, branch, weights, control)
            total, shares[branch] = total + loss, mean_terms(terms, batch.loss_weights, mask, counts)
        return total, shares

    def loss_weights(self, batch: Batch, mask: Bool[Array, "b l"], counts: Counts, control: Control) -> LossWeights:
        """What each term of each position weighs in the step's loss: CE + z_loss · (log Z)² + λ T² KL."""
        likelihood = batch.loss_weights / counts.loss
        kl = control.kl_weight * control.temperature**2 * mask / counts.kl
        return LossWeights(likelihood, self.objective.z_loss * likelihood, kl)

    def gradients(self, params: Any, batch: Batch, arm: tuple[str, ...], counts: Counts, control: Control) -> Any:
        """(loss, mean terms by branch, gradients of the arm's moving parts), summed over the micro-batches of `batch`."""
        moving = {part: params[part] for part in self.active_parts(arm)}
        still = {part: tree for part, tree in params.items() if part not in moving}
        loss = functools.partial(self.arm_loss, arm=arm, counts=counts, control=control)

        def one(micro: Batch) -> Any:
            (value, shares), gradient = jax.value_and_grad(loss, has_aux=True)(moving, still, micro)
            return value, shares, gradient

        if self.objective.accumulation == 1:
            return one(batch)
        micros = _micro_batches(batch, self.objective.accumulation)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, jax.tree.map(lambda x: x[0], micros))
        )
        add = lambda total, micro: (jax.tree.map(jnp.add, total, one(micro)), None)
        return jax.lax.scan(add, zeros, micros)[0]

    def run_arm(
        self, arm: tuple[str, ...], state: TrainState, batch: Batch, control: Control
    ) -> tuple[TrainState, Metrics]:
        """The whole update of one arm of the switch."""
        counts = self.counts(batch)
        loss, means, gradients = self.gradients(state.params, batch, arm, counts, control)
        norms = optimizer.part_norms(gradients)
        rate = jnp.asarray(self.learning_rate(state.step), jnp.float32)
        norm = optimizer.joint_norm(norms)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        params, moments = optimizer.apply_gradients(
            self.optimizer, rate, gradients, state.params, state.moments, norm, finite
        )
        metrics = {"loss": loss, "learning_rate": rate, "gradient_norm": norm, "finite": finite.astype(jnp.float32)}
        metrics |= {f"gradient_norm/{part}": norms.get(part, jnp.nan) for part in self.optimizer.trainable_parts}
        metrics |= self.mean_metrics(means)
        trained = jnp.array([branch in arm for branch in BRANCHES], jnp.int32)
        counters = state.counters._replace(
            branch_steps=state.counters.branch_steps + trained,
            skipped=state.counters.skipped + (1 - finite.astype(jnp.int32)),
            skipped_in_a_row=jnp.where(finite, 0, state.counters.skipped_in_a_row + 1),
        )
        return TrainState(state.step, {**state.params, **params}, {**state.moments, **moments}, counters), metrics

    def counts(self, batch: Batch) -> Counts:
        """Denominators over the whole batch, at least 1 so that a padded batch gives 0 and not NaN."""
        mask = losses.kl_mask(batch, self.consistency.kl_positions)
        return Counts(jnp.maximum(jnp.sum(batch.loss_weights), 1.0), jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0))

    def mean_metrics(self, means: Mapping[str, TokenTerms]) -> Metrics:
        """What a step measured; NaN where its arm did not measure it (a base step carries the teacher's figures)."""
        nan = jnp.full((), jnp.nan)
        metrics = {f"{name}/{branch}": nan for name in ("cross_entropy", "entropy") for branch in BRANCHES}
        metrics |= {"kl": nan, "kl_at_temperature": nan, "agreement": nan}
        metrics |= {f"cross_entropy/{branch}": term.cross_entropy for branch, term in means.items()}
        if "base" in means and self.consistency.uses_teacher:
            term = means["base"]
            metrics |= {"cross_entropy/large": term.teacher_cross_entropy, "agreement": term.agreement}
            metrics |= {"entropy/base": term.entropy, "entropy/large": term.teacher_entropy}
            metrics |= {"kl": term.kl, "kl_at_temperature": term.kl_at_temperature}
        return metrics

    def train_step(self, state: TrainState, batch: Batch, control: Control) -> tuple[TrainState, Metrics]:
        """`(state, batch, control) -> (state, metrics)`: one update of the arm whose turn it is."""
        arms = [functools.partial(self.run_arm, arm) for arm in self.consistency.arms]
        index = arm_index(state.step, self.consistency, control)
        new, metrics = (
            arms[0](state, batch, control) if len(arms) == 1 else jax.lax.switch(index, arms, state, batch, control)
        )
        by_source = source_tokens(batch, self.num_sources)
        counters = new.counters._replace(tokens=add_tokens(new.counters.tokens, by_source))
        metrics |= {
            "arm": index.astype(jnp.float32),
            "tokens": jnp.sum(by_source).astype(jnp.float32),
            "loss_tokens": jnp.sum(batch.loss_weights > 0, dtype=jnp.float32),
            "tiles": jnp.sum(batch.tile_segments > 0, dtype=jnp.float32),
            "skipped_in_a_row": counters.skipped_in_a_row.astype(jnp.float32),
        }
        return new._replace(step=state.step + 1, counters=counters), metrics


def mean_terms(terms: TokenTerms, weights: Array, mask: Array, counts: Counts) -> TokenTerms:
    """Terms summed over positions (losses by weight, KL terms by mask) and divided by the step's counts: scalars."""
    by_loss = ("cross_entropy", "z_squared", "teacher_cross_entropy")
    return TokenTerms(
        **{
            name: jnp.sum(value * weights) / counts.loss if name in by_loss else jnp.sum(value * mask) / counts.kl
            for name, value in terms._asdict().items()
        }
    )


def _micro_batches(batch: Batch, accumulation: int) -> Batch:
    """[b, …] -> [accumulation, b / accumulation, …]; strided, so that every device keeps its own rows."""
    rows = batch.tokens.shape[0]
    require(rows % accumulation == 0, f"{rows} rows cannot be split into {accumulation} micro-batches")
    split = lambda x: jnp.swapaxes(x.reshape(rows // accumulation, accumulation, *x.shape[1:]), 0, 1)
    return jax.tree.map(split, batch)


def source_tokens(batch: Batch, num_sources: int) -> Array:
    """Positions that are not padding, by source: uint32 [sources]."""
    real = batch.segments > 0
    per_source = [jnp.sum(real & (batch.sources == source), dtype=jnp.uint32) for source in range(num_sources)]
    return jnp.stack(per_source)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["names"])
@dataclasses.dataclass(frozen=True)
class PackedMetrics:
    """A step's scalars in one array, so that reading them is one transfer and not one of each.

    Attributes:
        values: float32 [metrics].
        names: of the values, in order.
    """

    values: Array
    names: tuple[str, ...]

    @classmethod
    def pack(cls, metrics: Metrics) -> PackedMetrics:
        """From scalars by name."""
        names = tuple(sorted(metrics))
        return cls(jnp.stack([metrics[name] for name in names]), names)

    def numbers(self) -> dict[str, float]:
        """By name, as plain numbers; waits for the step and fetches the array when it still lies on a device."""
        return dict(zip(self.names, np.asarray(self.values).tolist(), strict=True))


def compile_step(functions: StepFunctions, shardings: TrainState, batch_shardings: Batch) -> Callable[..., Any]:
    """The jitted step, `(state, batch, control) -> (state, PackedMetrics)`: state donated, its layout kept, metrics replicated."""

    def train_step(state: TrainState, batch: Batch, control: Control) -> tuple[TrainState, PackedMetrics]:
        state, metrics = functions.train_step(state, batch, control)
        return state, PackedMetrics.pack(metrics)

    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(shardings, batch_shardings, None),
        out_shardings=(shardings, None),
    )
