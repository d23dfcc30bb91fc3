"""`python -m experiments.launch --config stage2 --workdir DIR --data DIR --config.initialize_from.checkpoint=STAGE1_WORKDIR`:
multi-task pretraining of every part, from stage 1's parameters.

Stage 2 of HyperVL (arXiv 2512.14052) at full size. Published: the 214.6B multi-task tokens. Our choices, where they differ from
stage 1:

- Batch: 512 rows of 8192 positions, 4.2M a step: document pages with long transcriptions and interleaved web pages do not fit
  4096. 24 tiles a row are 6144 visual tokens: with a tenth of text-only tokens and transcriptions beside the pages a row seldom has more.
- Everything is trained. Learning rates: LLM and projectors 5e-5, encoders 1e-5 (a fifth), an optimizer that starts afresh:
  continued pretraining of finished parts, far below their own peak rates. 1000 steps of warm-up (1.9 %).
- Mixture: shares of tokens, ours (`data_pipelines/named_mixtures.py`): captions against forgetting, documents, charts and text in images
  (a third) since reading is what HyperVL reports first, grounding and screens, questions with much of STEM, several images at once,
  and 10 % text alone to keep the language model.
- DCL as in stage 1: it is where the paper describes it.
"""

from __future__ import annotations

import dataclasses

import ml_collections

from data_pipelines.named_mixtures import MIXTURES
from experiments.config import ExperimentConfig, steps_for
from experiments.configs import stage1
from experiments.overrides import to_config_dict
from hypervl_jax.training.batch import BatchShape
from hypervl_jax.training.optimizer import OptimizerConfig

TOKENS = 214_600_000_000
BATCH = BatchShape(rows=512, length=8192, tiles=24)


def experiment() -> ExperimentConfig:
    """The typed configuration: stage 1's with what this stage changes."""
    base = stage1.experiment()
    return dataclasses.replace(
        base,
        name="stage2",
        batch=BATCH,
        data=dataclasses.replace(base.data, root="data/stage2", mixture=MIXTURES["stage2"], seed=2),
        optimizer=OptimizerConfig(learning_rate=5e-5, vision_multiplier=0.2, schedule="cosine", warmup_steps=1000),
        loop=dataclasses.replace(base.loop, steps=steps_for(TOKENS, BATCH), token_budget=TOKENS),
    )


def get_config() -> ml_collections.ConfigDict:
    """The configuration as the command line changes it."""
    return to_config_dict(experiment())
