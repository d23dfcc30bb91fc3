import math
import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from hypervl_jax import partitioning
from hypervl_jax.architecture import ConfigError, hypervl_2b, hypervl_tiny
from hypervl_jax.models.runtime import RuntimeConfig
from hypervl_jax.partitioning import MESH_AXES, MeshConfig, abstract_mesh, make_mesh, parse_mesh
from hypervl_jax.training.state import abstract_parameters
from tests.small import make_setup, random_batch

FULL = abstract_parameters(hypervl_2b(), RuntimeConfig())


def array(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


def test_the_table_is_short_and_names_only_mesh_axes():
    assert len(partitioning.RULES) <= 25
    used = {
        axis for entry in partitioning.RULES.values() for axis in ([entry] if isinstance(entry, str) else entry or ())
    }
    assert used == set(MESH_AXES)


@pytest.mark.parametrize(
    ("config", "devices", "sizes"),
    [
        (MeshConfig(), 256, (1, 1, 256, 1, 1)),
        (MeshConfig(slice=2, context=2), 512, (2, 1, 128, 2, 1)),
        (MeshConfig(data=-1, fsdp=4, tensor=2), 64, (1, 8, 4, 1, 2)),
    ],
)
def test_one_axis_takes_what_is_left(config, devices, sizes):
    assert config.sizes(devices) == sizes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MeshConfig(data=-1), "hold -1 more than once"),
        (lambda: MeshConfig(tensor=0), "must be positive"),
        (lambda: MeshConfig(tensor=3).sizes(8), "8 devices cannot be split"),
        (lambda: MeshConfig(fsdp=4).sizes(8), "need 4 devices, 8 are here"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("fsdp", MeshConfig()),
        ("context4_tensor4", MeshConfig(context=4, tensor=4)),
        ("slice:1,data:1,fsdp:64,tensor:4", MeshConfig(fsdp=64, tensor=4)),
        ("fsdp:-1,slice:2", MeshConfig(slice=2)),
    ],
)
def test_meshes_are_written_by_name_or_by_numbers(text, config):
    assert parse_mesh(text) == config


@pytest.mark.parametrize("text", ["", "fsdp2", "fsdp:", "fsdp:x", "rows:4", "fsdp:2;tensor:2"])
def test_anything_else_is_no_mesh(text):
    with pytest.raises(ConfigError, match=r"neither a name .* nor sizes of slice, data"):
        parse_mesh(text)


def test_an_axis_is_named_once():
    with pytest.raises(ConfigError, match="names fsdp twice"):
        parse_mesh("fsdp:2,fsdp:4")


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (("embed", "emebd"), r"parameter \['a'\]: logical axis 'emebd' is not in the partitioning table"),
        (
            ("heads", "mlp"),
            r"parameter \['a'\]: logical axes 'heads' and 'mlp' of one array both claim mesh axis 'tensor'",
        ),
        (("embed", None), r"parameter \['a'\] with shape \(12, 8\) cannot be split 8 ways over fsdp \(12 is not"),
    ],
)
def test_an_error_of_sharding_names_the_parameter(axes, message):
    with pytest.raises(ConfigError, match=message):
        partitioning.shardings({"a": array(12, 8)}, {"a": axes}, abstract_mesh(MeshConfig(fsdp=8, tensor=2), 16))


def test_too_much_unsharded_names_the_largest():
    params = {"split": array(1024, 1024), "whole": array(512, 256), "half": array(256, 512), "small": array(64)}
    axes = {"split": ("embed", "mlp"), "whole": (None, None), "half": (None, "mlp"), "small": ("norm",)}
    shards = lambda config, devices: partitioning.shardings(params, axes, abstract_mesh(config, devices))
    with pytest.raises(ConfigError, match=r"\['whole'\] \(9\.4 %\), \['half'\] \(1\.9 %\)"):
        shards(MeshConfig(tensor=4), 16)
    shards(MeshConfig(data=-1, fsdp=1), 16)
    del params["whole"], axes["whole"], params["half"], axes["half"]
    shards(MeshConfig(tensor=4), 16)


@pytest.mark.parametrize(
    ("architecture", "config", "devices"),
    [
        (hypervl_2b(), MeshConfig(), 256),
        (hypervl_2b(), MeshConfig(context=4, tensor=4), 4096),
        (hypervl_2b(), MeshConfig(slice=2, fsdp=128, context=2), 512),
        (hypervl_tiny(), MeshConfig(tensor=2), 16),
    ],
)
def test_real_sizes_are_split_almost_evenly(architecture, config, devices):
    params, axes = abstract_parameters(architecture, RuntimeConfig())
    mesh = abstract_mesh(config, devices)
    shards = partitioning.shardings(params, axes, mesh)
    held = sum(
        math.prod(sharding.shard_shape(leaf.shape))
        for leaf, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(shards), strict=True)
    )
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    even = total / (mesh.shape["fsdp"] * mesh.shape["tensor"])
    assert even <= held <= even + 0.02 * total


def test_activations_go_with_their_rows_positions_and_tiles():
    assert partitioning.spec(("rows", "length", "activation_vocabulary")) == PartitionSpec(
        ("slice", "data", "fsdp"), "context", "tensor"
    )
    assert partitioning.spec(("tiles", None)) == PartitionSpec(("slice", "data", "fsdp", "context"), None)


def slices_of(count):
    """CPU devices that say they lie in `count` slices, as several TPU slices do; the mesh reads nothing else of them."""
    devices = jax.devices()
    per_slice = len(devices) // count
    return [
        types.SimpleNamespace(id=d.id, process_index=0, platform="cpu", device_kind="cpu", slice_index=i // per_slice)
        for i, d in enumerate(devices)
    ]


def test_only_the_slice_axis_crosses_slices():
    arranged = partitioning.arrange(MeshConfig(slice=2, tensor=2), slices_of(2))
    assert arranged.shape == (2, 1, 2, 1, 2)
    assert [{device.slice_index for device in part.flat} for part in arranged] == [{0}, {1}]
    with pytest.raises(ConfigError, match=r"the devices lie in 2 slices and mesh\.slice is 1.*set mesh\.slice to 2"):
        partitioning.arrange(MeshConfig(), slices_of(2))


def test_devices_that_know_no_slices_take_any_mesh():
    mesh = make_mesh(MeshConfig(slice=2, data=2, fsdp=1, tensor=2))
    assert dict(mesh.shape) == {"slice": 2, "data": 2, "fsdp": 1, "context": 1, "tensor": 2}
    assert partitioning.row_shards(mesh) == 4


CUT_ROWS = MeshConfig(fsdp=2, context=2, tensor=2)
"""More devices than rows: `context` splits positions and tiles of a row."""


def test_the_loss_is_the_same_when_rows_are_cut():
    """Of the base branch with its teacher, hence through both towers; as on one device to 1e-4."""
    batch, found = random_batch(0), []
    for setup in (make_setup(), make_setup(mesh=CUT_ROWS, devices=8)):
        functions, control = setup.functions, setup.control
        loss = lambda params, batch, functions=functions, control=control: functions.arm_loss(
            {}, params, batch, ("base",), functions.counts(batch), control
        )
        with jax.set_mesh(setup.mesh):
            found.append(jax.device_get(jax.jit(loss)(setup.state.params, setup.on_mesh(batch))))
    for expected, value in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [CUT_ROWS, MeshConfig(slice=2, fsdp=1, context=4)])
def test_steps_are_the_same_when_rows_are_cut(mesh):
    batch = random_batch(0)
    one, many = make_setup(), make_setup(mesh=mesh, devices=8)
    state, other = one.state, many.state
    for _ in range(2):
        state, expected = one.run(state, batch)
        other, found = many.run(other, batch)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
