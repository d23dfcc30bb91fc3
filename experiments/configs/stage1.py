"""`python -m experiments.launch --config stage1 --workdir DIR --data DIR --config.initialize_from.vision_base=DIR
--config.initialize_from.vision_large=DIR --config.initialize_from.llm=DIR`: captions align both encoders with the frozen LLM.

Stage 1 of HyperVL (arXiv 2512.14052) at full size. Published: the 82.8B caption tokens, SigLIP2 Base and Large, Qwen3-1.7B,
AnyRes tiles, alternating branches with a KL from Large to Base. Everything else is our choice:

- Budget: 82.8e9 LLM positions that are not padding, visual tokens included, each batch counted once: our reading of "tokens".
- Batch: 512 rows of 4096 positions, 2.1M a step: two rows on each chip of a 256-chip slice. Fewer chips accumulate; more than
  512 share rows: 4 chips a row on 2,048 (context 2 × tensor 2), 8 on 4,096 (context 2 × tensor 4; `experiments.hardware`). 4096
  positions hold one image of 12 tiles (3072 tokens) and its caption.
- 14 tiles a row: 3584 of 4096 positions, since captions are short. Empty tile slots cost encoder time; more would fit no row.
- Horizon of the schedule: the budget over rows · length · 0.97, the fill we assume; tile slots may run out before positions do, and a run
  that sees another fill says which loop.steps would fit.
- Frozen LLM: the projectors start from noise, and their gradients would spoil a language model that already works.
- Learning rates: projectors 1e-3, as usual for projectors from scratch (LLaVA, arXiv 2304.08485); encoders 1e-4, a tenth of
  it, since they are pretrained and the noise of the projectors reaches them. 1000 steps of warm-up are 2.5 % of the run. Cosine to a tenth.
- AdamW with b2 0.95, weight decay 0.1 and clipping at 1: the defaults of large language-model training.
- DCL: λ 1, T 2, 1:1, answer tokens. The teacher starts as poor as the student; `--config.consistency.kl_weight=0` is the ablation.
- Mixture: shares of tokens, ours (`data_pipelines/named_mixtures.py`). Captions of several writers, a share of images full of text,
  little of what is rare and good. `python -m tools.plan_data --config stage1` says from the sources' manifests how far they reach.
- No source is read more than 4 times: up to there repeated text was nearly as good as new (Muennighoff et al., arXiv 2305.16264). The
  run stops and says so; `--config.data.over_limit=reweight` would give the share to the other sources.
- α jitter 0.1: a tenth of the samples are scaled by a random α, so that the labels of the VRC measure what scaling loses and not
  that scaled images are unfamiliar.
- Loss spikes: a loss above twice the median of its arm's last 128 steps goes back to the last checkpoint and skips 8 batches.

`--debug` runs the same stage in minutes at a built-in small size on embedded data.
"""

from __future__ import annotations

import ml_collections

from data_pipelines.config import DataConfig
from data_pipelines.named_mixtures import MIXTURES
from experiments.config import ExperimentConfig, steps_for
from experiments.overrides import to_config_dict
from hypervl_jax.architecture import hypervl_2b
from hypervl_jax.training.batch import BatchShape
from hypervl_jax.training.checkpoint import CheckpointConfig
from hypervl_jax.training.loop import LoopConfig
from hypervl_jax.training.optimizer import OptimizerConfig

TOKENS = 82_800_000_000
BATCH = BatchShape(rows=512, length=4096, tiles=14)


def experiment() -> ExperimentConfig:
    """The typed configuration; stages 2 and 3 say what they change of it."""
    return ExperimentConfig(
        name="stage1",
        architecture=hypervl_2b(),
        batch=BATCH,
        data=DataConfig(
            root="data/stage1", mixture=MIXTURES["stage1"], seed=1, epoch_limit=4.0, workers=16, alpha_jitter=0.1
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, vision_multiplier=0.1, frozen=("decoder",), schedule="cosine", warmup_steps=1000
        ),
        loop=LoopConfig(
            steps=steps_for(TOKENS, BATCH),
            token_budget=TOKENS,
            log_every=20,
            evaluate_every=2000,
            spike_factor=2.0,
            spike_window=128,
        ),
        checkpoint=CheckpointConfig(every=1000, keep=3, keep_period=10_000),
    )


def get_config() -> ml_collections.ConfigDict:
    """The configuration as the command line changes it."""
    return to_config_dict(experiment())
