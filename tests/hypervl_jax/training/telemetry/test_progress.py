import io
import math

import pytest
import rich.console

from hypervl_jax.training.telemetry.progress import ProgressLine, Throughput, _short
from tests.hypervl_jax.training.telemetry.clock import Clock


def test_throughput_leaves_pauses_out():
    clock = Clock()
    throughput = Throughput(window=2, clock=clock)
    assert throughput.rates() == {}
    throughput.update(tokens=1000)
    clock.now = 10
    with throughput.pause():
        clock.now = 1010
    throughput.update(tokens=3000)
    assert throughput.rates() == {"tokens": 200.0}
    clock.now, totals = 1020, 4000
    throughput.update(tokens=totals)
    clock.now = 1030
    throughput.update(tokens=5000)
    assert throughput.rates() == {"tokens": 100.0}, "the window holds the last two intervals"


def test_steps_that_arrive_in_groups_do_not_distort_the_rate():
    clock = Clock()
    throughput = Throughput(window=4, clock=clock)
    for group in range(8):
        clock.now = 10.0 * group
        for step in range(50):
            clock.now += 1e-4
            throughput.update(tokens=50 * group + step + 1)
        if group == 0:
            assert throughput.rates() == {}, "a group alone says nothing about time"
    assert throughput.rates()["tokens"] == pytest.approx(5.0, rel=1e-2)


def progress(terminal, clock, **settings):
    console = rich.console.Console(file=io.StringIO(), force_terminal=terminal, width=200, color_system=None)
    return console.file, ProgressLine(100, 0, console=console, clock=clock, **settings)


def test_plain_lines_come_rarely_and_carry_the_last_loss_of_each_branch():
    clock = Clock()
    output, line = progress(False, clock)
    with line:
        for step in range(1, 41):
            clock.now += 1
            branch = ("base", "large")[step % 2]
            line.update(step, 500 * step, {f"cross_entropy/{branch}": step / 10, "cross_entropy/none": math.nan})
            if step == 2:
                line.message("held-out loss 3.0")
    printed = output.getvalue().splitlines()
    assert len(printed) == 5, "the first update, one each 15 seconds, the message, and the last state"
    assert printed[1] == "held-out loss 3.0"
    assert printed[-1] == "step 40/100 · 20k tokens · loss base 4.000 large 3.900 · 500 tokens/s · 0:01:00 left"
    line.mfu = 0.4167
    assert line.text().endswith(" · 500 tokens/s · MFU 41.7% · 0:01:00 left")


def test_a_token_budget_alone_says_where_the_run_ends():
    clock = Clock()
    _, line = progress(False, clock, token_budget=5000)
    for step in (1, 2):
        line.update(step, 1000 * step, {})
        clock.now += 1
    assert line.text() == "step 2/~5 · 2k/5k tokens · 1k tokens/s · 0:00:03 left"
    line.update(101, 1000, {})
    assert line.text().startswith("step 101/~505 · 1k/5k tokens"), "beyond the schedules too"


@pytest.mark.parametrize(
    ("tokens_a_step", "warning"),
    [
        (51, None),
        (49.5, None),
        (40, "near step 125, but the schedules are made for loop.steps 100: its last 25 steps would keep the rate"),
        (60, "near step 84, but the schedules are made for loop.steps 100: the rate would not reach its end"),
    ],
)
def test_a_budget_that_ends_elsewhere_than_the_schedules_is_told_once(tokens_a_step, warning):
    output, line = progress(False, Clock(), token_budget=5000)
    line.update(1, 5, {})
    assert "warning" not in output.getvalue(), "one step says too little"
    for step in range(10, 41):
        line.update(step, tokens_a_step * step, {})
    assert output.getvalue().count("warning: ") == (warning is not None)
    assert warning is None or warning in output.getvalue()


def test_a_terminal_gets_one_line_redrawn_in_place():
    clock = Clock()
    output, line = progress(True, clock)
    with line:
        for step in (1, 2, 3):
            clock.now += 1
            line.update(step, step, {})
    assert output.getvalue().count("\n") == 1
    assert all(f"step {step}/100" in output.getvalue() for step in (1, 2, 3))


def test_disabled_line_is_silent():
    output, line = progress(True, Clock(), enabled=False)
    with line:
        line.update(1, 1, {})
        line.message("hello")
    assert output.getvalue() == ""


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0"), (999, "999"), (12_345, "12.3k"), (999_600, "1000k"), (1_048_576, "1.05M"), (82.8e9, "82.8B")],
)
def test_counts_are_short(amount, text):
    assert _short(amount) == text
