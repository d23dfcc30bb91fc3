"""Counted FLOPs against hand counts, against the analytic count of `architecture.py`, and against XLA's own analysis."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from hypervl_jax import partitioning
from hypervl_jax.architecture import ConfigError, DecoderConfig, HyperVLConfig, TilingConfig, VisionConfig, hypervl_tiny
from hypervl_jax.models.attention import attention
from hypervl_jax.models.runtime import ATTENTION_OUTPUT, RuntimeConfig
from hypervl_jax.partitioning import MeshConfig
from hypervl_jax.planning.flops import BACKWARD, FORWARD, REPEATED, Work, count_flops
from hypervl_jax.planning.useful import step_flops
from hypervl_jax.training import state as training_state
from hypervl_jax.training.batch import Batch, BatchShape
from hypervl_jax.training.consistency import ConsistencyConfig, make_control
from hypervl_jax.training.optimizer import OptimizerConfig, learning_rate_schedule
from hypervl_jax.training.step import ObjectiveConfig, StepFunctions

SQUARE = jax.ShapeDtypeStruct((8, 8), jnp.float32)
ONE = 2 * 8**3
"""FLOPs of one product of two 8 × 8 matrices."""


def total(function, *arguments, arm: int = 0) -> int:
    return sum(count_flops(jax.jit(function).trace(*arguments).jaxpr, arm).values())


def test_scans_multiply() -> None:
    def function(x):
        inner = lambda y, _: (y @ y, None)
        outer = lambda y, _: (jax.lax.scan(inner, y @ y, length=3)[0], None)
        return jax.lax.scan(outer, x, length=5)[0]

    assert total(function, SQUARE) == 5 * (1 + 3) * ONE


def test_arms_of_the_outermost_switch_count_apart() -> None:
    arms = [lambda x: x @ x, lambda x: x @ x @ x]
    function = lambda index, x: jax.lax.switch(index, arms, x)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    assert [total(function, index, SQUARE, arm=arm) for arm in (0, 1)] == [ONE, 2 * ONE]


def test_a_switch_in_a_loop_counts_its_dearest_branch() -> None:
    arms = [lambda x: x @ x @ x, lambda x: x @ x]
    function = lambda x: jax.lax.scan(lambda y, i: (jax.lax.switch(i, arms, y), None), x, jnp.arange(4))[0]
    assert [total(function, SQUARE, arm=arm) for arm in (0, 1)] == [8 * ONE, 8 * ONE]


def test_work_in_a_while_loop_is_an_error() -> None:
    function = lambda x: jax.lax.while_loop(lambda y: jnp.sum(y) < 1, lambda y: y @ y, x)
    with pytest.raises(ConfigError, match="while loop"):
        total(function, SQUARE)


def test_recomputation_is_told_from_the_passes() -> None:
    layer = jax.checkpoint(lambda x, w: jnp.sin(jnp.sin(x @ w) @ w))
    step = jax.value_and_grad(lambda x, w: jnp.sum(layer(x, w)), (0, 1))
    tally = count_flops(jax.jit(step).trace(SQUARE, SQUARE).jaxpr)
    work = {phase: tally[Work("head", "product", phase)] for phase in (FORWARD, REPEATED, BACKWARD)}
    assert work == {FORWARD: 2 * ONE, REPEATED: 2 * ONE, BACKWARD: 4 * ONE}


def test_custom_gradients_are_followed() -> None:
    @jax.custom_vjp
    def double(x):
        return x @ x

    double.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))
    assert total(jax.value_and_grad(lambda x: jnp.sum(double(x))), SQUARE) == 3 * ONE


def test_what_nobody_needs_is_not_counted() -> None:
    # The value of a product is not needed for its gradient.
    assert total(jax.grad(lambda x, w: jnp.sum(x @ w), (0, 1)), SQUARE, SQUARE) == 2 * ONE


def test_shard_map_counts_every_device() -> None:
    mesh = jax.make_mesh((4, 2), ("rows", "copies"), axis_types=(AxisType.Auto,) * 2)
    rows = PartitionSpec("rows")
    sharded = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows)
    # Split four ways over the rows, done twice since the second axis repeats it.
    assert total(sharded, SQUARE, SQUARE) == 2 * ONE


def test_convolution() -> None:
    images, kernel = jax.ShapeDtypeStruct((2, 16, 16, 4), jnp.float32), jax.ShapeDtypeStruct((3, 3, 4, 8), jnp.float32)
    convolve = lambda x, k: jax.lax.conv_general_dilated(
        x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert total(convolve, images, kernel) == 2 * (2 * 8 * 8 * 8) * 3 * 3 * 4


@pytest.mark.parametrize(("part", "causal", "share"), [("decoder", True, 0.5), ("vision_base", False, 1.0)])
def test_splash_kernels_by_formula(part: str, causal: bool, share: float) -> None:
    b, length, h, g, k = 2, 256, 4, 2, 128
    query, key = (jax.ShapeDtypeStruct((b, length, heads, k), jnp.bfloat16) for heads in (h, g))
    segments = jax.ShapeDtypeStruct((b, length), jnp.int32)

    @jax.named_scope(part)
    def mixed(query, key, value, segments):
        return jnp.sum(attention(query, key, value, query_segments=segments, causal=causal, kernel="splash"))

    traced = jax.jit(jax.grad(mixed, (0, 1, 2))).trace(query, key, key, segments)
    tally = count_flops(traced.jaxpr)
    product = 2 * b * h * length**2 * k * share
    assert tally[Work(part, "attention", FORWARD)] == 2 * product
    # The fused backward kernel forms the scores again: scores, dV, dP, dK, dQ. Outside of it stand the products of outputs and gradients.
    assert tally[Work(part, "attention", BACKWARD)] == 5 * product + 2 * b * h * length * k


@pytest.mark.parametrize(("kept", "times"), [((), 1), ((ATTENTION_OUTPUT,), 0)])
def test_a_kernel_whose_results_are_kept_is_not_counted_again(kept: tuple[str, ...], times: int) -> None:
    query = jax.ShapeDtypeStruct((2, 256, 4, 128), jnp.bfloat16)

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*kept))
    def mixed(x):
        return jnp.sin(attention(jnp.sin(x), x, x, causal=True, kernel="splash"))

    with jax.sharding.use_abstract_mesh(partitioning.abstract_mesh(MeshConfig(fsdp=2), 2)):
        tally = count_flops(jax.jit(jax.value_and_grad(lambda x: jnp.sum(mixed(x)))).trace(query).jaxpr)
    repeated = tally[Work("head", "attention", REPEATED)]
    assert repeated == times * tally[Work("head", "attention", FORWARD)]
    assert tally[Work("head", "attention", FORWARD)] == 2 * 2 * 2 * 4 * 256**2 * 128


def test_an_unknown_kernel_is_an_error() -> None:
    from jax.experimental import pallas

    def copy(source, target):
        target[...] = source[...]

    with pytest.raises(ConfigError, match=r"'copy'.*KERNELS"):
        total(pallas.pallas_call(copy, out_shape=SQUARE, name="copy", interpret=True), SQUARE)


# -------------------------------------------------------------------- the real step


def architecture(scale: int, layers: int) -> HyperVLConfig:
    """Odd heads: 6 query heads over 3; 3 tiles a row."""
    vision = VisionConfig(64 * scale, 128 * scale, layers, 2 * scale, 8, 64)
    large = dataclasses.replace(vision, hidden_size=96 * scale, num_heads=3 * scale, num_layers=2 * layers)
    decoder = DecoderConfig(512, 192 * scale, 256 * scale, layers, 6, 3, 32 * scale)
    return dataclasses.replace(
        hypervl_tiny(), vision_base=vision, vision_large=large, decoder=decoder, tiling=TilingConfig(64, 8, 2, 3)
    )


def trace_step(
    model: HyperVLConfig,
    shape: BatchShape,
    optimizer: OptimizerConfig,
    consistency: ConsistencyConfig,
    remat: tuple[str, str] = ("none", "none"),
):
    runtime = RuntimeConfig("float32", "xla", *remat, tile_chunk=3)
    schedule = learning_rate_schedule(optimizer, 1000)
    functions = StepFunctions(model, runtime, optimizer, consistency, ObjectiveConfig(1 << 20), schedule, 2)
    state = training_state.abstract_state(model, runtime, optimizer, 2)
    batch = Batch(*(jax.ShapeDtypeStruct(*field) for field in shape.array_shapes(64)))
    return jax.jit(functions.train_step).trace(state, batch, make_control(consistency, 0))


def by_part_and_kind(tally) -> collections.Counter:
    sums = collections.Counter()
    for work, count in tally.items():
        sums[work.part, work.kind] += count
    return sums


@pytest.mark.parametrize("frozen", [(), ("decoder",), ("vision",), ("vision_base", "projector")])
def test_step_does_the_analytic_count(frozen: tuple[str, ...]) -> None:
    model, shape = architecture(1, 2), BatchShape(2, 64, 3)
    optimizer, consistency = OptimizerConfig(frozen=frozen), ConsistencyConfig()
    traced = trace_step(model, shape, optimizer, consistency)
    for number, arm in enumerate(consistency.arms):
        counted = by_part_and_kind(count_flops(traced.jaxpr, number))
        wanted = step_flops(model, shape, arm, optimizer.trainable_parts, teacher=True)
        # XLA's attention forms all pairs, the convention counts those that the causal mask leaves.
        wanted["decoder", "attention"] = wanted["decoder", "attention"] * 2 * shape.length // (shape.length + 1)
        assert counted == wanted


def test_full_rematerialisation_repeats_one_forward_pass_of_the_layers() -> None:
    model, shape = architecture(1, 2), BatchShape(2, 64, 3)
    optimizer, consistency = OptimizerConfig(), ConsistencyConfig(alternation="large")
    tally = count_flops(trace_step(model, shape, optimizer, consistency, ("full", "tile")).jaxpr)
    forward, repeated = (tally[Work("decoder", "attention", phase)] for phase in (FORWARD, REPEATED))
    assert forward == repeated
    # The last product of a layer is not needed to differentiate it.
    products = tally[Work("decoder", "product", FORWARD)], tally[Work("decoder", "product", REPEATED)]
    down = 2 * 2 * shape.rows * shape.length * model.decoder.intermediate_size * model.decoder.hidden_size
    assert products[0] - products[1] == down


def test_xla_counts_the_same_where_it_has_no_loops() -> None:
    """All loops have one trip here, which is what XLA counts; its count has elementwise operations too, under 2 % at this size."""
    consistency = ConsistencyConfig(alternation="base")
    traced = trace_step(architecture(4, 1), BatchShape(16, 128, 3), OptimizerConfig(), consistency)
    counted = sum(count_flops(traced.jaxpr).values())
    analysed = traced.lower().compile().cost_analysis()["flops"]
    assert counted <= analysed <= 1.02 * counted
