"""Collectives and memory traffic read from HLO: from written programs with known answers, and from what the TPU compiler makes."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hypervl_jax.architecture import ConfigError
from hypervl_jax.planning.chips import topology
from hypervl_jax.planning.programs import Collective, collectives, group_size, hbm_bytes, parse_program

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

LOOP = """
HloModule loop, is_scheduled=true

%gathering (param_0.1: bf16[2,8]) -> (bf16[8,8], bf16[2,8]) {
  %param_0.1 = bf16[2,8]{1,0} parameter(0)
  %all-gather.1 = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%param_0.1), channel_id=7, replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0}
  %custom-call.1 = (bf16[8,8]{1,0}, bf16[2,8]{1,0}) custom-call(%all-gather.1, %param_0.1), custom_call_target="AsyncCollectiveStart"
  %full.1 = bf16[8,8]{1,0} get-tuple-element(%custom-call.1), index=0
  %shard.1 = bf16[2,8]{1,0} get-tuple-element(%custom-call.1), index=1
  ROOT %tuple.1 = (bf16[8,8]{1,0}, bf16[2,8]{1,0}) tuple(%full.1, %shard.1)
}

%hiding (param_0.9: bf16[2,8]) -> bf16[8,8] {
  %param_0.9 = bf16[2,8]{1,0} parameter(0)
  ROOT %all-gather.9 = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%param_0.9), channel_id=7, replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0}
}

%updating (param_0.2: f32[6,64], param_1.2: f32[1,64], param_2.2: s32[]) -> f32[6,64] {
  %param_0.2 = f32[6,64]{1,0} parameter(0)
  %param_1.2 = f32[1,64]{1,0} parameter(1)
  %param_2.2 = s32[] parameter(2)
  %constant.2 = s32[] constant(0)
  ROOT %dynamic-update-slice.2 = f32[6,64]{1,0} dynamic-update-slice(%param_0.2, %param_1.2, %param_2.2, %constant.2)
}

%body (arg.3: (s32[], bf16[2,8], f32[6,64], f32[1,64])) -> (s32[], bf16[2,8], f32[6,64], f32[1,64]) {
  %arg.3 = (s32[]{:T(128)}, bf16[2,8]{1,0:S(1)}, f32[6,64]{1,0:T(8,128)}, /*index=3*/f32[1,64]{1,0:S(1)}) parameter(0)
  %number.3 = s32[]{:S(6)} get-tuple-element(%arg.3), index=0
  %shard.3 = bf16[2,8]{1,0:S(1)} get-tuple-element(%arg.3), index=1
  %stack.3 = f32[6,64]{1,0} get-tuple-element(%arg.3), index=2
  %row.3 = f32[1,64]{1,0:S(1)} get-tuple-element(%arg.3), index=3
  %start.3 = (bf16[8,8]{1,0:S(1)}, bf16[2,8]{1,0:S(1)}) fusion(%shard.3), kind=kCustom, calls=%gathering
  %middle.3 = bf16[8,8]{1,0} fusion(%shard.3), kind=kCustom, calls=%hiding
  %stack.4 = f32[6,64]{1,0} fusion(%stack.3, %row.3, %number.3), kind=kLoop, calls=%updating
  %one.3 = s32[]{:S(6)} constant(1)
  %next.3 = s32[]{:S(6)} add(%number.3, %one.3), metadata={op_name="jit(f)/while/body/add"}
  ROOT %tuple.3 = (s32[], bf16[2,8]{1,0:S(1)}, f32[6,64]{1,0}, f32[1,64]{1,0:S(1)}) tuple(%next.3, %shard.3, %stack.4, %row.3)
}

%condition (arg.4: (s32[], bf16[2,8], f32[6,64], f32[1,64])) -> pred[] {
  %arg.4 = (s32[], bf16[2,8]{1,0:S(1)}, f32[6,64]{1,0}, f32[1,64]{1,0:S(1)}) parameter(0)
  %number.4 = s32[] get-tuple-element(%arg.4), index=0
  %constant.4 = s32[]{:T(128)} constant(6)
  ROOT %compare.4 = pred[] compare(%number.4, %constant.4), direction=LT
}

%small (arg.5: f32[16]) -> f32[16] {
  %arg.5 = f32[16]{0} parameter(0)
  ROOT %all-reduce.5 = f32[16]{0} all-reduce(%arg.5), channel_id=1, replica_groups={{0,1},{2,3}}, use_global_device_ids=true
}

%large (arg.6: f32[16]) -> f32[16] {
  %arg.6 = f32[16]{0} parameter(0)
  %token.6 = token[] after-all()
  %recv.6 = (f32[16]{0}, u32[], token[]) recv(%token.6), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %send.6 = (f32[16]{0}, u32[], token[]) send(%arg.6, %token.6), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %reduce-scatter.6 = f32[16]{0} reduce-scatter(%arg.6), channel_id=4, replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY %main (arg.7: (s32[], bf16[2,8], f32[6,64], f32[1,64]), x.7: f32[16], index.7: s32[]) -> f32[16] {
  %arg.7 = (s32[], bf16[2,8]{1,0:S(1)}, f32[6,64]{1,0}, f32[1,64]{1,0:S(1)}) parameter(0)
  %x.7 = f32[16]{0} parameter(1)
  %index.7 = s32[] parameter(2)
  %while.7 = (s32[], bf16[2,8]{1,0:S(1)}, f32[6,64]{1,0}, f32[1,64]{1,0:S(1)}) while(%arg.7), condition=%condition, body=%body
  ROOT %conditional.7 = f32[16]{0} conditional(%index.7, %x.7, %x.7), branch_computations={%small, %large}
}
"""


def test_collectives_of_each_arm() -> None:
    program = parse_program(LOOP)
    # Two fusions of the loop carry channel 7: one asynchronous gather, six times, counted where it starts.
    gather = Collective("all-gather", 8 * 8 * 2, 4, 6, crosses=False)
    assert collectives(program, 0) == [gather, Collective("all-reduce", 64, 2, 1, crosses=False)]
    between = Collective("all-reduce", 64, 2, 1, crosses=True)
    assert collectives(program, 1, slices=2) == [
        gather,
        between,
        Collective("reduce-scatter", 4 * 64, 4, 1, crosses=False),
    ]


def test_received_bytes() -> None:
    received = lambda kind: Collective(kind, 1200, 4, 2, crosses=False).received
    assert received("all-gather") == received("reduce-scatter") == received("all-to-all") == 2 * 900
    assert received("all-reduce") == 2 * 1800
    assert received("collective-permute") == 2 * 1200


def test_traffic_counts_updates_in_place_once_a_trip() -> None:
    # A trip writes one row of 64 floats into the stack and reads nothing: row and shard lie in on-chip memory. The fusion that hides
    # the gather writes none of its result. The all-reduce reads and writes 16 floats.
    assert hbm_bytes(parse_program(LOOP), 0) == 6 * (64 * 4) + 2 * 64


ASYNC = """
HloModule asynchronous, is_scheduled=true

%slicing (param.1: u8[2,512]) -> u8[1,512] {
  %param.1 = u8[2,512]{1,0} parameter(0)
  ROOT %slice.1 = u8[1,512]{1,0:S(1)} slice(%param.1), slice={[1:2], [0:512]}
}

ENTRY %main (arg.2: u8[2,512]) -> u8[1,512] {
  %arg.2 = u8[2,512]{1,0} parameter(0)
  %start.2 = ((u8[2,512]{1,0}), u8[1,512]{1,0:S(1)}, s32[]{:S(2)}) async-start(%arg.2), calls=%slicing
  ROOT %done.2 = u8[1,512]{1,0:S(1)} async-done(%start.2)
}
"""


def test_an_asynchronous_operation_moves_what_its_computation_moves() -> None:
    # One row is read from HBM into on-chip memory.
    assert hbm_bytes(parse_program(ASYNC), 0) == 512


def test_known_trip_count_comes_first() -> None:
    known = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert collectives(parse_program(known))[0].times == 5


@pytest.mark.parametrize(("step", "times"), [(2, 3), (4, 2)])
def test_a_loop_that_counts_in_larger_steps_runs_less_often(step: int, times: int) -> None:
    program = parse_program(LOOP.replace("s32[]{:S(6)} constant(1)", f"s32[]{{:S(6)}} constant({step})"))
    assert collectives(program)[0].times == times


def test_a_loop_that_does_not_say_how_it_counts_is_an_error() -> None:
    with pytest.raises(ConfigError, match="number of trips of while"):
        collectives(parse_program(LOOP.replace("add(%number.3, %one.3)", "add(%number.3, %number.3)")))


def test_a_loop_without_a_bound_is_an_error() -> None:
    with pytest.raises(ConfigError, match="number of trips of while"):
        collectives(
            parse_program(LOOP.replace("s32[]{:T(128)} constant(6)", "s32[]{:T(128)} add(%number.4, %number.4)"))
        )


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2},{3,4,5}}", 3),
        ("[16,8]<=[128]", 8),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['axis_0'=2,'axis_1'=8] {'axis_1'}", 8),
        ("mesh['axis_0'=2,'axis_1'=8] {'axis_0','axis_1'}", 16),
        ("mesh['axis_0'=16] {'axis_0':(2)4}", 4),
    ],
)
def test_replica_groups(groups: str, size: int) -> None:
    assert group_size(f"all-gather(%x), replica_groups={groups}, dimensions={{0}}") == size


def test_other_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="no HLO text"):
        parse_program("module @jit_f {\n}")


def compiled_layers(name: str, trips: int, width: int):
    """`trips` layers, each with a weight split over all devices, which the compiler must gather in every trip."""
    wanted = topology(name)
    mesh = jax.sharding.Mesh(wanted.devices(), ("fsdp",), axis_types=(AxisType.Auto,))
    split = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
    weights = jax.ShapeDtypeStruct((trips, width, width), jnp.bfloat16, sharding=split(None, "fsdp"))
    rows = jax.ShapeDtypeStruct((4096, width), jnp.bfloat16, sharding=split("fsdp"))
    function = lambda w, x: jax.lax.scan(lambda y, one: (jnp.tanh(y @ one), None), x, w)[0]
    return jax.jit(function, out_shardings=split("fsdp")).lower(weights, rows).compile()


@needs_compiler
def test_a_compiled_loop_gathers_each_weight_once() -> None:
    trips, width = 5, 1024
    program = parse_program(compiled_layers("v5e-4", trips, width).as_text())
    found = collectives(program)
    assert {one.kind for one in found} == {"all-gather"}
    assert sum(one.size * one.times for one in found) == trips * width * width * 2
    assert {one.group for one in found} == {4}
    # At least: this device's quarter of all weights, rows in and out. At most: in every trip the weight thrice and the rows twice.
    weight, rows = 2 * width * width, 2 * 4096 // 4 * width
    assert trips * weight // 4 + 2 * rows <= hbm_bytes(program) <= trips * (3 * weight + 2 * rows)
