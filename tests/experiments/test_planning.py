"""The step on meshes whose chips share rows, compiled by the TPU compiler; and plans of programs that are there already."""

import argparse
import importlib.util
import re

import jax
import pytest

from data_pipelines.lanes import source_names
from experiments import launch, planning
from experiments.config import ExperimentConfig
from experiments.planning import Memory, Plan
from hypervl_jax import partitioning
from hypervl_jax.architecture import ConfigError
from hypervl_jax.planning import flops, programs
from hypervl_jax.planning.chips import topology

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

V5E = topology("v5e-8")
MESHES = {
    "context": "slice:1,data:1,fsdp:4,context:2,tensor:1",
    "tensor": "slice:1,data:1,fsdp:4,context:1,tensor:2",
    "both": "slice:1,data:1,fsdp:2,context:2,tensor:2",
}


def laid_out(name: str, debug: bool = True, mesh: str = "fsdp") -> ExperimentConfig:
    """A named configuration on eight chips, as `launch --hardware` takes it."""
    asked = argparse.Namespace(config=name, debug=debug, data=None, hardware=V5E.name)
    return launch.resolve(asked, [("mesh", mesh), ("runtime.tile_chunk", "2")])


def traced(config: ExperimentConfig) -> tuple[jax.stages.Traced, jax.sharding.Mesh]:
    mesh = partitioning.make_mesh(config.mesh, V5E.devices())
    return planning.trace_step(config.training_run(), len(source_names(config.data)), mesh)[0], mesh


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_the_tpu_compiler_takes_rows_that_chips_share(name: str) -> None:
    """With the splash kernel on each chip's own heads and positions, the towers' weights gathered before the tiles, and no more
    arithmetic than on a mesh of rows alone."""
    config = laid_out("stage2", mesh=MESHES[name])
    step, mesh = traced(config)
    _, text, _ = planning.compile_traced(step, mesh)
    decoder, length = config.architecture.decoder, config.batch.length
    own = (decoder.num_heads // mesh.shape["tensor"], length // mesh.shape["context"], decoder.head_dim)
    kernels = [line for line in text.splitlines() if "custom-call(" in line and "splash_mha_fwd" in line]
    assert any(re.search(rf"bf16\[(\d+,)*{own[0]},{own[1]},{own[2]}\]", line) for line in kernels)

    for arm in range(2):
        moves = programs.collectives(programs.parse_program(text), arm)
        assert {"all-gather", "all-reduce"} <= {move.kind for move in moves}
        plain = flops.count_flops(traced(laid_out("stage2"))[0].jaxpr, arm)
        assert sum(flops.count_flops(step.jaxpr, arm).values()) == sum(plain.values())


def test_a_plan_serves_configurations_that_run_its_program() -> None:
    stage1, stage2, stage3 = (laid_out(f"stage{number}", debug=False) for number in (1, 2, 3))
    arms = tuple(
        planning.plan_arm(stage2, V5E, number, planning.useful_flops(stage2, arm), None)
        for number, arm in enumerate(stage2.consistency.arms)
    )
    budget = planning.stage_budget(stage2, V5E, arms, 0.4, 2.0)
    made = Plan(stage2, V5E, {}, Memory(0, 0, 0, 0, None, None, 1, 2), arms, budget)
    assert made.step_floor is None, "of a step that does not fit only FLOPs are known"
    last = planning.replan(made, stage3, 0.4, 2.0)
    assert last.arms == made.arms
    assert last.config.name == "stage3"
    assert last.budget.step_seconds == budget.step_seconds
    assert last.budget.price / budget.price == pytest.approx(55.1 / 214.6)
    with pytest.raises(ConfigError, match="stage1 runs another program"):
        planning.replan(made, stage1, 0.4, 2.0)
