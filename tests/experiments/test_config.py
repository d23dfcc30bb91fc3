import dataclasses

import pytest

from experiments.config import ExperimentConfig, InitializeConfig, steps_for
from experiments.named import load_config
from experiments.overrides import apply_override, from_config_dict
from hypervl_jax.architecture import ConfigError
from hypervl_jax.training.batch import BatchShape


def changed(name, **values):
    config = load_config(name)
    for path, text in values.items():
        apply_override(config, ExperimentConfig, path.replace("__", ".").rstrip("_"), text)
    return from_config_dict(ExperimentConfig, config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch__tiles": "40"}, "40 tiles of 16 tokens are 640 tokens: more than the row's 256"),
        ({"batch__tiles": "5"}, "batch.tiles 5 is below the 9 tiles one image may take"),
        ({"batch__tiles": "0"}, "batch.tiles 0 is text alone"),
        ({"architecture__tiling__tile_size": "128"}, "vision_base.image_size 64 must equal tiling.tile_size 128"),
        ({"objective__accumulation": "3"}, "batch.rows 4 cannot be split into objective.accumulation 3"),
        ({"objective__accumulation": "4", "mesh__data": "4"}, "make rows a multiple of 16"),
        ({"mesh__context": "3"}, "batch.length 256 cannot be split over mesh.context 3"),
        (
            {"mesh__context": "4", "mesh__fsdp": "4", "runtime__tile_chunk": "2"},
            "the 2 tiles that 1 rows encode together",
        ),
        ({"optimizer__warmup_steps": "3000"}, "warmup_steps 3000 must be below loop.steps 3000"),
        ({"loop__token_budget": "1e9"}, "loop.token_budget 1000000000 is more than .* set loop.steps to 1006766"),
        (
            {"optimizer__frozen": "vision_large,projector_large,decoder"},
            "steps of branch large would train nothing: optimizer.frozen",
        ),
        ({"heldout__split": "train"}, "heldout.split 'train' is the split the run trains on"),
        ({"heldout__left_out": "txt"}, "heldout.left_out names txt, not in data.mixture"),
        (
            {"initialize_from__checkpoint": "runs/a"},
            "checkpoint gives every part, but vision_base and vision_large and llm",
        ),
        ({"seed": "-1"}, "seed -1 must lie in"),
        ({"name_": "../../x"}, "name '../../x' must be a plain directory name"),
        ({"heldout__batches": "-1"}, "heldout.batches -1"),
        ({"consistency__alternation": "both"}, "consistency.alternation 'both' is not one of"),
    ],
)
def test_combinations_that_cannot_work_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        changed("tiny", **values)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("optimizer.weight_decay", "-5"),
        ("optimizer.eps", "-1"),
        ("optimizer.learning_rate", "inf"),
        ("optimizer.learning_rate", "nan"),
        ("optimizer.vision_multiplier", "-1"),
        ("optimizer.warmup_steps", "-5"),
        ("loop.prefetch", "-3"),
        ("loop.spike_skip", "-30"),
        ("loop.spike_limit", "-1"),
        ("loop.spike_window", "100000"),
        ("checkpoint.keep_period", "-3"),
        ("consistency.kl_weight", "inf"),
        ("consistency.temperature", "inf"),
        ("objective.z_loss", "inf"),
        ("architecture.decoder.num_kv_heads", "0"),
        ("architecture.decoder.hidden_size", "-8"),
        ("architecture.decoder.num_layers", "0"),
        ("architecture.decoder.rope_theta", "nan"),
        ("architecture.vision_base.num_heads", "0"),
        ("architecture.vision_large.num_layers", "0"),
        ("architecture.tiling.shuffle", "0"),
        ("architecture.tiling.max_tiles", "0"),
        ("architecture.projector.layer_norm_eps", "-1"),
        ("architecture.compressor.proxy_size", "0"),
    ],
)
def test_values_that_cannot_be_are_refused_by_their_name(path, value):
    with pytest.raises(ConfigError, match=path.split(".")[-1]) as refused:
        changed("tiny", **{path.replace(".", "__"): value})
    assert value.lstrip("+") in str(refused.value)


def test_branches_that_are_not_trained_alone_may_be_frozen():
    config = changed("tiny", optimizer__frozen="vision_large,projector_large,decoder", consistency__alternation="base")
    assert config.optimizer.trainable_parts == ("vision_base", "projector_base")


def test_the_decoder_alone_learns_from_text_alone():
    config = changed("tiny", batch__tiles="0", optimizer__frozen="vision,projector", consistency__alternation="base")
    assert config.optimizer.trainable_parts == ("decoder",)


def test_the_horizon_is_the_least_that_holds_the_budget():
    batch = BatchShape(rows=10, length=100, tiles=0)
    assert steps_for(970, batch) == 1
    assert steps_for(971, batch) == 2


def test_where_parameters_come_from_must_be_said_once():
    assert InitializeConfig().unsaid == ("vision_base", "vision_large", "llm")
    assert InitializeConfig(vision_base="random", llm="a").unsaid == ("vision_large",)
    assert InitializeConfig(checkpoint="a").unsaid == ()
    with pytest.raises(ConfigError, match="checkpoint is a directory"):
        InitializeConfig(checkpoint="random")


def test_the_trainer_gets_every_field_it_has():
    config = changed("stage1")
    run = config.training_run()
    for field in dataclasses.fields(run):
        assert getattr(run, field.name) is getattr(config, field.name)
