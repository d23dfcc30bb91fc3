"""The DCL step: what moves, what stays, what a batch's layout may not change."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypervl_jax.architecture import PARTS
from hypervl_jax.partitioning import MeshConfig
from hypervl_jax.training.batch import BatchShape, empty_batch
from hypervl_jax.training.consistency import ConsistencyConfig, arm_index, make_control
from hypervl_jax.training.optimizer import OptimizerConfig
from hypervl_jax.training.state import add_tokens, token_totals
from hypervl_jax.training.step import ObjectiveConfig, branch_hidden
from tests.small import SHAPE, SOURCES, Setup, fill_document, make_setup, random_batch


@pytest.fixture(scope="module")
def setup() -> Setup:
    return make_setup()


def equal(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_a_step_moves_its_branch_and_leaves_the_idle_one_bit_identical(setup):
    state = setup.state
    for step, (active, idle) in enumerate((("base", "large"), ("large", "base"), ("base", "large"))):
        new, metrics = setup.run(state, random_batch(step))
        assert metrics["arm"] == step % 2
        for part in (f"vision_{idle}", f"projector_{idle}"):
            assert equal(new.params[part], state.params[part])
            assert equal(new.moments[part], state.moments[part])
        for part in (f"vision_{active}", f"projector_{active}", "decoder"):
            assert not equal(new.params[part], state.params[part])
        state = new
    assert state.counters.branch_steps.tolist() == [2, 1]


def test_a_base_step_reports_both_branches_and_a_large_step_only_its_own(setup):
    state, base = setup.run(setup.state, random_batch(0))
    _, large = setup.run(state, random_batch(1))
    for name in ("cross_entropy/base", "cross_entropy/large", "kl", "kl_at_temperature", "agreement", "entropy/base"):
        assert np.isfinite(base[name])
    assert np.isnan(large["kl"])
    assert np.isnan(large["cross_entropy/base"])
    assert large["loss"] == pytest.approx(large["cross_entropy/large"], rel=1e-6)
    assert base["loss"] == pytest.approx(base["cross_entropy/base"] + 4.0 * base["kl_at_temperature"], rel=1e-5)


def test_learning_rate_zero_changes_no_parameter():
    setup = make_setup(OptimizerConfig(learning_rate=0.0, warmup_steps=0, schedule="constant"))
    new, _ = setup.run(setup.state, random_batch(0))
    assert equal(new.params, setup.state.params)


def test_frozen_parts_have_no_moments_and_stay_bit_identical():
    setup = make_setup(OptimizerConfig(learning_rate=1e-2, warmup_steps=0, schedule="constant", frozen=("decoder",)))
    assert set(setup.state.moments) == set(PARTS) - {"decoder"}
    state, _ = setup.run(setup.state, random_batch(0))
    state, _ = setup.run(state, random_batch(1))
    assert equal(state.params["decoder"], setup.state.params["decoder"])
    assert not equal(state.params["vision_base"], setup.state.params["vision_base"])
    assert not equal(state.params["vision_large"], setup.state.params["vision_large"])


def weight_gradient_shapes(setup: Setup) -> str:
    with jax.set_mesh(setup.mesh):
        return setup.step.lower(setup.state, random_batch(0), setup.control).as_text()


def test_the_lowered_step_holds_no_weight_gradient_of_a_frozen_decoder():
    """Neither that of a layer nor that of the head, the one float32 value of the head's shape that is added to."""
    rate = dict(learning_rate=1e-2, warmup_steps=0, schedule="constant")
    frozen = weight_gradient_shapes(make_setup(OptimizerConfig(**rate, frozen=("decoder",))))
    trained = weight_gradient_shapes(make_setup(OptimizerConfig(**rate)))
    # A stacked MLP kernel of the decoder [2 layers, 32, 64]: its gradient is written layer by layer in the backward scan.
    layer = re.compile(r"dynamic_update_slice.*tensor<2x32x64xf32>")
    head = re.compile(r"stablehlo.add .*tensor<32x128xf32>")
    for update in (layer, head):
        assert update.search(trained)
        assert not update.search(frozen)


def test_donated_state_is_aliased(setup):
    with jax.set_mesh(setup.mesh):
        compiled = setup.step.lower(setup.state, setup.on_mesh(random_batch(0)), setup.control).compile()
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(setup.state))
    assert compiled.memory_analysis().alias_size_in_bytes >= 0.99 * state_bytes


def test_the_step_compiles_once_for_both_branches_and_for_changed_control(setup):
    fresh = make_setup()
    state = fresh.state
    for step in range(4):
        control = fresh.control._replace(kl_weight=jnp.float32(step), temperature=jnp.float32(1 + step))
        fresh.control = control
        state, _ = fresh.run(state, random_batch(step))
    assert fresh.step._cache_size() == 1


def with_padding_micro_batch() -> object:
    """Rows 1 and 3 are the second micro-batch of two: all padding; the first has unequal documents."""
    batch = empty_batch(SHAPE, 16)
    rng = np.random.default_rng(3)
    fill_document(batch, 0, 0, 40, 0, rng, 0)
    fill_document(batch, 2, 0, 12, 0, rng, 1)
    return batch


@pytest.mark.parametrize("batch", [random_batch(5), with_padding_micro_batch()], ids=["unequal", "padding"])
def test_accumulation_equals_the_large_batch(setup, batch):
    accumulated = make_setup(objective=ObjectiveConfig(loss_chunk_tokens=16, accumulation=2))
    for arm in (0, 1):
        state = setup.state._replace(step=jnp.int32(arm))
        whole, whole_metrics = setup.run(state, batch)
        parts, parts_metrics = accumulated.run(state, batch)
        assert whole_metrics["gradient_norm"] == pytest.approx(parts_metrics["gradient_norm"], rel=1e-5)
        assert whole_metrics["loss"] == pytest.approx(parts_metrics["loss"], rel=1e-5)
        first = lambda tree: jax.tree.leaves(tree.moments)
        for a, b in zip(first(whole), first(parts), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_a_padded_batch_gives_zero_gradient_and_no_nan(setup):
    new, metrics = setup.run(setup.state, empty_batch(SHAPE, 16))
    assert metrics["gradient_norm"] == 0
    assert metrics["loss"] == 0
    assert metrics["finite"] == 1
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(new.params))


def test_a_padded_row_adds_nothing_to_the_gradient(setup):
    batch = random_batch(1)
    for field, fill in zip(batch, empty_batch(SHAPE, 16), strict=True):
        field[1:] = fill[1:]
    noise = random_batch(2)
    with_garbage = batch._replace(tiles=batch.tiles.copy(), tokens=batch.tokens.copy())
    with_garbage.tiles[1:], with_garbage.tokens[1:] = noise.tiles[1:], noise.tokens[1:]
    clean, _ = setup.run(setup.state, batch)
    dirty, _ = setup.run(setup.state, with_garbage)
    assert equal(clean.params, dirty.params)


def test_packed_loss_equals_the_sum_of_the_unpacked_ones(setup):
    rng = np.random.default_rng(9)
    packed, apart = empty_batch(SHAPE, 16), empty_batch(SHAPE, 16)
    fill_document(packed, 0, 0, 20, 0, rng, 0)
    fill_document(packed, 0, 20, 25, 1, rng, 0)
    rng = np.random.default_rng(9)
    fill_document(apart, 0, 0, 20, 0, rng, 0)
    fill_document(apart, 1, 0, 25, 0, rng, 0)
    _, packed_metrics = setup.run(setup.state, packed)
    _, apart_metrics = setup.run(setup.state, apart)
    assert packed_metrics["loss_tokens"] == apart_metrics["loss_tokens"]
    assert packed_metrics["loss"] == pytest.approx(apart_metrics["loss"], rel=1e-5)
    assert packed_metrics["gradient_norm"] == pytest.approx(apart_metrics["gradient_norm"], rel=1e-5)


def test_perturbing_one_document_leaves_the_others_bit_identical(setup):
    batch = random_batch(4)
    changed = batch._replace(tokens=batch.tokens.copy(), tiles=batch.tiles.copy())
    first = batch.segments == 1
    changed.tokens[first] = (changed.tokens[first] + 7) % 60
    changed.tiles[batch.tile_segments == 1] ^= 255
    hidden = jax.jit(lambda b: branch_hidden(setup.functions.model, setup.state.params, b, "base"))
    before, after = np.asarray(hidden(batch)), np.asarray(hidden(changed))
    others = batch.segments == 2
    np.testing.assert_array_equal(before[others], after[others])
    assert not np.array_equal(before[first], after[first])


def test_a_nonfinite_step_is_skipped_and_counted(setup):
    batch = random_batch(0)
    broken = batch._replace(loss_weights=np.where(batch.loss_weights > 0, np.inf, 0).astype(np.float32))
    state, metrics = setup.run(setup.state, broken)
    assert metrics["finite"] == 0
    assert equal(state.params, setup.state.params)
    assert equal(state.moments, setup.state.moments)
    assert int(state.counters.skipped_in_a_row) == 1
    state, _ = setup.run(state, batch)
    assert int(state.counters.skipped_in_a_row) == 0
    assert int(state.counters.skipped) == 1
    assert int(state.step) == 2


def test_without_kl_weight_the_step_has_no_teacher_pass():
    with_teacher = make_setup(consistency=ConsistencyConfig(alternation="ratio"))
    without = make_setup(consistency=ConsistencyConfig(alternation="ratio", kl_weight=0.0))
    texts = [weight_gradient_shapes(x) for x in (with_teacher, without)]
    assert len(texts[1]) < len(texts[0])
    _, metrics = without.run(without.state, random_batch(0))
    assert np.isnan(metrics["kl"])
    assert metrics["loss"] == pytest.approx(metrics["cross_entropy/base"], rel=1e-6)


def test_joint_steps_train_both_branches():
    setup = make_setup(consistency=ConsistencyConfig(alternation="joint"))
    new, metrics = setup.run(setup.state, random_batch(0))
    assert all(not equal(new.params[part], setup.state.params[part]) for part in PARTS)
    assert new.counters.branch_steps.tolist() == [1, 1]
    assert np.isfinite(metrics["kl"])


@pytest.mark.parametrize(
    ("alternation", "base", "large", "expected"),
    [("ratio", 1, 1, "010101"), ("ratio", 2, 1, "001001"), ("ratio", 1, 2, "011011")],
)
def test_ratio_alternation(alternation, base, large, expected):
    config = ConsistencyConfig(alternation=alternation, base_steps=base, large_steps=large)
    control = make_control(config, 0)
    assert "".join(str(int(arm_index(jnp.int32(step), config, control))) for step in range(6)) == expected


def test_random_alternation_is_a_pure_function_of_seed_and_step_with_the_asked_odds():
    config = ConsistencyConfig(alternation="random", base_steps=3, large_steps=1)
    draw = jax.jit(jax.vmap(lambda step, control: arm_index(step, config, control), in_axes=(0, None)))
    steps = jnp.arange(4000, dtype=jnp.int32)
    first, again, other = (np.asarray(draw(steps, make_control(config, seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert abs(first.mean() - 0.25) < 0.03


def test_token_counters_pass_32_bits():
    tokens = jnp.zeros((1, 2), jnp.uint32)
    for _ in range(5):
        tokens = add_tokens(tokens, jnp.array([2**31 + 17], jnp.uint32))
    assert token_totals(tokens) == [5 * (2**31 + 17)]


def test_tokens_are_counted_by_source(setup):
    batch = random_batch(0)
    state, metrics = setup.run(setup.state, batch)
    expected = [int(np.sum((batch.segments > 0) & (batch.sources == source))) for source in range(SOURCES)]
    assert token_totals(state.counters.tokens) == expected
    assert metrics["tokens"] == sum(expected)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(data=2, fsdp=2, tensor=2), marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=1, fsdp=4, tensor=2), marks=pytest.mark.slow),
        MeshConfig(slice=2, data=1, fsdp=2, tensor=2),
    ],
    ids=str,
)
def test_losses_do_not_depend_on_the_mesh(mesh):
    shape = dataclasses.replace(SHAPE, rows=8)
    one, many = make_setup(), make_setup(mesh=mesh, devices=8)
    states = [one.state, many.state]
    for step in range(4):
        batch = random_batch(step, BatchShape(shape.rows, shape.length, shape.tiles))
        results = [setup.run(state, batch) for setup, state in zip((one, many), states, strict=True)]
        states = [state for state, _ in results]
        assert results[0][1]["loss"] == pytest.approx(results[1][1]["loss"], rel=1e-4)
