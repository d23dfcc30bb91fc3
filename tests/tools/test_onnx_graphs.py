"""Edge graphs as ONNX compute what JAX computes; in whole numbers they are near it, block scales nearer than one scale an output."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax.architecture import MOBILENET_V3_SMALL, CompressorConfig
from hypervl_jax.models.compressor_io import abstract_compressor
from hypervl_jax.training.state import abstract_parameters
from tests.small import small_architecture
from tests.tools.runs import random_like
from tools import edge_graphs
from tools.artifacts import ArtifactError
from tools.edge_graphs import Graph
from tools.edge_parity import snr
from tools.golden import RUNTIME
from tools.quantisation import PRECISIONS, BlockedMatrix, quantise, quantise_blocks

onnx = pytest.importorskip("onnx", reason="the extra 'qnn' is not installed")
pytest.importorskip("onnxruntime", reason="the extra 'qnn' is not installed")

from tools import onnx_files  # noqa: E402
from tools.onnx_graphs import onnx_graph  # noqa: E402
from tools.onnx_quantise import Range, measure, quantise_graph  # noqa: E402

SMALL = small_architecture()
WIDE = dataclasses.replace(
    SMALL, decoder=dataclasses.replace(SMALL.decoder, hidden_size=64, intermediate_size=128, head_dim=16)
)


@pytest.fixture(scope="module")
def params() -> dict:
    return random_like(abstract_parameters(SMALL, RUNTIME)[0])


@pytest.fixture(scope="module")
def wide() -> dict:
    return random_like(abstract_parameters(WIDE, RUNTIME)[0])


def inputs(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    """Ids below 100, everything else in [0, 1], the mask of a half-filled cache."""
    rng = np.random.default_rng(seed)
    feed = {
        name: rng.integers(0, 100, kind.shape).astype(np.int32)
        if kind.dtype == jnp.int32
        else rng.random(kind.shape, np.float32)
        for name, kind in graph.inputs.items()
    }
    if "mask" in feed:
        *_, length, seen = feed["mask"].shape
        feed["mask"] = edge_graphs.step_mask(4, length, length, seen - length)
    return feed


def run(graph, path: Path, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    onnx_files.save(graph, path)
    return dict(onnx_files.signature(onnx_files.open_session(path))(**feed))


def graphs(params: dict) -> dict[str, Graph]:
    table = quantise(np.asarray(params["decoder"]["embedding"]), 8)
    affine = CompressorConfig(proxy_size=32, stages=MOBILENET_V3_SMALL[:4], head_width=64, norm="affine")
    return {
        "encoder": edge_graphs.encoder_graph(SMALL, "base", params),
        "large": edge_graphs.encoder_graph(SMALL, "large", params),
        "compressor": edge_graphs.compressor_graph(
            SMALL.compressor, random_like(abstract_compressor(SMALL.compressor))
        ),
        "affine": edge_graphs.compressor_graph(affine, random_like(abstract_compressor(affine))),
        "embedder": edge_graphs.embedder_graph(params, 5),
        "table": edge_graphs.embedder_graph(params, 5, table),
        "prefill": edge_graphs.decoder_graph(SMALL.decoder, edge_graphs.decoder_weights(params), 4, 8, head=False),
        "decode": edge_graphs.decoder_graph(SMALL.decoder, edge_graphs.decoder_weights(params), 1, 8, head=True),
    }


@pytest.mark.parametrize("name", ["encoder", "large", "compressor", "affine", "embedder", "table", "prefill", "decode"])
def test_onnx_is_jax(params: dict, tmp_path: Path, name: str) -> None:
    graph = graphs(params)[name]
    feed = inputs(graph)
    written = onnx_graph(graph)
    expected, found = graph(*feed.values()), run(written, tmp_path / "graph.onnx", feed)
    assert list(found) == list(graph.outputs)
    for key, value in expected.items():
        assert np.isfinite(value).all()
        np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-5 * np.abs(value).max())
    onnx.checker.check_model(str(tmp_path / "graph.onnx"))


def test_named_functions_are_one_operation_each(params: dict) -> None:
    kinds = [node.op_type for node in onnx_graph(graphs(params)["encoder"]).nodes]
    assert (kinds.count("LayerNormalization"), kinds.count("Gemm"), kinds.count("Gelu")) == (4, 9, 2)
    assert kinds.count("Softmax") == 1
    assert not {"Sqrt", "Exp", "ReduceMax"} & set(kinds)
    decoder = [node.op_type for node in onnx_graph(graphs(params)["prefill"]).nodes]
    assert decoder.count("RMSNormalization") == 2 * 4 + 1


def test_weights_lie_beside_the_file_once_for_all_graphs(params: dict, tmp_path: Path) -> None:
    made = [edge_graphs.embedder_graph(params, length) for length in (1, 6)]
    places = onnx_files.save(onnx_graph(made[0]), tmp_path / "first.onnx")
    onnx_files.save(onnx_graph(made[1]), tmp_path / "second.onnx", places)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.onnx", "first.weights", "second.onnx"]
    feed = inputs(made[1])
    found = onnx_files.signature(onnx_files.open_session(tmp_path / "second.onnx"))(**feed)
    np.testing.assert_array_equal(found["embeddings"], made[1](*feed.values())["embeddings"])


def test_an_operation_without_a_rule_is_named() -> None:
    kind = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    graph = Graph("g", lambda weights, x: (jnp.sin(x),), {}, {"x": kind}, ("y",))
    with pytest.raises(ArtifactError, match="'sin'"):
        onnx_graph(graph)


@pytest.mark.parametrize(("precision", "least"), [("w8a16", 34), ("w4a16", 12), ("w8a8", 12)])
def test_whole_numbers_are_near_jax(wide: dict, tmp_path: Path, precision: str, least: float) -> None:
    graph = edge_graphs.decoder_graph(WIDE.decoder, edge_graphs.decoder_weights(wide), 4, 8, head=True)
    feeds = [inputs(graph, seed) for seed in range(3)]
    found = quantise_graph(onnx_graph(graph), PRECISIONS[precision], feeds)
    values = run(found, tmp_path / "whole.onnx", feeds[0])
    ratio = snr(graph(*feeds[0].values())["logits"], values["logits"])
    assert least < ratio < 70


def test_rounding_makes_good_its_own_errors() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(400, 16)) @ rng.normal(size=(16, 96)) + 0.1 * rng.normal(size=(400, 96))
    matrix = rng.normal(size=(24, 96)).astype(np.float32)

    def error(found: BlockedMatrix) -> float:
        assert np.abs(found.values).max() <= 7
        assert 1 <= found.multiples.min() <= found.multiples.max() <= 15
        steps = np.repeat(found.multiples * found.scale[:, None], 32, axis=1)
        return float(np.square(inputs @ (found.values * steps - matrix).T).mean())

    plain = error(quantise_blocks(matrix, 32))
    assert error(quantise_blocks(matrix, 32, (inputs.T @ inputs).astype(np.float32))) < plain / 4
    # Of inputs that do not go together none can make good another's error.
    alone = quantise_blocks(matrix, 32, np.eye(96, dtype=np.float32))
    np.testing.assert_array_equal(alone.values, quantise_blocks(matrix, 32).values)


def test_a_mask_takes_nothing_from_the_range_of_the_scores(params: dict) -> None:
    graph = edge_graphs.decoder_graph(SMALL.decoder, edge_graphs.decoder_weights(params), 4, 8, head=False)
    written = onnx_graph(graph)
    ranges = measure(written, [inputs(graph)])
    masked = [ranges[node.input[0]] for node in written.nodes if node.op_type == "Softmax"]
    assert len(masked) == SMALL.decoder.num_layers
    assert all(-50 < found.low < found.high < 50 for found in masked)
    assert ranges["mask"] == Range(edge_graphs.MASKED_SCORE, 0)


def test_what_is_moved_keeps_its_range(params: dict) -> None:
    graph = graphs(params)["encoder"]
    written = onnx_graph(graph)
    ranges = measure(written, [inputs(graph)])
    for node in written.nodes:
        if node.op_type in ("Reshape", "Transpose", "Slice"):
            assert ranges[node.input[0]] == ranges[node.output[0]]


def test_block_scales_are_nearer_than_one_scale_an_output() -> None:
    rng = np.random.default_rng(0)
    matrix = (rng.normal(size=(24, 256)) * np.repeat(rng.uniform(0.1, 1, (24, 8)), 32, 1)).astype(np.float32)
    blocks, plain = quantise_blocks(matrix, 32), quantise(matrix, 4)
    assert np.abs(blocks.values).max() <= 7
    assert (blocks.multiples.min(), blocks.multiples.max()) >= (1, 1)
    assert blocks.multiples.max() <= 15
    near = blocks.values * np.repeat(blocks.multiples, 32, 1) * blocks.scale[:, None]
    assert snr(matrix, near) > snr(matrix, plain.values * plain.scale[:, None]) + 1.5
