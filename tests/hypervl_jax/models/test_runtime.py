"""Refusals of impossible runtime settings, and the choice of the attention kernel."""

import logging

import pytest

from hypervl_jax.architecture import ConfigError
from hypervl_jax.models.runtime import RuntimeConfig, resolve_kernels


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "float16"}, "dtype 'float16' is not one of bfloat16, float32"),
        ({"attention": "flash"}, "attention 'flash'"),
        ({"decoder_remat": "tile"}, "decoder_remat 'tile'"),
        ({"tower_remat": "full"}, "tower_remat 'full'"),
        ({"tile_chunk": 0}, "tile_chunk 0 must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        RuntimeConfig(**values)


@pytest.mark.parametrize(
    ("asked", "platform", "kernel"),
    [
        ("auto", "tpu", "splash"),
        ("auto", "cpu", "xla"),
        ("auto", "gpu", "xla"),
        ("xla", "tpu", "xla"),
        ("splash", "tpu", "splash"),
    ],
)
def test_the_kernel_follows_the_platform_of_the_devices(asked, platform, kernel, caplog):
    with caplog.at_level(logging.INFO, logger="hypervl_jax"):
        assert resolve_kernels(RuntimeConfig(attention=asked), platform) == RuntimeConfig(attention=kernel)
    assert f"attention kernel {kernel}: " in caplog.text


def test_splash_is_refused_where_it_cannot_run():
    with pytest.raises(ConfigError, match="'splash' runs on TPU only and these devices are 'cpu'"):
        resolve_kernels(RuntimeConfig(attention="splash"), "cpu")
