"""The graphs of `tools.edge_graphs` in the form that the LiteRT-LM engine calls.

    token_ids ─► embedder ─► embeddings ─┐
    images ─► tower ─► soft_tokens ─► adapter ─► mm_embedding ─┴─► prefill_N, decode: the cache goes in and comes out whole

The engine keeps the cache and gives positions and a mask; rotary tables and the place of the new keys and values follow from the positions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hypervl_jax.architecture import DecoderConfig, HyperVLConfig
from hypervl_jax.models.qwen3 import rotary_angles
from hypervl_jax.vision.pixels import PIXEL_MEAN, PIXEL_STD
from tools import edge_graphs
from tools.edge_graphs import MASKED_SCORE, Graph, Weights, within
from tools.quantisation import QuantisedMatrix


def embedder_graph(params: Mapping[str, Any], table: QuantisedMatrix | None = None) -> Graph:
    """One id "token_ids" [1, 1] to "embeddings" [1, 1, d]. Ids below 0, which stand for visual tokens, give the row of id 0."""
    graph = edge_graphs.embedder_graph(params, 1, table)
    function = lambda weights, tokens: graph.function(weights, jnp.maximum(tokens, 0))
    inputs = {"token_ids": graph.inputs["tokens"]}
    return dataclasses.replace(graph, name="embedder", function=function, inputs=inputs)


def vision_graphs(config: HyperVLConfig, branch: str, params: Mapping[str, Any]) -> tuple[Graph, Graph]:
    """The encoder of a branch in two files: "images" [1, s, s, 3] in [0, 1] to "features" [1, p, d], those to "mm_embedding" [1, v, d]."""
    whole, vision = edge_graphs.encoder_graph(config, branch, params), config.vision(branch)
    patches = (config.tiling.tile_size // vision.patch_size) ** 2
    soft = {"soft_tokens": jax.ShapeDtypeStruct((1, patches, vision.hidden_size), jnp.float32)}
    # The engine gives pixels in [0, 1].
    tower = lambda weights, tile: (edge_graphs.encode_patches(weights, (tile - PIXEL_MEAN) / PIXEL_STD, vision)[None],)
    shuffle, eps = config.tiling.shuffle, config.projector.layer_norm_eps
    project = lambda weights, features: (edge_graphs.project(weights, features[0], shuffle, eps)[None],)
    first, second = within(whole.weights, "tower"), within(whole.weights, "projector")
    return (
        Graph(f"vision_{config.tiling.tile_size}", tower, first, {"images": whole.inputs["tile"]}, ("features",)),
        Graph("vision_adapter", project, second, soft, ("mm_embedding",)),
    )


def decoder_graph(config: DecoderConfig, weights: Weights, length: int, slots: int, head: bool) -> Graph:
    """`length` positions that are written into a cache of `slots` slots; `weights` are those of `edge_graphs.decoder_weights`.

    Inputs: "embeddings" [1, l, d]; "input_pos" [l] int32, rising by one; "mask" [1, 1, l, slots], added to the scores; for each layer
    "kv_cache_k_0" [1, g, slots, k] and "kv_cache_v_0" [1, g, k, slots].
    Outputs: the cache; last, with a head, "logits" [1, l, n].
    """
    inner = edge_graphs.decoder_graph(config, weights, length, slots, head)
    cache = {name: inner.inputs[own] for name, own in zip(cache_names(config), cache_keys(config), strict=True)}
    for name, shape in cache.items():
        if name.startswith("kv_cache_v"):
            cache[name] = jax.ShapeDtypeStruct((1, shape.shape[1], shape.shape[3], slots), jnp.float32)
    inputs = {
        "embeddings": inner.inputs["embeddings"],
        "input_pos": jax.ShapeDtypeStruct((length,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((1, 1, length, slots), jnp.float32),
        **cache,
    }
    outputs = (*cache, "logits") if head else tuple(cache)
    function = functools.partial(_decode, inner=inner, config=config, head=head)
    return Graph(inner.name, function, inner.weights, inputs, outputs)


def cache_names(config: DecoderConfig) -> Iterator[str]:
    """The engine's names of the cache's arrays: each layer's keys, then its values."""
    for layer in range(config.num_layers):
        yield f"kv_cache_k_{layer}"
        yield f"kv_cache_v_{layer}"


def cache_keys(config: DecoderConfig) -> list[str]:
    """Our names of the same arrays."""
    return list(edge_graphs.cache_names(config))


def _decode(
    weights: Weights,
    embeddings: Float[Array, "1 l d"],
    positions: Int[Array, "l"],
    mask: Float[Array, "1 1 l s"],
    *cache: Array,
    inner: Graph,
    config: DecoderConfig,
    head: bool,
) -> tuple[Array, ...]:
    """The graph that returns slices of the cache, between what the engine gives and what it wants."""
    length, first = embeddings.shape[1], positions[0]
    cosine, sine = (table[:, :, 0] for table in rotary_angles(positions[None], config.head_dim, config.rope_theta))
    # The engine's mask says of every slot, those of the new positions included; ours says of the cached ones first.
    seen = jnp.maximum(mask, MASKED_SCORE)
    new = jax.lax.dynamic_slice(seen, (0, 0, 0, first), (1, 1, length, length))
    cached = jnp.where(jnp.arange(mask.shape[3]) < first, seen, MASKED_SCORE)
    halves = [array if number % 2 == 0 else array.transpose(0, 1, 3, 2) for number, array in enumerate(cache)]
    outputs = inner.function(weights, embeddings, cosine, sine, jnp.concatenate([cached, new], axis=3), *halves)
    written = tuple(
        jax.lax.dynamic_update_slice(old, part, (0, 0, first, 0))
        if number % 2 == 0
        else jax.lax.dynamic_update_slice(old, part.transpose(0, 1, 3, 2), (0, 0, 0, first))
        for number, (old, part) in enumerate(zip(cache, outputs, strict=False))
    )
    return (*written, outputs[-1]) if head else written
