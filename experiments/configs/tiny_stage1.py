"""`python -m experiments.launch --config tiny_stage1`: stage 1 (captions) at the tiny size, from random parameters.

As `tiny`, on captions alone. Unlike `stage1` the LLM is trained too: here it starts from noise, and a frozen random decoder
would have nothing to align the encoders with. The KL term is off: a teacher that sees nothing yet has nothing to teach.
No image is scaled yet: towers that start from noise learn first what a cell shows at its size.
"""

from __future__ import annotations

import dataclasses

import ml_collections

from data_pipelines.config import SourceShare
from experiments.config import ExperimentConfig, HeldoutConfig
from experiments.configs import tiny
from experiments.overrides import to_config_dict
from hypervl_jax.training.consistency import ConsistencyConfig

STEPS = 2000


def experiment() -> ExperimentConfig:
    """The typed configuration: `tiny`'s with what this stage changes."""
    base = tiny.experiment()
    return dataclasses.replace(
        base,
        name="tiny_stage1",
        data=dataclasses.replace(base.data, mixture=(SourceShare("captions", 1.0),), seed=1, alpha_jitter=0.0),
        heldout=HeldoutConfig(batches=base.heldout.batches),
        optimizer=dataclasses.replace(base.optimizer, schedule="constant"),
        consistency=ConsistencyConfig(kl_weight=0.0),
        loop=dataclasses.replace(base.loop, steps=STEPS, evaluate_every=1000),
    )


def get_config() -> ml_collections.ConfigDict:
    """The configuration as the command line changes it."""
    return to_config_dict(experiment())
