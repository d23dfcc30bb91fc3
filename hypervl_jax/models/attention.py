"""Scaled dot-product attention: one entry, several kernels."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from hypervl_jax import partitioning
from hypervl_jax.architecture import require
from hypervl_jax.models import runtime, splash

QUERY_BLOCK = 512
"""Queries whose scores `chunked_attention` holds at one time."""

MASKED_SCORE = -1e30
"""Score of a pair that may not attend: finite, so that rows without any allowed key stay finite; its weight is exactly 0
next to any allowed key, so that what stands at a masked position cannot change a single bit of the result."""


def attention(
    query: Float[Array, "b q h k"],
    key: Float[Array, "b s g k"],
    value: Float[Array, "b s g k"],
    *,
    query_segments: Int[Array, "b q"] | None = None,
    key_segments: Int[Array, "b s"] | None = None,
    query_positions: Int[Array, "b q"] | None = None,
    key_positions: Int[Array, "b s"] | None = None,
    causal: bool,
    kernel: str,
    axes: tuple[str | None, str | None] = ("rows", "length"),
) -> Float[Array, "b q h k"]:
    """Grouped-query attention (arXiv 2305.13245) with scores divided by sqrt(k) and a float32 softmax.

    Query head i reads key-value head i // (h / g); keys are not repeated in memory.

    Args:
        query: h heads of width k; h is a multiple of g.
        key: g heads, each read by h / g query heads.
        value: like `key`.
        query_segments: a query attends only to keys of its own segment; everywhere when None.
        key_segments: when they are not the queries' own (None), as with a cache.
        query_positions: order within a segment, used when `causal`; array order when None, which in packed rows is the same.
        key_positions: like `query_positions`.
        causal: a query attends only to keys whose position is not after its own.
        kernel: one of `runtime.ATTENTION_KERNELS`. Splash is for sequences that attend to themselves in array order; what
            else is asked of it goes through XLA (`splash_obstacle`), and the log says so once.
        axes: logical axes of b and q (`partitioning.RULES`).

    Returns:
        The mixed values in the dtype of `value`. With XLA, queries without any allowed key give the mean of all values.

    Raises:
        ConfigError: an unknown kernel.
    """
    require(kernel in runtime.ATTENTION_KERNELS, f"attention kernel {kernel!r} is unknown")
    if kernel in ("splash", "splash_interpreted"):
        own_keys = all(x is None for x in (key_segments, query_positions, key_positions))
        obstacle = splash_obstacle(query.shape, key.shape, own_keys, axes)
        announce(kernel, query.shape, key.shape, obstacle, tokens_of_a_device(query.shape[1], axes[1]))
        if obstacle is None:
            interpret = kernel == "splash_interpreted"
            return splash.splash_attention(query, key, value, query_segments, causal, axes, interpret=interpret)
    compute = chunked_attention if kernel == "chunked" else xla_attention
    return compute(query, key, value, query_segments, key_segments, query_positions, key_positions, causal)


def splash_obstacle(
    query: tuple[int, ...], key: tuple[int, ...], own_keys: bool, axes: tuple[str | None, str | None]
) -> str | None:
    """Why the splash kernel cannot compute a call (or would be a waste) on the mesh that is set, None when it can.

    Args:
        query: shape [b, q, h, k].
        key: shape [b, s, g, k].
        own_keys: the keys have the queries' segments, and array order is the causal order.
        axes: logical axes of b and q.
    """
    if not own_keys or query[1] != key[1]:
        return "the keys are not the queries' own, as with a cache"
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        names = ("rows", "tokens", "query heads", "key-value heads")
        entries = [partitioning.spec((axis,))[0] for axis in (*axes, "activation_heads", "activation_kv_heads")]
        for name, size, entry in zip(names, (*query[:3], key[2]), entries, strict=True):
            if size % partitioning.ways(entry, mesh):
                return f"{size} {name} do not split over the {partitioning.ways(entry, mesh)} devices along {entry}"
    tokens = tokens_of_a_device(query[1], axes[1])
    return f"{tokens} tokens on a device do not fill a block of {splash.LANES}" if tokens < splash.LANES else None


def tokens_of_a_device(length: int, axis: str | None) -> int:
    """Of `length` tokens along a logical axis, those that one device of the mesh holds (all where no mesh is set)."""
    mesh = jax.sharding.get_abstract_mesh()
    return length if mesh.empty else length // partitioning.ways(partitioning.spec((axis,))[0], mesh)


@functools.cache
def announce(kernel: str, query: tuple[int, ...], key: tuple[int, ...], obstacle: str | None, tokens: int) -> None:
    """Says once in the log which kernel a call of these shapes got, with `tokens` on each device."""
    call = f"attention of {query[2]} heads of width {query[3]} over {query[1]} queries and {key[1]} keys"
    blocks, block = splash.block_grid(tokens)
    filled = f"{kernel}, {tokens} tokens on a device filled up to {blocks * block} in blocks of {block}"
    chosen = filled if obstacle is None else f"xla instead of {kernel}, because {obstacle}"
    runtime.LOGGER.info("%s: %s", call, chosen)


def attention_mask(
    query_segments: Int[Array, "b q"] | None,
    key_segments: Int[Array, "b s"] | None,
    query_positions: Int[Array, "b q"],
    key_positions: Int[Array, "b s"],
    causal: bool,
) -> Bool[Array, "b q s"] | None:
    """Which query may attend to which key; None when every query may attend to every key.

    Two samples of two tokens and one padding position in a row, causal:

        segments 1 1 2 2 0 | positions 0 1 0 1 0
        1 . . . .
        1 1 . . .
        . . 1 . .
        . . 1 1 .
        . . . . 1
    """
    mask = None
    if query_segments is not None:
        mask = query_segments[:, :, None] == key_segments[:, None, :]
    if causal:
        ordered = query_positions[:, :, None] >= key_positions[:, None, :]
        mask = ordered if mask is None else mask & ordered
    return mask


def xla_attention(
    query: Float[Array, "b q h k"],
    key: Float[Array, "b s g k"],
    value: Float[Array, "b s g k"],
    query_segments: Int[Array, "b q"] | None,
    key_segments: Int[Array, "b s"] | None,
    query_positions: Int[Array, "b q"] | None,
    key_positions: Int[Array, "b s"] | None,
    causal: bool,
) -> Float[Array, "b q h k"]:
    """Attention in plain XLA; the scores of all pairs are held in float32, [b, h, q, s]."""
    rows, num_queries, num_heads, head_dim = query.shape
    groups = key.shape[2]
    key_segments = query_segments if key_segments is None else key_segments
    query_positions = jnp.arange(num_queries)[None] if query_positions is None else query_positions
    key_positions = jnp.arange(key.shape[1])[None] if key_positions is None else key_positions
    mask = attention_mask(query_segments, key_segments, query_positions, key_positions, causal)
    grouped = query.reshape(rows, num_queries, groups, num_heads // groups, head_dim)
    scores = jnp.einsum("bqgrk,bsgk->bgrqs", grouped, key, preferred_element_type=jnp.float32) * head_dim**-0.5
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, MASKED_SCORE)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bgrqs,bsgk->bqgrk", weights, value).reshape(query.shape)
    return checkpoint_name(mixed, runtime.ATTENTION_OUTPUT)


def chunked_attention(
    query: Float[Array, "b q h k"],
    key: Float[Array, "b s g k"],
    value: Float[Array, "b s g k"],
    query_segments: Int[Array, "b q"] | None,
    key_segments: Int[Array, "b s"] | None,
    query_positions: Int[Array, "b q"] | None,
    key_positions: Int[Array, "b s"] | None,
    causal: bool,
) -> Float[Array, "b q h k"]:
    """`xla_attention` of `QUERY_BLOCK` queries after `QUERY_BLOCK` queries: the same result, for a softmax is over keys.

    Holds the scores [b, h, QUERY_BLOCK, s] of one block, where `xla_attention` holds [b, h, q, s].
    """
    length = query.shape[1]
    key_segments = query_segments if key_segments is None else key_segments
    query_positions = jnp.arange(length)[None] if query_positions is None else query_positions
    blocks = [_query_blocks(x) for x in (query, query_segments, query_positions)]

    def attend(block: list[Array | None]) -> Float[Array, "b q h k"]:
        queries, segments, positions = block
        return xla_attention(queries, key, value, segments, key_segments, positions, key_positions, causal)

    mixed = jax.lax.map(attend, blocks).swapaxes(0, 1)
    return mixed.reshape(query.shape[0], -1, *query.shape[2:])[:, :length]


def _query_blocks(x: Array | None) -> Array | None:
    """[b, q, ...] as [blocks, b, QUERY_BLOCK, ...], filled up with zeros."""
    if x is None:
        return None
    block = min(QUERY_BLOCK, x.shape[1])
    filled = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), *((0, 0),) * (x.ndim - 2)))
    return filled.reshape(x.shape[0], -1, block, *x.shape[2:]).swapaxes(0, 1)
