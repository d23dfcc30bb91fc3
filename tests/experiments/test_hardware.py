import types

import pytest

from experiments import hardware, launch, workdir
from experiments.config import ExperimentConfig
from experiments.hardware import TABLE, Hardware, accumulation, live_topology
from experiments.named import config_names, load_config
from experiments.overrides import flatten, from_config_dict
from hypervl_jax.architecture import ConfigError
from hypervl_jax.partitioning import MeshConfig
from hypervl_jax.planning import chips

PODS = ("v5e-256", "2xv5e-256", "v6e-256", "v5p-512", "v5p-4096", "v5p-8192")
STAGES = ("stage1", "stage2", "stage3")


def laid_out(name, topology, *given):
    config = load_config(name)
    hardware.modify(config, chips.topology(topology), given)
    return from_config_dict(ExperimentConfig, config)


@pytest.mark.parametrize("topology", PODS)
@pytest.mark.parametrize("name", STAGES)
def test_a_modifier_changes_only_what_a_resumed_run_may_change(name, topology):
    before = workdir.as_json(from_config_dict(ExperimentConfig, load_config(name)))
    after = workdir.as_json(laid_out(name, topology))
    changed = {key for key in before if before[key] != after[key]}
    assert workdir.differing_keys(before, after) == []
    assert not {key for key in changed if key.startswith(("batch.", "data.", "loop.", "optimizer.", "runtime.dtype"))}


@pytest.mark.parametrize("topology", PODS)
@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_an_entry_of_its_own_that_fits_every_pod(name, topology):
    found, config = chips.topology(topology), laid_out(name, topology)
    sizes = config.mesh.sizes(found.num_devices)
    shards = sizes[0] * sizes[1] * sizes[2]
    assert hardware.find(found, name).configs != "*"
    assert sizes[0] == found.slices
    assert config.batch.rows % (shards * config.objective.accumulation) == 0
    assert config.batch.length % config.mesh.context == 0
    assert config.runtime.tile_chunk % config.mesh.context == 0


@pytest.mark.parametrize(
    ("rows", "shards", "at_once", "expected"),
    [(512, 256, 2, 1), (512, 256, 1, 2), (512, 8, 4, 16), (12, 2, 4, 2), (10, 2, 3, 5)],
)
def test_accumulation_is_the_least_that_keeps_the_rows_of_a_shard(rows, shards, at_once, expected):
    assert accumulation(rows, shards, at_once) == expected


def test_small_slices_of_a_generation_accumulate_what_large_ones_do_at_once():
    config = laid_out("stage1", "v5e-16")
    assert config.mesh == MeshConfig(fsdp=-1)
    assert config.objective.accumulation == 32


def test_what_the_user_says_wins_and_accumulation_follows_the_mesh():
    config = laid_out("stage1", "v5e-16", ("mesh.tensor", "2"), ("runtime.tower_remat", "nested"))
    assert config.mesh.sizes(16) == (1, 1, 8, 1, 2)
    assert config.runtime.tower_remat == "nested"
    assert config.objective.accumulation == 64
    assert laid_out("stage1", "v5e-16", ("objective.accumulation", "8")).objective.accumulation == 8


@pytest.mark.parametrize(
    ("topology", "given", "message"),
    [
        ("v5e-16", (("mesh", "fsdp:8"),), "need 8 devices, 16 are here"),
        ("8xv6e-256", (), "batch.rows 512 cannot be split over 2048 row shards"),
        ("v9-4", (), "names no known TPU"),
    ],
)
def test_what_cannot_be_laid_out_says_why(topology, given, message):
    with pytest.raises(ConfigError, match=message):
        laid_out("stage1", topology, *given)


def test_an_unknown_generation_is_refused_with_what_is_known(monkeypatch):
    monkeypatch.setattr(hardware, "TABLE", TABLE[:1])
    with pytest.raises(ConfigError, match="no entry for tiny on v5e-16; known: v5e-256"):
        hardware.find(chips.topology("v5e-16"), "tiny")


def devices_of(kind, slices, per_slice):
    return [types.SimpleNamespace(device_kind=kind, slice_index=s) for s in range(slices) for _ in range(per_slice)]


@pytest.mark.parametrize(
    ("kind", "slices", "per_slice", "name"),
    [
        ("TPU v5 lite", 1, 256, "v5e-256"),
        ("TPU v5 lite", 2, 256, "2xv5e-256"),
        ("TPU v5 lite", 1, 1, "v5e:1x1"),
        ("TPU v6 lite", 1, 8, "v6e-8"),
        ("TPU v5", 1, 256, "v5p-512"),
        ("TPU v5p", 1, 2048, "v5p-4096"),
        ("TPU7x", 1, 128, "tpu7x-128"),
    ],
)
def test_devices_are_recognised_and_have_an_entry(kind, slices, per_slice, name):
    found = live_topology(devices_of(kind, slices, per_slice))
    assert found.name == name
    assert found.num_devices == slices * per_slice
    assert isinstance(hardware.find(found, "tiny"), Hardware)


def test_other_devices_keep_the_configuration():
    assert live_topology(devices_of("cpu", 1, 8)) is None
    assert hardware.chosen(None, None) is None
    assert hardware.chosen("none", chips.topology("v5e-4")) is None
    assert hardware.chosen("v5e-8", chips.topology("v5e-4")).name == "v5e-8"


def test_launch_lays_out_and_says_so(capsys):
    arguments = ("--config", "stage1", "--hardware", "v5p-8192", "--print", "--config.runtime.tile_chunk=4")
    assert launch.main(arguments) == 0
    shown = capsys.readouterr().out
    for line in ("mesh.data = 2", "mesh.fsdp = 256", "mesh.context = 2", "mesh.tensor = 4", "runtime.tile_chunk = 4"):
        assert f"{line}\n" in shown
    line = hardware.describe(laid_out("stage1", "v5p-8192"), chips.topology("v5p-8192"))
    assert line.startswith(
        "hardware v5p-8192 (entry v5p-8192, stage1): mesh slice:1,data:2,fsdp:256,context:2,tensor:4"
    )


def test_launch_refuses_an_unknown_topology(capsys):
    assert launch.main(("--config", "stage1", "--hardware", "v5e256", "--print")) == 2
    assert "is not of the form v5e-256" in capsys.readouterr().err


def test_every_configuration_has_an_entry_on_every_generation():
    for name in config_names():
        for chip in chips.CHIPS.values():
            for slices in (1, 2):
                assert hardware.find(chips.Topology(chip, (4,) * chip.axes, slices), name).topology.startswith("*")


def test_the_tiny_size_runs_on_the_smallest_slice():
    config = laid_out("tiny", "v5e-4")
    assert config.mesh.sizes(4) == (1, 1, 4, 1, 1)
    assert flatten(config)["objective.accumulation"] == 1


def test_a_mesh_of_the_users_takes_as_many_tiles_at_a_time_as_share_a_row():
    """Before any device is known: the layout of v5p-8192, by its numbers."""
    words = ["--config", "stage1", "--config.mesh=data:2,fsdp:256,context:2,tensor:4"]
    assert launch.resolve(*launch.parse(words)).runtime.tile_chunk == 2
    with pytest.raises(ConfigError, match=r"make runtime\.tile_chunk 1 a multiple"):
        launch.resolve(*launch.parse([*words, "--config.runtime.tile_chunk=1"]))
