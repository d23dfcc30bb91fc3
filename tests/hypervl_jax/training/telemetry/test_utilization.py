import jax
import pytest

from hypervl_jax.architecture import PARTS, hypervl_2b
from hypervl_jax.training.batch import BatchShape
from hypervl_jax.training.consistency import ConsistencyConfig
from hypervl_jax.training.telemetry.utilization import Utilization, arms_flops, count_chips, memory_in_use

SHAPE = BatchShape(rows=8, length=4096, tiles=14)
MODEL = hypervl_2b()
WITH_TEACHER, WITHOUT = ConsistencyConfig(), ConsistencyConfig(kl_weight=0.0)


class Device:
    """What `Utilization` and `memory_in_use` ask of a device."""

    def __init__(self, number=0, kind="TPU v5 lite", stats=None, coords=(0, 0, 0)):
        self.id, self.device_kind, self.coords, self._stats = number, kind, coords, stats

    def memory_stats(self):
        return self._stats


def forward(width, layers, intermediate):
    """One forward pass, with its matrices written out: decoder, then tower and projector of the given width."""
    weights = 28 * (2048 * 128 * (16 + 8 + 8 + 16) + 3 * 2048 * 6144) + 2048 * 151_936
    decoder = 2 * weights * 8 * 4096 + 28 * 4 * (8 * 4096 * 4097 // 2) * 16 * 128
    patches = 2 * 1024 * 16 * 16 * 3 * width
    tower = patches + layers * (2 * 1024 * (4 * width**2 + 2 * width * intermediate) + 4 * 1024**2 * width)
    projector = 2 * 256 * (4 * width * 2048 + 2048**2)
    return decoder + 8 * 14 * (tower + projector), 8 * 14 * patches


def test_a_step_costs_three_forward_passes_and_the_teacher_one_more():
    """6 N D and attention (PaLM, appendix B), but for the gradient of the pixels, which nobody needs."""
    (base, base_patches), (large, large_patches) = forward(768, 12, 3072), forward(1024, 24, 4096)
    assert arms_flops(MODEL, SHAPE, WITHOUT, PARTS) == {
        "base": 3 * base - base_patches,
        "large": 3 * large - large_patches,
    }
    assert arms_flops(MODEL, SHAPE, WITH_TEACHER, PARTS) == {
        "base": 3 * base - base_patches + large,
        "large": 3 * large - large_patches,
    }


def test_mfu_follows_the_arms_that_ran():
    arms = arms_flops(MODEL, SHAPE, WITH_TEACHER, PARTS)
    utilization = Utilization(arms, [Device(number) for number in range(4)])
    expected = (3 * arms["base"] + 2 * arms["large"]) / (10.0 * 4 * 197e12)
    assert utilization.mfu({0: 3, 1: 2}, seconds=10.0) == pytest.approx(expected, rel=1e-12)
    said = utilization.describe()
    assert "decoder + active towers + projectors + teacher forward, attention included" in said
    assert "197 TFLOP/s" in said
    assert f"{arms['base'] / 1e12:.4g} TFLOP a step of base" in said


def test_without_a_known_peak_mfu_is_left_out_and_said_so():
    utilization = Utilization(arms_flops(MODEL, SHAPE, WITH_TEACHER, PARTS), jax.devices()[:1])
    assert utilization.mfu({0: 1}, 1.0) is None
    assert utilization.describe().startswith("MFU is left out: no published peak is known for devices of kind 'cpu'")


def test_two_devices_may_share_a_chip():
    assert count_chips(jax.devices()[:3]) == 3
    assert count_chips([Device(number, "TPU7x", coords=(number // 2, 0, 0)) for number in range(4)]) == 2


def test_memory_is_that_of_the_fullest_device():
    stats = [{"bytes_in_use": 5, "peak_bytes_in_use": 9, "bytes_limit": 16}, {"bytes_in_use": 7, "bytes_limit": 16}]
    found = memory_in_use([Device(stats=each) for each in stats])
    assert found == {"device_bytes/now": 7.0, "device_bytes/peak": 9.0, "device_bytes/limit": 16.0}
    assert memory_in_use([Device(), Device()]) == {}
