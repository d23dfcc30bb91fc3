"""Training the compressor (VRC) on labels: losses by name, the loop, calibration. `training.compression` makes the targets.

Source: HyperVL (arXiv 2512.14052), section on the VRC. The paper publishes neither loss nor schedule: all of this is our choice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8

from hypervl_jax import partitioning
from hypervl_jax.architecture import CompressorConfig, require
from hypervl_jax.models.compressor import Compressor
from hypervl_jax.models.compressor_io import predict_log_areas, shift_output
from hypervl_jax.models.mobilenet_weights import with_backbone
from hypervl_jax.training.compression import RATIOS, chance_lost
from hypervl_jax.vision.resolution import MAX_ALPHA, MIN_ALPHA, alpha_from_prediction, prediction_from_alpha


@dataclasses.dataclass(frozen=True)
class CompressorTrainConfig:
    """How a compressor is trained. All numbers are our choice: the paper publishes none.

    Attributes:
        steps: AdamW updates.
        batch_size: images a step.
        learning_rate: its highest value, after `warmup_steps`; a cosine takes it to 0.
        warmup_steps: of a linear rise from 0.
        weight_decay: of the kernels; norms and biases have none.
        loss: one of `LOSSES`.
        over_compression_weight: how much worse it is to predict too small an area than one too large by the same factor.
            Not 1 by default: what over-compression throws away no later part can bring back, while under-compression costs
            a few tokens; and labels are noisy, so a symmetric loss would compress half of the images too far.
        huber_delta: where the Huber loss turns from square to linear, in units of the log of the area.
        ordinal_scale: width of the ordinal loss's steps, in the same units; neighbouring ratios lie 0.1 to 0.7 apart.
        validation_share: share of the distinct pictures that are kept out of training, for choosing the step and calibration.
        allowed_loss: `chance_lost` that calibration allows; by default the paper's cost, 98.7 % of the score left.
        evaluate_every: steps between validations; the parameters with the least validation loss are kept.
        seed: of parameters and order.
    """

    steps: int = 300
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup_steps: int = 30
    weight_decay: float = 1e-2
    loss: str = "huber"
    over_compression_weight: float = 3.0
    huber_delta: float = 0.5
    ordinal_scale: float = 0.2
    validation_share: float = 0.2
    allowed_loss: float = 0.013
    evaluate_every: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.loss in LOSSES, f"compressor loss {self.loss!r} is not one of {', '.join(LOSSES)}")
        positive = ("steps", "batch_size", "learning_rate", "over_compression_weight", "huber_delta", "ordinal_scale")
        for name in (*positive, "evaluate_every"):
            require(getattr(self, name) > 0, f"compressor {name} {getattr(self, name)} must be positive")
        require(
            0 < self.validation_share < 1,
            f"compressor validation_share {self.validation_share} must lie between 0 and 1",
        )
        require(self.allowed_loss >= 0, f"compressor allowed_loss {self.allowed_loss} must not be negative")


def _direction_weight(residual: Array, config: CompressorTrainConfig) -> Array:
    return jnp.where(residual < 0, config.over_compression_weight, 1.0)


def mse(residual: Float[Array, "b"], config: CompressorTrainConfig) -> Float[Array, "b"]:
    """Half of the squared error, the over-compressed side weighted."""
    return _direction_weight(residual, config) * jnp.square(residual) / 2


def huber(residual: Float[Array, "b"], config: CompressorTrainConfig) -> Float[Array, "b"]:
    """Huber's loss (1964), the over-compressed side weighted."""
    return _direction_weight(residual, config) * optax.losses.huber_loss(residual, delta=config.huber_delta)


def pinball(residual: Float[Array, "b"], config: CompressorTrainConfig) -> Float[Array, "b"]:
    """Quantile loss (Koenker and Bassett, 1978): with weight w its optimum is the quantile w / (1 + w) of the targets."""
    return _direction_weight(residual, config) * jnp.abs(residual)


RESIDUAL_LOSSES: Mapping[str, Callable[[Array, CompressorTrainConfig], Array]] = {
    "huber": huber,
    "pinball": pinball,
    "mse": mse,
}
"""Losses of prediction − target in log area; symmetric with `over_compression_weight` 1."""

ORDINAL = "ordinal"

LOSSES = (*RESIDUAL_LOSSES, ORDINAL)
"""All losses by name."""

BETWEEN_RATIOS = tuple(math.sqrt(lower * upper) for lower, upper in itertools.pairwise(RATIOS))
"""The nine α between neighbouring ratios that an ordinal label is compared with."""


def ordinal(
    predictions: Float[Array, "b"],
    targets: Float[Array, "b"],
    sides: Float[Array, "b"],
    proxy_size: int,
    config: CompressorTrainConfig,
) -> Float[Array, "b"]:
    """Cumulative-link loss (proportional odds; McCullagh, 1980): cross-entropy of "more than this α" at each of `BETWEEN_RATIOS`.

    P(more) = sigmoid((prediction − bound) / `ordinal_scale`) in log area. The mean over the nine bounds; a label above a bound, which
    too small a prediction misses, has the over-compressed side's weight. Labels at the ends of the range need no special care: no bound
    lies beyond them.
    """
    bounds = prediction_from_alpha(jnp.asarray(BETWEEN_RATIOS), sides[:, None], proxy_size)
    more = targets[:, None] > bounds
    terms = optax.losses.sigmoid_binary_cross_entropy((predictions[:, None] - bounds) / config.ordinal_scale, more)
    return (jnp.where(more, config.over_compression_weight, 1.0) * terms).mean(1)


_END_TOLERANCE = 1e-3
"""Labels nearer than this to an end of the range, in log area, lie on it; neighbouring ratios differ by 0.1 or more."""


def censored_residual(
    predictions: Float[Array, "b"], targets: Float[Array, "b"], sides: Float[Array, "b"], proxy_size: int
) -> Float[Array, "b"]:
    """prediction − target, 0 where the label only bounds it.

    α* = 1 says "at least the whole image" and α* = 0.1 "a tenth or less": predictions beyond such an end are clipped to the
    same α, so they are right.
    """
    residual = predictions - targets
    top, bottom = (prediction_from_alpha(alpha, sides, proxy_size) for alpha in (MAX_ALPHA, MIN_ALPHA))
    residual = jnp.where(targets >= top - _END_TOLERANCE, jnp.minimum(residual, 0.0), residual)
    return jnp.where(targets <= bottom + _END_TOLERANCE, jnp.maximum(residual, 0.0), residual)


class Lesson(NamedTuple):
    """Images to learn from, in host or device memory.

    `curves` are L(α) at `RATIOS`, nats, which calibration needs; `longest_sides` are in pixels.
    """

    proxies: UInt8[Any, "n s s 3"]
    targets: Float32[Any, "n"]
    longest_sides: Float32[Any, "n"]
    curves: Float32[Any, "n 10"]

    def part(self, chosen: Any) -> Lesson:
        """The images that a mask or an array of indices chooses."""
        return Lesson(*(field[chosen] for field in self))


class TrainedCompressor(NamedTuple):
    """A trained and calibrated compressor.

    Attributes:
        params: with the calibration in the output's bias: inference needs nothing else.
        history: step, training loss and validation loss, every `evaluate_every` steps.
        calibration_bias: what was added to the output, in log area; positive keeps more.
        validation: mask of the images that were kept out of training.
    """

    params: dict[str, Any]
    history: list[dict[str, float]]
    calibration_bias: float
    validation: Bool[np.ndarray, "n"]


def validation_mask(proxies: UInt8[np.ndarray, "n s s 3"], share: float) -> Bool[np.ndarray, "n"]:
    """Images to keep out of training: about `share` of the distinct pictures, by hash, whatever their order.

    Equal pictures, of which several questions may have been asked, fall on one side.

    Raises `ConfigError` when a side would be empty.
    """
    digests = [hashlib.blake2b(proxy.tobytes(), digest_size=8).digest() for proxy in proxies]
    order = sorted(set(digests))
    count = round(share * len(order))
    require(
        0 < count < len(order),
        f"{len(order)} distinct pictures cannot be split into {1 - share:.0%} training and {share:.0%} validation; label more images",
    )
    chosen = frozenset(order[:count])
    return np.array([digest in chosen for digest in digests])


def train_compressor(
    config: CompressorConfig,
    lesson: Lesson,
    settings: CompressorTrainConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
    first: Mapping[str, Any] | None = None,
) -> TrainedCompressor:
    """Trains a compressor on one device, and calibrates it.

    Args:
        config: its architecture.
        lesson: images, targets and curves, in host memory.
        settings: of the training.
        progress: called with steps done and steps in all.
        first: parameters to begin with (`mobilenet_weights.load_mobilenet`); all others are random.

    Raises:
        CheckpointError: `first` does not fit the architecture.
        ConfigError: too few pictures, or proxies of another size than `config.proxy_size`.
    """
    validation = validation_mask(lesson.proxies, settings.validation_share)
    held_out = lesson.part(validation)
    trainer = Trainer(config, settings, lesson.part(~validation), first or {})
    history, best, least = [], trainer.params, np.inf
    for steps, loss in trainer.run():
        outputs = predict_log_areas(config, trainer.params, held_out.proxies)
        loss_held_out = float(_mean_loss(outputs, held_out, config.proxy_size, settings))
        history.append({"step": steps, "loss": loss, "validation_loss": loss_held_out})
        if loss_held_out < least:
            best, least = trainer.params, loss_held_out
        progress(steps, settings.steps)
    outputs = predict_log_areas(config, best, held_out.proxies)
    bias = calibration_bias(outputs, held_out, settings.allowed_loss, config.proxy_size)
    return TrainedCompressor(shift_output(best, bias), history, bias, validation)


class Trainer:
    """The parameters and the optimizer's state (`params`, `state`) between two validations."""

    def __init__(
        self, config: CompressorConfig, settings: CompressorTrainConfig, lesson: Lesson, first: Mapping[str, Any]
    ) -> None:
        self._config, self._settings, self._module = config, settings, Compressor(config)
        self._lesson = jax.device_put(lesson)
        self._optimizer = _optimizer(settings)
        init = jax.jit(self._module.init)
        fresh, _ = partitioning.unbox(init(jax.random.key(settings.seed), lesson.proxies[:1])["params"])
        # The median is the best constant; from 0 the first steps would only move the bias there.
        self.params = shift_output(jax.device_put(with_backbone(fresh, first)), float(np.median(lesson.targets)))
        self.state = self._optimizer.init(self.params)
        self._step = jax.jit(self.update)

    def run(self) -> Iterator[tuple[int, float]]:
        """Yields (steps done, mean loss since the last time) every `evaluate_every` steps."""
        order, losses = _order(len(self._lesson.targets), self._settings), []
        # One dispatch a step: inside a scan, XLA's CPU backend runs these convolutions four times slower.
        for done, chosen in enumerate(order, start=1):
            self.params, self.state, loss = self._step(self.params, self.state, self._lesson, chosen)
            losses.append(loss)
            if done % self._settings.evaluate_every == 0 or done == len(order):
                yield done, float(np.mean(jax.device_get(losses)))
                losses.clear()

    def update(self, params: Any, state: Any, lesson: Lesson, chosen: Int[Array, "b"]) -> tuple[Any, Any, Array]:
        """One update on the chosen images; their loss comes last."""
        loss, gradient = jax.value_and_grad(self._loss)(params, lesson.part(chosen))
        updates, state = self._optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    def _loss(self, params: Any, lesson: Lesson) -> Float[Array, ""]:
        outputs = self._module.apply({"params": params}, lesson.proxies)
        return _mean_loss(outputs, lesson, self._config.proxy_size, self._settings)


def _optimizer(settings: CompressorTrainConfig) -> optax.GradientTransformation:
    warmup = min(settings.warmup_steps, settings.steps - 1)
    rate = optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, warmup, settings.steps)
    kernels = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    adamw = optax.adamw(rate, weight_decay=settings.weight_decay, mask=kernels)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def _order(images: int, settings: CompressorTrainConfig) -> Int[np.ndarray, "k b"]:
    """Which images each step sees: one permutation after another, cut into batches."""
    rng, needed = np.random.default_rng(settings.seed), settings.steps * settings.batch_size
    epochs = [rng.permutation(images) for _ in range(-(-needed // images))]
    return np.concatenate(epochs)[:needed].astype(np.int32).reshape(settings.steps, settings.batch_size)


def _mean_loss(outputs: Array, lesson: Lesson, proxy_size: int, settings: CompressorTrainConfig) -> Float[Array, ""]:
    if settings.loss == ORDINAL:
        return ordinal(outputs, lesson.targets, lesson.longest_sides, proxy_size, settings).mean()
    residual = censored_residual(outputs, lesson.targets, lesson.longest_sides, proxy_size)
    return RESIDUAL_LOSSES[settings.loss](residual, settings).mean()


_BIAS_STEP = 0.02
"""Resolution of calibration in log area: 2 % of α."""


def calibration_bias(outputs: Float[np.ndarray, "n"], lesson: Lesson, allowed: float, proxy_size: int) -> float:
    """The smallest bias such that with it and every larger one `chance_lost` is at most `allowed`.

    At the largest bias tried every image is whole and nothing is lost, so there always is one. It may be negative: then the
    predictions kept more than was asked for.
    """
    bottom, top = (prediction_from_alpha(alpha, lesson.longest_sides, proxy_size) for alpha in (MIN_ALPHA, MAX_ALPHA))
    smallest = float(np.max(top - outputs)) + _BIAS_STEP
    for bias in np.arange(smallest, float(np.min(bottom - outputs)), -_BIAS_STEP):
        alphas = alpha_from_prediction(outputs + bias, lesson.longest_sides, proxy_size)
        if chance_lost(lesson.curves, alphas) > allowed:
            break
        smallest = float(bias)
    return smallest
