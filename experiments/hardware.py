"""Hardware modifiers: how an experiment is laid out on a topology, chosen by the first entry of `TABLE` whose patterns match.

    2xv5e-256, stage1 ─► mesh, rows a row shard computes at a time (hence accumulation), rematerialisation, kernels, chunks

A modifier changes how fast and in how much memory a step is computed, never what it computes: the global rows, their order and
everything else that decides the result belong to the experiment. `launch` applies the entry of the devices it finds, or of
`--hardware NAME`, before the overrides of the command line, which therefore win.

**Meshes.** Rows go over slice × data × fsdp. fsdp is at most 256: the width 768 of SigLIP2-Base has no larger power of two. More
chips than rows share a row: `context` splits its positions and tiles, `tensor` its heads and widths, at most 4 ways, for the 12
heads of SigLIP2-Base. Only `slice` crosses the data-centre network, so parameters are gathered within a slice.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Sequence

import jax
import ml_collections

from experiments.config import ExperimentConfig
from experiments.overrides import apply_override
from hypervl_jax.architecture import ConfigError, require
from hypervl_jax.partitioning import MESH_AXES, ROW_AXES, MeshConfig, count_slices
from hypervl_jax.planning import chips

NONE = "none"
"""`--hardware none`: the configuration's own settings, whatever the devices are."""

Setting = tuple[str, str]
"""Path and text of a value, as on the command line."""


@dataclasses.dataclass(frozen=True)
class Hardware:
    """How experiments are laid out on a topology.

    Attributes:
        topology: pattern of topology names (`planning.chips.topology`).
        configs: pattern of configuration names.
        mesh: devices along each axis within a slice; `slice` is set to the topology's slices.
        rows: most rows that a row shard (the devices that share rows) computes at a time; the rest is accumulated.
        decoder_remat: see `RuntimeConfig`.
        tower_remat: see `RuntimeConfig`.
        tile_chunk: tiles of each row that pass through a tower together; a multiple of `mesh.context`.
        attention: kernel.
        loss_chunk_tokens: see `ObjectiveConfig`.
        planned: memory a device and bound on the time of a step, as `python -m tools.plan_topology` printed them; empty: not planned.
    """

    topology: str
    configs: str
    mesh: MeshConfig
    rows: int
    decoder_remat: str = "full"
    tower_remat: str = "tile"
    tile_chunk: int = 1
    attention: str = "auto"
    loss_chunk_tokens: int = 1024
    planned: str = ""

    def mesh_on(self, topology: chips.Topology) -> MeshConfig:
        """The mesh with the topology's slices."""
        return dataclasses.replace(self.mesh, slice=topology.slices)

    def settings(self, rows: int, shards: int) -> list[Setting]:
        """What this changes beside the mesh, for `rows` global rows over `shards` row shards."""
        return [
            ("objective.accumulation", str(accumulation(rows, shards, self.rows))),
            ("objective.loss_chunk_tokens", str(self.loss_chunk_tokens)),
            ("runtime.attention", self.attention),
            ("runtime.decoder_remat", self.decoder_remat),
            ("runtime.tower_remat", self.tower_remat),
            ("runtime.tile_chunk", str(self.tile_chunk)),
        ]


def accumulation(rows: int, shards: int, at_once: int) -> int:
    """The fewest micro-batches in which a row shard has at most `at_once` rows. Raises `ConfigError` when rows do not split."""
    require(
        rows % shards == 0,
        f"batch.rows {rows} cannot be split over {shards} row shards; let chips share rows: --config.mesh.context or "
        "mesh.tensor splits a row, mesh.data=1 and mesh.fsdp=ROWS are the most row shards there can be",
    )
    each = rows // shards
    return next(parts for parts in range(1, each + 1) if each % parts == 0 and each // parts <= at_once)


FSDP = MeshConfig()
SPLIT_4 = MeshConfig(data=2, fsdp=256, context=2, tensor=2)
SPLIT_8 = MeshConfig(data=2, fsdp=256, context=2, tensor=4)

TABLE: tuple[Hardware, ...] = (
    Hardware(
        "v5e-256",
        "stage1",
        FSDP,
        rows=2,
        decoder_remat="dots",
        tower_remat="layer",
        planned="14.1 of 15.8 GiB a device, step at least 0.74 s",
    ),
    Hardware(
        "v5e-256",
        "stage[23]",
        FSDP,
        rows=2,
        decoder_remat="attention",
        planned="7.9 of 15.8 GiB a device, step at least 2.05 s",
    ),
    Hardware(
        "2xv5e-256",
        "stage1",
        FSDP,
        rows=1,
        decoder_remat="dots",
        planned="7.7 of 15.8 GiB a device, step at least 0.38 s",
    ),
    Hardware(
        "2xv5e-256",
        "stage[23]",
        FSDP,
        rows=1,
        decoder_remat="dots",
        planned="13.6 of 15.8 GiB a device, step at least 0.94 s",
    ),
    Hardware(
        "v6e-256",
        "stage1",
        FSDP,
        rows=2,
        decoder_remat="dots",
        planned="12.1 of 31.2 GiB a device, step at least 0.21 s",
    ),
    Hardware(
        "v6e-256",
        "stage[23]",
        FSDP,
        rows=2,
        decoder_remat="dots",
        planned="23.7 of 31.2 GiB a device, step at least 0.50 s",
    ),
    Hardware(
        "v5p-512",
        "stage1",
        FSDP,
        rows=2,
        decoder_remat="dots",
        planned="12.2 of 95.7 GiB a device, step at least 0.33 s",
    ),
    Hardware(
        "v5p-512",
        "stage[23]",
        FSDP,
        rows=2,
        decoder_remat="dots",
        planned="23.7 of 95.7 GiB a device, step at least 0.80 s",
    ),
    Hardware(
        "v5p-4096",
        "stage1",
        SPLIT_4,
        rows=1,
        decoder_remat="dots",
        tile_chunk=2,
        planned="2.6 of 95.7 GiB a device, step at least 0.04 s",
    ),
    Hardware(
        "v5p-4096",
        "stage[23]",
        SPLIT_4,
        rows=1,
        decoder_remat="dots",
        tile_chunk=2,
        planned="5.1 of 95.7 GiB a device, step at least 0.10 s",
    ),
    Hardware(
        "v5p-8192",
        "stage1",
        SPLIT_8,
        rows=1,
        decoder_remat="dots",
        tile_chunk=2,
        planned="1.6 of 95.7 GiB a device, step at least 0.02 s",
    ),
    Hardware(
        "v5p-8192",
        "stage[23]",
        SPLIT_8,
        rows=1,
        decoder_remat="dots",
        tile_chunk=2,
        planned="3.0 of 95.7 GiB a device, step at least 0.05 s",
    ),
    Hardware("*v5e*", "*", FSDP, rows=1),
    Hardware("*v6e*", "*", FSDP, rows=2),
    Hardware("*v4*", "*", FSDP, rows=2),
    Hardware("*v5p*", "*", FSDP, rows=2),
    Hardware("*tpu7x*", "*", FSDP, rows=2),
)
"""From the special to the general; the first match counts."""


def find(topology: chips.Topology, config: str) -> Hardware:
    """The modifier of a configuration on a topology. Raises `ConfigError` when there is none."""
    for entry in TABLE:
        if fnmatch.fnmatchcase(topology.name, entry.topology) and fnmatch.fnmatchcase(config, entry.configs):
            return entry
    raise ConfigError(
        f"experiments.hardware has no entry for {config} on {topology.name}; known: "
        f"{', '.join(dict.fromkeys(entry.topology for entry in TABLE))}. Add one, or set --config.mesh and --hardware {NONE}"
    )


def modify(config: ml_collections.ConfigDict, topology: chips.Topology, given: Sequence[Setting] = ()) -> None:
    """Applies the modifier of a topology to a configuration, and `given`, what the user said, over it again.

    Accumulation follows from the mesh that results. Raises `ConfigError` when there is no entry, or the mesh does not fit.
    """
    entry = find(topology, config.name)
    _apply(config, [("mesh", mesh_text(entry.mesh_on(topology))), *given])
    sizes = MeshConfig(**config.mesh.to_dict()).sizes(topology.num_devices)
    shards = math.prod(sizes[MESH_AXES.index(axis)] for axis in ROW_AXES)
    _apply(config, [*entry.settings(config.batch.rows, shards), *given])


def fit_tile_chunk(config: ml_collections.ConfigDict, given: Sequence[Setting] = ()) -> None:
    """Where a mesh splits tiles over `context` devices, as many pass through a tower together, unless `given` says otherwise."""
    together = math.lcm(config.runtime.tile_chunk, config.mesh.context)
    if "runtime.tile_chunk" not in dict(given) and together <= config.batch.tiles:
        _apply(config, [("runtime.tile_chunk", str(together))])


def _apply(config: ml_collections.ConfigDict, changes: Sequence[Setting]) -> None:
    for path, text in changes:
        apply_override(config, ExperimentConfig, path, text)


def mesh_text(mesh: MeshConfig) -> str:
    """A mesh as `--config.mesh` takes it."""
    return ",".join(f"{axis}:{size}" for axis, size in zip(MESH_AXES, dataclasses.astuple(mesh), strict=True))


def chosen(name: str | None, found: chips.Topology | None) -> chips.Topology | None:
    """The topology to lay out for: the one named, or else the one found; None for neither, or for `none`.

    Raises `ConfigError` when the name is no topology.
    """
    if name is None:
        return found
    return None if name == NONE else chips.topology(name)


def describe(config: ExperimentConfig, topology: chips.Topology) -> str:
    """One line for the log: which entry was taken, what the run was laid out as, and what the planner said of the entry."""
    entry, runtime, objective = find(topology, config.name), config.runtime, config.objective
    return (
        f"hardware {topology.name} (entry {entry.topology}, {entry.configs}): mesh {mesh_text(config.mesh)}, accumulation "
        f"{objective.accumulation}, remat {runtime.decoder_remat} / {runtime.tower_remat}, attention {runtime.attention}, "
        f"tile chunk {runtime.tile_chunk}, loss chunk {objective.loss_chunk_tokens}; {entry.planned or 'not planned'}"
    )


def live_topology(devices: Sequence[jax.Device]) -> chips.Topology | None:
    """The topology of the devices a run has found; None for anything but TPUs of the planner's table."""
    chip, slices = chips.KINDS.get(devices[0].device_kind), count_slices(devices)
    if chip is None:
        return None
    count = len(devices) // slices // chip.devices
    line = (count, *(1 for _ in range(chip.axes - 1)))
    return chips.Topology(chip, chips.slice_shape(chip, count) or line, slices)
