import ast
import math
import os
import pathlib

import jax
import numpy as np
import pytest

from data_pipelines.named_mixtures import MIXTURES, PUBLIC_SOURCES
from experiments import named
from experiments.config import EXPECTED_FILL, ExperimentConfig
from experiments.debug import shrink
from experiments.overrides import config_text, from_config_dict, to_config_dict
from hypervl_jax.architecture import PARTS, ConfigError
from hypervl_jax.training.batch import Batch
from hypervl_jax.training.consistency import make_control
from hypervl_jax.training.optimizer import learning_rate_schedule
from hypervl_jax.training.state import abstract_state
from hypervl_jax.training.step import StepFunctions

GOLDENS = pathlib.Path(__file__).parent / "goldens"
STAGE_TOKENS = {"stage1": 82.8e9, "stage2": 214.6e9, "stage3": 55.1e9}
"""HyperVL, arXiv 2512.14052."""


def load(name):
    return from_config_dict(ExperimentConfig, named.load_config(name))


@pytest.mark.parametrize("name", named.config_names())
def test_every_value_of_every_configuration_is_the_golden_one(name):
    """After a change that is meant: UPDATE_GOLDENS=1 pytest tests/experiments/test_configs.py, and read the diff."""
    text, golden = config_text(load(name)), GOLDENS / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDENS"):
        golden.write_text(text)
    assert text == golden.read_text()


def test_there_is_no_golden_without_a_configuration():
    assert {path.stem for path in GOLDENS.glob("*.txt")} == set(named.config_names())


@pytest.mark.parametrize("name", named.config_names())
def test_the_docstring_begins_with_the_command(name):
    docstring = ast.get_docstring(ast.parse((named.DIRECTORY / f"{name}.py").read_text()))
    assert docstring.startswith(f"`python -m experiments.launch --config {name}")
    assert named.config_summary(name).endswith(".")
    assert load(name).name == name


@pytest.mark.parametrize("name", named.config_names())
def test_typed_configs_and_config_dicts_round_trip(name):
    typed = load(name)
    assert from_config_dict(ExperimentConfig, to_config_dict(typed)) == typed
    assert to_config_dict(typed) == named.load_config(name)


@pytest.mark.parametrize(("name", "tokens"), STAGE_TOKENS.items())
def test_stages_have_the_published_budgets_and_schedules_that_end_with_them(name, tokens):
    config = load(name)
    assert config.loop.token_budget == tokens
    a_step = config.batch.rows * config.batch.length * EXPECTED_FILL
    assert 0 <= config.loop.steps * a_step - tokens < a_step
    assert config.data.mixture == MIXTURES[name]
    assert math.isclose(sum(source.share for source in config.data.mixture), 1.0)
    assert all(source.name in PUBLIC_SOURCES for source in config.data.mixture)


def test_all_budgets_together_are_the_papers():
    assert sum(load(name).loop.token_budget for name in STAGE_TOKENS) == 352_500_000_000


def test_the_stages_train_what_they_say():
    assert load("stage1").optimizer.trainable_parts == PARTS[:-1]
    assert load("stage2").optimizer.trainable_parts == load("stage3").optimizer.trainable_parts == PARTS
    for name in STAGE_TOKENS:
        assert load(name).initialize_from.unsaid == ("vision_base", "vision_large", "llm")


@pytest.mark.parametrize("name", named.config_names())
def test_debug_keeps_all_but_sizes(name):
    config, small = load(name), shrink(load(name))
    assert sum(small.architecture.parameter_counts().values()) < 2e6
    assert small.loop.steps < 100
    assert not small.initialize_from.unsaid
    for kept in ("consistency", "runtime", "seed"):
        assert getattr(small, kept) == getattr(config, kept)
    for kept in ("frozen", "schedule", "learning_rate", "vision_multiplier", "weight_decay"):
        assert getattr(small.optimizer, kept) == getattr(config.optimizer, kept)
    assert small.loop.spike_factor == config.loop.spike_factor
    assert small.data.alpha_jitter == config.data.alpha_jitter


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(ConfigError, match=r"unknown configuration 'stage_1'; did you mean stage1\?"):
        named.load_config("stage_1")


@pytest.mark.parametrize("name", STAGE_TOKENS)
def test_the_whole_step_traces_at_full_size_with_the_published_parameter_counts(name):
    config = load(name)
    sources = len(config.data.mixture)
    functions = StepFunctions(
        config.architecture,
        config.runtime,
        config.optimizer,
        config.consistency,
        config.objective,
        learning_rate_schedule(config.optimizer, config.loop.steps),
        sources,
    )
    state = abstract_state(config.architecture, config.runtime, config.optimizer, sources)
    shapes = config.batch.array_shapes(config.architecture.tiling.tile_size)
    batch = Batch(*(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes))
    control = make_control(config.consistency, config.seed)

    new, metrics = jax.eval_shape(functions.train_step, state, batch, control)

    signature = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert signature(new) == signature(state)
    assert {"cross_entropy/base", "cross_entropy/large", "kl", "tokens"} <= set(metrics)
    assert all(leaf.shape == () and leaf.dtype == np.float32 for leaf in metrics.values())
    counts = {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in state.params.items()}
    assert counts == config.architecture.parameter_counts()
    assert counts["decoder"] == 1_720_574_976, "Qwen3-1.7B"
    assert counts["vision_base"] == pytest.approx(86.43e6, rel=1e-4), "SigLIP2 Base at 512 pixels without its head"
    assert counts["vision_large"] == pytest.approx(304.1e6, rel=1e-3), "SigLIP2 Large at 512 pixels without its head"
    assert ("decoder" in state.moments) == (name != "stage1")
