"""Attention through JAX's public Pallas kernel for TPU, "splash" (sparse flash) attention.

The kernel keeps a running softmax (arXiv 2205.14135), so that the scores of all pairs never lie in HBM, and its grid skips
blocks that the causal mask empties. It runs on one device: on a mesh every device runs it on its own rows, heads and
queries, and gathers the keys and values of the whole row where a row is split.

Blocks. A query block of n rows does about n FLOPs per byte of keys and values that it reads (bfloat16), and chips need 170
to 560 FLOPs per byte of HBM bandwidth (v5p 170, v5e 240, tpu7x 310, v6e 560): `LARGEST_BLOCK` = 1024 is above that
everywhere. 2048 does not fit the 16 MiB of VMEM that a kernel has on v5e, and 512 makes four times as many grid steps, each
with a fixed cost, to save a tenth of the causal scores at 4,096 tokens. Scores are formed `LARGEST_COMPUTE_BLOCK` keys at a
time, so that the softmax of one half of a block overlaps the matrix products of the other. 1024 compiles in bfloat16 and
in float32 for v4, v5e, v5p, v6e and tpu7x.

The fused backward kernel forms the scores once for the gradients of queries, keys and values (5 matrix products instead of
7) at the price of one gradient of the queries per block of keys: length / 1024 times the size of the queries, for a moment.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as pallas
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SplashAttentionKernel
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from hypervl_jax import partitioning
from hypervl_jax.models.runtime import ATTENTION_OUTPUT

LANES = 128
"""Width of a TPU vector register; every block is a multiple of it."""

LARGEST_BLOCK = 1024
LARGEST_COMPUTE_BLOCK = 512

FILLER_SEGMENT = -1
"""Segment of the positions added to fill a device's last block; no row has it, so they only see each other."""


def block_grid(length: int) -> tuple[int, int]:
    """(number of blocks, tokens of a block) for a sequence of `length` tokens, filled up to a whole number of blocks.

    The fewest blocks of at most `LARGEST_BLOCK`; less than `LANES` tokens are added for each block.
    """
    blocks = -(-length // LARGEST_BLOCK)
    return blocks, -(-length // (blocks * LANES)) * LANES


def splash_attention(
    query: Float[Array, "b l h k"],
    key: Float[Array, "b l g k"],
    value: Float[Array, "b l g k"],
    segments: Int[Array, "b l"] | None,
    causal: bool,
    axes: tuple[str | None, str | None],
    *,
    interpret: bool = False,
) -> Float[Array, "b l h k"]:
    """Grouped-query self-attention within segments, split over the mesh where one is set.

    Args:
        query: h heads; scores are divided by sqrt(k).
        key: g heads, each read by h / g query heads.
        value: like `key`.
        segments: a position attends only to its own segment (0 to 0, so padding stays finite); everywhere when None.
        causal: a position attends to no later one of the array.
        axes: logical axes of b and l.
        interpret: run on any device, slowly.

    Returns:
        The mixed values. Under rematerialisation they and the logarithm of the softmax's denominators go by the name
        `ATTENTION_OUTPUT`: all that the backward kernel needs besides its inputs.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows, tokens = partitioning.spec(axes)
    shards = 1 if mesh.empty else partitioning.ways(tokens, mesh)
    kernel = _kernel(query.shape[1] // shards, shards, query.shape[2], causal, interpret)
    if mesh.empty:
        return _on_one_device(kernel, query, key, value, segments, gather=None)
    queries = partitioning.spec((*axes, "activation_heads", None))
    keys = partitioning.spec((*axes, "activation_kv_heads", None))
    kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, tokens if causal else None)))
    # The kernel does not say over which mesh axes its results vary, so shard_map cannot check it.
    return jax.shard_map(
        functools.partial(_on_one_device, gather=tokens),
        in_specs=(kernel_spec, queries, keys, keys, PartitionSpec(rows, tokens)),
        out_specs=queries,
        check_vma=False,
    )(kernel, query, key, value, segments)


def _kernel(length: int, shards: int, heads: int, causal: bool, interpret: bool) -> SplashAttentionKernel:
    """The Pallas kernel for rows of `shards` pieces, each of `length` tokens and filled up to whole blocks."""
    blocks, block = block_grid(length)
    compute = LARGEST_COMPUTE_BLOCK if block % LARGEST_COMPUTE_BLOCK == 0 else block
    sizes = pallas.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=compute,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=compute,
        use_fused_bwd_kernel=True,
    )
    piece, whole = blocks * block, shards * blocks * block
    # A full mask is the same for every piece of the queries, a causal one is not.
    mask = pallas.CausalMask((whole, whole)) if causal else pallas.FullMask((piece, whole))
    return pallas.make_splash_mha(
        pallas.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=shards if causal else 1,
        residual_checkpoint_name=ATTENTION_OUTPUT,
        interpret=interpret,
    )


def _on_one_device(
    kernel: SplashAttentionKernel,
    query: Float[Array, "b l h k"],
    key: Float[Array, "b l g k"],
    value: Float[Array, "b l g k"],
    segments: Int[Array, "b l"] | None,
    gather: tuple[str, ...] | str | None,
) -> Float[Array, "b l h k"]:
    """`splash_attention` of one device's rows, queries and heads; `gather` names the mesh axes that split the tokens."""
    length, width = query.shape[1], query.shape[-1]
    blocks, block = block_grid(length)
    filler = blocks * block - length
    # The kernel does not scale: the product is formed in float32 and rounded once.
    scaled = (query.astype(jnp.float32) * width**-0.5).astype(query.dtype)
    fill = lambda x: jnp.pad(x, ((0, 0), (0, filler), (0, 0), (0, 0))).swapaxes(1, 2)
    whole = lambda x, axis: x if gather is None else jax.lax.all_gather(x, gather, axis=axis, tiled=True)
    ids = _filled_segments(segments, query.shape[:2], filler)
    pair = None if ids is None else pallas.SegmentIds(ids, whole(ids, 1))
    mixed = jax.vmap(kernel)(fill(scaled), whole(fill(key), 2), whole(fill(value), 2), pair)
    return mixed.swapaxes(1, 2)[:, :length]


def _filled_segments(
    segments: Int[Array, "b l"] | None, shape: tuple[int, int], filler: int
) -> Int[Array, "b s"] | None:
    """Segments with those of the filler appended; None where every position attends to every other."""
    if segments is None and filler == 0:
        return None
    segments = jnp.zeros(shape, jnp.int32) if segments is None else segments
    return jnp.pad(segments, ((0, 0), (0, filler)), constant_values=FILLER_SEGMENT)
