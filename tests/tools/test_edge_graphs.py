"""The static graphs compute what the Flax modules compute, in operations that NPU compilers take."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax.architecture import MOBILENET_V3_SMALL, CompressorConfig, HyperVLConfig, ProjectorConfig
from hypervl_jax.models.compressor import Compressor
from hypervl_jax.models.compressor_io import abstract_compressor
from hypervl_jax.models.hypervl import HyperVL
from hypervl_jax.models.qwen3 import Decoder, head_weights, logits
from hypervl_jax.training.state import abstract_parameters
from hypervl_jax.vision.pixels import normalise_pixels
from hypervl_jax.vision.resolution import alpha_from_prediction
from tests.small import MOBILENET_V4_FORMS, small_architecture
from tests.tools.runs import random_like
from tools import edge_graphs
from tools.edge_graphs import Graph, HostCache
from tools.golden import RUNTIME

SMALL = small_architecture()
LARGEST_RANK = 5
UNSUPPORTED = {"scan", "while", "cond", "scatter", "dynamic_update_slice", "sort", "gather"}


def parameters(config: HyperVLConfig) -> dict:
    return random_like(abstract_parameters(config, RUNTIME)[0])


@pytest.fixture(scope="module")
def params() -> dict:
    return parameters(SMALL)


def primitives(jaxpr: jax.extend.core.Jaxpr) -> list[tuple[str, int]]:
    """Name and largest rank of every operation, those of inner functions too."""
    found = []
    for equation in jaxpr.eqns:
        found.append((equation.primitive.name, max(len(v.aval.shape) for v in equation.outvars)))
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                found += primitives(value.jaxpr)
    return found


def assert_static(graph: Graph) -> None:
    operations = primitives(jax.make_jaxpr(graph.function)(dict(graph.weights), *graph.inputs.values()).jaxpr)
    assert max(rank for _, rank in operations) <= LARGEST_RANK
    assert not {name for name, _ in operations} & UNSUPPORTED


@pytest.mark.parametrize(("branch", "layer_norm"), [("base", True), ("large", False)])
def test_the_encoder_is_the_tower_and_the_projector(branch: str, layer_norm: bool) -> None:
    config = dataclasses.replace(SMALL, projector=ProjectorConfig(layer_norm=layer_norm))
    params = parameters(config)
    graph = edge_graphs.encoder_graph(config, branch, params)
    assert_static(graph)
    side = config.tiling.tile_size
    tile = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), dtype=np.uint8)
    expected = HyperVL(config, RUNTIME).apply({"params": params}, tile[None], branch, method="encode_chunk")
    found = graph(normalise_pixels(tile))["features"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_heads_that_do_not_fill_the_last_group_attend_too() -> None:
    base = dataclasses.replace(SMALL.vision_base, hidden_size=24, num_heads=3)
    config = dataclasses.replace(SMALL, vision_base=base)
    params = parameters(config)
    tile = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    expected = HyperVL(config, RUNTIME).apply({"params": params}, tile[None], "base", method="encode_chunk")
    found = edge_graphs.encoder_graph(config, "base", params)(normalise_pixels(tile))["features"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "config",
    [
        SMALL.compressor,
        CompressorConfig(proxy_size=32, stages=MOBILENET_V3_SMALL[:4], head_width=64, norm="affine"),
        CompressorConfig(proxy_size=32, stages=MOBILENET_V4_FORMS, head_width=64, norm="affine"),
    ],
)
def test_the_compressor_gives_the_module_s_output_and_alpha(config: CompressorConfig) -> None:
    params = random_like(abstract_compressor(config))
    graph = edge_graphs.compressor_graph(config, params)
    assert_static(graph)
    proxy = np.random.default_rng(0).integers(0, 256, (1, config.proxy_size, config.proxy_size, 3), dtype=np.uint8)
    expected = np.asarray(Compressor(config).apply({"params": params}, proxy))
    found = graph(proxy.astype(np.float32) / 255, np.float32([300]))
    np.testing.assert_allclose(found["log_area"], expected, atol=1e-4)
    np.testing.assert_allclose(found["alpha"], alpha_from_prediction(expected, 300, config.proxy_size), atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_prefill_and_decoding_through_the_host_s_cache_are_the_decoder(tied: bool) -> None:
    config = dataclasses.replace(SMALL.decoder, tie_embeddings=tied)
    params, slots = parameters(dataclasses.replace(SMALL, decoder=config)), 16
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 11)
    cache, found, at = HostCache(config, slots), [], 0
    for length, real in [(8, 8), (4, 1), (1, 1), (1, 1)]:
        ids = np.zeros((1, length), np.int32)
        ids[0, :real] = tokens[at : at + real]
        embeddings = edge_graphs.embedder_graph(params, length)(ids)["embeddings"]
        graph = edge_graphs.decoder_graph(config, edge_graphs.decoder_weights(params), length, slots, head=True)
        inputs = cache.inputs(embeddings, real)
        assert {name: value.shape for name, value in inputs.items()} == {n: v.shape for n, v in graph.inputs.items()}
        assert list(inputs) == list(graph.inputs)
        outputs = graph(*inputs.values())
        cache.write(outputs, real)
        found.append(outputs["logits"][0, :real])
        at += real
    module, row = Decoder(config, RUNTIME), np.ones((1, len(tokens)), np.int32)
    tree = {"params": params["decoder"]}
    embedded = module.apply(tree, tokens[None], method="embed")
    hidden = module.apply(tree, embedded, row, np.arange(len(tokens))[None])
    expected = logits(hidden[0], head_weights(params["decoder"]))
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=1e-4, atol=1e-5 * float(jnp.abs(expected).max()))
    with pytest.raises(ValueError, match="17 positions do not fit the 16 slots"):
        cache.write(outputs, slots + 1 - at)


@pytest.mark.parametrize(("length", "head"), [(4, False), (1, True)])
def test_decoder_graphs_hold_only_operations_of_static_shape(params: dict, length: int, head: bool) -> None:
    graph = edge_graphs.decoder_graph(SMALL.decoder, edge_graphs.decoder_weights(params), length, 8, head=head)
    assert_static(graph)
    assert graph.outputs[-1] == ("logits" if head else "hidden")


def test_weights_are_views_of_the_model_s_arrays(params: dict) -> None:
    layers = params["decoder"]["layers"]
    found = edge_graphs.decoder_weights(params)
    for name in ("mlp/up", "attention/output"):
        kernel = np.asarray(layers[name.split("/")[0]][name.split("/")[1]]["kernel"])
        assert np.shares_memory(found[f"layers_01/{name}/kernel"], kernel)
    up = np.asarray(layers["mlp"]["up"]["kernel"])
    np.testing.assert_array_equal(found["layers_01/mlp/up/kernel"], up[1].T)
    assert np.shares_memory(found["head/kernel"], np.asarray(params["decoder"]["embedding"]))


def test_the_mask_is_the_one_that_is_drawn() -> None:
    mask = edge_graphs.step_mask(written=2, real=2, length=3, slots=3)[0, 0]
    drawn = ["xx.x..", "xx.xx.", "xx.xx."]
    assert ["".join("x" if value == 0 else "." for value in row) for row in mask] == drawn
