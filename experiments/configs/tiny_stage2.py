"""`python -m experiments.launch --config tiny_stage2 --config.initialize_from.checkpoint=runs/tiny_stage1`: stage 2 (all tasks) at
the tiny size, from stage 1's parameters.

As `tiny`, with a fresh optimizer on the parameters of `tiny_stage1`. The rate is as high as in stage 1, unlike at full size:
after a few hundred steps nothing is learned that a high rate could spoil.
"""

from __future__ import annotations

import dataclasses

import ml_collections

from experiments.config import ExperimentConfig, InitializeConfig
from experiments.configs import tiny
from experiments.overrides import to_config_dict

STEPS = 1200


def experiment() -> ExperimentConfig:
    """The typed configuration: `tiny`'s with what this stage changes."""
    base = tiny.experiment()
    return dataclasses.replace(
        base,
        name="tiny_stage2",
        data=dataclasses.replace(base.data, seed=2),
        optimizer=dataclasses.replace(base.optimizer, final_fraction=0.4),
        loop=dataclasses.replace(base.loop, steps=STEPS),
        initialize_from=InitializeConfig(),
    )


def get_config() -> ml_collections.ConfigDict:
    """The configuration as the command line changes it."""
    return to_config_dict(experiment())
