import threading

import pytest

from hypervl_jax.training.telemetry.step_times import StallAlarm, StepTime, StepTimer
from tests.hypervl_jax.training.telemetry.clock import Clock


class Result:
    """Stands for a device array that is ready at a given time: `jax.block_until_ready` asks leaves for this method."""

    def __init__(self, clock, at):
        self._clock, self._at, self._ready = clock, at, threading.Event()

    def block_until_ready(self):
        assert self._ready.wait(10)
        self._clock.now = self._at
        return self

    def end(self):
        self._ready.set()


def timed(clock, timer, received, waited, end):
    """One step whose batch came at `received` after `waited` seconds, and whose result is there at `end`."""
    result = Result(clock, end)
    future = timer.dispatched(received, waited, result)
    result.end()
    return future.result(10)


def test_waiting_while_the_devices_are_busy_costs_nothing():
    clock, beats = Clock(), []
    with StepTimer(lambda: beats.append(clock.now), clock) as timer:
        timer.resume()
        assert timed(clock, timer, received=0, waited=0, end=10) == StepTime(10, 0, 0)
        # The host ran ahead: it asked for the batch at 1 and had it at 9, before the step before had ended.
        assert timed(clock, timer, received=9, waited=8, end=20) == StepTime(10, 0, 8)
        # It asked at 12 and waited until 26; the devices were busy until 20.
        assert timed(clock, timer, received=26, waited=14, end=36) == StepTime(16, 6, 14)
        # The host did something else until 39, then waited one second: only that one is data wait.
        assert timed(clock, timer, received=40, waited=1, end=50) == StepTime(14, 1, 1)
    assert beats == [10, 20, 36, 50]


def test_pauses_do_not_count():
    clock = Clock()
    with StepTimer(clock=clock) as timer:
        timer.resume()
        timed(clock, timer, received=0, waited=0, end=10)
        clock.now = 100
        timer.resume()
        assert timed(clock, timer, received=103, waited=3, end=110) == StepTime(10, 3, 3)


def test_a_failed_step_fails_where_its_time_is_read():
    class Failed:
        def block_until_ready(self):
            raise RuntimeError("device lost")

    with StepTimer(clock=Clock()) as timer:
        future = timer.dispatched(0, 0, Failed())
        with pytest.raises(RuntimeError, match="device lost"):
            future.result(10)


def test_the_alarm_needs_steps_in_a_row_and_is_raised_once():
    alarm = StallAlarm(share=0.1, steps=3)
    stalled, fine = StepTime(1.0, 0.11, 0.5), StepTime(1.0, 0.1, 0.9)
    said = [alarm.update(time) for time in (stalled, stalled, fine, stalled, stalled, stalled, stalled)]
    assert [bool(text) for text in said] == [False] * 5 + [True, False]
    assert "data.workers" in said[5]
