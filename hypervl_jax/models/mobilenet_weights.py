"""MobileNetV3 backbones for the compressor (VRC): sizes by name and width, and weights that timm published.

timm's files hold the BatchNorm of every convolution; here it becomes the per-channel affine map of norm "affine", and the input
normalisation that the weights were trained with goes into the first convolution. Weighted pooling and MLP stay as they are.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float32
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from hypervl_jax.architecture import MOBILENET_TINY, MOBILENET_V3_LARGE, MOBILENET_V3_SMALL, CompressorConfig, require
from hypervl_jax.models.compressor import Block, blocks, round_width
from hypervl_jax.models.safetensors_files import CheckpointError

BACKBONES = {
    "tiny": (MOBILENET_TINY, 8, 64),
    "small": (MOBILENET_V3_SMALL, 16, 576),
    "large": (MOBILENET_V3_LARGE, 16, 960),
}
"""Stages, stem width and head width of each size at width 1 (arXiv 1905.02244, tables 1 and 2; "tiny" is ours)."""

IMAGENET_MEAN, IMAGENET_SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of pixels in [0, 1]: what timm's MobileNetV3 was trained with."""

BATCH_NORM_EPS = 1e-5
WEIGHTS = "model.safetensors"

Tensors = Mapping[str, Float32[np.ndarray, "..."]]


def mobilenet_config(base: CompressorConfig, backbone: str, width: float = 1.0) -> CompressorConfig:
    """`base` with another backbone; `width` multiplies every number of channels, rounded as MobileNet does.

    Raises `ConfigError` for an unknown backbone, or a width that is not positive.
    """
    require(backbone in BACKBONES, f"backbone {backbone!r} is not one of {', '.join(BACKBONES)}")
    require(width > 0, f"backbone width {width} must be positive")
    stages, stem, head = BACKBONES[backbone]
    scaled = tuple((k, round_width(e * width), round_width(w * width), *rest) for k, e, w, *rest in stages)
    return dataclasses.replace(
        base, stages=scaled, stem_width=round_width(stem * width), head_width=round_width(head * width)
    )


class _Names(NamedTuple):
    """timm's names of one bottleneck: the block, and (convolution, norm) of its three parts."""

    block: str
    expand: tuple[str, str] | None
    depthwise: tuple[str, str]
    project: tuple[str, str]


def _names(block: Block, name: str) -> _Names:
    """A block that does not expand is depthwise separable, with a numbering of its own."""
    if block.expanded == block.inputs:
        return _Names(name, None, ("conv_dw", "bn1"), ("conv_pw", "bn2"))
    return _Names(name, ("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3"))


def load_mobilenet(path: epath.PathLike, config: CompressorConfig) -> dict[str, Any]:
    """The backbone's part of a compressor's parameters (stem, bottlenecks, head) from timm's `model.safetensors`.

    At the picture's border the folded input normalisation differs a little: the padding is 0 after our normalisation instead of
    after theirs.

    Args:
        path: of the file, or of a directory that holds it.
        config: must have norm "affine", and stages of the same sizes.

    Raises:
        CheckpointError: no such file, or its tensors are not those of the configured backbone.
        ConfigError: the norm is another.
    """
    require(
        config.norm == "affine",
        f"compressor norm {config.norm!r} keeps no BatchNorm; set it to 'affine' for pretrained weights",
    )
    tensors = read_tensors(epath.Path(path))
    order = _block_names(tensors)
    expected = [*blocks(config)]
    if len(order) != len(expected) + 1:
        raise CheckpointError(
            f"{path} has {len(order) - 1} bottlenecks, the configured backbone {len(expected)}; choose another --backbone"
        )
    *names, head = order
    found = {
        "stem": _fold_input(_convolution(tensors, "conv_stem", "bn1")),
        "head": _convolution(tensors, f"{head}.conv", f"{head}.bn1"),
    }
    for number, (block, name) in enumerate(zip(expected, names, strict=True)):
        found[f"bottleneck_{number}"] = _bottleneck(tensors, block, _names(block, name))
    return found


def read_tensors(path: epath.Path) -> Tensors:
    """All tensors of a safetensors file in float32. Raises `CheckpointError`."""
    file = path / WEIGHTS if path.is_dir() else path
    try:
        return {key: np.asarray(value, np.float32) for key, value in safetensors.load(file.read_bytes()).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}); give timm's model.safetensors of a MobileNetV3"
        ) from error


def _block_names(tensors: Tensors) -> list[str]:
    """`blocks.STAGE.NUMBER`, in order."""
    found = {tuple(map(int, match.groups())) for key in tensors if (match := re.match(r"blocks\.(\d+)\.(\d+)\.", key))}
    return [f"blocks.{stage}.{number}" for stage, number in sorted(found)]


def _take(tensors: Tensors, key: str) -> Float32[np.ndarray, "..."]:
    if key not in tensors:
        raise CheckpointError(f"the weights have no {key!r}: they are not timm's of this MobileNetV3")
    return tensors[key]


def _convolution(tensors: Tensors, convolution: str, norm: str) -> dict[str, Any]:
    """A convolution, [outputs, inputs, rows, columns] to [rows, columns, inputs, outputs], and its BatchNorm as an affine map."""
    kernel = _take(tensors, f"{convolution}.weight").transpose(2, 3, 1, 0)
    weight, bias, mean, variance = (
        _take(tensors, f"{norm}.{part}") for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight / np.sqrt(variance + BATCH_NORM_EPS)
    return {"convolution": {"kernel": kernel}, "norm": {"scale": scale, "bias": bias - mean * scale}}


def _fold_input(stem: Mapping[str, Any]) -> dict[str, Any]:
    """The stem for pixels in [-1, 1]: (x + 1) / 2 is theirs in [0, 1], then ImageNet's mean and spread."""
    mean, spread = (np.array(values, np.float32)[:, None] for values in (IMAGENET_MEAN, IMAGENET_SPREAD))
    kernel, scale = stem["convolution"]["kernel"], stem["norm"]["scale"]
    shift = (kernel * ((0.5 - mean) / spread)).sum((0, 1, 2))
    bias = stem["norm"]["bias"] + scale * shift
    return {"convolution": {"kernel": kernel / (2 * spread)}, "norm": {"scale": scale, "bias": bias}}


def _bottleneck(tensors: Tensors, block: Block, names: _Names) -> dict[str, Any]:
    parts = {"expand": names.expand, "depthwise": names.depthwise, "project": names.project}
    found = {
        part: _convolution(tensors, f"{names.block}.{pair[0]}", f"{names.block}.{pair[1]}")
        for part, pair in parts.items()
        if pair is not None
    }
    if block.squeeze_excite:
        found["squeeze_excite"] = {
            ours: _linear(tensors, f"{names.block}.se.{theirs}")
            for ours, theirs in (("squeeze", "conv_reduce"), ("excite", "conv_expand"))
        }
    return found


def _linear(tensors: Tensors, name: str) -> dict[str, Any]:
    """A 1 × 1 convolution as a matrix [inputs, outputs]."""
    return {"kernel": _take(tensors, f"{name}.weight")[:, :, 0, 0].T, "bias": _take(tensors, f"{name}.bias")}


def with_backbone(params: Mapping[str, Any], backbone: Mapping[str, Any]) -> dict[str, Any]:
    """`params` of a compressor with the backbone replaced.

    Raises `CheckpointError` naming the first tensor of another shape.
    """
    for path, have, want in _pairs(backbone, params):
        if have.shape != want.shape:
            raise CheckpointError(
                f"pretrained {path} is {have.shape}, the configured backbone needs {want.shape}; choose another --backbone or --width"
            )
    return {**params, **backbone}


def _pairs(
    found: Mapping[str, Any], wanted: Mapping[str, Any], path: Sequence[str] = ()
) -> Iterator[tuple[str, Any, Any]]:
    """(path, found leaf, wanted leaf) of two trees. Raises `CheckpointError` where one lacks what the other has."""
    if path and set(found) != set(wanted):
        raise CheckpointError(
            f"pretrained {'/'.join(path)} has {sorted(found)}, the configured backbone needs {sorted(wanted)}"
        )
    for key, value in found.items():
        here = (*path, key)
        if isinstance(value, Mapping):
            yield from _pairs(value, wanted[key], here)
        else:
            yield "/".join(here), value, wanted[key]
