import json
import time

import pytest

from hypervl_jax.training.telemetry.goodput import (
    ACTIVITIES,
    CHECKPOINT,
    COMPILE,
    DATA_WAIT,
    LOST,
    START,
    STEP,
    ActivityClock,
    Goodput,
    read_goodput,
)
from tests.hypervl_jax.training.telemetry.clock import Clock


def seconds(**given):
    return {name: float(given.get(name, 0)) for name in (*ACTIVITIES, LOST)}


def pass_time(clock, activity, amount):
    with clock.during(activity):
        clock.clock.now += amount


def test_every_second_belongs_to_one_activity():
    time = Clock()
    clock = ActivityClock(started=-3.0, clock=time)
    time.now = 2
    clock.switch(STEP)
    pass_time(clock, COMPILE, 10)
    time.now += 4
    with clock.during(CHECKPOINT):
        time.now += 1
        pass_time(clock, DATA_WAIT, 7)
        time.now += 1
    time.now += 0.5
    assert clock.now == (STEP, 23.0 + 2)
    expected = seconds(start=5, compile=10, step=4.5, checkpoint=2, data_wait=7)
    assert clock.totals() | {LOST: 0.0} == expected
    clock.move(3.0, DATA_WAIT, STEP)
    assert clock.totals() | {LOST: 0.0} == expected | {DATA_WAIT: 4.0, STEP: 7.5}
    assert sum(clock.totals().values()) == time.now + 3


def test_an_activity_ends_when_it_fails():
    clock = ActivityClock(clock=Clock())
    with pytest.raises(RuntimeError), clock.during(CHECKPOINT):
        raise RuntimeError
    assert clock.now[0] == START


def one_start(directory, resume, *, steps, saves, each=10.0):
    """A start of 5 s, then steps of `each` + 1 s of waiting; checkpoints take 2 s. Killed after its last record."""
    clock = ActivityClock(clock=Clock())
    goodput = Goodput(directory, clock, resume)
    pass_time(clock, START, 5)
    clock.switch(STEP)
    for step in range(resume, steps):
        if step in saves:
            pass_time(clock, CHECKPOINT, 2)
            goodput.mark(step)
        pass_time(clock, DATA_WAIT, 1)
        clock.clock.now += each
    goodput.write(force=True)
    return goodput


def test_what_is_done_again_after_a_kill_is_lost(tmp_path):
    first = one_start(tmp_path, 0, steps=9, saves=(4, 8))
    assert first.totals() == seconds(start=5, step=90, data_wait=9, checkpoint=4)
    # Checkpoint 8 was not on disk yet: the next start goes on from 4 and repeats five steps.
    second = one_start(tmp_path, 4, steps=8, saves=(4,))
    assert second.totals() == seconds(start=10, step=80, data_wait=8, checkpoint=6, lost=55)
    third = one_start(tmp_path, 8, steps=9, saves=())
    # No mark at 8 any more: the newest one before it is that of step 4.
    assert third.totals() == seconds(start=15, step=50, data_wait=5, checkpoint=6, lost=99)
    assert third.metrics()["goodput"] == pytest.approx(50 / 175)
    assert sum(third.totals().values()) == 3 * 5 + 9 * 11 + 4 * 11 + 11 + 3 * 2


def test_a_run_killed_before_its_first_checkpoint_lost_all_of_it(tmp_path):
    one_start(tmp_path, 0, steps=3, saves=())
    assert one_start(tmp_path, 0, steps=0, saves=()).totals() == seconds(start=10, lost=33)


def test_a_rewind_loses_the_steps_since_its_checkpoint(tmp_path):
    goodput = one_start(tmp_path, 0, steps=9, saves=(4, 8))
    goodput.rewind(4)
    assert goodput.totals() == seconds(start=5, step=40, data_wait=4, checkpoint=4, lost=55)
    goodput.rewind(4)
    assert goodput.totals()[LOST] == 55, "nothing was done between the two"


def test_time_between_starts_is_told_apart(tmp_path):
    one_start(tmp_path, 0, steps=1, saves=())
    path = tmp_path / "goodput.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"written": time.time() - 3600}))
    goodput = one_start(tmp_path, 0, steps=0, saves=())
    assert "over 2 start(s)" in goodput.summary()
    assert "stopped between them 1:00:00" in goodput.summary()
    assert "lost 0:00:11 (52.4%)" in goodput.summary()


def test_the_account_is_written_rarely_and_by_one_process(tmp_path):
    clock = ActivityClock(clock=Clock())
    goodput = Goodput(tmp_path, clock)
    for _ in range(31):
        clock.clock.now += 1
        goodput.write()
    assert read_goodput(tmp_path / "goodput.json")["seconds"][START] == 30
    other = Goodput(tmp_path, clock, enabled=False)
    assert other.totals() == seconds(start=31), "it knows its own start only"
    other.write(force=True)
    assert read_goodput(tmp_path / "goodput.json")["seconds"][START] == 30
