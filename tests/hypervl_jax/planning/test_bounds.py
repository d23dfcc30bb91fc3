"""Floors and budgets against arithmetic by hand."""

import pytest

from hypervl_jax.architecture import ConfigError
from hypervl_jax.planning.bounds import Demand, budget, floors, mfu
from hypervl_jax.planning.chips import CHIPS, topology


def test_floors_of_v5e() -> None:
    found = floors(CHIPS["v5e"], Demand(flops=197e12, hbm_bytes=819e9 / 2, ici_bytes=50e9, dcn_bytes=3.125e9 * 2))
    assert found == pytest.approx((1.0, 0.5, 0.25, 2.0))
    assert (found.limit, found.seconds) == ("dcn", pytest.approx(2.0))


def test_a_device_of_tpu7x_is_half_a_chip() -> None:
    assert floors(CHIPS["tpu7x"], Demand(flops=2307e12)).arithmetic == pytest.approx(2.0)


def test_no_bytes_between_slices_where_no_bandwidth_is_published() -> None:
    assert floors(CHIPS["v4"], Demand(1.0)).dcn == 0
    with pytest.raises(ConfigError, match="DCN"):
        floors(CHIPS["v4"], Demand(1.0, dcn_bytes=1.0))


def test_mfu_is_useful_work_over_the_peak_of_all_chips() -> None:
    assert mfu(topology("2xv5e-256"), useful_flops=512 * 197e12, seconds=4.0) == pytest.approx(0.25)


def test_budget() -> None:
    # One step of 1e6 tokens takes 2 s at half the peak; 43.2e9 tokens are 43,200 steps: a day.
    wanted = topology("v5e-256")
    found = budget(wanted, 256 * 197e12, step_tokens=1e6, total_tokens=43.2e9, mfu=0.5, price_per_chip_hour=1.2)
    assert found.step_seconds == pytest.approx(2.0)
    assert found.tokens_per_chip_second == pytest.approx(1e6 / 2 / 256)
    assert found.days == pytest.approx(1.0)
    assert found.chip_hours == pytest.approx(24 * 256)
    assert found.price == pytest.approx(24 * 256 * 1.2)


@pytest.mark.parametrize("stated", [0.0, 1.1])
def test_an_impossible_mfu_is_refused(stated: float) -> None:
    with pytest.raises(ConfigError, match="MFU"):
        budget(topology("v5e-4"), 1.0, 1.0, 1.0, stated)
