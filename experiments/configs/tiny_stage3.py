"""`python -m experiments.launch --config tiny_stage3 --config.initialize_from.checkpoint=runs/tiny_stage2`: stage 3 (the picture
tasks alone, rate down to 0) at the tiny size, from stage 2's parameters.

As `tiny_stage2` without captions and text, at half its rate and down to 0: the embedded data's "high quality" is the tasks
themselves.
"""

from __future__ import annotations

import dataclasses

import ml_collections

from data_pipelines.config import SourceShare
from experiments.config import ExperimentConfig, HeldoutConfig
from experiments.configs import tiny_stage2
from experiments.overrides import to_config_dict

STEPS = 500
TASKS = ("digits", "documents", "charts", "scenes")


def experiment() -> ExperimentConfig:
    """The typed configuration: `tiny_stage2`'s with what this stage changes."""
    base = tiny_stage2.experiment()
    return dataclasses.replace(
        base,
        name="tiny_stage3",
        data=dataclasses.replace(base.data, mixture=tuple(SourceShare(task, 1.0) for task in TASKS), seed=3),
        heldout=HeldoutConfig(batches=base.heldout.batches),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=5e-4, final_fraction=0.0),
        loop=dataclasses.replace(base.loop, steps=STEPS, evaluate_every=250),
    )


def get_config() -> ml_collections.ConfigDict:
    """The configuration as the command line changes it."""
    return to_config_dict(experiment())
