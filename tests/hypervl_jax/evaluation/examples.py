"""A small random model, pictures with questions, and made-up results for the tests of evaluation."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from hypervl_jax.architecture import HyperVLConfig
from hypervl_jax.evaluation.benchmarks import IMAGE, Item, ItemResult
from hypervl_jax.inference.assistant import Assistant
from hypervl_jax.text.conversation import IMAGE_SLOT, Turn
from hypervl_jax.training.checkpoint import CheckpointConfig, Checkpoints, Description, write_description
from hypervl_jax.training.state import TrainState, abstract_parameters, initial_counters
from tests.data_pipelines import corpora
from tests.small import RUNTIME, small_architecture


def architecture() -> HyperVLConfig:
    """The small model with the vocabulary of the test tokenizer."""
    small = small_architecture()
    return dataclasses.replace(
        small, decoder=dataclasses.replace(small.decoder, vocab_size=corpora.tokenizer().vocab_size)
    )


@functools.cache
def random_params() -> dict[str, Any]:
    """All parts at random, wide enough that answers depend on the picture."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jax.numpy.asarray(rng.normal(centre, 0.3, leaf.shape), np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_parameters(architecture(), RUNTIME)[0])


@functools.cache
def assistant() -> Assistant:
    """The small model, ready to answer."""
    return Assistant(architecture(), RUNTIME, random_params(), corpora.tokenizer())


def save_checkpoint(home: pathlib.Path) -> pathlib.Path:
    """The small model as a run's directory `home/run`, with its row length, as training writes it."""
    corpora.tokenizer().save(home / "tokenizer")
    checkpoints = Checkpoints(home / "run" / "checkpoints", CheckpointConfig(asynchronous=False))
    state = TrainState(jnp.int32(7), random_params(), {}, initial_counters(1))
    checkpoints.save(state, jnp.zeros((1, 1), jnp.int32), {})
    checkpoints.close()
    details = {"config": {"batch.length": 128, "batch.tiles": 16}}
    description = Description(architecture(), details, epath.Path(home / "tokenizer"))
    write_description(home / "run" / "checkpoints", description)
    return home / "run"


def item(number: int, height: int = 16, width: int = 16, answer: str = "red") -> Item:
    """A picture of random blocks with a question."""
    turns = (Turn("user", f"{IMAGE_SLOT}Which word?"),)
    return Item(f"{number:032x}", "words", turns, (corpora.png(height, width, number),), (answer,), "word", 1)


def result(number: int, score: float, **changes: Any) -> ItemResult:
    """A made-up line; answered by the base encoder at α = 1, unless changed."""
    values: dict[str, Any] = {
        "identity": f"{number:032x}",
        "task": "words",
        "kind": "word",
        "level": 1,
        "encoder": "base",
        "condition": IMAGE,
        "alpha": 1.0,
        "prediction": "red" if score else "blue",
        "score": score,
        "stopped": True,
        "alphas": (1.0,),
        "tiles": 4,
        "visual_tokens": 16,
        "milliseconds": {"encoder": 2.0, "decode": 1.0, "compilation": 500.0},
    }
    return ItemResult(**{**values, **changes})
