"""The dense Qwen3 decoder (arXiv 2505.09388).

Computes what `Qwen3ForCausalLM` of `transformers` computes: RMSNorm, grouped-query attention with q/k-norm and rotary
embeddings, SwiGLU, no biases, a tied or an untied head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from hypervl_jax.architecture import DecoderConfig
from hypervl_jax.models.attention import attention
from hypervl_jax.models.layers import Linear, RMSNorm, scan_layers
from hypervl_jax.models.runtime import ATTENTION_OUTPUT, RuntimeConfig
from hypervl_jax.partitioning import constrain

KEEP_ATTENTION = jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT)
REMAT_POLICIES = {
    "full": None,
    "attention": KEEP_ATTENTION,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, KEEP_ATTENTION
    ),
}


class KVCache(NamedTuple):
    """Keys and values of the positions seen so far. Axes: y layers, b rows, s slots, g key-value heads, k head width.

    Every call of the decoder writes its l positions to the slots `cache_index` … `cache_index` + l - 1 of every row. A slot
    with segment 0 is empty or padding and no real token attends to it, so prompts of different lengths share a batch,
    padded on either side, as long as `positions` count the real tokens of each row.
    """

    keys: Float[Array, "y b s g k"]
    values: Float[Array, "y b s g k"]
    segments: Int[Array, "b s"]
    positions: Int[Array, "b s"]


def empty_cache(config: DecoderConfig, rows: int, slots: int, dtype: str) -> KVCache:
    """A cache of `slots` empty slots a row, keys and values in the compute dtype."""
    shape = (config.num_layers, rows, slots, config.num_kv_heads, config.head_dim)
    integers = jnp.zeros((rows, slots), jnp.int32)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), integers, integers)


class Context(NamedTuple):
    """What every layer of one forward pass shares; the last four are None without a cache.

    Then the keys are the queries' own, and the causal order is that of the array.
    """

    cosine: Float[Array, "b l 1 k"]
    sine: Float[Array, "b l 1 k"]
    segments: Int[Array, "b l"]
    positions: Int[Array, "b l"] | None
    key_segments: Int[Array, "b s"] | None
    key_positions: Int[Array, "b s"] | None
    cache_index: Int[Array, ""] | None


class LayerCache(NamedTuple):
    """One layer's keys and values."""

    keys: Float[Array, "b s g k"]
    values: Float[Array, "b s g k"]


def rotary_angles(
    positions: Int[Array, "b l"], head_dim: int, theta: float
) -> tuple[Float[Array, "b l 1 k"], Float[Array, "b l 1 k"]]:
    """Cosine and sine of the rotary angles in float32, the half-width table repeated to the head's width."""
    frequencies = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[..., None, None] * jnp.concatenate([frequencies, frequencies])
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "b l h k"], cosine: Float[Array, "b l 1 k"], sine: Float[Array, "b l 1 k"]
) -> Float[Array, "b l h k"]:
    """Rotary position embedding (arXiv 2104.09864); channel i is paired with channel i + k/2, in float32."""
    wide = x.astype(jnp.float32)
    first, second = jnp.split(wide, 2, axis=-1)
    return (wide * cosine + jnp.concatenate([-second, first], axis=-1) * sine).astype(x.dtype)


class DecoderAttention(nn.Module):
    """Causal grouped-query attention within segments, with an RMSNorm on each head's query and key."""

    config: DecoderConfig
    runtime: RuntimeConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], cache: LayerCache | None, context: Context
    ) -> tuple[Float[Array, "b l d"], LayerCache | None]:
        """Mixed values, and this call's keys and values where there is a cache to write them to."""
        config, dtype = self.config, self.runtime.dtype
        query = self._heads(x, "query", config.num_heads, "heads")
        key = self._heads(x, "key", config.num_kv_heads, "kv_heads")
        value = self._heads(x, "value", config.num_kv_heads, "kv_heads")
        query = RMSNorm(config.rms_norm_eps, dtype, name="query_norm")(query)
        key = RMSNorm(config.rms_norm_eps, dtype, name="key_norm")(key)
        query = rotate(query, context.cosine, context.sine)
        new = LayerCache(rotate(key, context.cosine, context.sine), value)
        seen = new if cache is None else write_slots(cache, new, context.cache_index)
        mixed = attention(
            query,
            seen.keys,
            seen.values,
            query_segments=context.segments,
            key_segments=context.key_segments,
            query_positions=context.positions,
            key_positions=context.key_positions,
            causal=True,
            kernel="xla" if self.is_initializing() else self.runtime.attention,
        )
        shape = (config.num_heads, config.head_dim, config.hidden_size)
        output = Linear(shape, ("heads", "head_dim", "embed"), dtype, inputs=2, use_bias=False, name="output")
        return output(mixed), None if cache is None else new

    def _heads(self, x: Float[Array, "b l d"], name: str, heads: int, axis: str) -> Float[Array, "b l h k"]:
        shape = (self.config.hidden_size, heads, self.config.head_dim)
        linear = Linear(shape, ("embed", axis, "head_dim"), self.runtime.dtype, use_bias=False, name=name)
        return constrain(linear(x), "rows", "length", f"activation_{axis}", None)


def write_slots(cache: LayerCache, new: LayerCache, index: Int[Array, ""]) -> LayerCache:
    """`cache` with `new` in the slots from `index` on."""
    write = lambda old, part: jax.lax.dynamic_update_slice_in_dim(old, part.astype(old.dtype), index, axis=1)
    return LayerCache(write(cache.keys, new.keys), write(cache.values, new.values))


class DecoderMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) · up(x))."""

    config: DecoderConfig
    runtime: RuntimeConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """Same shape as `x`."""
        d, inner = self.config.hidden_size, self.config.intermediate_size
        gate, up = (
            Linear((d, inner), ("embed", "mlp"), self.runtime.dtype, use_bias=False, name=name)(x)
            for name in ("gate", "up")
        )
        gated = constrain(jax.nn.silu(gate) * up, "rows", "length", "activation_mlp")
        return Linear((inner, d), ("mlp", "embed"), self.runtime.dtype, use_bias=False, name="down")(gated)


class DecoderLayer(nn.Module):
    """A pre-norm decoder layer."""

    config: DecoderConfig
    runtime: RuntimeConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], cache: LayerCache | None, context: Context
    ) -> tuple[Float[Array, "b l d"], LayerCache | None]:
        """The layer's output, and its new keys and values where there is a cache."""
        eps, dtype = self.config.rms_norm_eps, self.runtime.dtype
        normed = RMSNorm(eps, dtype, name="attention_norm")(x)
        attended, new = DecoderAttention(self.config, self.runtime, name="attention")(normed, cache, context)
        x = x + attended
        x = x + DecoderMLP(self.config, self.runtime, name="mlp")(RMSNorm(eps, dtype, name="mlp_norm")(x))
        return constrain(x, "rows", "length", "activation_embed"), new


class Decoder(nn.Module):
    """Token embeddings and the decoder's layers; `head_weights` and `logits` make the head."""

    config: DecoderConfig
    runtime: RuntimeConfig

    def setup(self) -> None:
        """Declares the parameters; the layers share one scanned tree."""
        config, runtime = self.config, self.runtime
        table = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocabulary", "embed"))
        self.embedding = self.param("embedding", table, (config.vocab_size, config.hidden_size))
        if not config.tie_embeddings:
            head = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed", "vocabulary"))
            self.head = self.param("head", head, (config.hidden_size, config.vocab_size))
        layer = DecoderLayer
        if runtime.decoder_remat != "none":
            layer = nn.remat(DecoderLayer, policy=REMAT_POLICIES[runtime.decoder_remat], prevent_cse=False)
        self.layers = scan_layers(layer, config.num_layers, (0, nn.broadcast))(config, runtime)
        self.final_norm = RMSNorm(config.rms_norm_eps, runtime.dtype)

    def embed(self, tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """Token embeddings in the compute dtype."""
        # Gathered over fsdp first: a lookup in a table split along d makes the partitioner replicate all rows.
        table = constrain(self.embedding.astype(self.runtime.dtype), "vocabulary", "activation_embed")
        rows = jnp.take(table, constrain(tokens, "rows", "length"), axis=0)
        return constrain(rows, "rows", "length", "activation_embed")

    def __call__(
        self,
        embeddings: Float[Array, "b l d"],
        segments: Int[Array, "b l"],
        positions: Int[Array, "b l"],
        cache: KVCache | None = None,
        cache_index: int | Int[Array, ""] | None = None,
    ) -> Any:
        """Hidden states after the final norm.

        Args:
            embeddings: what `embed` returned, visual tokens merged in.
            segments: 0 is padding; a position attends only within its segment.
            positions: count the tokens of each segment from 0; they set the rotary angles, and with a cache the causal
                order. Without one that is the array's, the same in rows whose segments keep the order of their tokens.
            cache: keys and values of earlier calls. Prefill is a call with an empty cache at index 0, decoding a call of
                length 1 at the next slot.
            cache_index: first slot to write, the same for all rows; may be traced. `cache_index` + l must not exceed the
                cache's slots (a traced index cannot be checked; XLA would clamp it and overwrite earlier slots).

        Returns:
            hidden [b, l, d]; with a cache (hidden, the cache with this call written in).
        """
        angles = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        if cache is None:
            context = Context(*angles, segments, None, None, None, None)
            hidden, _ = self.layers(embeddings.astype(self.runtime.dtype), None, context)
            return self.final_norm(hidden)
        write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), cache_index, 1)
        key_segments, key_positions = write(cache.segments, segments), write(cache.positions, positions)
        context = Context(*angles, segments, positions, key_segments, key_positions, jnp.asarray(cache_index))
        layers = LayerCache(cache.keys, cache.values)
        hidden, new = self.layers(embeddings.astype(self.runtime.dtype), layers, context)
        # The layers return only what they wrote, so that a donated cache is updated in place here.
        keys, values = jax.vmap(write_slots, (0, 0, None))(layers, new, context.cache_index)
        return self.final_norm(hidden), KVCache(keys, values, key_segments, key_positions)


def head_weights(decoder_params: Mapping[str, Any]) -> Float[Array, "d n"]:
    """The output head of a decoder's parameters: the transposed embedding where the head is tied."""
    return decoder_params["head"] if "head" in decoder_params else decoder_params["embedding"].T


def logits(hidden: Float[Array, "... d"], weights: Float[Array, "d n"]) -> Float[Array, "... n"]:
    """Logits in float32; the product is formed in the dtype of `hidden` with float32 accumulation."""
    return jnp.matmul(hidden, weights.astype(hidden.dtype), preferred_element_type=jnp.float32)
