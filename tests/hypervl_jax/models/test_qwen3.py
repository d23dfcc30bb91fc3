"""Qwen3 against `transformers`, packing, padding and the cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from hypervl_jax import partitioning
from hypervl_jax.architecture import DecoderConfig, qwen3
from hypervl_jax.models import huggingface
from hypervl_jax.models.qwen3 import Decoder, KVCache, empty_cache, head_weights, logits
from hypervl_jax.models.runtime import RuntimeConfig
from tests.references import qwen3_config

RUNTIME = RuntimeConfig(dtype="float32")
SHAPES = {
    "tied": DecoderConfig(97, 48, 80, 2, 4, 2, 16, rope_theta=1e6),
    "untied": DecoderConfig(97, 48, 80, 3, 4, 1, 16, rope_theta=1e4, tie_embeddings=False),
    "odd heads": DecoderConfig(64, 40, 56, 2, 9, 3, 10, rope_theta=5e5),
    "no groups": DecoderConfig(50, 32, 40, 1, 3, 3, 8, rope_theta=1e6, rms_norm_eps=1e-5),
}


def reference_model(config: DecoderConfig, seed: int = 0) -> Qwen3ForCausalLM:
    """A `transformers` model of the same shape whose weights are all random, norms included."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(qwen3_config(config)).eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.15)
    return model


def random_params(config: DecoderConfig, seed: int = 0) -> dict:
    """Random parameters in the tree of our own initialiser; norm scales lie around 1."""
    ids, embeddings = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, config.hidden_size))
    boxed = jax.eval_shape(Decoder(config, RUNTIME).init, jax.random.key(0), embeddings, ids, ids)
    abstract, _ = partitioning.unbox(boxed["params"])
    rng = np.random.default_rng(seed)

    def draw(path, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return rng.normal(centre, 0.15, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract)


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward(config: DecoderConfig, runtime: RuntimeConfig, params: dict, tokens, segments, positions) -> jax.Array:
    module = Decoder(config, runtime)
    embeddings = module.apply({"params": params}, tokens, method="embed")
    hidden = module.apply({"params": params}, embeddings, segments, positions)
    return logits(hidden, head_weights(params))


def our_logits(config: DecoderConfig, params: dict, tokens, segments, positions, runtime=RUNTIME) -> np.ndarray:
    return np.asarray(forward(config, runtime, params, tokens, segments, positions))


def tokens_of(config: DecoderConfig, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape).astype(np.int32)


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_transformers_both_ways(name, tmp_path):
    config = SHAPES[name]
    reference = reference_model(config)
    reference.save_pretrained(tmp_path / "theirs")
    params, report = huggingface.load_decoder(tmp_path / "theirs", config)
    assert len(report.taken) == len(jax.tree.leaves(params))
    tokens = tokens_of(config, 2, 11)
    positions = np.tile(np.arange(11, dtype=np.int32), (2, 1))
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    ours = our_logits(config, params, tokens, np.ones_like(tokens), positions)
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=1e-4)
    assert np.abs(expected).max() > 0.5

    huggingface.save_decoder(params, config, tmp_path / "ours")
    back = Qwen3ForCausalLM.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        np.testing.assert_allclose(back(torch.tensor(tokens)).logits.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_equals_transformers(side, tmp_path):
    config = SHAPES["tied"]
    reference = reference_model(config)
    reference.save_pretrained(tmp_path)
    params, _ = huggingface.load_decoder(tmp_path, config)
    tokens = tokens_of(config, 2, 12)
    real = np.ones((2, 12), np.int32)
    real[1, slice(0, 5) if side == "left" else slice(7, 12)] = 0
    positions = np.maximum(np.cumsum(real, 1) - 1, 0).astype(np.int32) * real
    with torch.no_grad():
        expected = reference(
            torch.tensor(tokens), attention_mask=torch.tensor(real), position_ids=torch.tensor(positions)
        ).logits.numpy()
    ours = our_logits(config, params, tokens, real, positions)
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours[real == 1], expected[real == 1], atol=1e-4, rtol=1e-4)


def test_packed_segments_equal_separate_sequences():
    config = SHAPES["odd heads"]
    params = random_params(config)
    lengths = (5, 1, 7)
    tokens = tokens_of(config, 1, 16)
    segments = np.repeat([1, 2, 3, 0], [*lengths, 3])[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in (*lengths, 3)])[None].astype(np.int32)
    packed = our_logits(config, params, tokens, segments, positions)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        alone = our_logits(config, params, tokens[:, part], np.ones((1, length), np.int32), np.arange(length)[None])
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-5)
        start += length


def test_perturbing_one_segment_leaves_the_others_bit_identical():
    config = SHAPES["tied"]
    params = random_params(config)
    tokens = tokens_of(config, 1, 24)
    segments = np.repeat([1, 2, 3, 0], [9, 8, 4, 3])[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in (9, 8, 4, 3)])[None].astype(np.int32)
    before = our_logits(config, params, tokens, segments, positions)
    for segment in (0, 1, 2, 3):
        changed = np.where(segments == segment, (tokens + 1) % config.vocab_size, tokens)
        after = our_logits(config, params, changed, segments, positions)
        np.testing.assert_array_equal(after[segments != segment], before[segments != segment])
        assert np.abs(after[segments == segment] - before[segments == segment]).max() > 1e-3


def test_padding_row_gives_no_nan_gradient():
    config = SHAPES["tied"]
    tokens, segments = tokens_of(config, 2, 8), np.repeat([[1], [0]], 8, 1).astype(np.int32)
    positions = np.arange(8, dtype=np.int32) * segments

    def loss(params):
        return jnp.square(forward(config, RUNTIME, params, tokens, segments, positions) * segments[..., None]).sum()

    gradients = jax.jit(jax.grad(loss))(random_params(config))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(gradients))


def test_rematerialisation_changes_no_gradient():
    config = SHAPES["no groups"]
    tokens = tokens_of(config, 2, 6)
    ones, positions = np.ones_like(tokens), np.tile(np.arange(6, dtype=np.int32), (2, 1))

    def gradients(runtime):
        loss = lambda params: jnp.square(forward(config, runtime, params, tokens, ones, positions)).mean()
        return jax.jit(jax.grad(loss))(random_params(config))

    full = gradients(RUNTIME)
    for remat in ("none", "dots"):
        other = gradients(RuntimeConfig(dtype="float32", decoder_remat=remat))
        # Entries are sums with cancellation, so the error is measured against the largest one of each parameter.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max(), rtol=0), full, other)


def cached_logits(
    config: DecoderConfig, params: dict, tokens: np.ndarray, prompts: np.ndarray, side: str
) -> list[np.ndarray]:
    """Logits of every real token of each row: prompts of different lengths prefilled together, the rest decoded one by one."""
    rows, total = tokens.shape
    width, slots = prompts.max(), prompts.max() + total - prompts.min()
    module, variables = Decoder(config, RUNTIME), {"params": params}

    @jax.jit
    def step(cache: KVCache, ids, segments, positions, index):
        embeddings = module.apply(variables, ids, method="embed")
        hidden, cache = module.apply(variables, embeddings, segments, positions, cache, index)
        return logits(hidden, head_weights(params)), cache

    offsets = (width - prompts if side == "left" else 0 * prompts)[:, None]
    count = np.arange(width)[None] - offsets
    real = (count >= 0) & (count < prompts[:, None])
    ids = np.where(real, np.take_along_axis(tokens, np.clip(count, 0, total - 1), 1), 0)
    cache = empty_cache(config, rows, int(slots), "float32")
    out, cache = step(cache, ids, real.astype(np.int32), np.where(real, count, 0), 0)
    result = [[np.asarray(out[row][real[row]])] for row in range(rows)]
    for number in range(total - prompts.min()):
        place = prompts + number
        ids = np.take_along_axis(tokens, np.minimum(place, total - 1)[:, None], 1)
        out, cache = step(cache, ids, np.ones_like(ids), place[:, None], jnp.int32(width + number))
        for row in np.flatnonzero(place < total):
            result[row].append(np.asarray(out[row]))
    return [np.concatenate(parts) for parts in result]


@pytest.mark.parametrize(("name", "side"), [("tied", "left"), ("odd heads", "right")])
def test_cached_decoding_equals_the_full_forward(name, side):
    config = SHAPES[name]
    params = random_params(config)
    tokens = tokens_of(config, 3, 10)
    positions = np.tile(np.arange(10, dtype=np.int32), (3, 1))
    full = our_logits(config, params, tokens, np.ones_like(tokens), positions)
    for row, cached in enumerate(cached_logits(config, params, tokens, np.array([6, 2, 4]), side)):
        np.testing.assert_allclose(cached, full[row], atol=1e-5)


def test_bfloat16_keeps_float32_parameters_and_logits():
    config = SHAPES["tied"]
    params = random_params(config)
    tokens = tokens_of(config, 1, 6)
    positions = np.arange(6)[None]
    exact = our_logits(config, params, tokens, np.ones_like(tokens), positions)
    rounded = our_logits(config, params, tokens, np.ones_like(tokens), positions, RuntimeConfig())
    assert rounded.dtype == np.float32
    assert 0 < np.abs(rounded - exact).max() < 0.1 * np.abs(exact).max()


def test_flops_equal_the_compilers_count():
    config = DecoderConfig(512, 256, 640, 1, 4, 2, 64)
    runtime = RuntimeConfig(dtype="float32", decoder_remat="none")
    ids = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    lowered = forward.lower(config, runtime, random_params(config), ids, ids, ids)
    counted = lowered.compile().cost_analysis()["flops"]
    assert config.forward_flops(256, attended=256 * 256) == pytest.approx(counted, rel=0.02)


@pytest.mark.slow
def test_qwen3_1_7b_equals_transformers(tmp_path):
    config = qwen3("qwen3-1.7b")
    torch.manual_seed(0)
    reference = Qwen3ForCausalLM(qwen3_config(config)).eval()
    tokens = tokens_of(config, 1, 5)
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    reference.save_pretrained(tmp_path)
    del reference  # two float32 copies of 1.7B parameters are enough for one machine
    params, _ = huggingface.load_decoder(tmp_path, config)
    assert sum(x.size for x in jax.tree.leaves(params)) == 1_720_574_976
    ours = our_logits(config, params, tokens, np.ones_like(tokens), np.arange(5)[None])
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=1e-4)
