"""How a configuration is split over a topology, as text: parameters from their logical axes, activations from a trace of the loss.

The trace is of what the step differentiates (base branch with its teacher, so both towers), under a mesh without devices; it
finds every array whose sharding the code pins, and every input of a `shard_map` (kernels, fused losses).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from experiments import hardware
from experiments.config import ExperimentConfig
from experiments.named import load_config
from experiments.overrides import from_config_dict
from hypervl_jax import partitioning
from hypervl_jax.models.runtime import resolve_kernels
from hypervl_jax.planning import chips
from hypervl_jax.training.batch import Batch, BatchShape
from hypervl_jax.training.consistency import make_control
from hypervl_jax.training.optimizer import OptimizerConfig
from hypervl_jax.training.state import abstract_parameters
from hypervl_jax.training.step import StepFunctions


def laid_out(name: str, topology: str) -> tuple[ExperimentConfig, AbstractMesh]:
    """A named configuration on a topology, and its mesh."""
    config, found = load_config(name), chips.topology(topology)
    hardware.modify(config, found)
    typed = from_config_dict(ExperimentConfig, config)
    return typed, partitioning.abstract_mesh(typed.mesh, found.num_devices)


def sharding_text(name: str, topology: str) -> str:
    """The golden text of one configuration on one topology."""
    config, mesh = laid_out(name, topology)
    head = f"mesh {' '.join(f'{axis}={size}' for axis, size in mesh.shape.items())}, accumulation {config.objective.accumulation}"
    parameters = [line(path, leaf.shape, spec, mesh) for path, leaf, spec in parameter_specs(config, mesh)]
    rows = partitioning.row_sharding(mesh).spec
    shapes = config.batch.array_shapes(config.architecture.tiling.tile_size)
    inputs = [line(f"batch.{name}", shape, rows, mesh) for name, (shape, _) in shapes._asdict().items()]
    activations = [line(what, shape, spec, mesh) for what, shape, spec in pinned(config, mesh)]
    return "\n".join([head, "", "parameters", *parameters, "", "batch", *inputs, "", "activations", *activations, ""])


def parameter_specs(config: ExperimentConfig, mesh: AbstractMesh) -> Iterator[tuple[str, Any, PartitionSpec]]:
    """Path, shape and sharding of every parameter."""
    params, axes = abstract_parameters(config.architecture, config.runtime)
    shardings = jax.tree.leaves(partitioning.shardings(params, axes, mesh))
    for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(params), shardings, strict=True):
        yield "/".join(key.key for key in path), leaf, sharding.spec


def line(what: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: AbstractMesh) -> str:
    """`what [whole] -> [on a device]  axes`; axes of size 1 are left out."""
    entries = [*spec, *(None for _ in range(len(shape) - len(spec)))]
    local = [size // partitioning.ways(entry, mesh) for size, entry in zip(shape, entries, strict=True)]
    axes = ["+".join(axis for axis in _axes(entry) if mesh.shape[axis] > 1) or "-" for entry in entries]
    return f"  {what} {_sizes(shape)} -> {_sizes(local)}  {' '.join(axes)}"


def _axes(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


def _sizes(shape: Any) -> str:
    return f"[{', '.join(map(str, shape))}]"


def pinned(config: ExperimentConfig, mesh: AbstractMesh) -> list[tuple[str, tuple[int, ...], PartitionSpec]]:
    """Every activation whose sharding the code says, once: module, shape, spec; configurations that only differ in data share it."""
    runtime = resolve_kernels(config.runtime, "tpu")
    return _trace(config.architecture, runtime, config.consistency, config.objective, config.batch, mesh)


@functools.lru_cache
def _trace(
    architecture: Any, runtime: Any, consistency: Any, objective: Any, shape: BatchShape, mesh: AbstractMesh
) -> list[tuple[str, tuple[int, ...], PartitionSpec]]:
    functions = StepFunctions(
        architecture, runtime, OptimizerConfig(), consistency, objective, learning_rate=lambda step: step, num_sources=1
    )
    params, _ = abstract_parameters(architecture, runtime)
    micro = dataclasses.replace(shape, rows=shape.rows // objective.accumulation)
    arrays = micro.array_shapes(architecture.tiling.tile_size)
    batch = Batch(*(jax.ShapeDtypeStruct(size, dtype) for size, dtype in arrays))
    control = jax.eval_shape(lambda: make_control(consistency, 0))

    def loss(params: Any, batch: Batch, control: Any) -> Any:
        return functions.arm_loss({}, params, batch, arm=("base",), counts=functions.counts(batch), control=control)

    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.make_jaxpr(loss)(params, batch, control)
    return list(dict.fromkeys(_pins(traced.jaxpr, "")))


def _pins(jaxpr: Any, outer: str) -> Iterator[tuple[str, tuple[int, ...], PartitionSpec]]:
    """Sharding constraints and inputs of shard_maps, in the order of the program, with the module they stand in."""
    for equation in jaxpr.eqns:
        place = f"{outer}/{equation.source_info.name_stack}"
        if equation.primitive.name == "sharding_constraint":
            yield _module(place), equation.outvars[0].aval.shape, equation.params["sharding"].spec
        if equation.primitive.name == "shard_map":
            for variable, spec in zip(equation.invars, equation.params["in_specs"], strict=True):
                if variable.aval.ndim > 1 and math.prod(variable.aval.shape) > 2**10:
                    yield f"{_module(place)}: shard_map", variable.aval.shape, spec
        for inner in _inner(equation.params.values()):
            yield from _pins(inner, place)


def _inner(values: Iterable[Any]) -> Iterator[Any]:
    """Programs among an equation's parameters."""
    for value in values:
        for item in value if isinstance(value, tuple | list) else (value,):
            found = getattr(item, "jaxpr", item)
            if hasattr(found, "eqns"):
                yield found


def _module(place: str) -> str:
    """The innermost modules of a name stack, without what transformations add."""
    names = [
        name
        for name in re.split(r"[/()]", place)
        if name and name not in ("jvp", "transpose", "checkpoint", "rematted_computation")
    ]
    return "/".join(name.removeprefix("HyperVL.") for name in dict.fromkeys(names)) or "loss"
