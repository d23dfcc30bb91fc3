"""`python -m experiments.launch --config stage3 --workdir DIR --data DIR --config.initialize_from.checkpoint=STAGE2_WORKDIR`:
the last, high-quality stage, from stage 2's parameters.

Stage 3 of HyperVL (arXiv 2512.14052) at full size. Published: the 55.1B high-quality tokens. Our choices, where they differ from
stage 2 (same batch, same parts trained):

- Learning rates: 2e-5, encoders a fifth of it, by cosine down to 0: the run ends here, nothing continues from its rate. 250
  steps of warm-up (1.8 %).
- Mixture: shares of tokens, ours (`data_pipelines/named_mixtures.py`): instructions and documents that were filtered or written for
  quality; no raw web captions.
"""

from __future__ import annotations

import dataclasses

import ml_collections

from data_pipelines.named_mixtures import MIXTURES
from experiments.config import ExperimentConfig, steps_for
from experiments.configs import stage2
from experiments.overrides import to_config_dict
from hypervl_jax.training.optimizer import OptimizerConfig

TOKENS = 55_100_000_000


def experiment() -> ExperimentConfig:
    """The typed configuration: stage 2's with what this stage changes."""
    base = stage2.experiment()
    return dataclasses.replace(
        base,
        name="stage3",
        data=dataclasses.replace(base.data, root="data/stage3", mixture=MIXTURES["stage3"], seed=3),
        optimizer=OptimizerConfig(
            learning_rate=2e-5, vision_multiplier=0.2, schedule="cosine", warmup_steps=250, final_fraction=0.0
        ),
        loop=dataclasses.replace(base.loop, steps=steps_for(TOKENS, base.batch), token_budget=TOKENS),
    )


def get_config() -> ml_collections.ConfigDict:
    """The configuration as the command line changes it."""
    return to_config_dict(experiment())
