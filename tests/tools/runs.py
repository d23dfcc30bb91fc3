"""A run's directory with a random tiny model, as the tools find it after training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypervl_jax.architecture import hypervl_tiny
from hypervl_jax.models.runtime import RuntimeConfig
from hypervl_jax.text.tokenizer import train_sentencepiece
from hypervl_jax.training.checkpoint import CheckpointConfig, Checkpoints, Description, write_description
from hypervl_jax.training.state import TrainState, abstract_parameters, initial_counters

CONFIG = hypervl_tiny()
TEXTS = ["What is the number in the picture? How many red circles are there? user assistant"]


def random_like(abstract: Any) -> Any:
    """Parameters wide enough that greedy answers depend on the prompt."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(centre, 0.15, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def write_run(workdir: Path) -> None:
    """Writes checkpoint 1 of a model of `CONFIG` with its description and a tokenizer of 310 pieces."""
    params = random_like(abstract_parameters(CONFIG, RuntimeConfig(dtype="float32"))[0])
    checkpoints = Checkpoints(workdir / "checkpoints", CheckpointConfig(asynchronous=False))
    checkpoints.save(TrainState(jnp.int32(1), params, {}, initial_counters(1)), jnp.zeros((1, 1), jnp.int32), {})
    checkpoints.close()
    tokenizer = train_sentencepiece(TEXTS, workdir / "tokenizer.model", vocab_size=310)
    tokenizer.save(workdir / "tokenizer")
    write_description(
        workdir / "checkpoints", Description(CONFIG, {"tokenizer": tokenizer.fingerprint}, workdir / "tokenizer")
    )
