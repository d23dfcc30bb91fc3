"""HyperVL written for edge runtimes: static shapes, unrolled layers, operations that NPU compilers take.

    tile ─► encoder (tower, projector of one branch) ─► features      proxy, longest side ─► compressor ─► α
    ids ─► embedder ─► embeddings + rotary tables + mask + cache ─► decoder ─► new keys and values, logits

Every `Graph` computes what the Flax module of its parameters computes (float32), and shares their memory. What it keeps to:
no loop, no array of more than five axes, attention of the towers in groups of `HEAD_GROUP` heads, so that the scores of a
group fit the fast memory of an NPU, and a cache that is only read: the runtime writes the returned keys and values
(`HostCache`), because compilers for NPUs take no update of more than one position inside a graph.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Float32, Int

from hypervl_jax.architecture import (
    DECODER,
    CompressorConfig,
    DecoderConfig,
    HyperVLConfig,
    VisionConfig,
    projector_part,
    vision_part,
)
from hypervl_jax.mobilenet import Block, Convolution, blocks, head, stem
from hypervl_jax.models.compressor import ACTIVATIONS, GROUP_NORM_EPS
from hypervl_jax.models.qwen3 import rotary_angles
from hypervl_jax.vision.pixels import PIXEL_MEAN, PIXEL_STD
from hypervl_jax.vision.resolution import alpha_from_prediction
from tools.quantisation import Precision, QuantisedMatrix, quantise_weights

HEAD_GROUP = 2
"""Heads of a tower that attend together: with 16-bit activations all at once overflow the fast memory of a Snapdragon NPU."""

MASKED_SCORE = -512.0
"""Added to the score of a pair that may not attend. Next to any allowed score within ±400 its weight is exactly 0 in float32,
and the range of the sum is small enough for 16-bit activations, where -1e4 would leave steps of 0.15 to the real scores."""

GELU = "aten.gelu.default"
"""Name under which the converter knows GELU as one operation; written out it becomes sixty."""

Weights = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Graph:
    """A function of static shapes.

    Attributes:
        name: of the part, and of its signature in an artifact.
        function: (weights, *inputs) -> outputs, traceable.
        weights: float32 arrays by name, views of the model's own; matrices are [outputs, inputs]. Whole numbers only for a converter.
        inputs: shapes and dtypes by name, in order.
        outputs: names, in order.
    """

    name: str
    function: Callable[..., tuple[Array, ...]]
    weights: Weights
    inputs: Mapping[str, jax.ShapeDtypeStruct]
    outputs: tuple[str, ...]

    def __call__(self, *values: Any) -> dict[str, np.ndarray]:
        """The outputs by name, computed by JAX."""
        found = jax.jit(self.function)(dict(self.weights), *values)
        return {name: np.asarray(value) for name, value in zip(self.outputs, found, strict=True)}

    def rounded(self, precision: Precision) -> Graph:
        """The same for a converter, with matrices as whole numbers."""
        return dataclasses.replace(self, weights=quantise_weights(self.weights, precision))


# Parameter trees as flat views.


def flat_weights(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A parameter tree by path, scanned layers apart ("layers_01/…"), kernels of linear layers as [outputs, inputs]."""
    flat = {}
    for name, leaf in traverse_util.flatten_dict(dict(tree), sep="/").items():
        value = np.asarray(leaf)
        if name.startswith("layers/"):
            for layer, own in enumerate(value):
                flat[f"{layer_name(layer)}/{name.removeprefix('layers/')}"] = _as_matrix(name, own)
        else:
            flat[name] = _as_matrix(name, value)
    return flat


def layer_name(layer: int) -> str:
    """Name of a layer in flat weights."""
    return f"layers_{layer:02d}"


def _as_matrix(name: str, value: np.ndarray) -> np.ndarray:
    """A kernel as [outputs, inputs], a bias as one axis, anything else as it is."""
    if name.endswith("convolution/kernel"):
        return value
    if name.endswith("kernel"):
        inputs = value.shape[:-1] if name.endswith("output/kernel") else value.shape[:1]
        return value.reshape(math.prod(inputs), -1).T
    return value.reshape(-1) if name.endswith("bias") else value


def within(weights: Weights, prefix: str) -> dict[str, Any]:
    """The weights under a prefix, by the rest of their names."""
    start = f"{prefix}/"
    return {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}


def _under(prefix: str, weights: Weights) -> dict[str, Any]:
    return {f"{prefix}/{name}": value for name, value in weights.items()}


# Operations. Those under `jax.jit` are one operation of most runtimes: `tools.onnx_graphs` knows them by their names, and for the
# others they are written out.


@jax.jit
def linear(weights: Weights, x: Float[Array, "l c"]) -> Float[Array, "l e"]:
    """x · kernelᵀ, plus the bias where there is one."""
    y = jax.lax.dot_general(x, weights["kernel"], (((1,), (1,)), ((), ())))
    return y + weights["bias"] if "bias" in weights else y


@jax.jit
def layer_norm(weights: Weights, x: Float[Array, "l d"], eps: float) -> Float[Array, "l d"]:
    """Layer normalisation over the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    normalised = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    return normalised * weights["scale"] + weights["bias"]


@jax.jit
def rms_norm(weights: Weights, x: Float[Array, "... d"], eps: float) -> Float[Array, "... d"]:
    """Root-mean-square normalisation over the last axis."""
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps) * weights["scale"]


def gelu(x: Float[Array, "..."], approximate: str) -> Float[Array, "..."]:
    """GELU as one operation of the runtime; `approximate` is "none" (exact) or "tanh"."""

    def written_out(value: Array, *, approximate: str) -> Array:
        return jax.nn.gelu(value, approximate=approximate == "tanh")

    return jax.lax.composite(written_out, name=GELU, version=1)(x, approximate=approximate)


def merge_squares(features: Float[Array, "p c"], factor: int) -> Float[Array, "v e"]:
    """Each `factor` × `factor` square of a square grid as one row, in the order (row offset, column offset, c).

    With pixels it cuts patches, with patches it is the pixel shuffle; four axes at most.
    """
    p, c = features.shape
    cells = math.isqrt(p) // factor
    grid = features.reshape(cells, factor, cells, factor * c).transpose(0, 2, 1, 3)
    return grid.reshape(cells * cells, factor * factor * c)


# The encoder of one branch.


def encoder_graph(config: HyperVLConfig, branch: str, params: Mapping[str, Any]) -> Graph:
    """One tile [1, s, s, 3] of normalised pixels to its visual tokens "features" [1, v, d]: tower and projector.

    Normalising is not a part of the graph: a subtraction at the very start does not run with 16-bit activations. It is not folded into
    the patch embedding either: padding, which is 0.004 here, would be the difference of two large sums, one of them of rounded weights.
    With random weights at the real size that left 4 dB to dynamic int8.
    """
    vision, side = config.vision(branch), config.tiling.tile_size
    weights = _under("tower", flat_weights(params[vision_part(branch)]))
    weights |= _under("projector", flat_weights(params[projector_part(branch)]))
    inputs = {"tile": jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)}
    function = functools.partial(
        _encode, vision=vision, shuffle=config.tiling.shuffle, eps=config.projector.layer_norm_eps
    )
    return Graph(f"encoder_{branch}", function, weights, inputs, ("features",))


def _encode(
    weights: Weights, tile: Float[Array, "1 s s 3"], *, vision: VisionConfig, shuffle: int, eps: float
) -> tuple[Float[Array, "1 v d"]]:
    features = encode_patches(within(weights, "tower"), tile, vision)
    return (project(within(weights, "projector"), features, shuffle, eps)[None],)


def project(weights: Weights, features: Float[Array, "p d"], shuffle: int, eps: float) -> Float[Array, "v d"]:
    """A projector: patches of a tile to its visual tokens."""
    x = merge_squares(features, shuffle)
    if "norm/scale" in weights:
        x = layer_norm(within(weights, "norm"), x, eps)
    x = gelu(linear(within(weights, "first"), x), "none")
    return linear(within(weights, "second"), x)


def encode_patches(weights: Weights, tile: Float[Array, "1 s s 3"], vision: VisionConfig) -> Float[Array, "p d"]:
    """A vision tower: one tile of normalised pixels to the features of its patches."""
    x = linear(within(weights, "patch_embedding"), merge_squares(tile.reshape(-1, 3), vision.patch_size))
    x = x + weights["position_embedding"]
    eps = vision.layer_norm_eps
    for layer in range(vision.num_layers):
        own = within(weights, layer_name(layer))
        x = x + _tower_attention(within(own, "attention"), layer_norm(within(own, "attention_norm"), x, eps), vision)
        hidden = linear(within(own, "mlp/up"), layer_norm(within(own, "mlp_norm"), x, eps))
        x = x + linear(within(own, "mlp/down"), gelu(hidden, "tanh"))
    return layer_norm(within(weights, "final_norm"), x, eps)


def _tower_attention(weights: Weights, x: Float[Array, "p d"], vision: VisionConfig) -> Float[Array, "p d"]:
    """Attention among all patches, `HEAD_GROUP` heads after another."""
    query, key, value = (
        linear(within(weights, name), x).reshape(-1, vision.num_heads, vision.head_dim).transpose(1, 0, 2)
        for name in ("query", "key", "value")
    )
    mixed = []
    for first in range(0, vision.num_heads, HEAD_GROUP):
        q, k, v = (
            jax.lax.slice_in_dim(heads, first, min(first + HEAD_GROUP, vision.num_heads))
            for heads in (query, key, value)
        )
        scores = jnp.matmul(q, k.transpose(0, 2, 1)) * vision.head_dim**-0.5
        # Joined head by head, the groups' products would be made one by the converter, over the weights of all heads at once.
        mixed.append(jnp.matmul(softmax(scores), v).transpose(1, 0, 2).reshape(x.shape[0], -1))
    return linear(within(weights, "output"), jnp.concatenate(mixed, axis=1))


@jax.jit
def softmax(scores: Float[Array, "..."]) -> Float[Array, "..."]:
    """Softmax over the last axis, in the form that the converter knows as one operation."""
    exponentials = jnp.exp(scores - scores.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


# The compressor.


def compressor_graph(config: CompressorConfig, params: Mapping[str, Any]) -> Graph:
    """A proxy [1, s, s, 3], float32 in [0, 1], and the image's longest side in pixels [1] to "log_area" and "alpha", [1] each."""
    side = config.proxy_size
    inputs = {
        "proxy": jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32),
        "longest_side": jax.ShapeDtypeStruct((1,), jnp.float32),
    }
    function = functools.partial(_compress, config=config)
    return Graph("compressor", function, flat_weights(params), inputs, ("log_area", "alpha"))


def _compress(
    weights: Weights, proxy: Float[Array, "1 s s 3"], longest_side: Float[Array, "1"], *, config: CompressorConfig
) -> tuple[Float[Array, "1"], Float[Array, "1"]]:
    x = (proxy - PIXEL_MEAN) / PIXEL_STD
    x = _convolution(within(weights, "stem"), x, config, stem(config))
    for number, block in enumerate(blocks(config)):
        x = _bottleneck(within(weights, f"bottleneck_{number}"), x, block, config)
    x = _convolution(within(weights, "head"), x, config, head(config))
    flat = x.reshape(-1, x.shape[-1])
    # One row of scores: a softmax over the last axis, and a product that is the weighted sum.
    pooling = softmax(linear(within(weights, "pooling/score"), flat).reshape(1, -1))
    hidden = ACTIVATIONS["hard_swish"](linear(within(weights, "hidden"), pooling @ flat))
    log_area = linear(within(weights, "output"), hidden)[:, 0]
    return log_area, alpha_from_prediction(log_area, longest_side, config.proxy_size)


def _bottleneck(
    weights: Weights, x: Float[Array, "1 r q c"], block: Block, config: CompressorConfig
) -> Float[Array, "1 r q e"]:
    inputs, (*before, last) = x, block.convolutions
    for found in before:
        x = _convolution(within(weights, found.name), x, config, found)
    if block.squeezed:
        mean = x.mean((1, 2))
        squeezed = jax.nn.relu(linear(within(weights, "squeeze_excite/squeeze"), mean))
        x = x * jax.nn.hard_sigmoid(linear(within(weights, "squeeze_excite/excite"), squeezed))[:, None, None]
    x = _convolution(within(weights, last.name), x, config, last)
    return inputs + x if block.residual else x


def _convolution(
    weights: Weights,
    x: Float[Array, "1 r q c"],
    config: CompressorConfig,
    found: Convolution,
) -> Float[Array, "1 r q e"]:
    """Convolution, norm, activation."""
    margin = (found.kernel - 1) // 2
    x = jax.lax.conv_general_dilated(
        x,
        weights["convolution/kernel"],
        (found.stride, found.stride),
        ((margin, margin), (margin, margin)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=found.groups,
    )
    if config.norm == "group":
        x = _normalise_groups(x, config.group_size)
    x = x * weights["norm/scale"] + weights["norm/bias"]
    return ACTIVATIONS[found.activation](x) if found.activation else x


def _normalise_groups(x: Float[Array, "1 r q c"], group_size: int) -> Float[Array, "1 r q c"]:
    grouped = x.reshape(-1, x.shape[-1] // group_size, group_size)
    centred = grouped - grouped.mean((0, 2), keepdims=True)
    variance = jnp.square(centred).mean((0, 2), keepdims=True)
    return (centred * jax.lax.rsqrt(variance + GROUP_NORM_EPS)).reshape(x.shape)


# Embedder and decoder.


def embedder_graph(params: Mapping[str, Any], length: int, table: QuantisedMatrix | None = None) -> Graph:
    """Ids [1, l] (int32) to "embeddings" [1, l, d], looked up in `table`, or in the parameters when None."""
    weights = {"embedding": np.asarray(params[DECODER]["embedding"])} if table is None else _table_weights(table)
    inputs = {"tokens": jax.ShapeDtypeStruct((1, length), jnp.int32)}
    return Graph(f"embedder_{length}", _embed, weights, inputs, ("embeddings",))


def _table_weights(table: QuantisedMatrix) -> dict[str, np.ndarray]:
    return {"embedding": table.values, "scale": table.scale[:, None]}


def _embed(weights: Weights, tokens: Int[Array, "1 l"]) -> tuple[Float[Array, "1 l d"]]:
    # Ids are the tokenizer's own, so nothing has to be clipped or filled.
    rows = weights["embedding"].at[tokens].get(mode="promise_in_bounds").astype(jnp.float32)
    return (rows * weights["scale"].at[tokens].get(mode="promise_in_bounds") if "scale" in weights else rows,)


def decoder_weights(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The decoder's layers, final norm and head, as far as they are there; a tied head is the embedding, [outputs, inputs] as it stands."""
    tree = dict(params[DECODER])
    embedding, head = tree.pop("embedding", None), tree.pop("head", None)
    flat = flat_weights(tree)
    if head is not None:
        flat["head/kernel"] = np.asarray(head).T
    elif embedding is not None:
        flat["head/kernel"] = np.asarray(embedding)
    return flat


def decoder_graph(config: DecoderConfig, weights: Weights, length: int, slots: int, head: bool) -> Graph:
    """`length` positions after those in a cache of `slots` slots; `weights` are those of `decoder_weights`.

    Inputs: "embeddings" [1, l, d]; "cosine" and "sine" [1, l, k], rows of the rotary tables; "mask" [1, 1, l, slots + l], added
    to the scores, cache first; then for each layer "key_00" and "value_00" [1, g, slots, k].
    Outputs: for each layer the new "key_00" and "value_00" [1, g, l, k]; last, with a head, "logits" [1, l, n], else "hidden"
    [1, l, d], after the final norm.
    """
    used = {name: value for name, value in weights.items() if head or name != "head/kernel"}
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    inputs = {"embeddings": shape((1, length, config.hidden_size))}
    inputs |= {name: shape((1, length, config.head_dim)) for name in ("cosine", "sine")}
    inputs |= {"mask": shape((1, 1, length, slots + length))}
    names = tuple(cache_names(config))
    inputs |= {name: shape((1, config.num_kv_heads, slots, config.head_dim)) for name in names}
    outputs = (*names, "logits" if head else "hidden")
    name = "decode" if length == 1 else f"prefill_{length}"
    return Graph(name, functools.partial(_decode, config=config), used, inputs, outputs)


def cache_names(config: DecoderConfig) -> Iterator[str]:
    """Names of the cache's arrays in order: each layer's keys, then its values."""
    for layer in range(config.num_layers):
        yield f"key_{layer:02d}"
        yield f"value_{layer:02d}"


class _Step(NamedTuple):
    """What the layers of one call share."""

    cosine: Float[Array, "l k"]
    sine: Float[Array, "l k"]
    mask: Float[Array, "1 1 l s"]
    config: DecoderConfig


def _decode(
    weights: Weights,
    embeddings: Float[Array, "1 l d"],
    cosine: Float[Array, "1 l k"],
    sine: Float[Array, "1 l k"],
    mask: Float[Array, "1 1 l s"],
    *cache: Float[Array, "1 g s k"],
    config: DecoderConfig,
) -> tuple[Array, ...]:
    step, written, x = _Step(cosine, sine, mask, config), [], embeddings[0]
    eps = config.rms_norm_eps
    for layer in range(config.num_layers):
        own, (keys, values) = within(weights, layer_name(layer)), cache[2 * layer : 2 * layer + 2]
        normed = rms_norm(within(own, "attention_norm"), x, eps)
        attended, key, value = _decoder_attention(within(own, "attention"), normed, keys, values, step)
        x, written = x + attended, [*written, key[None], value[None]]
        x = x + _swiglu(within(own, "mlp"), rms_norm(within(own, "mlp_norm"), x, eps))
    x = rms_norm(within(weights, "final_norm"), x, eps)
    return (*written, (linear(within(weights, "head"), x) if "head/kernel" in weights else x)[None])


def _decoder_attention(
    weights: Weights,
    x: Float[Array, "l d"],
    keys: Float[Array, "1 g s k"],
    values: Float[Array, "1 g s k"],
    step: _Step,
) -> tuple[Float[Array, "l d"], Float[Array, "g l k"], Float[Array, "g l k"]]:
    """Mixed values, and the new keys and values. All queries of a key-value head are rows of one matrix."""
    config, length = step.config, x.shape[0]
    groups, width, eps = config.num_kv_heads, config.head_dim, config.rms_norm_eps
    # Heads are rows while they are normalised: of three axes the NPU's float16 norm (QAIRT 2.51) makes wrong numbers.
    query, key, value = (linear(within(weights, name), x).reshape(-1, width) for name in ("query", "key", "value"))
    query = rms_norm(within(weights, "query_norm"), query, eps)
    key = rms_norm(within(weights, "key_norm"), key, eps)
    query, key, value = (heads.reshape(length, -1, width).transpose(1, 0, 2) for heads in (query, key, value))
    query, key = _rotate(query, step), _rotate(key, step)
    seen = jnp.concatenate([keys[0], key], axis=1)
    scores = jnp.matmul(query.reshape(groups, -1, width), seen.transpose(0, 2, 1)) * width**-0.5
    masked = scores.reshape(groups, -1, length, seen.shape[1]) + step.mask
    mixed = jnp.matmul(softmax(masked).reshape(scores.shape), jnp.concatenate([values[0], value], axis=1))
    joined = mixed.reshape(-1, length, width).transpose(1, 0, 2).reshape(length, -1)
    return linear(within(weights, "output"), joined), key, value


def _rotate(x: Float[Array, "h l k"], step: _Step) -> Float[Array, "h l k"]:
    """Rotary position embedding; channel i is paired with channel i + k/2."""
    half = x.shape[-1] // 2
    first, second = jax.lax.slice_in_dim(x, 0, half, axis=2), jax.lax.slice_in_dim(x, half, 2 * half, axis=2)
    return x * step.cosine + jnp.concatenate([-second, first], axis=-1) * step.sine


def _swiglu(weights: Weights, x: Float[Array, "l d"]) -> Float[Array, "l d"]:
    gate = linear(within(weights, "gate"), x)
    return linear(within(weights, "down"), gate * jax.nn.sigmoid(gate) * linear(within(weights, "up"), x))


# What the runtime keeps between calls of the decoder.


def step_mask(written: int, real: int, length: int, slots: int) -> Float32[np.ndarray, "1 1 l s"]:
    """What is added to the scores of `length` new positions over `slots` cached ones and themselves.

    Of the cache the first `written` are seen, of the new positions those not after the query's own and below `real`. Rows of
    padding see what the last real one sees.
    """
    rows, new = np.arange(length)[:, None], np.arange(length)[None]
    seen = np.concatenate([np.tile(np.arange(slots) < written, (length, 1)), (new <= rows) & (new < real)], axis=1)
    return np.where(seen, 0, MASKED_SCORE).astype(np.float32)[None, None]


class HostCache:
    """Keys and values of one conversation in host memory, and the other inputs that follow from how many there are."""

    def __init__(self, config: DecoderConfig, slots: int) -> None:
        shape = (1, config.num_kv_heads, slots, config.head_dim)
        self.arrays = {name: np.zeros(shape, np.float32) for name in cache_names(config)}
        self.slots, self.written = slots, 0
        cosine, sine = rotary_angles(jnp.arange(slots)[None], config.head_dim, config.rope_theta)
        self._cosine, self._sine = np.asarray(cosine)[:, :, 0], np.asarray(sine)[:, :, 0]

    def inputs(self, embeddings: Float32[np.ndarray, "1 l d"], real: int) -> dict[str, np.ndarray]:
        """Inputs of a decoder graph by name, in its order, for embeddings of which the first `real` positions are no padding.

        Raises `ValueError` when the cache has no room for them.
        """
        self._check(real)
        length = embeddings.shape[1]
        # Padding may stand beyond the last slot; its angles are never seen.
        places = np.minimum(self.written + np.arange(length), self.slots - 1)
        mask = step_mask(self.written, real, length, self.slots)
        tables = {"cosine": self._cosine[:, places], "sine": self._sine[:, places]}
        return {"embeddings": embeddings, **tables, "mask": mask, **self.arrays}

    def write(self, outputs: Mapping[str, np.ndarray], real: int) -> None:
        """Appends the first `real` new keys and values. Raises `ValueError` when there is no room for them."""
        self._check(real)
        for name, array in self.arrays.items():
            array[:, :, self.written : self.written + real] = outputs[name][:, :, :real]
        self.written += real

    def _check(self, real: int) -> None:
        if self.written + real > self.slots:
            raise ValueError(f"{self.written + real} positions do not fit the {self.slots} slots of the cache")
