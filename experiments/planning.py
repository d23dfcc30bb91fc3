"""Plans a run on a topology: the step that `launch` runs, compiled by the TPU compiler on this machine, and what it says.

config + topology ─► jaxpr (FLOPs of each arm) ─► executable or "does not fit" ─► memory, collectives, floors, budget
"""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib
import re
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from data_pipelines.lanes import source_names
from experiments.config import EXPECTED_FILL, ExperimentConfig
from hypervl_jax import partitioning
from hypervl_jax.architecture import HyperVLConfig, require
from hypervl_jax.planning import bounds, flops, programs, useful
from hypervl_jax.planning.chips import GIB, Topology
from hypervl_jax.training.batch import Batch
from hypervl_jax.training.checkpoint import abstract_like
from hypervl_jax.training.consistency import ConsistencyConfig, make_control
from hypervl_jax.training.loop import TrainingRun
from hypervl_jax.training.program import build_step
from hypervl_jax.training.state import TrainState


class CompilerFailed(RuntimeError):
    """The TPU compiler failed at a program, for another reason than that it does not fit; the message is the compiler's."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
        parameters, optimizer, tiles, batch: arguments of the step (`batch` without the tiles), as they are sharded.
        activations: temporaries: activations, gradients, gathered weights, and results that reuse no argument.
        code: the program.
        available: what the compiler lets a program use.
        needed: of all together. When the step does not fit only this is known of what the compiler would allocate.
    """

    parameters: int
    optimizer: int
    tiles: int
    batch: int
    activations: int | None
    code: int | None
    available: int
    needed: int

    @property
    def fits(self) -> bool:
        """Whether the step fits."""
        return self.needed <= self.available


@dataclasses.dataclass(frozen=True)
class ArmPlan:
    """One arm of the step's switch: `compiled` and `useful` FLOPs over all devices, and what a device moves in a step.

    The last three are None when the step does not fit.
    """

    branches: tuple[str, ...]
    compiled: flops.Tally
    useful: useful.Useful
    collectives: tuple[programs.Collective, ...] | None
    demand: bounds.Demand | None
    floors: bounds.Floors | None

    @property
    def useful_share(self) -> float:
        """Useful over compiled FLOPs; the rest is recomputation and masked attention."""
        return sum(self.useful.values()) / sum(self.compiled.values())


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known of a run on a topology before it starts."""

    config: ExperimentConfig
    topology: Topology
    mesh: Mapping[str, int]
    memory: Memory
    arms: tuple[ArmPlan, ...]
    budget: bounds.Budget

    @property
    def rows_per_shard(self) -> int:
        """Rows that a row shard computes at a time."""
        shards = math.prod(self.mesh[axis] for axis in partitioning.ROW_AXES)
        return self.config.batch.rows // (self.config.objective.accumulation * shards)

    @property
    def mean_useful(self) -> float:
        """Useful FLOPs of a step, the mean over the alternation."""
        return mean_over_arms(self.config.consistency, [sum(arm.useful.values()) for arm in self.arms])

    @property
    def step_floor(self) -> float | None:
        """Seconds that a step takes at least, the mean over the alternation; None when it does not fit."""
        if any(arm.floors is None for arm in self.arms):
            return None
        return mean_over_arms(self.config.consistency, [arm.floors.seconds for arm in self.arms])

    @property
    def mfu_bound(self) -> float | None:
        """MFU that the floors allow at most."""
        return None if self.step_floor is None else bounds.mfu(self.topology, self.mean_useful, self.step_floor)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A plan with the compiler's output, which is None when the step does not fit; `text` is the scheduled program in HLO."""

    plan: Plan
    executable: jax.stages.Compiled | None
    text: str | None


def mean_over_arms(consistency: ConsistencyConfig, values: list[float]) -> float:
    """The mean of one value an arm over the steps of the alternation."""
    weights = (consistency.base_steps, consistency.large_steps) if len(values) > 1 else (1,)
    return float(np.average(values, weights=weights))


def trace_step(
    run: TrainingRun, num_sources: int, mesh: jax.sharding.Mesh
) -> tuple[jax.stages.Traced, TrainState, Batch]:
    """The step that a trainer on `mesh` runs, traced without arrays; with the abstract state and batch it takes."""
    program = build_step(run, num_sources, mesh)
    state = abstract_like(program.abstract, program.shardings)
    shapes = run.batch.array_shapes(run.architecture.tiling.tile_size)
    batch = Batch(*(jax.ShapeDtypeStruct(shape, dtype, sharding=program.rows) for shape, dtype in shapes))
    control = jax.eval_shape(lambda: make_control(run.consistency, run.seed))
    with jax.set_mesh(mesh):
        return program.step.trace(state, batch, control), state, batch


def plan(
    config: ExperimentConfig,
    topology: Topology,
    mfu: float = 0.4,
    price_per_chip_hour: float | None = None,
) -> Compiled:
    """Compiles the step of a configuration for a topology and says what it needs.

    Args:
        config: laid out for the topology (`hardware.modify`), as `launch` would run it.
        topology: to plan for.
        mfu: stated, for time and cost.
        price_per_chip_hour: for the cost.

    Raises:
        ConfigError: the configuration does not fit the mesh.
        CompilerMissing: libtpu is not installed.
        CompilerFailed: the TPU compiler has an error of its own, and says so. It may also end this process: see `plan_process`.
    """
    mesh = partitioning.make_mesh(config.mesh, topology.devices())
    run = config.training_run()
    traced, state, batch = trace_step(run, len(source_names(config.data)), mesh)
    counts = [flops.count_flops(traced.jaxpr, number) for number in range(len(config.consistency.arms))]
    executable, text, needed = compile_traced(traced, mesh)
    memory = memory_of(state, batch, executable, needed, topology)
    program = programs.parse_program(text) if text else None
    arms = tuple(plan_arm(config, topology, number, count, program) for number, count in enumerate(counts))
    budget = stage_budget(config, topology, arms, mfu, price_per_chip_hour)
    return Compiled(Plan(config, topology, dict(mesh.shape), memory, arms, budget), executable, text)


def stage_budget(
    config: ExperimentConfig, topology: Topology, arms: tuple[ArmPlan, ...], mfu: float, price: float | None
) -> bounds.Budget:
    """Time and cost of all of a configuration's tokens at a stated MFU."""
    mean = mean_over_arms(config.consistency, [sum(arm.useful.values()) for arm in arms])
    tokens = config.batch.rows * config.batch.length * EXPECTED_FILL
    total = config.loop.token_budget or config.loop.steps * tokens
    return bounds.budget(topology, mean, tokens, total, mfu, price)


def runs_the_same_program(one: ExperimentConfig, other: ExperimentConfig) -> bool:
    """Whether two configurations compile to the same step but for constants (learning rates) and the few bytes of the counters by source."""
    shaping = lambda config: (
        config.architecture,
        config.batch,
        config.runtime,
        config.consistency,
        config.objective,
        config.mesh,
        config.optimizer.trainable_parts,
    )
    return shaping(one) == shaping(other)


def replan(made: Plan, config: ExperimentConfig, mfu: float, price: float | None) -> Plan:
    """The plan of a configuration that runs the program of a plan that is there, on the same topology: only the budget is its own."""
    require(runs_the_same_program(made.config, config), f"{config.name} runs another program than {made.config.name}")
    return dataclasses.replace(made, config=config, budget=stage_budget(config, made.topology, made.arms, mfu, price))


def compile_traced(
    traced: jax.stages.Traced, mesh: jax.sharding.Mesh
) -> tuple[jax.stages.Compiled | None, str | None, int]:
    """The executable, its HLO and 0; or Nones and the bytes that a device would need, when the compiler says that HBM does not suffice.

    The text is what the compiler writes down as it works: `executable.as_text()` fails at some programs for v5p and v6e, whose
    gathers run on their SparseCores (libtpu 0.0.52).

    Raises `CompilerFailed` when the compiler says anything else.
    """
    with tempfile.TemporaryDirectory() as directory:
        try:
            with jax.set_mesh(mesh):
                options = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True}
                executable = traced.lower().compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            needed = out_of_memory(str(error))
            if needed is None:
                raise CompilerFailed(str(error).splitlines()[0]) from error
            return None, None, needed
        (path,) = pathlib.Path(directory).glob("*train_step*.after_optimizations.txt")
        return executable, path.read_text(), 0


_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": GIB, "T": 1 << 40}


def out_of_memory(message: str) -> int | None:
    """Bytes that a program needs of a device, from the compiler's message that they are not there; None for another message.

    The message says "temporaries" and means arguments and results too.
    """
    found = re.search(r"total memory required for HLO temporaries \(([\d.]+)([BKMGT]?)\)", message)
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


def device_bytes(tree: Any) -> int:
    """Bytes of the shards that one device holds of abstract arrays."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def memory_of(
    state: TrainState, batch: Batch, executable: jax.stages.Compiled | None, needed: int, topology: Topology
) -> Memory:
    """Memory of one device by kind; `needed` is what the compiler asked for when there is no executable."""
    tiles = device_bytes(batch.tiles)
    arguments = (device_bytes(state.params), device_bytes(state.moments), tiles, device_bytes(batch) - tiles)
    if executable is None:
        return Memory(*arguments, None, None, topology.chip.device_hbm, needed)
    found = executable.memory_analysis()
    fresh = found.output_size_in_bytes - found.alias_size_in_bytes
    activations, code = found.temp_size_in_bytes + fresh, found.generated_code_size_in_bytes
    needed = found.argument_size_in_bytes + activations + code
    return Memory(*arguments, activations, code, topology.chip.device_hbm, needed)


def plan_arm(
    config: ExperimentConfig,
    topology: Topology,
    number: int,
    compiled: flops.Tally,
    program: programs.Program | None,
) -> ArmPlan:
    """What one arm of the step's switch costs, given its counted FLOPs; only those of a step that does not fit."""
    arm = config.consistency.arms[number]
    needed = useful_flops(config, arm)
    if program is None:
        return ArmPlan(arm, compiled, needed, None, None, None)
    moves = tuple(programs.collectives(program, number, topology.slices))
    received = {crosses: sum(move.received for move in moves if move.crosses == crosses) for crosses in (False, True)}
    demand = bounds.Demand(
        sum(compiled.values()) / topology.num_devices,
        programs.hbm_bytes(program, number),
        received[False],
        received[True],
    )
    return ArmPlan(arm, compiled, needed, moves, demand, bounds.floors(topology.chip, demand))


def useful_flops(config: ExperimentConfig, arm: tuple[str, ...]) -> useful.Useful:
    """FLOPs that a step of one arm must do."""
    architecture: HyperVLConfig = config.architecture
    return useful.step_flops(
        architecture, config.batch, arm, config.optimizer.trainable_parts, config.consistency.uses_teacher
    )


def flops_by_part(arm: ArmPlan) -> dict[str, dict[str, float]]:
    """{part: {"compiled": …, "useful": …}} with attention apart, `decoder attention`, in the order of the counts."""
    table: dict[str, dict[str, float]] = collections.defaultdict(lambda: {"compiled": 0.0, "useful": 0.0})
    name = lambda part, kind: part if kind == useful.PRODUCT else f"{part} {kind}"
    for work, count in arm.compiled.items():
        table[name(work.part, work.kind)]["compiled"] += count
    for (part, kind), count in arm.useful.items():
        table[name(part, kind)]["useful"] += count
    return dict(sorted(table.items()))
