"""`ExperimentConfig`: the rooms' own configs put together, and the checks that need more than one room.

A field belongs to the room that reads it; this file repeats none of them.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib

from data_pipelines.config import DataConfig
from data_pipelines.staged import local_tokenizer
from hypervl_jax.architecture import DECODER, HyperVLConfig, branch_parts, require
from hypervl_jax.models.runtime import RuntimeConfig
from hypervl_jax.partitioning import MeshConfig
from hypervl_jax.training.batch import BatchShape
from hypervl_jax.training.checkpoint import CheckpointConfig
from hypervl_jax.training.consistency import ConsistencyConfig
from hypervl_jax.training.loop import LoopConfig, TrainingRun
from hypervl_jax.training.optimizer import OptimizerConfig
from hypervl_jax.training.step import ObjectiveConfig

RANDOM = "random"
"""What `initialize_from` says where parameters are to be made from the seed."""

EXPECTED_FILL = 0.97
"""Our planning assumption: the share of a batch's positions that are not padding. Where tile slots run out before positions it is
less. A run with a token budget compares it with what it sees, and warns when its schedules would end elsewhere than its budget."""


@dataclasses.dataclass(frozen=True)
class HeldoutConfig:
    """Held-out losses. The source `name` of the mixture lies in `data.root/split/name`.

    Attributes:
        split: name of the held-out split.
        batches: global batches of each source that are read, from its start; 0 switches the evaluation off.
        left_out: sources of the mixture that have no held-out split.
    """

    split: str = "heldout"
    batches: int = 1
    left_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(
            self.batches >= 0, f"heldout.batches {self.batches} must not be negative; 0 switches the evaluation off"
        )


@dataclasses.dataclass(frozen=True)
class InitializeConfig:
    """Where parameters come from at step 0: a directory, or "random". Empty means that it has not been said yet.

    Attributes:
        vision_base: a SigLIP2 checkpoint with safetensors; its projector is always random.
        vision_large: the same for the large branch.
        llm: a Qwen3 checkpoint with safetensors.
        checkpoint: the workdir (or its `checkpoints`) of an earlier run, which gives all parts; the optimizer starts afresh.
    """

    vision_base: str = ""
    vision_large: str = ""
    llm: str = ""
    checkpoint: str = ""

    def __post_init__(self) -> None:
        parts = [name for name in self.single_parts if getattr(self, name)]
        require(
            not (self.checkpoint and parts),
            f"initialize_from.checkpoint gives every part, but {' and '.join(parts)} is set too; set it to '' or leave checkpoint out",
        )
        require(
            self.checkpoint != RANDOM,
            "initialize_from.checkpoint is a directory; say 'random' for vision_base, vision_large and llm",
        )

    @property
    def single_parts(self) -> tuple[str, ...]:
        """Fields that name the source of one part each."""
        return tuple(field.name for field in dataclasses.fields(self) if field.name != "checkpoint")

    @property
    def unsaid(self) -> tuple[str, ...]:
        """Parts of which nobody has said where they come from; such a run is refused."""
        return () if self.checkpoint else tuple(name for name in self.single_parts if not getattr(self, name))


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Everything that decides a run.

    Attributes:
        name: of the configuration; the default workdir is `runs/<name>`.
        seed: of random parameters and of random alternation. The order of the data has its own, `data.seed`.
        architecture: what the model is.
        runtime: how it is computed.
        mesh: how devices are arranged.
        batch: sizes of the global batch; they belong to the experiment, never to the hardware.
        data: the training mixture.
        heldout: the evaluation during training.
        optimizer: AdamW, schedule, frozen parts.
        consistency: alternation of the branches and KL.
        objective: loss terms and accumulation.
        loop: how long.
        checkpoint: how often.
        initialize_from: where parameters come from.
        tokenizer: file or directory, with its chat template beside it; `data.root` when empty, since the data was counted with it.
    """

    name: str
    architecture: HyperVLConfig
    batch: BatchShape
    data: DataConfig
    optimizer: OptimizerConfig
    loop: LoopConfig
    seed: int = 0
    runtime: RuntimeConfig = dataclasses.field(default_factory=RuntimeConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    heldout: HeldoutConfig = dataclasses.field(default_factory=HeldoutConfig)
    consistency: ConsistencyConfig = dataclasses.field(default_factory=ConsistencyConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    initialize_from: InitializeConfig = dataclasses.field(default_factory=InitializeConfig)
    tokenizer: str = ""

    def __post_init__(self) -> None:
        plain = self.name not in ("", ".", "..") and not set(self.name) & set("/\\\0")
        require(plain, f"name {self.name!r} must be a plain directory name; say with --workdir where the run lies")
        require(0 <= self.seed < 2**31, f"seed {self.seed} must lie in 0..2**31-1")
        self.batch.validate_with(self.architecture.tiling)
        _check_rows(self)
        _check_length(self)
        _check_arms(self)
        _check_heldout(self)

    @property
    def tokenizer_path(self) -> pathlib.Path:
        """Where the tokenizer lies; of a remote one, the local copy."""
        return local_tokenizer(self.tokenizer or self.data.root)

    def training_run(self) -> TrainingRun:
        """What the trainer needs of this."""
        names = (field.name for field in dataclasses.fields(TrainingRun))
        return TrainingRun(**{name: getattr(self, name) for name in names})


def steps_for(token_budget: float, batch: BatchShape) -> int:
    """Steps in which a batch shape takes `token_budget` LLM positions at `EXPECTED_FILL`: the horizon of the schedules."""
    return math.ceil(token_budget / (batch.rows * batch.length * EXPECTED_FILL))


def _check_rows(config: ExperimentConfig) -> None:
    """Rows and positions split evenly over micro-batches and the mesh sizes that are given; the rest is checked on the devices."""
    mesh, accumulation = config.mesh, config.objective.accumulation
    ways = math.prod(size for size in (mesh.slice, mesh.data, mesh.fsdp) if size > 0)
    require(
        config.batch.rows % (accumulation * ways) == 0,
        f"batch.rows {config.batch.rows} cannot be split into objective.accumulation {accumulation} micro-batches over {ways} row shards of "
        f"the mesh; make rows a multiple of {accumulation * ways}, or let chips share rows with mesh.context or mesh.tensor",
    )
    if mesh.context > 1:
        _check_context(config, config.batch.rows // (accumulation * ways) if mesh.fsdp > 0 else 1)


def _check_context(config: ExperimentConfig, rows: int) -> None:
    """Positions and tiles of `rows` rows, which share a group of chips, split evenly over `mesh.context`."""
    context, tiles = config.mesh.context, min(config.runtime.tile_chunk, config.batch.tiles)
    require(
        config.batch.length % context == 0,
        f"batch.length {config.batch.length} cannot be split over mesh.context {context}; make it a divisor",
    )
    require(
        rows * tiles % context == 0,
        f"the {rows * tiles} tiles that {rows} rows encode together cannot be split over mesh.context {context}; make "
        f"runtime.tile_chunk {config.runtime.tile_chunk} a multiple of it",
    )


def _check_length(config: ExperimentConfig) -> None:
    """The schedule reaches beyond its warm-up and as far as the token budget."""
    loop, optimizer = config.loop, config.optimizer
    require(
        optimizer.warmup_steps < loop.steps,
        f"optimizer.warmup_steps {optimizer.warmup_steps} must be below loop.steps {loop.steps}; lower it or train longer",
    )
    most = loop.steps * config.batch.rows * config.batch.length
    require(
        loop.token_budget <= most,
        f"loop.token_budget {loop.token_budget} is more than the {most} positions of loop.steps {loop.steps}, and the schedules would end "
        f"before the run; set loop.steps to {steps_for(loop.token_budget, config.batch)}",
    )


def _check_arms(config: ExperimentConfig) -> None:
    """Every arm of the alternation trains something, and nothing that the batches do not hold."""
    trainable = set(config.optimizer.trainable_parts)
    require(
        config.batch.tiles > 0 or trainable == {DECODER},
        "batch.tiles 0 is text alone, from which only the decoder learns; set optimizer.frozen to vision,projector",
    )
    for arm in config.consistency.arms:
        moved = trainable & {part for branch in arm for part in branch_parts(branch)}
        require(
            bool(moved),
            f"steps of branch {'+'.join(arm)} would train nothing: optimizer.frozen {', '.join(config.optimizer.frozen)} freezes all its parts; "
            "unfreeze one or change consistency.alternation",
        )


def _check_heldout(config: ExperimentConfig) -> None:
    """The held-out split is another one, and what it leaves out is in the mixture."""
    require(
        config.heldout.split != config.data.split,
        f"heldout.split {config.heldout.split!r} is the split the run trains on; name another one",
    )
    names = [source.name for source in config.data.mixture]
    unknown = [name for name in config.heldout.left_out if name not in names]
    require(not unknown, f"heldout.left_out names {', '.join(unknown)}, not in data.mixture ({', '.join(names)})")
