"""Pretrained backbones in timm's layout, against the features that timm computes (`timm_reference`)."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from hypervl_jax.architecture import CompressorConfig, ConfigError, hypervl_2b
from hypervl_jax.mobilenet import BACKBONES, PLAIN, blocks, mobilenet_config
from hypervl_jax.models.compressor import Compressor, parameter_count
from hypervl_jax.models.compressor_io import abstract_compressor
from hypervl_jax.models.key_table import mobilenet_table
from hypervl_jax.models.mobilenet_weights import LEFT_OUT, WRAPPED, load_mobilenet, with_backbone
from hypervl_jax.models.safetensors_files import CheckpointError
from tests.hypervl_jax.models import timm_reference
from tests.hypervl_jax.models.timm_reference import NETWORKS, SIDE

FROZEN = timm_reference.read()
HALVES = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


def configured(name: str) -> CompressorConfig:
    """The compressor whose backbone is timm's `name`."""
    base = CompressorConfig(proxy_size=SIDE)
    return dataclasses.replace(mobilenet_config(base, *NETWORKS[name]), norm="affine")


def saved(directory: pathlib.Path, name: str, prefix: str = "", without: str = "") -> pathlib.Path:
    """timm's `name` on disk, less the tensors that hold `without` in their names."""
    tensors = timm_reference.weights(FROZEN[name][0])
    kept = {prefix + key: value for key, value in tensors.items() if not without or without not in key}
    save_file(kept, directory / "model.safetensors")
    return directory


def fresh(config: CompressorConfig) -> dict:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract_compressor(config))


def our_features(config: CompressorConfig, backbone: dict) -> np.ndarray:
    """The head's output of our network."""

    def head(params: dict, proxies: np.ndarray) -> jax.Array:
        only = lambda module, _: module.name == "head"
        _, found = Compressor(config).apply({"params": params}, proxies, capture_intermediates=only)
        return found["intermediates"]["head"]["__call__"][0]

    return np.asarray(jax.jit(head)(with_backbone(fresh(config), backbone), timm_reference.proxy()))


@pytest.mark.parametrize(
    ("name", "prefix", "settings"),
    [
        ("mobilenetv3_small_050", "", {}),
        ("mobilenetv3_large_100", WRAPPED, {"architecture": "mobilenetv3_large_100", "pretrained_cfg": {}}),
        ("mobilenetv4_conv_small_050", "", {"architecture": "mobilenetv4_conv_small_050", "pretrained_cfg": HALVES}),
        ("mobilenetv4_conv_medium", "", {}),
    ],
)
def test_features_are_timms(name: str, prefix: str, settings: dict, tmp_path: pathlib.Path) -> None:
    directory = saved(tmp_path, name, prefix)
    if settings:
        (directory / "config.json").write_text(json.dumps(settings))
    config, expected = configured(name), FROZEN[name][1]
    found, scale = our_features(config, load_mobilenet(directory, config)), np.abs(expected).max()
    np.testing.assert_allclose(found / scale, expected / scale, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.01 * scale


@pytest.mark.parametrize("name", NETWORKS)
def test_all_tensors_of_timm_have_a_place(name: str) -> None:
    shapes = FROZEN[name][0]
    places = sorted(
        {tuple(map(int, found.groups())) for key in shapes if (found := re.match(r"blocks\.(\d+)\.(\d+)\.", key))}
    )
    table = mobilenet_table(configured(name), [f"blocks.{stage}.{number}" for stage, number in places])
    assert {entry.key: list(entry.key_shape) for entry in table} == {
        key: shape for key, shape in shapes.items() if not LEFT_OUT.match(key)
    }


def test_timm_still_computes_this() -> None:
    pytest.importorskip("timm", reason="timm needs torchvision")
    found = timm_reference.compute("mobilenetv4_conv_small_050")
    shapes, features = FROZEN["mobilenetv4_conv_small_050"]
    assert json.loads(found["shapes"]) == shapes
    np.testing.assert_allclose(found["features"], features, rtol=1e-4, atol=1e-5 * np.abs(features).max())


def test_weights_of_another_backbone_are_refused(tmp_path: pathlib.Path) -> None:
    name = "mobilenetv3_small_050"
    directory, small = saved(tmp_path, name), configured(name)
    other = lambda backbone, width=1.0: dataclasses.replace(mobilenet_config(small, backbone, width), norm="affine")
    with pytest.raises(CheckpointError, match="11 bottlenecks, the configured backbone 15; choose another --backbone"):
        load_mobilenet(directory, other("large"))
    with pytest.raises(CheckpointError, match=r"has shape .* choose another --backbone or --width"):
        load_mobilenet(directory, other("small"))
    with pytest.raises(ConfigError, match="affine"):
        load_mobilenet(directory, dataclasses.replace(small, norm="group"))
    with pytest.raises(CheckpointError, match="does not exist; give timm's"):
        load_mobilenet(tmp_path / "nowhere", small)
    for network in ("tf_mobilenetv3_small_100", "mobilenetv4_hybrid_medium", "mobilenetv4_conv_aa_medium", "resnet18"):
        (directory / "config.json").write_text(json.dumps({"architecture": f"{network}.in1k"}))
        with pytest.raises(CheckpointError, match=network):
            load_mobilenet(directory, small)
    (directory / "config.json").write_text(json.dumps({"pretrained_cfg": {"mean": [0.5], "std": [0.5]}}))
    with pytest.raises(CheckpointError, match="three numbers each"):
        load_mobilenet(directory, small)
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match="conv_reduce"):
        load_mobilenet(saved(tmp_path, name, without="se.conv_reduce"), small)
    (directory / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_mobilenet(directory, small)


def test_width_multiplies_every_number_of_channels() -> None:
    full = hypervl_2b().compressor
    assert mobilenet_config(full, "small") == full
    double = mobilenet_config(full, "small", 2.0)
    assert (double.stem_width, double.head_width) == (32, 1152)
    assert [stage[1:3] for stage in double.stages[:3]] == [(32, 32), (144, 48), (176, 48)]
    sizes = [parameter_count(mobilenet_config(full, name)) for name in BACKBONES]
    assert sizes[:3] == sorted(sizes[:3])
    assert sizes[3:] == sorted(sizes[3:])
    with pytest.raises(ConfigError, match="backbone"):
        mobilenet_config(full, "huge")
    with pytest.raises(ConfigError, match="no form"):
        list(blocks(dataclasses.replace(full, stages=((3, 16, 16, False, "relu", 1, "square", 0),))))
    assert {block.form for block in blocks(mobilenet_config(full, "v4-small"))} == {PLAIN, "universal"}
