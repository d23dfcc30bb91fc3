import threading
import time

import pytest

from hypervl_jax.training.telemetry.goodput import COMPILE, DATA_WAIT, STEP, ActivityClock
from hypervl_jax.training.telemetry.watchdog import Watchdog


def wait_until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_a_hang_is_written_down_once_with_all_stacks(tmp_path, capfd):
    path, release = tmp_path / "stacks-3.txt", threading.Event()

    def stuck_in_a_helper_thread():
        release.wait(30)

    helper = threading.Thread(target=stuck_in_a_helper_thread)
    helper.start()
    clock = ActivityClock()
    with Watchdog(tmp_path, clock, seconds=0.2, process=3):
        clock.switch(DATA_WAIT)
        assert wait_until(path.exists)
        time.sleep(0.5)
    release.set()
    helper.join()
    text = path.read_text()
    assert text.count("the loop is in: data wait") == 1
    assert "stuck_in_a_helper_thread" in text
    assert "test_a_hang_is_written_down_once_with_all_stacks" in text
    assert "stuck_in_a_helper_thread" in capfd.readouterr().err


def test_a_second_hang_is_written_down_too(tmp_path):
    path, clock = tmp_path / "stacks-0.txt", ActivityClock()
    clock.switch(STEP)
    with Watchdog(tmp_path, clock, seconds=0.2) as watchdog:
        assert wait_until(path.exists)
        watchdog.beat()
        assert wait_until(lambda: path.read_text().count("the loop is in: step") == 2)


@pytest.mark.parametrize("limit", [1.0, 0.0])
def test_steps_that_end_and_patient_activities_are_left_alone(tmp_path, limit):
    clock = ActivityClock()
    with Watchdog(tmp_path, clock, seconds=limit) as watchdog:
        clock.switch(COMPILE)
        time.sleep(1.3)
        clock.switch(STEP)
        for _ in range(26):
            watchdog.beat()
            time.sleep(0.05)
    assert not (tmp_path / "stacks-0.txt").exists()


def test_compilation_has_a_limit_of_its_own(tmp_path):
    clock = ActivityClock()
    clock.switch(COMPILE)
    with Watchdog(tmp_path, clock, seconds=0.05):
        assert wait_until((tmp_path / "stacks-0.txt").exists)
    assert clock.clock() - clock.now[1] > 0.5
