"""The vision tower against `transformers`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from hypervl_jax.architecture import VisionConfig, siglip2
from hypervl_jax.models import huggingface
from hypervl_jax.models.runtime import RuntimeConfig
from hypervl_jax.models.siglip2 import VisionTower, resample_positions
from tests.references import vision_values

RUNTIME = RuntimeConfig(dtype="float32")
SHAPES = {
    "small": VisionConfig(32, 48, 2, 4, patch_size=8, image_size=32),
    "odd": VisionConfig(30, 44, 3, 5, patch_size=7, image_size=21),
    "one layer": VisionConfig(24, 40, 1, 2, patch_size=4, image_size=16),
}


def reference_model(config: VisionConfig, spread: float | None = 0.15) -> SiglipVisionModel:
    """A `transformers` tower of the same shape, pooling head included; every weight is random unless `spread` is None."""
    torch.manual_seed(0)
    model = SiglipVisionModel(SiglipVisionConfig(**vision_values(config))).eval()
    for name, parameter in model.named_parameters() if spread else ():
        is_scale = "norm" in name and name.endswith("weight")
        parameter.data.normal_(1.0 if is_scale else 0.0, spread)
    return model


def tiles_of(config: VisionConfig, count: int) -> np.ndarray:
    shape = (count, config.image_size, config.image_size, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def reference_features(model: SiglipVisionModel, tiles: np.ndarray) -> np.ndarray:
    pixels = torch.tensor(tiles).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        return model(pixels).last_hidden_state.numpy()


def our_features(config: VisionConfig, params: dict, tiles: np.ndarray, runtime: RuntimeConfig = RUNTIME) -> np.ndarray:
    tower = VisionTower(config, runtime)
    return np.asarray(jax.jit(lambda params, tiles: tower.apply({"params": params}, tiles))(params, tiles))


@pytest.mark.parametrize("name", SHAPES)
def test_hidden_states_equal_transformers_both_ways(name, tmp_path):
    config = SHAPES[name]
    reference = reference_model(config)
    reference.save_pretrained(tmp_path / "theirs")
    params, report = huggingface.load_vision(tmp_path / "theirs", config)
    assert sum(x.size for x in jax.tree.leaves(params)) == config.parameter_count()
    assert report.left_out
    assert all(key.startswith("head.") for key in report.left_out)
    tiles = tiles_of(config, 3)
    expected = reference_features(reference, tiles)
    np.testing.assert_allclose(our_features(config, params, tiles), expected, atol=1e-4, rtol=1e-4)

    huggingface.save_vision(params, config, tmp_path / "ours")
    back = SiglipVisionModel.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_allclose(reference_features(back, tiles), expected, atol=1e-5)


@pytest.mark.parametrize("remat", ["layer", "none"])
def test_rematerialisation_changes_nothing(remat, tmp_path):
    config = SHAPES["small"]
    reference_model(config).save_pretrained(tmp_path)
    params, _ = huggingface.load_vision(tmp_path, config)
    tiles = tiles_of(config, 2)
    runtime = dataclasses.replace(RUNTIME, tower_remat=remat)
    np.testing.assert_allclose(
        our_features(config, params, tiles, runtime), our_features(config, params, tiles), atol=1e-6
    )


@pytest.mark.parametrize("side", [8, 16, 5, 32, 17])
def test_resampled_positions_equal_torch_interpolation(side):
    weights = np.random.default_rng(0).normal(size=(16 * 16, 6)).astype(np.float32)
    grid = torch.tensor(weights).reshape(1, 16, 16, 6).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, (side, side), mode="bilinear", align_corners=False, antialias=True)
    ours = resample_positions(jnp.asarray(weights), side)
    np.testing.assert_allclose(ours, expected[0].permute(1, 2, 0).reshape(side * side, 6), atol=1e-5)
    if side == 16:
        np.testing.assert_array_equal(ours, weights)


def test_a_tile_of_another_size_is_refused():
    config = SHAPES["small"]
    with pytest.raises(ValueError, match="takes uint8 tiles"):
        jax.eval_shape(VisionTower(config, RUNTIME).init, jax.random.key(0), jnp.zeros((1, 40, 32, 3), jnp.uint8))


def test_flops_equal_the_compilers_count():
    config = VisionConfig(384, 1024, 1, 2, patch_size=16, image_size=128)
    tower = VisionTower(config, RuntimeConfig(dtype="float32", tower_remat="none"))
    tiles = jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.uint8)
    variables = jax.eval_shape(tower.init, jax.random.key(0), tiles)
    counted = jax.jit(tower.apply).lower(variables, tiles).compile().cost_analysis()["flops"]
    assert config.forward_flops() == pytest.approx(counted, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["siglip2-base-patch16-512", "siglip2-large-patch16-512"])
def test_real_towers_equal_transformers(name, tmp_path):
    config = siglip2(name)
    reference = reference_model(config, spread=None)
    reference.save_pretrained(tmp_path)
    params, _ = huggingface.load_vision(tmp_path, config)
    tiles = tiles_of(config, 1)
    np.testing.assert_allclose(
        our_features(config, params, tiles), reference_features(reference, tiles), atol=1e-4, rtol=1e-4
    )
