"""The composed model: parts, merging, serial tiles, memory, isolation of packed samples."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax import partitioning
from hypervl_jax.architecture import BRANCHES, PARTS, HyperVLConfig, branch_parts, hypervl_2b, hypervl_tiny
from hypervl_jax.models.hypervl import HyperVL, init_parameters, merge
from hypervl_jax.models.runtime import RuntimeConfig
from hypervl_jax.partitioning import MeshConfig
from hypervl_jax.planning.programs import collectives, parse_program
from hypervl_jax.training.batch import Batch, BatchShape, empty_batch
from tests.small import small_architecture

CONFIG = hypervl_tiny()
RUNTIME = RuntimeConfig(dtype="float32")
V = CONFIG.tiling.tokens_per_tile


@functools.cache
def compiled_initialiser() -> jax.stages.Compiled:
    plain = jax.jit(lambda key: partitioning.unbox(init_parameters(CONFIG, RUNTIME, key))[0])
    return plain.lower(jax.random.key(0)).compile()


@functools.cache
def parameters() -> dict:
    return compiled_initialiser()(jax.random.key(0))


def part_sizes(params: dict) -> dict[str, int]:
    return {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in params.items()}


def packed_batch(seed: int = 0) -> Batch:
    """A row of two samples with one tile each and padding, and a row of one sample with two tiles."""
    rng = np.random.default_rng(seed)
    batch = empty_batch(BatchShape(2, 64, 2), CONFIG.tiling.tile_size)
    batch.tokens[:] = rng.integers(0, CONFIG.decoder.vocab_size, (2, 64))
    batch.tiles[:] = rng.integers(0, 256, batch.tiles.shape)
    for row, samples in enumerate([(28, 30), (50,)]):
        start = 0
        for number, length in enumerate(samples):
            batch.segments[row, start : start + length] = number + 1
            batch.positions[row, start : start + length] = np.arange(length)
            visual = V if len(samples) == 2 else 2 * V
            batch.visual_index[row, start + 3 : start + 3 + visual] = np.arange(visual) + number * V
            batch.tile_segments[row, number : number + visual // V] = number + 1
            start += length
    return batch


@functools.partial(jax.jit, static_argnums=(0, 3))
def run(model: HyperVL, params: dict, batch: Batch, branch: str) -> jax.Array:
    return model.apply({"params": params}, batch, branch)


@functools.partial(jax.jit, static_argnums=0)
def encode_base(model: HyperVL, parts: dict, tiles: np.ndarray) -> jax.Array:
    return model.apply({"params": parts}, tiles, "base", method="encode_tiles")


def encode(runtime: RuntimeConfig, tiles: np.ndarray) -> np.ndarray:
    parts = {part: parameters()[part] for part in branch_parts("base")[:2]}
    return np.asarray(encode_base(HyperVL(CONFIG, runtime), parts, tiles))


def five_tiles() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 5, 64, 64, 3), dtype=np.uint8)


def test_parameters_have_the_announced_parts_and_counts():
    assert tuple(sorted(parameters())) == tuple(sorted(PARTS))
    assert part_sizes(parameters()) == CONFIG.parameter_counts()
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(parameters()))


def test_parameter_counts_at_full_size_are_the_published_ones():
    config = hypervl_2b()
    abstract, axes = partitioning.unbox(
        jax.eval_shape(lambda key: init_parameters(config, RUNTIME, key), jax.random.key(0))
    )
    counts = part_sizes(abstract)
    assert counts == config.parameter_counts()
    assert counts["decoder"] == 1_720_574_976
    assert counts["vision_base"] == pytest.approx(86.43e6, abs=5e3)
    assert counts["vision_large"] == pytest.approx(304.1e6, abs=5e4)
    for names in jax.tree.leaves(axes, is_leaf=lambda leaf: isinstance(leaf, tuple)):
        partitioning.spec(names)


def test_initialisation_runs_no_forward_pass():
    program = compiled_initialiser().as_text()
    assert "while(" in program
    assert "dot(" not in program
    assert "gemm" not in program


def test_initial_loss_is_that_of_a_uniform_guess():
    batch = packed_batch()
    targets = np.random.default_rng(9).integers(0, CONFIG.decoder.vocab_size, (2, 64, 1))
    for branch in BRANCHES:
        logits = run(HyperVL(CONFIG, RUNTIME), parameters(), batch, branch)
        guess = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets, -1)[..., 0]
        assert float(guess.mean()) == pytest.approx(np.log(CONFIG.decoder.vocab_size), rel=0.05)


def test_merge_puts_each_visual_token_in_its_place():
    embeddings = jnp.zeros((2, 5, 1)) - 1
    visual = jnp.arange(8.0).reshape(2, 4, 1)
    index = jnp.array([[-1, 2, 0, -1, 3], [1, -1, -1, -1, 0]])
    assert merge(embeddings, visual, index)[..., 0].tolist() == [[-1, 2, 0, -1, 3], [5, -1, -1, -1, 4]]


@pytest.mark.parametrize(("chunk", "remat"), [(2, "tile"), (3, "layer"), (1, "nested"), (9, "none")])
def test_chunks_of_tiles_do_not_change_the_visual_tokens(chunk, remat):
    tiles = five_tiles()
    together = encode(RUNTIME, tiles)
    assert together.shape == (2, 5 * V, CONFIG.decoder.hidden_size)
    runtime = dataclasses.replace(RUNTIME, tile_chunk=chunk, tower_remat=remat)
    np.testing.assert_allclose(encode(runtime, tiles), together, atol=1e-5)


def test_a_tile_is_encoded_the_same_whatever_tiles_stand_beside_it():
    alone = encode(RUNTIME, five_tiles()[:, 3:4])
    np.testing.assert_allclose(alone, encode(RUNTIME, five_tiles())[:, 3 * V : 4 * V], atol=1e-5)


def test_text_only_batch_needs_only_the_decoder():
    batch = packed_batch()
    text = batch._replace(
        tiles=batch.tiles[:, :0],
        tile_segments=batch.tile_segments[:, :0],
        visual_index=np.full_like(batch.visual_index, -1),
    )
    model = HyperVL(CONFIG, RUNTIME)
    logits = run(model, {"decoder": parameters()["decoder"]}, text, "base")
    with_unused_tiles = run(model, parameters(), batch._replace(visual_index=text.visual_index), "large")
    np.testing.assert_allclose(logits, with_unused_tiles, atol=1e-5)


def test_perturbing_one_sample_leaves_the_others_bit_identical():
    model, batch = HyperVL(CONFIG, RUNTIME), packed_batch()
    before = np.asarray(run(model, parameters(), batch, "large"))
    tokens, tiles = batch.tokens.copy(), batch.tiles.copy()
    tokens[0, :28] = (tokens[0, :28] + 1) % CONFIG.decoder.vocab_size
    tiles[0, 0] = 255 - tiles[0, 0]
    after = np.asarray(run(model, parameters(), batch._replace(tokens=tokens, tiles=tiles), "large"))
    np.testing.assert_array_equal(after[0, 28:], before[0, 28:])
    np.testing.assert_array_equal(after[1], before[1])
    assert np.abs(after[0, :28] - before[0, :28]).max() > 1e-3


def test_gradient_reaches_the_chosen_branch_only_and_is_zero_for_padding():
    model, batch = HyperVL(CONFIG, RUNTIME), packed_batch()

    @jax.jit
    def gradients(params, weights):
        return jax.grad(lambda p: (jnp.square(run(model, p, batch, "base")) * weights[..., None]).sum())(params)

    largest = lambda tree: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))
    found = gradients(parameters(), jnp.asarray(batch.segments > 0, jnp.float32))
    assert {part: largest(tree) > 0 for part, tree in found.items()} == {
        part: part in branch_parts("base") for part in PARTS
    }
    assert largest(gradients(parameters(), jnp.zeros(batch.segments.shape))) == 0.0


def gradient_memory(config: HyperVLConfig, num_tiles: int, runtime: RuntimeConfig) -> int:
    """Temporary bytes of the gradient of `encode_tiles`, net of what input pixels and output tokens explain."""
    model = HyperVL(config, runtime)
    abstract = jax.eval_shape(
        lambda key: partitioning.unbox(init_parameters(config, runtime, key))[0], jax.random.key(0)
    )
    parts = {part: abstract[part] for part in branch_parts("large")[:2]}
    side = config.tiling.tile_size
    tiles = jax.ShapeDtypeStruct((1, num_tiles, side, side, 3), jnp.uint8)
    tokens = jax.ShapeDtypeStruct(
        (1, num_tiles * config.tiling.tokens_per_tile, config.decoder.hidden_size), jnp.float32
    )

    def loss(params, tiles, direction):
        return (model.apply({"params": params}, tiles, "large", method="encode_tiles") * direction).sum()

    compiled = jax.jit(jax.grad(loss)).lower(parts, tiles, tokens).compile()
    # The scan copies the pixels once into tile-major order, and likewise the tokens and their cotangents.
    explained = tiles.size + 3 * tokens.size * tokens.dtype.itemsize
    return compiled.memory_analysis().temp_size_in_bytes - explained


def test_peak_activation_memory_does_not_grow_with_the_number_of_tiles():
    few, many = (gradient_memory(CONFIG, tiles, RUNTIME) for tiles in (2, 16))
    activations_of_a_layer = CONFIG.vision_large.num_patches * CONFIG.vision_large.intermediate_size * 4
    assert many - few < activations_of_a_layer
    kept = gradient_memory(CONFIG, 16, dataclasses.replace(RUNTIME, tower_remat="none"))
    assert kept - many > 14 * activations_of_a_layer


def test_on_a_mesh_the_weights_are_gathered_once_for_all_tiles():
    """On two CPU devices. That the gradients are those of one device is tested with the step."""
    config, mesh = small_architecture(), partitioning.make_mesh(MeshConfig(), jax.devices()[:2])
    model, names = HyperVL(config, RUNTIME), branch_parts("base")[:2]
    boxed = jax.eval_shape(lambda key: init_parameters(config, RUNTIME, key), jax.random.key(0))
    abstract, axes = partitioning.unbox(boxed)
    split = partitioning.shardings(abstract, axes, mesh)
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    parts = {part: jax.tree.map(place, abstract[part], split[part]) for part in names}
    tiles = jax.ShapeDtypeStruct((2, 5, 16, 16, 3), jnp.uint8, sharding=partitioning.row_sharding(mesh))

    def loss(parts, tiles):
        return jnp.sum(model.apply({"params": parts}, tiles, "base", method="encode_tiles") ** 2)

    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss), out_shardings={part: split[part] for part in names})
        program = parse_program(step.lower(parts, tiles).compile().as_text())
    times = [move.times for move in collectives(program) if move.kind == "all-gather"]
    assert len(times) >= len(jax.tree.leaves(parts)) // 2
    assert set(times) == {1}


def test_bfloat16_is_the_default_and_stays_near_float32():
    batch = packed_batch()
    exact, rounded = (
        run(HyperVL(CONFIG, runtime), parameters(), batch, "base") for runtime in (RUNTIME, RuntimeConfig())
    )
    assert rounded.dtype == jnp.float32
    assert 0 < float(jnp.abs(exact - rounded).max()) < 0.05 * float(jnp.abs(exact).max())
