"""`python -m experiments.launch --config tiny`: a small model learns all embedded tasks at once, in minutes on two cores.

Needs the embedded data: `python -m data_pipelines.rendered --output data/embedded`. All numbers are our choice, made for two CPU
cores; the code is that of the full size.

- Architecture: both towers, both projectors and a decoder of the same kinds, 64-pixel tiles of 16 tokens; the vocabulary is
  that of the embedded SentencePiece model. Computed in float32, which CPUs are fastest and exact with.
- Batch: 4 rows of 256 positions and 9 tiles (the tile budget of one image): attention over short rows is cheap, and in a fixed
  time many small steps got further than few large ones (by held-out loss, in short trials on earlier data).
- Every part starts from random parameters and is trained with one rate: there is nothing pretrained to protect. 1e-3 began to use
  the pictures where 2e-3 and 3e-3 had not, in short trials on earlier data.
- Mixture: shares of tokens; the four picture tasks alike, some captions, little text.
- α jitter 0.25: VRC labels come from this model, so it must have seen scaled images.

`tiny_stage1`, `tiny_stage2` and `tiny_stage3` are the same model in HyperVL's three stages.
"""

from __future__ import annotations

import ml_collections

from data_pipelines.config import DataConfig, SourceShare
from experiments.config import RANDOM, ExperimentConfig, HeldoutConfig, InitializeConfig
from experiments.overrides import to_config_dict
from hypervl_jax.architecture import hypervl_tiny
from hypervl_jax.models.runtime import RuntimeConfig
from hypervl_jax.training.batch import BatchShape
from hypervl_jax.training.checkpoint import CheckpointConfig
from hypervl_jax.training.loop import LoopConfig
from hypervl_jax.training.optimizer import OptimizerConfig
from hypervl_jax.training.step import ObjectiveConfig

VOCABULARY = 768
MIXTURE = (
    SourceShare("captions", 2.0),
    SourceShare("digits", 2.0),
    SourceShare("documents", 2.0),
    SourceShare("charts", 2.0),
    SourceShare("scenes", 2.0),
    SourceShare("text", 0.5),
)
"""The embedded sources. `text` has no held-out split."""


def experiment() -> ExperimentConfig:
    """The typed configuration; the tiny stages say what they change of it."""
    return ExperimentConfig(
        name="tiny",
        architecture=hypervl_tiny(VOCABULARY),
        runtime=RuntimeConfig(dtype="float32", decoder_remat="none", tower_remat="none", tile_chunk=9),
        batch=BatchShape(rows=4, length=256, tiles=9),
        data=DataConfig(root="data/embedded", mixture=MIXTURE, seed=0, alpha_jitter=0.25),
        heldout=HeldoutConfig(batches=8, left_out=("text",)),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=50, b2=0.98, weight_decay=0.01),
        objective=ObjectiveConfig(loss_chunk_tokens=256),
        loop=LoopConfig(steps=3000, log_every=20, evaluate_every=500),
        checkpoint=CheckpointConfig(every=500, keep=2),
        initialize_from=InitializeConfig(vision_base=RANDOM, vision_large=RANDOM, llm=RANDOM),
    )


def get_config() -> ml_collections.ConfigDict:
    """The configuration as the command line changes it."""
    return to_config_dict(experiment())
