"""`--debug`: any configuration at a built-in small size on embedded data, for a few dozen steps.

Only sizes shrink. What makes the configuration what it is stays: frozen parts, rates, schedule, DCL, tiling options, compute dtype,
rematerialisation, worker processes, spike rule.
"""

from __future__ import annotations

import dataclasses
import fcntl
import math
import pathlib
from collections.abc import Sequence

import ml_collections

from data_pipelines.config import DataConfig, SourceShare
from data_pipelines.rendered.build import VOCAB_SIZE, build
from experiments.config import RANDOM, ExperimentConfig, HeldoutConfig, InitializeConfig
from experiments.preflight import missing_sources
from hypervl_jax.architecture import HyperVLConfig, hypervl_tiny
from hypervl_jax.partitioning import MeshConfig
from hypervl_jax.training.batch import BatchShape

DEBUG_DATA = "data/debug"
STEPS = 24
MOST_WORKERS = 2
SOURCES = ("captions", "digits", "documents", "charts", "scenes", "text")


def shrink(config: ExperimentConfig) -> ExperimentConfig:
    """The same experiment, small: it runs on any machine and any number of devices that divides 8."""
    batch = BatchShape(rows=8, length=512, tiles=24)
    return dataclasses.replace(
        config,
        name=f"{config.name}-debug",
        architecture=_small_architecture(config.architecture),
        batch=batch,
        mesh=MeshConfig(),
        data=_embedded_data(config.data),
        heldout=HeldoutConfig(batches=min(config.heldout.batches, 1), left_out=("text",)),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=min(config.optimizer.warmup_steps, STEPS // 6)),
        objective=dataclasses.replace(
            config.objective, loss_chunk_tokens=256, accumulation=math.gcd(config.objective.accumulation, batch.rows)
        ),
        loop=dataclasses.replace(config.loop, steps=STEPS, token_budget=0, log_every=4, evaluate_every=STEPS // 2),
        checkpoint=dataclasses.replace(config.checkpoint, every=STEPS // 3, keep_period=0),
        initialize_from=InitializeConfig(vision_base=RANDOM, vision_large=RANDOM, llm=RANDOM),
        tokenizer="",
    )


def fit_warmup(config: ml_collections.ConfigDict, given: Sequence[tuple[str, str]]) -> None:
    """Shortens the warm-up to fit the steps that the user asked for, unless he set it himself. `given`: overrides as (path, text)."""
    if "optimizer.warmup_steps" not in dict(given):
        config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, config.loop.steps // 6)


def _small_architecture(architecture: HyperVLConfig) -> HyperVLConfig:
    """The tiny model with the projector and the tiling options of the given one."""
    tiny = hypervl_tiny(VOCAB_SIZE)
    options = {"thumbnail": architecture.tiling.thumbnail, "separators": architecture.tiling.separators}
    tiling = dataclasses.replace(tiny.tiling, **options)
    return dataclasses.replace(tiny, projector=architecture.projector, tiling=tiling)


def _embedded_data(data: DataConfig) -> DataConfig:
    """All embedded sources in equal shares, read as the given data is."""
    return dataclasses.replace(
        data,
        root=DEBUG_DATA,
        mixture=tuple(SourceShare(name, 1.0) for name in SOURCES),
        changes=(),
        epoch_limit=0.0,
        epoch_limits=(),
        workers=min(data.workers, MOST_WORKERS),
        alphas="",
    )


def make_data(config: ExperimentConfig) -> bool:
    """Makes the embedded data at its smallest size where the configuration looks for it; says whether it had to.

    Of several processes that see the directory, one makes it and the others wait.

    Raises:
        BuildError: the directory holds something else.
    """
    if not missing_sources(config):
        return False
    root = pathlib.Path(config.data.root)
    root.parent.mkdir(parents=True, exist_ok=True)
    with root.with_name(f"{root.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return not build(root, size="test").already_complete
