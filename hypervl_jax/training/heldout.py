"""Held-out losses: cross-entropy of each branch and KL between them, for each source and over all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from hypervl_jax.architecture import BRANCHES
from hypervl_jax.models.qwen3 import head_weights
from hypervl_jax.training import losses
from hypervl_jax.training.batch import Batch
from hypervl_jax.training.step import StepFunctions, branch_hidden

Sums = dict[str, Float32[Array, "sources"]]


def heldout_sums(functions: StepFunctions, params: Mapping[str, Any], batch: Batch) -> Sums:
    """Sums over a batch's answer tokens by source: CE of both branches, KL(large ‖ base) at T = 1, agreement, tokens."""
    hidden = {branch: branch_hidden(functions.model, params, batch, branch) for branch in BRANCHES}
    terms = losses.token_terms(
        hidden["base"],
        head_weights(params["decoder"]),
        batch.targets,
        chunk=functions.objective.loss_chunk_tokens,
        teacher_hidden=hidden["large"],
    )
    members = (batch.sources[..., None] == jnp.arange(functions.num_sources)) * batch.loss_weights[..., None]
    values = {
        "cross_entropy/base": terms.cross_entropy,
        "cross_entropy/large": terms.teacher_cross_entropy,
        "kl": terms.kl,
        "agreement": terms.agreement,
        "tokens": jnp.ones_like(terms.kl),
    }
    return {name: jnp.einsum("bl,bls->s", value, members) for name, value in values.items()}


def heldout_means(totals: Mapping[str, np.ndarray], sources: Sequence[str]) -> dict[str, float]:
    """Means over all tokens (`kl`) and for each source that has any (`kl/charts`)."""
    counts = totals["tokens"]
    means = {}
    for name, sums in totals.items():
        if name == "tokens":
            continue
        means[name] = float(sums.sum() / max(counts.sum(), 1.0))
        means |= {f"{name}/{source}": float(sums[i] / counts[i]) for i, source in enumerate(sources) if counts[i] > 0}
    return means


class HeldoutEvaluation:
    """Runs the compiled held-out step over a finite set of batches kept ready by the caller."""

    def __init__(self, functions: StepFunctions, sources: Sequence[str], param_shardings: Any, batch_sharding: Any):
        self._sources = tuple(sources)
        self._step = jax.jit(
            lambda params, batch: heldout_sums(functions, params, batch), in_shardings=(param_shardings, batch_sharding)
        )

    def __call__(self, params: Mapping[str, Any], batches: Iterable[Batch]) -> dict[str, float]:
        """Held-out means; the sums are added on the host in float64."""
        totals: dict[str, np.ndarray] = {}
        for batch in batches:
            sums = jax.device_get(self._step(params, batch))
            totals = {name: totals.get(name, 0.0) + np.asarray(value, np.float64) for name, value in sums.items()}
        return heldout_means(totals, self._sources) if totals else {}
