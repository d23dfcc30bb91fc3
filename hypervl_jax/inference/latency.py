"""Switching at run time: predicted milliseconds from a measured device profile, and the largest branch and α in a budget.

`tools.profile_device` makes the profile. Predictions count what really runs: the padded sizes of `generate.bucket`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hypervl_jax.architecture import BRANCHES, HyperVLConfig, TilingConfig, to_json
from hypervl_jax.inference.generate import LENGTH_BUCKET, NEW_TOKENS_BUCKET, bucket
from hypervl_jax.vision.anyres import ImagePlan, plan_image, prompt_tokens

PROFILE_FORMAT = 2
ALPHAS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Limits on α that a budget may impose, the largest first."""

COMPRESSOR_STEP, RESIZE, ENCODER, PREFILL, DECODE = "compressor", "resize", "encoder", "prefill", "decode"
STEPS = (COMPRESSOR_STEP, RESIZE, ENCODER, PREFILL, DECODE)
"""Parts of an answer's time, in order: VRC with its proxy; resize and tiling; tower and projector; prompt; new tokens."""

Points = tuple[tuple[int, float], ...]
"""(size, milliseconds) by rising size."""


class ProfileError(ValueError):
    """A device profile that is missing or of another kind; the message says how to make one."""


@dataclasses.dataclass(frozen=True)
class DeviceProfile:
    """Median milliseconds of each part of the model on one device.

    Attributes:
        device, date, versions: where, when (ISO 8601) and with what it was measured.
        model: `model_digest` of the configuration that was measured.
        dtype: compute dtype.
        compressor: an image of the proxy's own size through proxy and VRC.
        proxy_per_megapixel: more for a larger image, per 10⁶ of its pixels.
        resize_per_megapixel: per 10⁶ pixels of the source image.
        tiling_per_tile: writing the resized pixels, per tile.
        encoder: tower and projector as they run in an answer, by branch and number of tiles.
        tower_per_tile, projector_per_tile: the parts of `encoder`, one tile through a program of its own, by branch. They say
            where time goes; predictions count with `encoder`, in which starting a program is paid once.
        prefill: by prompt length in tokens.
        decode_start: before the second token, by slots of the cache.
        decode: of one token, by slots of the cache.
    """

    device: str
    date: str
    versions: Mapping[str, str]
    model: str
    dtype: str
    compressor: float
    proxy_per_megapixel: float
    resize_per_megapixel: float
    tiling_per_tile: float
    encoder: Mapping[str, Points]
    tower_per_tile: Mapping[str, float]
    projector_per_tile: Mapping[str, float]
    prefill: Points
    decode_start: Points
    decode: Points


@dataclasses.dataclass(frozen=True)
class Workload:
    """What one answer has to do.

    Attributes:
        megapixels: of all source images, 10⁶ pixels.
        tiles: to encode.
        tokens: of the prompt, visual ones included.
        new_tokens: to generate, at most.
        compressed_images: images that pass through the VRC: all of them or none.
    """

    megapixels: float
    tiles: int
    tokens: int
    new_tokens: int
    compressed_images: int


@dataclasses.dataclass(frozen=True)
class Choice:
    """A branch, the α of each image, the milliseconds predicted for each step, and a sentence that says why."""

    branch: str
    alphas: tuple[float, ...]
    predicted_ms: Mapping[str, float]
    reason: str


def model_digest(config: HyperVLConfig) -> str:
    """A short name for a configuration, so that a profile is not used for another model."""
    return hashlib.sha256(json.dumps(to_json(config), sort_keys=True).encode()).hexdigest()[:16]


def save_profile(profile: DeviceProfile, path: str | Path) -> None:
    """Writes a profile as JSON."""
    values = {"format_version": PROFILE_FORMAT, **dataclasses.asdict(profile)}
    Path(path).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def load_profile(path: str | Path, config: HyperVLConfig) -> DeviceProfile:
    """Reads a profile. Raises `ProfileError` when there is none, or it is not one of this model."""
    command = "measure one with `python -m tools.profile_device --checkpoint DIR --output FILE`"
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        profile = _parse(values)
    except FileNotFoundError as error:
        raise ProfileError(f"no device profile at {path}; {command}") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ProfileError(f"{path} is not a device profile of this version; {command}") from error
    if profile.model != model_digest(config):
        raise ProfileError(f"the device profile {path} was measured with another model configuration; {command}")
    return profile


def _parse(values: dict[str, Any]) -> DeviceProfile:
    if values.pop("format_version") != PROFILE_FORMAT:
        raise ValueError("another format")
    for name in ("compressor", "proxy_per_megapixel", "resize_per_megapixel", "tiling_per_tile"):
        values[name] = float(values[name])
    for name in ("tower_per_tile", "projector_per_tile"):
        values[name] = {branch: float(values[name][branch]) for branch in BRANCHES}
    for name in ("prefill", "decode_start", "decode"):
        values[name] = _parse_points(values[name])
    values["encoder"] = {branch: _parse_points(values["encoder"][branch]) for branch in BRANCHES}
    return DeviceProfile(**values)


def _parse_points(pairs: Sequence[tuple[int, float]]) -> Points:
    if not pairs:
        raise ValueError("no points")
    return tuple(sorted((int(size), float(milliseconds)) for size, milliseconds in pairs))


def interpolate(points: Points, size: int) -> float:
    """Milliseconds at `size`: linear between points, the first one's below them, in proportion to the last one's above."""
    (previous_size, previous), *others = points
    if size <= previous_size:
        return previous
    for next_size, following in others:
        if size <= next_size:
            share = (size - previous_size) / (next_size - previous_size)
            return previous + share * (following - previous)
        previous_size, previous = next_size, following
    return previous * size / previous_size


def predict(profile: DeviceProfile, branch: str, work: Workload) -> dict[str, float]:
    """Milliseconds of each of `STEPS` when a request is answered alone, as a whole (a stream starts a program a token)."""
    length = bucket(work.tokens, LENGTH_BUCKET)
    slots = length + bucket(work.new_tokens, NEW_TOKENS_BUCKET)
    proxies = work.megapixels * profile.proxy_per_megapixel if work.compressed_images else 0.0
    return {
        COMPRESSOR_STEP: work.compressed_images * profile.compressor + proxies,
        RESIZE: work.megapixels * profile.resize_per_megapixel + work.tiles * profile.tiling_per_tile,
        ENCODER: interpolate(profile.encoder[branch], bucket(work.tiles)) if work.tiles else 0.0,
        PREFILL: interpolate(profile.prefill, length),
        # Prefill gives the first token.
        DECODE: interpolate(profile.decode_start, slots) + (work.new_tokens - 1) * interpolate(profile.decode, slots),
    }


def choose(
    profile: DeviceProfile,
    sizes: Sequence[tuple[int, int]],
    text_tokens: int,
    new_tokens: int,
    budget_ms: float,
    tiling: TilingConfig,
    *,
    wanted: Sequence[float],
    limits: Sequence[float] = ALPHAS,
    branches: Sequence[str] = BRANCHES,
    compressed: bool = False,
) -> Choice:
    """The largest branch, then the largest limit on α, whose predicted time fits the budget.

    The budget is the time from decoded pixels to the last of `new_tokens` tokens. When nothing fits, the cheapest is taken
    and the reason says so.

    Args:
        profile: of this device and model.
        sizes: (height, width) of each image, pixels.
        text_tokens: of the prompt without visual tokens and separators.
        new_tokens: most tokens of the answer.
        budget_ms: milliseconds.
        tiling: the model's.
        wanted: α of each image without a budget (the VRC's predictions, or what the user asked for).
        limits: candidates for the largest α; an image takes the smaller of its wanted α and the limit.
        branches: candidates, the smallest first.
        compressed: whether the VRC runs.
    """
    rejected: Choice | None = None
    for branch in reversed(branches):
        for limit in sorted(limits, reverse=True):
            alphas = tuple(min(alpha, limit) for alpha in wanted)
            work = _workload(sizes, alphas, text_tokens, new_tokens, tiling, compressed)
            choice = Choice(branch, alphas, predict(profile, branch, work), "")
            if _total(choice) <= budget_ms:
                return dataclasses.replace(choice, reason=_fitting(choice, rejected, budget_ms))
            rejected = choice
    assert rejected is not None
    return dataclasses.replace(rejected, reason=_failing(rejected, budget_ms))


def _workload(
    sizes: Sequence[tuple[int, int]],
    alphas: Sequence[float],
    text_tokens: int,
    new_tokens: int,
    tiling: TilingConfig,
    compressed: bool,
) -> Workload:
    plans: list[ImagePlan] = [plan_image(*size, alpha, tiling) for size, alpha in zip(sizes, alphas, strict=True)]
    return Workload(
        megapixels=sum(height * width for height, width in sizes) / 1e6,
        tiles=sum(plan.tiles for plan in plans),
        tokens=text_tokens + sum(prompt_tokens(plan, tiling) for plan in plans),
        new_tokens=new_tokens,
        compressed_images=len(sizes) if compressed else 0,
    )


def _total(choice: Choice) -> float:
    return sum(choice.predicted_ms.values())


def _fitting(choice: Choice, rejected: Choice | None, budget_ms: float) -> str:
    """Why a choice was made, with its numbers and those of the last candidate that did not fit."""
    sentence = (
        f"{_name(choice)} is predicted to take {_total(choice):.1f} ms ({_steps(choice)}), within {budget_ms:g} ms"
    )
    if rejected is None:
        return f"{sentence}; nothing larger is on offer"
    return f"{sentence}; {_name(rejected)}, the next larger candidate, would take {_total(rejected):.1f} ms"


def _failing(choice: Choice, budget_ms: float) -> str:
    return (
        f"nothing fits {budget_ms:g} ms; {_name(choice)}, the smallest candidate, is predicted to take "
        f"{_total(choice):.1f} ms ({_steps(choice)})"
    )


def _name(choice: Choice) -> str:
    if not choice.alphas:
        return f"branch {choice.branch}"
    return f"branch {choice.branch} at α {', '.join(f'{alpha:.2g}' for alpha in choice.alphas)}"


def _steps(choice: Choice) -> str:
    return ", ".join(f"{step} {milliseconds:.1f}" for step, milliseconds in choice.predicted_ms.items() if milliseconds)
