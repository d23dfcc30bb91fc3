"""Finds rows per chip, rematerialisation and loss chunk with the best bound that fit a topology, in few compiles.

Candidates are ordered by the memory that a coarse model predicts. Of those only the frontier is kept: more memory must promise a faster
step. Whether a candidate fits is then monotone along it, nearly enough, so a bisection finds the last one that does; all that was
compiled on the way is compared by its real bound.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from experiments.config import ExperimentConfig
from experiments.planning import Plan
from hypervl_jax import partitioning
from hypervl_jax.architecture import BRANCHES, VisionConfig, projector_part, require, vision_part
from hypervl_jax.planning import useful
from hypervl_jax.planning.chips import Topology

DECODER_POLICIES = ("full", "attention", "dots")
TOWER_POLICIES = ("nested", "tile", "layer", "none")
LOSS_CHUNKS = (1024, 4096)
HALF, FULL = 2, 4
"""Bytes of a bfloat16 and of a float32."""


class Candidate(NamedTuple):
    """A layout, with predicted bytes of activations a device and predicted seconds of a step."""

    config: ExperimentConfig
    memory: float
    seconds: float


def row_choices(config: ExperimentConfig, topology: Topology) -> list[int]:
    """Rows that a row shard can compute at a time. Raises `ConfigError` when rows do not split over the row shards."""
    shards = row_shards(config, topology)
    each, rest = divmod(config.batch.rows, shards)
    require(
        not rest and each > 0, f"{config.batch.rows} rows do not split over {shards} row shards; change --config.mesh"
    )
    return [rows for rows in range(1, each + 1) if each % rows == 0]


def row_shards(config: ExperimentConfig, topology: Topology) -> int:
    """Row shards of the configuration's mesh on a topology."""
    return partitioning.row_shards(partitioning.abstract_mesh(config.mesh, topology.num_devices))


def with_rows(config: ExperimentConfig, topology: Topology, rows: int) -> ExperimentConfig:
    """The same global batch with `rows` rows a shard at a time. Raises `ConfigError` when they do not divide its share."""
    choices = row_choices(config, topology)
    require(
        rows in choices,
        f"--rows-per-chip {rows} is not possible: a row shard has {choices[-1]} rows of the global batch, so {choices}",
    )
    return dataclasses.replace(
        config, objective=dataclasses.replace(config.objective, accumulation=choices[-1] // rows)
    )


def candidates(config: ExperimentConfig, topology: Topology) -> Iterator[Candidate]:
    """Every layout that is considered."""
    choices = itertools.product(row_choices(config, topology), DECODER_POLICIES, TOWER_POLICIES, LOSS_CHUNKS)
    for rows, decoder, tower, chunk in choices:
        found = with_rows(config, topology, rows)
        runtime = dataclasses.replace(config.runtime, decoder_remat=decoder, tower_remat=tower)
        objective = dataclasses.replace(found.objective, loss_chunk_tokens=chunk)
        found = dataclasses.replace(found, runtime=runtime, objective=objective)
        yield Candidate(found, predicted_memory(found, rows), predicted_seconds(found, topology))


def predicted_memory(config: ExperimentConfig, rows: int) -> float:
    """Bytes that the backward pass of the large branch keeps on a device: a coarse model, for ordering only."""
    decoder, vision = config.architecture.decoder, config.architecture.vision_large
    heads = (decoder.num_heads + 2 * decoder.num_kv_heads) * decoder.head_dim
    kept = {
        "full": 0,
        "attention": decoder.num_heads * decoder.head_dim,
        "none": 4 * heads + 6 * decoder.intermediate_size,
    }
    kept["dots"] = heads + 2 * decoder.hidden_size + 2 * decoder.intermediate_size
    layer = decoder.hidden_size + kept[config.runtime.decoder_remat]
    tokens = rows * config.batch.length
    logits = 4 * FULL * min(config.objective.loss_chunk_tokens, tokens) * decoder.vocab_size
    return HALF * tokens * decoder.num_layers * layer + logits + _tower_memory(config, vision, rows)


def _tower_memory(config: ExperimentConfig, vision: VisionConfig, rows: int) -> float:
    layer = HALF * vision.num_patches * vision.num_layers * vision.hidden_size
    all_kept = layer * (8 + 2 * vision.intermediate_size / vision.hidden_size)
    chunk = min(config.runtime.tile_chunk, config.batch.tiles)
    return (
        rows
        * {
            "nested": chunk * layer,
            "tile": chunk * all_kept,
            "layer": config.batch.tiles * layer,
            "none": config.batch.tiles * all_kept,
        }[config.runtime.tower_remat]
    )


def predicted_seconds(config: ExperimentConfig, topology: Topology) -> float:
    """Arithmetic of a large step with its recomputation, plus the gathering of all weights, once a pass and micro-batch."""
    arm, architecture = BRANCHES[1], config.architecture
    forward = useful.forward_flops(architecture, config.batch, arm)
    repeats = {"full": {useful.PRODUCT: 1, useful.ATTENTION: 1}, "attention": {useful.PRODUCT: 1}}
    decoder = repeats.get(config.runtime.decoder_remat, {})
    tower = {"nested": 2, "tile": 1, "layer": 1, "none": 0}[config.runtime.tower_remat]
    flops = sum(useful.step_flops(architecture, config.batch, (arm,), config.optimizer.trainable_parts, False).values())
    flops += sum(forward["decoder", kind] * times for kind, times in decoder.items())
    flops += sum(
        count * tower for (part, _), count in forward.items() if part in (vision_part(arm), projector_part(arm))
    )
    weights = HALF * sum(architecture.parameter_counts().values())
    gathers = 3 if config.runtime.decoder_remat in repeats else 2
    chip = topology.chip
    seconds = flops / (topology.chips * chip.flops)
    return seconds + config.objective.accumulation * gathers * weights * chip.devices / chip.ici_bandwidth


def frontier(found: list[Candidate]) -> list[Candidate]:
    """Candidates by growing memory, each faster than all before it."""
    kept: list[Candidate] = []
    for candidate in sorted(found, key=lambda one: (one.memory, one.seconds)):
        if not kept or candidate.seconds < kept[-1].seconds:
            kept.append(candidate)
    return kept


def search(
    config: ExperimentConfig, topology: Topology, make_plan: Callable[[ExperimentConfig], Plan | None]
) -> tuple[Plan, list[Plan]]:
    """The layout with the shortest step that fits, and all plans that were made; the last one when none fits.

    `make_plan` plans one configuration on the topology. None says that the compiler fails at it, and leaves out all layouts with
    the same rematerialisation. Raises `ConfigError` when it fails at all of them.
    """
    left, tried = list(candidates(config, topology)), []
    while line := frontier(left):
        tested = line[(len(line) - 1) // 2]
        made = make_plan(tested.config)
        if made is None:
            left = [one for one in left if rematerialisation(one) != rematerialisation(tested)]
            continue
        tried.append(made)
        if made.memory.fits:
            left = [one for one in left if one.memory > tested.memory and one.seconds < tested.seconds]
        else:
            left = [one for one in left if one.memory < tested.memory]
    require(bool(tried), f"the TPU compiler fails at every layout of {config.name} on {topology.name}")
    fitting = [plan for plan in tried if plan.memory.fits]
    return min(fitting, key=lambda plan: plan.step_floor) if fitting else tried[-1], tried


def rematerialisation(candidate: Candidate) -> tuple[str, str]:
    """The policies of decoder and tower."""
    return candidate.config.runtime.decoder_remat, candidate.config.runtime.tower_remat
