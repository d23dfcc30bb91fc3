"""The device mesh and the one table that maps logical axes of arrays to mesh axes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from hypervl_jax.architecture import ConfigError, require

MESH_AXES = ("slice", "data", "fsdp", "context", "tensor")
"""`slice` crosses the data-centre network, so only gradients travel over it; `data` replicates parameters; `fsdp` shards parameters
and rows; `context` shards the positions and tiles of one row, for meshes with more chips than rows; `tensor` shards heads and widths."""

ROW_AXES = ("slice", "data", "fsdp")
"""Mesh axes over which the rows of a batch are split."""

PARAMETER_AXES = ("fsdp", "tensor")
"""Mesh axes over which parameters are split."""

UNSHARDED_LIMIT = 0.02
"""Share of all parameters that a device may hold beyond an even split. Norms and biases are far below it at full size."""

UNSHARDED_ALLOWANCE = 2**14
"""Parameters beyond an even split that are never worth an error (64 KiB): norms and biases can be over 2 % of a model for tests."""

RULES: Mapping[str, tuple[str, ...] | str | None] = {
    "rows": ROW_AXES,
    "length": "context",
    "tiles": (*ROW_AXES, "context"),
    "layers": None,
    "embed": "fsdp",
    "vocabulary": "tensor",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "patch_pixels": None,
    "patches": None,
    "shuffled": "fsdp",
    "projected": "tensor",
    "norm": None,
    "channels": None,
    "activation_embed": None,
    "activation_heads": "tensor",
    "activation_kv_heads": "tensor",
    "activation_mlp": "tensor",
    "activation_vocabulary": "tensor",
}
"""Logical axis -> mesh axes. Parameters use the plain names, activations `rows`, `length` and the `activation_` names; `tiles` is the
axis on which the tiles of all rows are encoded together."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1 and takes what is left."""

    slice: int = 1
    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.astuple(self)
        require(all(size == -1 or size >= 1 for size in sizes), f"mesh sizes {sizes} must be positive, or -1 once")
        require(sizes.count(-1) <= 1, f"mesh sizes {sizes} hold -1 more than once")

    def sizes(self, num_devices: int) -> tuple[int, ...]:
        """Devices along each of `MESH_AXES`. Raises `ConfigError` when they do not multiply to `num_devices`."""
        sizes = dataclasses.astuple(self)
        known = math.prod(size for size in sizes if size != -1)
        if -1 in sizes:
            require(num_devices % known == 0, f"{num_devices} devices cannot be split by the fixed mesh sizes {sizes}")
            sizes = tuple(num_devices // known if size == -1 else size for size in sizes)
        require(
            math.prod(sizes) == num_devices,
            f"mesh sizes {dict(zip(MESH_AXES, sizes, strict=True))} need {math.prod(sizes)} devices, {num_devices} are here",
        )
        return sizes


NAMED_MESHES: Mapping[str, MeshConfig] = {
    "fsdp": MeshConfig(),
    "data": MeshConfig(data=-1, fsdp=1),
    "context2": MeshConfig(context=2),
    "context4": MeshConfig(context=4),
    "tensor2": MeshConfig(tensor=2),
    "tensor4": MeshConfig(tensor=4),
    "context2_tensor4": MeshConfig(context=2, tensor=4),
    "context4_tensor4": MeshConfig(context=4, tensor=4),
}
"""Meshes by name; what the name does not say is `fsdp`, on one slice."""


def parse_mesh(text: str) -> MeshConfig:
    """A mesh by its name, or by its sizes as `slice:2,fsdp:128,tensor:2`; an axis that is not named has size 1.

    Raises `ConfigError` for anything else, with what would be right.
    """
    if text in NAMED_MESHES:
        return NAMED_MESHES[text]
    sizes, named = dict.fromkeys(MESH_AXES, 1), set()
    for item in text.split(","):
        axis, _, size = item.partition(":")
        if axis not in sizes or not size.removeprefix("-").isdecimal():
            raise ConfigError(
                f"mesh {text!r} is neither a name ({', '.join(NAMED_MESHES)}) nor sizes of {', '.join(MESH_AXES)} "
                "such as slice:1,fsdp:64,tensor:4"
            )
        require(axis not in named, f"mesh {text!r} names {axis} twice")
        named.add(axis)
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def count_slices(devices: Sequence[jax.Device]) -> int:
    """Slices that these devices lie in; devices that know of none (CPU, a single slice) are one."""
    return len({getattr(device, "slice_index", None) or 0 for device in devices})


def arrange(config: MeshConfig, devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices as an array over `MESH_AXES`, in an order that follows the wiring: rings of an axis are rings of the interconnect.

    With several slices `slice` is the only axis that leaves a slice. Raises `ConfigError` when the sizes do not fit.
    """
    sizes, slices = config.sizes(len(devices)), count_slices(devices)
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    require(
        sizes[0] == slices,
        f"the devices lie in {slices} slices and mesh.slice is {sizes[0]}: only the axis `slice` may cross the data-centre "
        f"network; set mesh.slice to {slices}",
    )
    inside, across = (1, *sizes[1:]), (slices, *(1 for _ in sizes[1:]))
    return mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The one place where meshes are built, with `Auto` axes: linen scans do not survive `Explicit` ones.

    Raises `ConfigError` when the sizes do not fit the devices; all there are when None.
    """
    arranged = arrange(config, jax.devices() if devices is None else devices)
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def abstract_mesh(config: MeshConfig, num_devices: int) -> AbstractMesh:
    """The mesh without its devices: enough to say how everything is split."""
    return AbstractMesh(config.sizes(num_devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def spec(axes: Sequence[str | None]) -> PartitionSpec:
    """PartitionSpec of an array whose dimensions have these logical names (None: replicated).

    Raises `ConfigError` for an unknown name or a mesh axis claimed by two dimensions.
    """
    entries, claimed = [], {}
    for axis in axes:
        require(axis is None or axis in RULES, f"logical axis {axis!r} is not in the partitioning table")
        entry = None if axis is None else RULES[axis]
        for name in (entry,) if isinstance(entry, str) else entry or ():
            require(
                name not in claimed,
                f"logical axes {claimed.get(name)!r} and {axis!r} of one array both claim mesh axis {name!r}",
            )
            claimed[name] = axis
        entries.append(entry)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins the sharding of an activation by logical axis names; does nothing where no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


def ways(entry: tuple[str, ...] | str | None, mesh: Mesh | AbstractMesh) -> int:
    """Pieces into which one entry of a PartitionSpec cuts its dimension."""
    axes = (entry,) if isinstance(entry, str) else entry or ()
    return math.prod(mesh.shape[axis] for axis in axes)


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Pieces into which the rows of a batch are cut."""
    return ways(ROW_AXES, mesh)


def check_divisible(name: str, shape: Sequence[int], partition: PartitionSpec, mesh: Mesh | AbstractMesh) -> None:
    """Raises `ConfigError` naming `name` when a dimension is not divisible by the devices it is split over."""
    for dimension, entry in zip(shape, partition, strict=False):
        pieces = ways(entry, mesh)
        if dimension % pieces:
            raise ConfigError(
                f"{name} with shape {tuple(shape)} cannot be split {pieces} ways over {entry} ({dimension} is not divisible); change the mesh"
            )


def unbox(boxed: Any) -> tuple[Any, Any]:
    """Splits linen's boxed (abstract) parameters into plain leaves and a tree of logical-axis tuples."""
    is_box = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)
    axes = jax.tree.map(lambda leaf: tuple(leaf.names), boxed, is_leaf=is_box)
    return nn.meta.unbox(boxed), axes


def shardings(abstract: Any, axes: Any, mesh: Mesh | AbstractMesh) -> Any:
    """NamedShardings of a parameter tree from its logical axes.

    Raises `ConfigError` naming the parameter when one of its axes is unknown, two claim the same mesh axis or a dimension is
    not divisible, and naming the largest ones when too much stays whole (`check_sharded`).
    """

    def one(path: Any, leaf: jax.ShapeDtypeStruct, names: tuple[str | None, ...]) -> NamedSharding:
        name = jax.tree_util.keystr(path)
        try:
            partition = spec(names)
        except ConfigError as error:
            raise ConfigError(f"parameter {name}: {error}") from error
        check_divisible(f"parameter {name}", leaf.shape, partition, mesh)
        return NamedSharding(mesh, partition)

    tree = jax.tree_util.tree_map_with_path(one, abstract, axes)
    check_sharded(abstract, tree, mesh)
    return tree


def check_sharded(abstract: Any, tree: Any, mesh: Mesh | AbstractMesh) -> None:
    """Raises `ConfigError` when a device holds over 2 % of all parameters beyond an even split over `PARAMETER_AXES`.

    Copies along the other axes, which a mesh asks for by its sizes, are no surplus: `data` and `slice` exist to hold them.
    A parameter split over some of those axes and whole on the others counts with what is too much of it. Models so small
    that the surplus is below `UNSHARDED_ALLOWANCE` always pass.
    """
    even = math.prod(mesh.shape[axis] for axis in PARAMETER_AXES)
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    surplus = {
        jax.tree_util.keystr(path): math.prod(sharding.shard_shape(leaf.shape)) - leaf.size / even
        for (path, leaf), sharding in zip(leaves, jax.tree.leaves(tree), strict=True)
    }
    held, total = sum(surplus.values()), sum(leaf.size for _, leaf in leaves)
    if held <= max(UNSHARDED_LIMIT * total, UNSHARDED_ALLOWANCE):
        return
    largest = sorted(surplus, key=lambda name: -surplus[name])[:3]
    named = ", ".join(f"{name} ({100 * surplus[name] / total:.1f} %)" for name in largest)
    raise ConfigError(
        f"{100 * held / total:.1f} % of the parameters are held beyond an even split over {' × '.join(PARAMETER_AXES)} on the mesh "
        f"{dict(mesh.shape)}; the limit is {100 * UNSHARDED_LIMIT:.0f} %. The largest: {named}. Give their axes a mesh axis in `partitioning.RULES`"
    )


def row_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Sharding of arrays whose leading axis is the rows of a batch."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Sharding of small arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
