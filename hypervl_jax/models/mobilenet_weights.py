"""Published weights for the compressor's backbone: MobileNetV3 and the convolutional MobileNetV4, from files in timm's layout.

That is what the Hugging Face Hub holds under `timm/`, and what `TimmWrapper` of transformers writes. Every BatchNorm becomes the
per-channel affine map of norm "affine", and the input normalisation that the weights were trained with goes into the first
convolution. Weighted pooling and MLP stay as they are: classifier, and MobileNetV4's convolution after its pooling, are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from flax import traverse_util

from hypervl_jax.architecture import CompressorConfig, require
from hypervl_jax.mobilenet import STEM, blocks
from hypervl_jax.models.huggingface import check_keys, check_shape
from hypervl_jax.models.key_table import mobilenet_table
from hypervl_jax.models.safetensors_files import CONFIG_FILE, WEIGHTS_FILE, CheckpointError, SafetensorsReader

IMAGENET_MEAN, IMAGENET_SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of pixels in [0, 1]: what most of timm's MobileNets were trained with; `config.json` beside the weights may say others."""

BATCH_NORM_EPS = 1e-5

KNOWN = re.compile(r"mobilenet(v3_(small|large)|v4_conv_(small|medium|large))(_\d+)?")
"""timm's names of the networks that are computed as here. Others differ where no tensor shows it: padding, epsilon, filters before
strides (`tf_`, `_aa_`, `_blur_`), or have more (`hybrid`)."""

WRAPPED = "timm_model."
"""Prefix of keys in a directory that transformers wrote."""

LEFT_OUT = re.compile(r"(classifier|conv_head|norm_head)\.|.*num_batches_tracked$")


def load_mobilenet(path: epath.PathLike, config: CompressorConfig) -> dict[str, Any]:
    """The backbone's part of a compressor's parameters (stem, bottlenecks, head) from timm's `model.safetensors`.

    At the picture's border the folded input normalisation differs a little: the padding is 0 after our normalisation instead of
    after theirs.

    Args:
        path: of the file, or of a directory that holds it; a `config.json` beside it is read.
        config: must have norm "affine", and bottlenecks of the same sizes.

    Raises:
        CheckpointError: no such file, another network, or its tensors are not those of the configured backbone.
        ConfigError: the norm is another.
    """
    require(
        config.norm == "affine",
        f"compressor norm {config.norm!r} keeps no BatchNorm; set it to 'affine' for pretrained weights",
    )
    reader = open_weights(Path(path))
    check_network(reader)
    prefix = WRAPPED if any(key.startswith(WRAPPED) for key in reader.keys) else ""
    names, expected = _block_names(reader, prefix), len([*blocks(config)]) + 1
    if len(names) != expected:
        raise CheckpointError(
            f"{path} has {max(len(names) - 1, 0)} bottlenecks, the configured backbone {expected - 1}; choose another --backbone"
        )
    table = mobilenet_table(config, names, prefix)
    try:
        check_keys(reader, table, lambda key: LEFT_OUT.match(key.removeprefix(prefix)) is not None)
        for entry in table:
            check_shape(reader, entry)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; choose another --backbone or --width") from None
    whole = {entry.path: entry.read(reader, tuple(slice(None) for _ in entry.shape)) for entry in table}
    found = _folded(traverse_util.unflatten_dict(whole, sep="/"))
    return found | {STEM: _fold_input(found[STEM], *input_normalisation(reader.config))}


def open_weights(path: Path) -> SafetensorsReader:
    """A file of weights, or the one in a directory, with the `config.json` beside it where there is one. Raises `CheckpointError`."""
    file = path / WEIGHTS_FILE if path.is_dir() else path
    settings = file.with_name(CONFIG_FILE)
    try:
        config = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{settings} cannot be read: {error}") from error
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist; give timm's model.safetensors of a MobileNet")
    return SafetensorsReader(file.parent, config if isinstance(config, dict) else {}, [file])


def check_network(reader: SafetensorsReader) -> None:
    """Raises `CheckpointError` where `config.json` names a network that is not computed as here."""
    name = str(reader.config.get("architecture", "")).partition(".")[0]
    if name and not KNOWN.fullmatch(name):
        raise CheckpointError(
            f"{reader.directory} holds {name!r}; the compressor's backbone is a mobilenetv3_small or _large, or a mobilenetv4_conv_small, "
            "_medium or _large"
        )


def input_normalisation(config: Mapping[str, Any]) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and spread by channel, of pixels in [0, 1], that a network was trained with. Raises `CheckpointError`."""
    said = config.get("pretrained_cfg") or {}
    mean, spread = said.get("mean", IMAGENET_MEAN), said.get("std", IMAGENET_SPREAD)
    if len(mean) != len(IMAGENET_MEAN) or len(spread) != len(IMAGENET_SPREAD) or min(spread) <= 0:
        raise CheckpointError(f"config.json has mean {mean} and std {spread}; three numbers each are needed")
    return mean, spread


def _block_names(reader: SafetensorsReader, prefix: str) -> list[str]:
    """`blocks.STAGE.NUMBER` of bottlenecks and head, in order."""
    pattern = re.compile(re.escape(prefix) + r"blocks\.(\d+)\.(\d+)\.")
    found = {tuple(map(int, match.groups())) for key in reader.keys if (match := pattern.match(key))}
    return [f"blocks.{stage}.{number}" for stage, number in sorted(found)]


def _folded(tree: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` with every BatchNorm as an affine map."""
    if "variance" in tree:
        scale = tree["weight"] / np.sqrt(tree["variance"] + BATCH_NORM_EPS)
        return {"scale": scale, "bias": tree["bias"] - tree["mean"] * scale}
    return {name: _folded(value) if isinstance(value, Mapping) else value for name, value in tree.items()}


def _fold_input(stem: Mapping[str, Any], mean: Sequence[float], spread: Sequence[float]) -> dict[str, Any]:
    """The stem for pixels in [-1, 1]: (x + 1) / 2 is theirs in [0, 1], then their mean and spread."""
    middle, width = (np.array(values, np.float32)[:, None] for values in (mean, spread))
    kernel, scale = stem["convolution"]["kernel"], stem["norm"]["scale"]
    shift = (kernel * ((0.5 - middle) / width)).sum((0, 1, 2))
    bias = stem["norm"]["bias"] + scale * shift
    return {"convolution": {"kernel": kernel / (2 * width)}, "norm": {"scale": scale, "bias": bias}}


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
