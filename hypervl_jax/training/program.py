"""The step of a run on a mesh, built without arrays: `loop.Trainer` runs it, the planner compiles it for a topology."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from jax.sharding import Mesh, NamedSharding

from hypervl_jax import partitioning
from hypervl_jax.architecture import require
from hypervl_jax.models.runtime import resolve_kernels
from hypervl_jax.training import state as training_state
from hypervl_jax.training.optimizer import learning_rate_schedule
from hypervl_jax.training.state import TrainState
from hypervl_jax.training.step import StepFunctions, compile_step

if TYPE_CHECKING:
    from hypervl_jax.training.loop import TrainingRun


class StepProgram(NamedTuple):
    """A run's step on one mesh.

    Attributes:
        run: with the kernels that the mesh's devices run.
        functions: step and evaluation as pure functions.
        abstract: shapes and dtypes of the whole state.
        shardings: of the whole state.
        rows: sharding of every array of a batch.
        step: (state, batch, control) -> (state, metrics), jitted; it takes the mesh that is set (`jax.set_mesh`).
    """

    run: TrainingRun
    functions: StepFunctions
    abstract: TrainState
    shardings: TrainState
    rows: NamedSharding
    step: Callable[..., Any]


def build_step(run: TrainingRun, num_sources: int, mesh: Mesh) -> StepProgram:
    """The step of `run` on `mesh`, whose devices may be those of a topology that is not here.

    Raises `ConfigError` when the rows or a parameter do not split over the mesh, or the kernels do not run on its devices.
    """
    check_rows(run, mesh)
    run = dataclasses.replace(run, runtime=resolve_kernels(run.runtime, mesh.devices.flat[0].platform))
    schedule = learning_rate_schedule(run.optimizer, run.loop.steps)
    functions = StepFunctions(
        run.architecture, run.runtime, run.optimizer, run.consistency, run.objective, schedule, num_sources
    )
    sizes = (run.architecture, run.runtime, run.optimizer, num_sources)
    abstract, shardings = training_state.abstract_state(*sizes), training_state.state_shardings(*sizes, mesh)
    rows = partitioning.row_sharding(mesh)
    return StepProgram(run, functions, abstract, shardings, rows, compile_step(functions, shardings, rows))


def check_rows(run: TrainingRun, mesh: Mesh) -> None:
    """Raises `ConfigError` unless every micro-batch splits evenly over the mesh's row shards."""
    micros, shards = run.objective.accumulation, partitioning.row_shards(mesh)
    require(
        run.batch.rows % (micros * shards) == 0,
        f"batch.rows {run.batch.rows} cannot be split into objective.accumulation {micros} micro-batches over {shards} row "
        f"shards of the mesh; make rows a multiple of {micros * shards}, accumulate less, or let chips share rows with "
        "mesh.context or mesh.tensor",
    )
