"""The training state: parameters by part, optimizer moments of the trainable parts, exact counters."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int32, UInt32

from hypervl_jax import partitioning
from hypervl_jax.architecture import PARTS, ConfigError, HyperVLConfig
from hypervl_jax.models.hypervl import init_parameters
from hypervl_jax.models.runtime import RuntimeConfig
from hypervl_jax.training import optimizer
from hypervl_jax.training.optimizer import OptimizerConfig


class Counters(NamedTuple):
    """What has been done, exactly; `tokens` holds (low, high) 32-bit halves, for 352.5B does not fit 32 bits."""

    tokens: UInt32[Array, "sources 2"]
    branch_steps: Int32[Array, "2"]
    skipped: Int32[Array, ""]
    skipped_in_a_row: Int32[Array, ""]


class TrainState(NamedTuple):
    """Everything a step reads and writes. `step` counts updates done, skipped ones included."""

    step: Int32[Array, ""]
    params: dict[str, Any]
    moments: dict[str, Any]
    counters: Counters


def add_tokens(tokens: UInt32[Array, "sources 2"], new: UInt32[Array, "sources"]) -> UInt32[Array, "sources 2"]:
    """64-bit addition in two 32-bit halves: JAX runs with 32-bit integers."""
    low = tokens[:, 0] + new
    return jnp.stack([low, tokens[:, 1] + (low < new).astype(jnp.uint32)], axis=-1)


def token_totals(tokens: UInt32[np.ndarray, "sources 2"]) -> list[int]:
    """Tokens seen of each source as Python integers."""
    return [int(low) + (int(high) << 32) for low, high in np.asarray(tokens)]


def initial_counters(num_sources: int) -> Counters:
    """Counters before the first step."""
    zero = jnp.zeros((), jnp.int32)
    return Counters(jnp.zeros((num_sources, 2), jnp.uint32), jnp.zeros((2,), jnp.int32), zero, zero)


@functools.lru_cache
def abstract_parameters(config: HyperVLConfig, runtime: RuntimeConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shapes and dtypes of all parts, and their logical axes, without computing anything."""
    return partitioning.unbox(jax.eval_shape(functools.partial(init_parameters, config, runtime), jax.random.key(0)))


def initialise_parts(
    config: HyperVLConfig, runtime: RuntimeConfig, parts: tuple[str, ...], seed: int, shardings: Mapping[str, Any]
) -> dict[str, Any]:
    """Random parameters of `parts` only, made directly in their shardings; the same whichever parts are asked for."""

    def init(rng: jax.Array) -> dict[str, Any]:
        params, _ = partitioning.unbox(init_parameters(config, runtime, rng))
        return {part: params[part] for part in parts}

    return jax.jit(init, out_shardings={part: shardings[part] for part in parts})(jax.random.key(seed))


def fresh_state(config: OptimizerConfig, params: dict[str, Any], num_sources: int) -> TrainState:
    """State at step 0 around `params`, with a fresh optimizer."""
    moments = optimizer.initial_moments(config, params)
    return TrainState(jnp.zeros((), jnp.int32), params, moments, initial_counters(num_sources))


def abstract_state(
    config: HyperVLConfig, runtime: RuntimeConfig, optimizer_config: OptimizerConfig, num_sources: int
) -> TrainState:
    """Shapes and dtypes of the whole state."""
    params, _ = abstract_parameters(config, runtime)
    return jax.eval_shape(functools.partial(fresh_state, optimizer_config, num_sources=num_sources), params)


def state_shardings(
    config: HyperVLConfig, runtime: RuntimeConfig, optimizer_config: OptimizerConfig, num_sources: int, mesh: Mesh
) -> TrainState:
    """NamedShardings of the whole state: moments lie where their parameters lie, counters everywhere."""
    params, axes = abstract_parameters(config, runtime)
    shardings = partitioning.shardings(params, axes, mesh)
    whole = partitioning.replicated(mesh)
    abstract = abstract_state(config, runtime, optimizer_config, num_sources)
    moments = {
        part: optax.tree_map_params(
            optimizer.adam(optimizer_config),
            lambda _, sharding: sharding,
            tree,
            shardings[part],
            transform_non_params=lambda _: whole,
        )
        for part, tree in abstract.moments.items()
    }
    return TrainState(whole, shardings, moments, jax.tree.map(lambda _: whole, abstract.counters))


def check_parameters(params: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises `ConfigError` naming the first parameter whose tree, shape or dtype is not the expected one."""
    if set(params) != set(PARTS):
        raise ConfigError(f"parameters have the parts {sorted(params)}, expected {sorted(PARTS)}")
    found, wanted = (
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (params, expected)
    )
    for name in sorted(set(found) ^ set(wanted)):
        raise ConfigError(f"parameter {name} is {'unexpected' if name in found else 'missing'}")
    for name, leaf in wanted.items():
        have = found[name]
        if (have.shape, have.dtype) != (leaf.shape, leaf.dtype):
            raise ConfigError(
                f"parameter {name} is {have.dtype}{have.shape}, the configuration needs {leaf.dtype}{leaf.shape}"
            )
