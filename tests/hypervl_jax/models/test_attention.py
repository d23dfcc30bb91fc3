"""The attention entry against a plain reference, and the choice of its kernel."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from hypervl_jax import partitioning
from hypervl_jax.architecture import ConfigError
from hypervl_jax.models import attention as attention_module
from hypervl_jax.models.attention import attention, splash_obstacle
from hypervl_jax.partitioning import MeshConfig

LAYOUT = ("rows", "length")


def make_inputs(heads: int, groups: int, queries: int = 6, keys: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    draw = lambda length, count: rng.normal(size=(2, length, count, 8)).astype(np.float32)
    return draw(queries, heads), draw(keys, groups), draw(keys, groups)


def torch_attention(query, key, value, mask) -> np.ndarray:
    groups = query.shape[2] // key.shape[2]
    query, key, value = (torch.tensor(x).transpose(1, 2) for x in (query, key, value))
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, torch.tensor(mask)[:, None])
    return out.transpose(1, 2).numpy()


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (9, 3), (5, 1)])
def test_equals_torch(heads, groups):
    query, key, value = make_inputs(heads, groups)
    segments = np.array([[1, 1, 2, 2, 2, 3], [1, 2, 2, 2, 2, 2]], np.int32)
    same = segments[:, :, None] == segments[:, None]
    causal = same & np.tri(6, dtype=bool)
    every = np.ones((2, 6, 6), bool)
    for mask, options in (
        (every, {"causal": False}),
        (same, {"causal": False, "query_segments": segments}),
        (causal, {"causal": True, "query_segments": segments}),
        (causal, {"causal": True, "query_segments": segments, "key_segments": segments}),
    ):
        ours = attention(query, key, value, kernel="xla", **options)
        np.testing.assert_allclose(ours, torch_attention(query, key, value, mask), atol=1e-5)


def test_positions_set_the_causal_order():
    query, key, value = make_inputs(4, 2, queries=2, keys=6)
    query_positions, key_positions = np.array([[3, 1], [0, 5]]), np.array([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]])
    options = {"query_positions": query_positions, "key_positions": key_positions}
    ours = attention(query, key, value, causal=True, kernel="xla", **options)
    mask = query_positions[:, :, None] >= key_positions[:, None]
    np.testing.assert_allclose(ours, torch_attention(query, key, value, mask), atol=1e-5)


def test_in_packed_rows_array_order_is_the_causal_order():
    rng = np.random.default_rng(1)
    query, key, value = (rng.normal(size=(2, 12, 2, 8)).astype(np.float32) for _ in range(3))
    lengths = ((5, 1, 4), (3, 8, 0))
    segments = np.stack([np.repeat([1, 2, 3, 0], [*row, 12 - sum(row)]) for row in lengths])
    positions = np.stack(
        [np.concatenate([np.arange(n) for n in (*row, 0)] + [np.zeros(12 - sum(row))]) for row in lengths]
    )
    by_array = attention(query, key, value, query_segments=segments, causal=True, kernel="xla")
    by_position = attention(
        query,
        key,
        value,
        query_segments=segments,
        query_positions=positions,
        key_positions=positions,
        causal=True,
        kernel="xla",
    )
    np.testing.assert_array_equal(by_array[segments > 0], by_position[segments > 0])


def test_a_query_without_any_key_is_finite_and_has_finite_gradients():
    query, key, value = (jnp.asarray(x) for x in make_inputs(4, 2))
    segments = {"query_segments": jnp.full((2, 6), 7), "key_segments": jnp.ones((2, 6), jnp.int32)}
    total = lambda *inputs: attention(*inputs, causal=True, kernel="xla", **segments).sum()
    result, gradients = jax.value_and_grad(total, (0, 1, 2))(query, key, value)
    assert np.isfinite(result)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ConfigError, match="attention kernel 'flash' is unknown"):
        attention(*make_inputs(4, 2), causal=True, kernel="flash")


@pytest.mark.parametrize(
    ("query", "key", "own_keys", "reason"),
    [
        ((2, 128, 4, 64), (2, 128, 2, 64), True, None),
        ((2, 127, 4, 64), (2, 127, 2, 64), True, "127 tokens on a device do not fill a block of 128"),
        ((2, 1, 4, 64), (2, 512, 2, 64), True, "not the queries' own"),
        ((2, 512, 4, 64), (2, 512, 2, 64), False, "not the queries' own"),
    ],
)
def test_what_splash_cannot_compute_on_one_device(query, key, own_keys, reason):
    obstacle = splash_obstacle(query, key, own_keys, LAYOUT)
    assert obstacle is None if reason is None else reason in obstacle


@pytest.mark.parametrize(
    ("query", "groups", "reason"),
    [
        ((4, 256, 4, 64), 2, None),
        ((3, 256, 4, 64), 2, "3 rows do not split over the 2 devices"),
        ((4, 257, 4, 64), 2, "257 tokens do not split over the 2 devices"),
        ((4, 256, 3, 64), 3, "3 query heads do not split over the 2 devices"),
        ((4, 256, 4, 64), 1, "1 key-value heads do not split over the 2 devices along tensor"),
        ((4, 254, 4, 64), 2, "127 tokens on a device"),
    ],
)
def test_what_splash_cannot_compute_on_a_mesh(query, groups, reason):
    with jax.set_mesh(partitioning.make_mesh(MeshConfig(fsdp=2, context=2, tensor=2))):
        obstacle = splash_obstacle(query, (*query[:2], groups, 64), True, LAYOUT)
    assert obstacle is None if reason is None else reason in obstacle


def test_the_kernel_is_said_once(caplog):
    attention_module.announce.cache_clear()
    query, key, value = make_inputs(4, 2)
    with caplog.at_level(logging.INFO, logger="hypervl_jax"):
        for _ in range(3):
            ours = attention(query, key, value, causal=True, kernel="splash")
    expected = "xla instead of splash, because 6 tokens on a device do not fill a block of 128"
    assert [expected in record.message for record in caplog.records] == [True]
    np.testing.assert_array_equal(ours, attention(query, key, value, causal=True, kernel="xla"))
