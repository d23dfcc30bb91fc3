"""The planner's command on the debug size and a small slice: one real compile of both arms by the TPU compiler."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from experiments.named import config_names
from experiments.planning import out_of_memory
from hypervl_jax.planning.chips import topology
from tools import plan_topology

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@needs_compiler
def test_plans_of_the_debug_size(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        "--config",
        "stage2,stage3",
        "--topology",
        "v5e-4",
        "--debug",
        "--rows-per-chip",
        "1",
        "--json",
        "--save",
        str(tmp_path),
    ]
    assert plan_topology.main([*asked, "--price-per-chip-hour", "2"]) == 0
    printed = capsys.readouterr()
    plan, last = json.loads(printed.out)["plans"]
    assert plan == json.loads((tmp_path / "stage2-v5e-4" / "plan.json").read_text())
    assert (plan["fits"], plan["chips"], plan["accumulation"], plan["rows_per_shard"]) == (True, 4, 2, 1)
    assert (tmp_path / "stage2-v5e-4" / "step.executable").stat().st_size > 0

    # Stage 3 differs from stage 2 in data and learning rates.
    assert "stage3 runs the program of stage2-debug on v5e-4: not compiled again" in " ".join(printed.err.split())
    assert {**plan, "config": "stage3-debug"} == last

    sizes = plan["bytes"]
    # AdamW in float32 keeps two moments of every parameter; the compiler's argument bytes are padded, hence more.
    assert sizes["optimizer"] == pytest.approx(2 * sizes["parameters"], rel=1e-3)
    assert sizes["tiles"] == 8 // 4 * 24 * 64 * 64 * 3
    assert (
        sum(sizes[kind] for kind in ("parameters", "optimizer", "tiles", "batch"))
        <= sizes["needed"]
        <= sizes["available"]
    )

    base, large = plan["arms"]["base"], plan["arms"]["large"]
    # Full rematerialisation of the decoder, one level in the towers: at most one more forward pass, a third of the step.
    assert 0.66 < large["useful_share"] < base["useful_share"] < 1
    # The base arm reads the large tower for its teacher and never differentiates it.
    assert base["flops"]["vision_large"]["compiled"] == base["flops"]["vision_large"]["useful"]
    assert "vision_base" not in large["flops"]
    for arm in (base, large):
        kinds = {entry["kind"] for entry in arm["collectives"]}
        assert "all-gather" in kinds
        assert not any(entry["crosses_slices"] for entry in arm["collectives"])
        assert plan["step_seconds_floor"] >= arm["floors"]["arithmetic"] / 2 > 0
    assert plan["budget"]["price"] == pytest.approx(2 * plan["budget"]["chip_hours"])
    assert 0 < plan["mfu_bound"] < 1


@needs_compiler
def test_every_other_named_configuration_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    names = [name for name in config_names() if name not in ("stage2", "stage3")]
    asked = ["--config", ",".join(names), "--topology", "v5e-4", "--debug", "--json"]
    assert plan_topology.main(asked) == 0
    plans = {plan["config"].removesuffix("-debug"): plan for plan in json.loads(capsys.readouterr().out)["plans"]}
    assert list(plans) == names
    assert {"stage1", "tiny", "tiny_stage1"} <= plans.keys()
    # Stage 1 keeps the decoder as it is: no gradients of its weights, no moments.
    frozen, whole = plans["stage1"], plans["tiny"]
    assert frozen["bytes"]["parameters"] == whole["bytes"]["parameters"]
    assert frozen["bytes"]["optimizer"] < frozen["bytes"]["parameters"]
    useful = [plan["arms"]["large"]["flops"]["decoder"]["useful"] for plan in (frozen, whole)]
    assert useful[0] == pytest.approx(useful[1] * 2 / 3, rel=1e-6)
    for plan in plans.values():
        assert plan["fits"]
        assert all(0.6 < arm["useful_share"] < 1 for arm in plan["arms"].values())


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("topology_name", ["v5e-256", "v6e-256"])
@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_the_stages_fit_at_full_size(name: str, topology_name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A compile takes 200 s and 4 GiB; stage 3 runs stage 2's program."""
    assert plan_topology.main(["--config", name, "--topology", topology_name, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"]
    assert plan["rows_per_shard"] >= 2
    assert all(arm["useful_share"] >= 0.7 for arm in plan["arms"].values())


@needs_compiler
def test_a_compiler_that_ends_its_process_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # libtpu ends the process at a flag that it does not know.
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--no_such_flag")
    asked = ["--config", "stage2", "--topology", "v5e-4", "--debug", "--json"]
    assert plan_topology.main(asked) == plan_topology.COMPILER_FAILED
    printed = capfd.readouterr()
    assert printed.out == ""
    *progress, said = printed.err.splitlines()
    assert said.startswith("error: the TPU compiler (libtpu ")
    assert "'no_such_flag'" in said
    assert not any("no_such_flag" in line for line in progress)


@needs_compiler
def test_the_compilers_message_counts_arguments_too() -> None:
    device = topology("v5e-4").devices()[0]
    argument = jax.ShapeDtypeStruct((20 << 10, 1 << 18), jnp.float32, sharding=SingleDeviceSharding(device))
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jax.jit(jnp.sum).lower(argument).compile()
    assert out_of_memory(str(error.value)) == 20 << 30
    assert out_of_memory("something else") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "stage1", "--topology", "v5e-5"], "no v5e slice has 5 chips"),
        (["--config", "stag1", "--topology", "v5e-4"], "did you mean stage1"),
        (["--config", "stage1", "--topology", "v5e-4", "--config.optimizer.lr=1"], "unknown key"),
    ],
)
def test_errors_say_what_is_wrong(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_topology.main(arguments) == plan_topology.USAGE_ERROR
    assert message in capsys.readouterr().err


def test_unknown_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan_topology.main(["--config", "stage1", "--topology", "v5e-4", "--row-per-chip=2"])
    assert "--row-per-chip=2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--mfu", "3", "'3' is not a number above 0 and at most 1"),
        ("--mfu", "nan", "'nan' is not a number above 0"),
        ("--price-per-chip-hour", "-1", "'-1' is not a number of 0 or more"),
        ("--rows-per-chip", "0", "0 is not a whole number of 1 or more"),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_anything_is_compiled(
    option: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        plan_topology.main(["--config", "stage2", "--topology", "v5e-256", f"{option}={value}"])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
