"""The compressor's labels, targets, training and calibration."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hypervl_jax.architecture import CompressorConfig, ConfigError, TilingConfig
from hypervl_jax.models.compressor_io import abstract_compressor, predict_log_areas, shift_output
from hypervl_jax.models.safetensors_files import CheckpointError
from hypervl_jax.training.compression import (
    EVERY_TASK,
    RATIOS,
    ResolutionLabel,
    at_alpha,
    chance_lost,
    compressor_metrics,
    compressor_targets,
    optimal_ratio,
    rank_correlation,
    relative_increase,
    summarise_labels,
)
from hypervl_jax.training.compressor_training import (
    BETWEEN_RATIOS,
    ORDINAL,
    RESIDUAL_LOSSES,
    CompressorTrainConfig,
    Lesson,
    calibration_bias,
    censored_residual,
    ordinal,
    train_compressor,
    validation_mask,
)
from hypervl_jax.vision.anyres import plan_image
from hypervl_jax.vision.resolution import alpha_from_prediction

TILING = TilingConfig(tile_size=64, patch_size=8, shuffle=2, max_tiles=9)
SMALL = CompressorConfig(
    proxy_size=16, stem_width=8, stages=((3, 8, 8, False, "relu", 2),), head_width=16, hidden_size=16
)
FALLING = (3.0, 2.0, 1.6, 1.4, 1.2, 1.1, 1.04, 1.03, 1.02, 1.0)


def make_label(losses=FALLING, task="charts", height=96, width=160, blind=4.0, name="0") -> ResolutionLabel:
    tokens = tuple(plan_image(height, width, alpha, TILING).tokens for alpha in RATIOS)
    return ResolutionLabel(name * 32, task, task, height, width, tuple(losses), blind, tokens)


def test_relative_increase_is_the_definition():
    np.testing.assert_allclose(relative_increase(np.array(FALLING), 0.1), np.array(FALLING) - 1.0, atol=1e-12)
    certain = np.linspace(0.02, 0.01, 10)
    np.testing.assert_allclose(relative_increase(certain, 0.5), (certain - 0.01) / 0.5, atol=1e-12)


@pytest.mark.parametrize(("epsilon", "expected"), [(0.0, 1.0), (0.02, 0.9), (0.05, 0.7), (0.1, 0.6), (5.0, 0.1)])
def test_optimal_ratio_is_the_smallest_within_epsilon(epsilon, expected):
    assert optimal_ratio(np.array(FALLING), epsilon + 1e-9, 0.1) == expected


def test_a_curve_that_rises_and_falls_again_is_not_trusted_below_its_rise():
    losses = np.array([1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert optimal_ratio(losses, 0.05, 0.1) == 0.5


def test_an_answer_that_improves_when_compressed_is_compressed_most():
    assert optimal_ratio(np.linspace(0.5, 1.0, 10), 0.0, 0.1) == 0.1


def test_the_floor_decides_for_answers_that_are_certain():
    losses = np.full(10, 1e-4)
    losses[:5] = 1e-3
    assert optimal_ratio(losses, 0.05, 1e-6) == 0.6
    assert optimal_ratio(losses, 0.05, 0.1) == 0.1


@settings(deadline=None)
@given(st.lists(st.floats(0, 10), min_size=10, max_size=10), st.floats(0, 2), st.floats(1e-3, 1))
def test_optimal_ratio_agrees_with_the_search_by_hand(losses, epsilon, floor):
    best = 1.0
    for alpha, loss in reversed(list(zip(RATIOS, losses, strict=True))):
        if (loss - losses[-1]) / max(losses[-1], floor) > epsilon:
            break
        best = alpha
    assert optimal_ratio(np.array([losses]), epsilon, floor).tolist() == [best]


@pytest.mark.parametrize(
    ("losses", "epsilon", "floor", "message"),
    [
        ([np.nan] * 10, 0.1, 0.1, "finite"),
        ([-1.0] * 10, 0.1, 0.1, "0 or more"),
        ([1.0] * 9, 0.1, 0.1, "axis of 10"),
        ([1.0] * 10, -0.1, 0.1, "epsilon"),
        ([1.0] * 10, 0.1, 0.0, "floor"),
    ],
)
def test_curves_that_mean_nothing_are_refused(losses, epsilon, floor, message):
    with pytest.raises(ValueError, match=message):
        optimal_ratio(np.array(losses), epsilon, floor)


@pytest.mark.parametrize("size", [(10, 12), (96, 160), (900, 30)])
def test_targets_map_back_to_the_label(size):
    labels = [make_label(height=size[0], width=size[1]), make_label([1.0] * 10, height=size[0], width=size[1])]
    targets = compressor_targets(labels, 0.05, 0.1, 64)
    np.testing.assert_allclose(alpha_from_prediction(targets, max(size), 64), [0.7, 0.1], rtol=1e-5)


def test_summary_reports_floor_blind_guessers_and_tokens():
    labels = [make_label(), make_label([0.01] * 10, "digits", blind=0.012), make_label(task="digits")]
    summaries = summarise_labels(labels, 0.05, 0.1)
    assert list(summaries) == ["charts", "digits", EVERY_TASK]
    assert (summaries["digits"].on_floor, summaries["digits"].blind, summaries["charts"].blind) == (0.5, 0.5, 0.0)
    assert summaries["charts"].mean_optimal == 0.7
    assert summaries[EVERY_TASK].histogram == (1, 0, 0, 0, 0, 0, 2, 0, 0, 0)
    kept, whole = (plan_image(96, 160, alpha, TILING).tokens for alpha in (0.7, 1.0))
    assert summaries["charts"].tokens_saved == pytest.approx(1 - kept / whole)


def test_increases_are_interpolated_between_ratios():
    curve = relative_increase(np.array([FALLING] * 4), 0.1)
    expected = np.interp([0.1, 0.234, 0.95, 1.0], RATIOS, curve[0])
    np.testing.assert_allclose(at_alpha(curve, np.array([0.1, 0.234, 0.95, 1.0])), expected, atol=1e-9)


def test_the_chance_lost_counts_an_image_once_and_is_not_raised_by_noise():
    half = np.log(2.0)
    curves = np.array([[50.0] * 9 + [0.0], [0.0] * 9 + [half]])
    assert chance_lost(curves, np.array([0.5, 1.0])) == pytest.approx(1 / 1.5)
    assert chance_lost(curves, np.array([1.0, 0.5])) == pytest.approx(-0.5 / 1.5)
    noise = np.random.default_rng(0).uniform(0.4, 0.6, (20_000, 10))
    assert abs(chance_lost(noise, np.full(20_000, 0.3))) < 0.002


@pytest.mark.parametrize("name", sorted(RESIDUAL_LOSSES))
def test_losses_punish_over_compression_by_the_weight(name):
    settings = CompressorTrainConfig(loss=name, over_compression_weight=3.0)
    below, above = RESIDUAL_LOSSES[name](jnp.array([-0.2, 0.2]), settings)
    assert below == pytest.approx(3 * above)


def test_the_pinball_optimum_is_the_weighted_quantile():
    targets, settings = np.linspace(0, 1, 1001), CompressorTrainConfig(loss="pinball", over_compression_weight=3.0)
    total = [
        float(RESIDUAL_LOSSES["pinball"](guess - targets, settings).sum()) for guess in (0.65, 0.7, 0.75, 0.8, 0.85)
    ]
    assert np.argmin(total) == 2


def test_the_ordinal_loss_is_the_mean_of_nine_logistic_ones():
    settings = CompressorTrainConfig(loss=ORDINAL, over_compression_weight=3.0, ordinal_scale=0.2)
    sides, prediction, alpha = np.array([64.0]), np.log(np.array([0.4])), 0.6
    bounds = np.log(BETWEEN_RATIOS)
    expected = 0.0
    for bound in bounds:
        chance = 1 / (1 + np.exp(-(prediction[0] - bound) / 0.2))
        more = np.log(alpha) > bound
        expected -= 3.0 * np.log(chance) if more else np.log(1 - chance)
    found = ordinal(jnp.asarray(prediction), jnp.log(jnp.array([alpha])), jnp.asarray(sides), 64, settings)
    np.testing.assert_allclose(found, [expected / 9], rtol=1e-5)


def test_the_ordinal_optimum_lies_in_the_labels_interval_and_is_flat_beyond_the_ends():
    settings = CompressorTrainConfig(loss=ORDINAL, over_compression_weight=1.0, ordinal_scale=0.02)
    guesses = jnp.log(jnp.array(RATIOS))
    for label in RATIOS:
        losses = ordinal(guesses, jnp.full(10, np.log(label)), jnp.full(10, 64.0), 64, settings)
        assert RATIOS[int(jnp.argmin(losses))] == label
    beyond = ordinal(jnp.array([0.3, 2.0]), jnp.zeros(2), jnp.full(2, 64.0), 64, settings)
    np.testing.assert_allclose(beyond, 0, atol=1e-4)


def test_labels_at_the_ends_only_bound_the_prediction():
    alphas, sides = np.array([0.1, 0.1, 0.5, 1.0, 1.0]), np.full(5, 200.0)
    targets = np.log(alphas * (200 / 64) ** 2)
    shifts = np.array([-1.0, 1.0, 1.0, 1.0, -1.0])
    residual = censored_residual(targets + shifts, targets, sides, 64)
    np.testing.assert_allclose(residual, [0.0, 1.0, 1.0, 0.0, -1.0], atol=1e-5)


def test_equal_pictures_stay_on_one_side_whatever_the_order():
    pictures = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), np.uint8)
    doubled = np.concatenate([pictures, pictures])
    mask = validation_mask(doubled, 0.25)
    assert mask[:40].sum() == 10
    np.testing.assert_array_equal(mask[:40], mask[40:])
    order = np.random.default_rng(1).permutation(80)
    np.testing.assert_array_equal(validation_mask(doubled[order], 0.25), mask[order])
    with pytest.raises(ConfigError, match="distinct pictures"):
        validation_mask(pictures[:1].repeat(9, 0), 0.5)


def test_calibration_finds_the_strongest_compression_that_is_allowed():
    """Right answers' chances are exactly α at `RATIOS`, so a quarter lost means a mean α of 0.75 (less between them)."""
    rng = np.random.default_rng(0)
    sides = rng.integers(20, 300, 60).astype(np.float32)
    outputs = rng.normal(0, 0.5, 60).astype(np.float32)
    lesson = Lesson(np.zeros(60), np.zeros(60), sides, np.tile(-np.log(RATIOS), (60, 1)))
    bias = calibration_bias(outputs, lesson, 0.25, 64)
    alphas = alpha_from_prediction(outputs + bias, sides, 64)
    assert 0.75 <= alphas.mean() < 0.765
    assert calibration_bias(outputs + 1.0, lesson, 0.25, 64) == pytest.approx(bias - 1.0, abs=0.021)
    whole = alpha_from_prediction(outputs + calibration_bias(outputs, lesson, 0.0, 64), sides, 64)
    np.testing.assert_allclose(whole, 1.0)


def test_shifting_the_output_shifts_every_prediction():
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), abstract_compressor(SMALL))
    proxies = rng.integers(0, 256, (5, 16, 16, 3), np.uint8)
    before = predict_log_areas(SMALL, params, proxies)
    after = predict_log_areas(SMALL, shift_output(params, 0.7), proxies)
    np.testing.assert_allclose(after, before + 0.7, atol=1e-5)
    np.testing.assert_allclose(before, predict_log_areas(SMALL, params, proxies, batch_size=2), atol=1e-5)


def detail_lesson(count: int) -> Lesson:
    """Noise of 1-pixel grain must be kept whole, flat pictures need a tenth: a curve rises below its α*."""
    rng = np.random.default_rng(0)
    fine = np.arange(count) % 2 == 0
    noise = rng.integers(0, 256, (count, 16, 16, 3), np.uint8)
    flat = np.broadcast_to(rng.integers(0, 256, (count, 1, 1, 3), np.uint8), noise.shape)
    best = np.where(fine, 1.0, 0.1)
    curves = np.maximum(0.0, best[:, None] - np.array(RATIOS))
    sides = np.full(count, 16, np.float32)
    proxies = np.where(fine[:, None, None, None], noise, flat)
    return Lesson(proxies, np.log(best).astype(np.float32), sides, curves.astype(np.float32))


def test_training_learns_which_pictures_need_their_pixels():
    lesson = detail_lesson(120)
    settings = CompressorTrainConfig(steps=60, batch_size=16, learning_rate=1e-2, warmup_steps=5, evaluate_every=20)
    calls = []
    trained = train_compressor(SMALL, lesson, settings, lambda done, total: calls.append((done, total)))
    assert calls == [(20, 60), (40, 60), (60, 60)]
    assert trained.history[-1]["validation_loss"] < 0.5 * trained.history[0]["validation_loss"]
    held_out = lesson.part(trained.validation)
    alphas = alpha_from_prediction(predict_log_areas(SMALL, trained.params, held_out.proxies), 16.0, 16)
    fine = held_out.targets == 0
    assert alphas[fine].min() > alphas[~fine].max()
    # the calibration is inside the parameters
    assert chance_lost(held_out.curves, alphas) <= settings.allowed_loss


def test_training_begins_with_the_weights_that_are_given():
    settings = CompressorTrainConfig(steps=1, batch_size=8, learning_rate=1e-9, warmup_steps=0, evaluate_every=1)
    fresh = abstract_compressor(SMALL)
    first = {"stem": jax.tree.map(lambda leaf: np.full(leaf.shape, 0.3, np.float32), fresh["stem"])}
    trained = train_compressor(SMALL, detail_lesson(20), settings, first=first)
    for leaf in jax.tree.leaves(trained.params["stem"]):
        np.testing.assert_allclose(leaf, 0.3, atol=1e-6)
    assert np.ptp(trained.params["hidden"]["kernel"]) > 0.1
    with pytest.raises(CheckpointError, match="choose another --backbone"):
        train_compressor(
            SMALL, detail_lesson(20), settings, first={"stem": jax.tree.map(lambda x: x[..., :4], first["stem"])}
        )


def test_metrics_measure_what_they_say():
    labels = [make_label(task="charts"), make_label([1.0] * 10, task="digits"), make_label(task="digits")]
    alphas = np.array([0.5, 0.2, 1.0])
    metrics = compressor_metrics(labels, alphas, 0.05, 0.1, TILING)
    assert metrics["charts"].over_compressed == 1.0
    assert metrics["charts"].chance_lost == pytest.approx(1 - np.exp(-FALLING[4]) / np.exp(-FALLING[9]))
    assert metrics["charts"].rank_correlation is None
    assert metrics["digits"].over_compressed == 0.0
    assert metrics["digits"].rank_correlation == pytest.approx(1.0)
    assert metrics[EVERY_TASK].mean_alpha == pytest.approx(alphas.mean())
    plans = [plan_image(96, 160, alpha, TILING) for alpha in alphas]
    whole = plan_image(96, 160, 1.0, TILING)
    assert metrics[EVERY_TASK].tokens_saved == pytest.approx(1 - sum(p.tokens for p in plans) / (3 * whole.tokens))
    assert metrics[EVERY_TASK].tiles_saved == pytest.approx(1 - sum(p.tiles for p in plans) / (3 * whole.tiles))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=20))
def test_rank_correlation_is_scipys(pairs):
    first, second = np.array(pairs, float).T
    found = rank_correlation(first, second)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        assert found is None
    else:
        assert found == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-9)


@pytest.mark.parametrize(
    "change", [{"loss": "l2"}, {"steps": 0}, {"validation_share": 1.0}, {"allowed_loss": -1.0}, {"batch_size": 0}]
)
def test_settings_that_cannot_work_are_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change)).split("_")[0]):
        dataclasses.replace(CompressorTrainConfig(), **change)
