"""Pretrained backbones: timm's layout against torch's own convolutions and BatchNorm, and against timm itself where it is there."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from hypervl_jax.architecture import CompressorConfig, ConfigError, hypervl_2b
from hypervl_jax.models.compressor import Compressor, blocks, parameter_count
from hypervl_jax.models.compressor_io import abstract_compressor
from hypervl_jax.models.mobilenet_weights import (
    IMAGENET_MEAN,
    IMAGENET_SPREAD,
    load_mobilenet,
    mobilenet_config,
    with_backbone,
)
from hypervl_jax.models.safetensors_files import CheckpointError

SMALL = dataclasses.replace(mobilenet_config(CompressorConfig(proxy_size=64), "small"), norm="affine")


def timm_tensors(config: CompressorConfig, split: tuple[int, ...] = (1, 2, 3, 2, 3)) -> dict[str, np.ndarray]:
    """Random tensors under timm's names; `split` is how many bottlenecks each of its stages has."""
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}

    def convolution(name: str, norm: str, outputs: int, inputs: int, kernel: int) -> None:
        spread = np.sqrt(2 / (inputs * kernel**2))
        tensors[f"{name}.weight"] = rng.normal(0, spread, (outputs, inputs, kernel, kernel))
        tensors[f"{norm}.weight"], tensors[f"{norm}.bias"] = rng.uniform(0.5, 1.5, outputs), rng.normal(0, 0.3, outputs)
        tensors[f"{norm}.running_mean"], tensors[f"{norm}.running_var"] = (
            rng.normal(0, 0.3, outputs),
            rng.uniform(0.5, 2, outputs),
        )

    convolution("conv_stem", "bn1", config.stem_width, 3, 3)
    names = [f"blocks.{stage}.{number}" for stage, count in enumerate(split) for number in range(count)]
    for name, block in zip(names, blocks(config), strict=True):
        separable = block.expanded == block.inputs
        if not separable:
            convolution(f"{name}.conv_pw", f"{name}.bn1", block.expanded, block.inputs, 1)
        convolution(f"{name}.conv_dw", f"{name}.bn{1 if separable else 2}", block.expanded, 1, block.kernel)
        last = ("conv_pw", "bn2") if separable else ("conv_pwl", "bn3")
        convolution(f"{name}.{last[0]}", f"{name}.{last[1]}", block.width, block.expanded, 1)
        if block.squeeze_excite:
            for part, shape in (
                ("conv_reduce", (block.squeezed, block.expanded)),
                ("conv_expand", (block.expanded, block.squeezed)),
            ):
                tensors[f"{name}.se.{part}.weight"] = rng.normal(0, 0.1, (*shape, 1, 1))
                tensors[f"{name}.se.{part}.bias"] = rng.normal(0, 0.1, shape[0])
    convolution(f"blocks.{len(split)}.0.conv", f"blocks.{len(split)}.0.bn1", config.head_width, block.width, 1)
    tensors["classifier.weight"] = rng.normal(size=(10, 8))
    return {key: value.astype(np.float32) for key, value in tensors.items()}


def features(config: CompressorConfig, tensors: dict[str, np.ndarray], pixels: torch.Tensor) -> torch.Tensor:
    """The head's output by torch, in timm's order: convolution, BatchNorm in evaluation mode, activation.

    Pictures are padded with mid-grey, which is 0 after our normalisation; theirs pads with the mean colour.
    """
    functional = torch.nn.functional
    acts = {"relu": functional.relu, "hard_swish": functional.hardswish, None: lambda x: x}
    at = lambda key: torch.from_numpy(tensors[key])

    def convolve(x, name, norm, act, stride=1, groups=1):
        x = functional.conv2d(
            x,
            at(f"{name}.weight"),
            stride=stride,
            padding=(tensors[f"{name}.weight"].shape[-1] - 1) // 2,
            groups=groups,
        )
        parts = [at(f"{norm}.{part}") for part in ("running_mean", "running_var", "weight", "bias")]
        return acts[act](functional.batch_norm(x, *parts, eps=1e-5))

    mean, spread = (torch.tensor(values)[None, :, None, None] for values in (IMAGENET_MEAN, IMAGENET_SPREAD))
    grey = functional.pad(pixels - 0.5, (1, 1, 1, 1)) + 0.5
    padded = functional.conv2d((grey - mean) / spread, at("conv_stem.weight"), stride=2)
    parts = [at(f"bn1.{part}") for part in ("running_mean", "running_var", "weight", "bias")]
    x = functional.hardswish(functional.batch_norm(padded, *parts, eps=1e-5))
    names = sorted({tuple(map(int, key.split(".")[1:3])) for key in tensors if key.startswith("blocks.")})
    for (stage, number), block in zip(names[:-1], blocks(config), strict=True):
        name, inputs, separable = f"blocks.{stage}.{number}", x, block.expanded == block.inputs
        if not separable:
            x = convolve(x, f"{name}.conv_pw", f"{name}.bn1", block.activation)
        norm = "bn1" if separable else "bn2"
        x = convolve(x, f"{name}.conv_dw", f"{name}.{norm}", block.activation, block.stride, block.expanded)
        if block.squeeze_excite:
            gate = functional.relu(
                functional.conv2d(
                    x.mean((2, 3), keepdim=True), at(f"{name}.se.conv_reduce.weight"), at(f"{name}.se.conv_reduce.bias")
                )
            )
            x = x * functional.hardsigmoid(
                functional.conv2d(gate, at(f"{name}.se.conv_expand.weight"), at(f"{name}.se.conv_expand.bias"))
            )
        last = ("conv_pw", "bn2") if separable else ("conv_pwl", "bn3")
        x = convolve(x, f"{name}.{last[0]}", f"{name}.{last[1]}", None)
        x = x + inputs if block.residual else x
    head = f"blocks.{names[-1][0]}.0"
    return convolve(x, f"{head}.conv", f"{head}.bn1", "hard_swish")


def our_features(config: CompressorConfig, backbone: dict, proxies: np.ndarray) -> np.ndarray:
    """The head's output of our network."""
    fresh = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract_compressor(config))
    params = with_backbone(fresh, backbone)
    _, found = Compressor(config).apply({"params": params}, proxies, capture_intermediates=True)
    return np.asarray(found["intermediates"]["head"]["__call__"][0])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
    directory, tensors = tmp_path_factory.mktemp("timm"), timm_tensors(SMALL)
    save_file(tensors, directory / "model.safetensors")
    return directory, tensors


def test_features_are_torchs(saved) -> None:
    directory, tensors = saved
    proxies = np.random.default_rng(1).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    pixels = torch.from_numpy(proxies.astype(np.float32) / 255).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = features(SMALL, tensors, pixels).permute(0, 2, 3, 1).numpy()
    found = our_features(SMALL, load_mobilenet(directory, SMALL), proxies)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found / scale, expected / scale, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.01 * scale


def test_timm_has_these_tensors_and_computes_these_features(tmp_path: pathlib.Path) -> None:
    timm = pytest.importorskip("timm", reason="timm needs torchvision")
    for name in ("small", "large"):
        torch.manual_seed(0)
        model = timm.create_model(f"mobilenetv3_{name}_100", pretrained=False).eval()
        tensors = {key: value.numpy() for key, value in model.state_dict().items() if "num_batches" not in key}
        save_file(tensors, tmp_path / "model.safetensors")
        config = dataclasses.replace(mobilenet_config(CompressorConfig(proxy_size=64), name), norm="affine")
        proxies = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
        grey = (
            torch.nn.functional.pad(torch.from_numpy(proxies / np.float32(255)).permute(0, 3, 1, 2) - 0.5, (1, 1, 1, 1))
            + 0.5
        )
        mean, spread = (torch.tensor(values)[None, :, None, None] for values in (IMAGENET_MEAN, IMAGENET_SPREAD))
        # timm pads with the mean colour, we with mid-grey.
        model.conv_stem.padding = (0, 0)
        with torch.no_grad():
            theirs = model.blocks(model.bn1(model.conv_stem((grey - mean) / spread))).permute(0, 2, 3, 1).numpy()
        found = our_features(config, load_mobilenet(tmp_path, config), proxies)
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(found / scale, theirs / scale, rtol=1e-4, atol=1e-5)


def test_weights_of_another_backbone_are_refused(saved, tmp_path: pathlib.Path) -> None:
    directory, tensors = saved
    with pytest.raises(CheckpointError, match="choose another --backbone"):
        load_mobilenet(directory, dataclasses.replace(mobilenet_config(SMALL, "large"), norm="affine"))
    with pytest.raises(ConfigError, match="affine"):
        load_mobilenet(directory, dataclasses.replace(SMALL, norm="group"))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_mobilenet(tmp_path, SMALL)
    wide = dataclasses.replace(mobilenet_config(SMALL, "small", 2.0), norm="affine")
    fresh = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract_compressor(wide))
    with pytest.raises(CheckpointError, match="choose another --backbone or --width"):
        with_backbone(fresh, load_mobilenet(directory, SMALL))
    save_file(
        {key: value for key, value in tensors.items() if "se.conv_reduce" not in key}, tmp_path / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match="conv_reduce"):
        load_mobilenet(tmp_path, SMALL)


def test_width_multiplies_every_number_of_channels() -> None:
    full = hypervl_2b().compressor
    assert mobilenet_config(full, "small") == full
    half = mobilenet_config(full, "small", 0.5)
    assert (half.stem_width, half.head_width) == (8, 288)
    assert [stage[2] for stage in half.stages] == [8, 16, 16, 24, 24, 24, 24, 24, 48, 48, 48]
    sizes = [parameter_count(mobilenet_config(full, name)) for name in ("tiny", "small", "large")]
    assert sizes == sorted(sizes)
    with pytest.raises(ConfigError, match="backbone"):
        mobilenet_config(full, "huge")
