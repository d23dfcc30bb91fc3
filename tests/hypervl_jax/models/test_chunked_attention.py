"""Attention over blocks of queries gives what attention over all of them gives."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from hypervl_jax.models.attention import QUERY_BLOCK, attention


@pytest.mark.parametrize("length", [40, QUERY_BLOCK, QUERY_BLOCK + 8])
@pytest.mark.parametrize("causal", [False, True])
def test_blocks_change_nothing(length: int, causal: bool) -> None:
    rng = np.random.default_rng(length)
    query = rng.normal(size=(2, length, 4, 8)).astype(np.float32)
    key, value = (rng.normal(size=(2, length, 2, 8)).astype(np.float32) for _ in range(2))
    segments = np.sort(rng.integers(1, 4, (2, length))) if causal else None
    plain, chunked = (
        attention(query, key, value, query_segments=segments, causal=causal, kernel=kernel)
        for kernel in ("xla", "chunked")
    )
    np.testing.assert_allclose(chunked, plain, atol=1e-5)


def test_blocks_hold_fewer_scores() -> None:
    shape = jax.ShapeDtypeStruct((1, 4 * QUERY_BLOCK, 2, 8), np.float32)
    held = {}
    for kernel in ("xla", "chunked"):
        run = jax.jit(lambda q, k, v, kernel=kernel: attention(q, k, v, causal=False, kernel=kernel))
        held[kernel] = run.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes
    assert held["chunked"] < held["xla"] / 2
