"""Topology names and published figures. Chips per shape are those of Google's tables (cloud.google.com/tpu/docs/v5p, /v5e)."""

import importlib.util

import pytest

from hypervl_jax.architecture import ConfigError
from hypervl_jax.planning import chips
from hypervl_jax.planning.chips import CHIPS, topology

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

PUBLISHED_SHAPES = {
    "v5p-8": (2, 2, 1),
    "v5p-16": (2, 2, 2),
    "v5p-64": (2, 4, 4),
    "v5p-128": (4, 4, 4),
    "v5p-256": (4, 4, 8),
    "v5p-512": (4, 8, 8),
    "v5p-1024": (8, 8, 8),
    "v5p-4096": (8, 16, 16),
    "v5p-8192": (16, 16, 16),
    "v5p-12288": (16, 16, 24),
    "v4-1536": (8, 8, 12),
    "v5e-8": (2, 4),
    "v5e-32": (4, 8),
    "v5e-256": (16, 16),
    "v6e-128": (8, 16),
    "tpu7x-128": (4, 4, 4),
}


@pytest.mark.parametrize(("name", "shape"), PUBLISHED_SHAPES.items())
def test_names_have_googles_shapes(name: str, shape: tuple[int, ...]) -> None:
    found = topology(name)
    assert found.shape == shape
    assert found.name == name


def test_number_counts_cores_where_google_counts_cores() -> None:
    assert topology("v5p-512").chips == 256
    assert topology("v5e-256").chips == 256
    assert topology("v5p:16x16x16").chips == 4096
    assert topology("2xv5e-256").chips == 512
    assert topology("tpu7x-128").num_devices == 128


def test_unusual_shape_keeps_its_shape_in_the_name() -> None:
    assert topology("2xv5p:4x4x16").name == "2xv5p:4x4x16"
    assert topology("v5p:4x8x8").name == "v5p-512"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e-5", "no v5e slice has 5 chips"),
        ("v5p-7", "no v5p slice has 7 TensorCores"),
        ("v5e-512", "no v5e slice has 512 chips"),
        ("v9-8", "no known TPU"),
        ("v5p:4x4", "3 axes"),
        ("v5e:32x32", "256 chips"),
        ("a100-8x", "not of the form"),
        ("2xv4-512", "DCN"),
        ("0xv5e-256", "has no slice"),
    ],
)
def test_wrong_names_say_what_is_wrong(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        topology(name)


def test_peak_is_that_of_a_device() -> None:
    assert chips.peak_flops("TPU v5 lite") == 197e12
    assert chips.peak_flops("TPU v5") == 459e12
    assert chips.peak_flops("TPU7x") == 2307e12 / 2
    assert chips.peak_flops("cpu") is None


def test_published_figures_agree_with_each_other() -> None:
    # The pod pages give the peak of a whole pod of 256 chips: 50.63 (v5e) and 234.9 PFLOP/s (v6e).
    assert CHIPS["v5e"].flops * 256 == pytest.approx(50.63e15, rel=0.01)
    assert CHIPS["v6e"].flops * 256 == pytest.approx(234.9e15, rel=0.01)
    # All-reduce bandwidth of a pod: 51.2 and 102.4 TB/s.
    assert CHIPS["v5e"].ici_bandwidth * 256 == pytest.approx(51.2e12)
    assert CHIPS["v6e"].ici_bandwidth * 256 == pytest.approx(102.4e12)
    # DCN of a pod: 6.4 and 25.6 Tbit/s.
    assert CHIPS["v5e"].dcn_bandwidth * 256 * 8 == pytest.approx(6.4e12)
    assert CHIPS["v6e"].dcn_bandwidth * 256 * 8 == pytest.approx(25.6e12)


@needs_compiler
@pytest.mark.parametrize(
    ("name", "slices"), [("v5e-8", 1), ("2xv5e-4", 2), ("v4-8", 1), ("v5p-8", 1), ("2xtpu7x-8", 2)]
)
def test_compiler_describes_the_devices(name: str, slices: int) -> None:
    wanted = topology(name)
    devices = wanted.devices()
    assert len(devices) == wanted.num_devices
    assert {device.device_kind for device in devices} == {wanted.chip.kind}
    assert {chips.slice_of(device) for device in devices} == set(range(slices))
    assert chips.peak_flops(devices[0].device_kind) == wanted.chip.flops / wanted.chip.devices


def test_missing_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(chips.CompilerMissing, match=r"pip install \.\[tpu\]"):
        topology("v5e-16").devices()
