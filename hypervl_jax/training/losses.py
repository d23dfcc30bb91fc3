"""The objective from hidden states and head weights; every loss is a (sum, count) that is divided once, globally.

Logits of a whole batch never exist: at L=4096, 8 rows and 151,936 words they would be 20 GB in float32. `loss_chunks` forms them
a chunk of tokens at a time on each chip; here are the sharding of that work and its place in differentiation.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int32

from hypervl_jax import partitioning
from hypervl_jax.architecture import ConfigError
from hypervl_jax.training.batch import Batch
from hypervl_jax.training.loss_chunks import ChipLosses, LossWeights, Shards, Tokens, TokenTerms, Totals, Wanted

KL_POSITIONS = ("answer", "text", "all")


def kl_mask(batch: Batch, positions: str) -> Bool[Array, "b l"]:
    """Positions at which the KL term of DCL is taken, by what they predict.

    "answer": tokens that carry loss; "text": any text token of the same sample, prompt included (the paper's words);
    "all": any token of the same sample, image slots included. A sample's last position predicts nothing.
    """
    if positions == "answer":
        return batch.loss_weights > 0
    following = lambda x, fill: jnp.pad(x[:, 1:], ((0, 0), (0, 1)), constant_values=fill)
    inside = (batch.segments > 0) & (following(batch.segments, 0) == batch.segments)
    if positions == "all":
        return inside
    if positions == "text":
        return inside & (following(batch.visual_index, 0) < 0)
    raise ConfigError(f"kl_positions {positions!r} is not one of {', '.join(KL_POSITIONS)}")


class Inputs(NamedTuple):
    """What the objective is a function of, apart from the hidden states and the head it is differentiated by."""

    tokens: Tokens
    temperature: Float32[Array, ""]


def token_terms(
    hidden: Float[Array, "b l d"],
    head: Float32[Array, "d n"],
    targets: Int32[Array, "b l"],
    *,
    chunk: int,
    teacher_hidden: Float[Array, "b l d"] | None = None,
    temperature: Float32[Array, ""] | float = 1.0,
) -> TokenTerms:
    """Cross-entropy and, with a teacher, the KL terms of DCL at every position: constants, for measuring only.

    The arguments are those of `weighted_loss`.
    """
    weights = LossWeights(*(jnp.zeros(targets.shape, jnp.float32) for _ in LossWeights._fields))
    return weighted_loss(
        hidden, head, targets, weights, chunk=chunk, teacher_hidden=teacher_hidden, temperature=temperature
    )[1]


def weighted_loss(
    hidden: Float[Array, "b l d"],
    head: Float32[Array, "d n"],
    targets: Int32[Array, "b l"],
    weights: LossWeights,
    *,
    chunk: int,
    teacher_hidden: Float[Array, "b l d"] | None = None,
    temperature: Float32[Array, ""] | float = 1.0,
) -> tuple[Float32[Array, ""], TokenTerms]:
    """The sum of cross-entropy, squared log-partition and smoothed KL over all positions, each by its weight; and all terms.

    The loss has gradients with respect to `hidden` and `head`, formed in the forward pass where they are asked for; all else is
    constant: the teacher and its use of the head, the weights, the temperature and the terms.

    Args:
        hidden: final hidden states of the branch being trained; matrix products are formed in their dtype.
        head: output embedding in float32, shared by student and teacher; its gradient is accumulated in float32.
        targets: next ids.
        weights: of the terms that carry a gradient.
        chunk: tokens of each chip whose logits exist at one time.
        teacher_hidden: final hidden states of the teacher.
        temperature: T of the smoothed KL (Hinton et al., arXiv 1503.02531); the factor T² belongs to the weights.
    """
    inputs = Inputs(Tokens(targets, weights, teacher_hidden), jnp.asarray(temperature, jnp.float32))
    loss, terms = _weighted_loss(chunk, hidden, head, jax.lax.stop_gradient(inputs))
    return loss, jax.lax.stop_gradient(terms)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_loss(chunk: int, hidden: Array, head: Array, inputs: Inputs) -> tuple[Array, TokenTerms]:
    terms = _totals(chunk, hidden, head, inputs, Wanted()).terms
    return _weigh(terms, inputs.tokens.weights), terms


def _forward(chunk: int, hidden: Any, head: Any, inputs: Any) -> tuple[tuple[Array, TokenTerms], tuple[Any, Any]]:
    """The loss, and as residuals its gradients with respect to those of `hidden` and `head` that are differentiated."""
    values = jax.tree.map(lambda x: x.value, inputs, is_leaf=lambda x: isinstance(x, CustomVJPPrimal))
    totals = _totals(chunk, hidden.value, head.value, values, Wanted(hidden.perturbed, head.perturbed))
    loss = _weigh(totals.terms, values.tokens.weights)
    return (loss, totals.terms), (totals.hidden_gradient, totals.head_gradient)


def _backward(chunk: int, gradients: tuple[Any, Any], cotangents: tuple[Any, Any]) -> tuple[Any, Any, None]:
    scale = lambda x: (x * cotangents[0]).astype(x.dtype)
    return *(None if x is None else scale(x) for x in gradients), None


_weighted_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _weigh(terms: TokenTerms, weights: LossWeights) -> Float32[Array, ""]:
    return sum(jnp.sum(getattr(terms, name) * weight) for name, weight in weights._asdict().items())


def _totals(
    chunk: int, hidden: Float[Array, "b l d"], head: Float32[Array, "d n"], inputs: Inputs, wanted: Wanted
) -> Totals:
    """Terms [b, l] and gradients of global arrays: the work of each chip under `shard_map`, or all of it where no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return _chip_totals(hidden, head, inputs, chunk=chunk, wanted=wanted, shards=Shards())
    rows, states = partitioning.spec(("rows", "length")), partitioning.spec(("rows", "length", "activation_embed"))
    weights = partitioning.spec(("embed", "vocabulary"))
    shards = Shards(_axes(*rows), *(_axes(entry) for entry in weights))
    tokens = Tokens(rows, LossWeights(rows, rows, rows), states)
    chip = functools.partial(_chip_totals, chunk=chunk, wanted=wanted, shards=shards)
    # Nothing differentiates through this call, so that it may skip the check of what varies over which axes.
    return jax.shard_map(
        chip,
        in_specs=(states, weights, Inputs(tokens, PartitionSpec())),
        out_specs=Totals(rows, states, weights),
        check_vma=False,
    )(hidden, head, inputs)


def _axes(*entries: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Mesh axes that truly split dimensions with these entries of a PartitionSpec: those of more than one device."""
    sizes = jax.sharding.get_abstract_mesh().shape
    named = [(entry,) if isinstance(entry, str) else entry or () for entry in entries]
    return tuple(axis for axes in named for axis in axes if sizes[axis] > 1)


def _chip_totals(
    hidden: Float[Array, "b l d"],
    head: Float32[Array, "d n"],
    inputs: Inputs,
    *,
    chunk: int,
    wanted: Wanted,
    shards: Shards,
) -> Totals:
    """One chip's share: the head is gathered once, in the compute dtype, and its gradient reduced once, in float32."""
    shape = hidden.shape[:2]
    losses = ChipLosses(_gather(head.astype(hidden.dtype), shards), inputs.temperature, wanted, shards)
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    totals = losses.totals(flat(hidden), jax.tree.map(flat, inputs.tokens), chunk)
    unflatten = lambda x: x.reshape(*shape, *x.shape[1:])
    head_gradient = jax.tree.map(lambda x: _reduce(x, shards), totals.head_gradient)
    # The backward pass of the model waits: until it is reduced, each chip holds the gradient of the whole head (1.2 GB for Qwen3).
    hidden_gradient, head_gradient = jax.lax.optimization_barrier((totals.hidden_gradient, head_gradient))
    return Totals(jax.tree.map(unflatten, totals.terms), jax.tree.map(unflatten, hidden_gradient), head_gradient)


def _gather(head: Float[Array, "d_shard n"], shards: Shards) -> Float[Array, "d n"]:
    return jax.lax.all_gather(head, shards.width, axis=0, tiled=True) if shards.width else head


def _reduce(gradient: Float32[Array, "d n"], shards: Shards) -> Float32[Array, "d_shard n"]:
    """Sum over all chips' tokens, of the part of the width that this chip keeps."""
    if shards.width:
        gradient = jax.lax.psum_scatter(gradient, shards.width, scatter_dimension=0, tiled=True)
    return jax.lax.psum(gradient, tuple(axis for axis in shards.tokens if axis not in shards.width))
