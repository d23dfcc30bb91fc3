import jax
import jax.numpy as jnp
import pytest

from hypervl_jax.architecture import ConfigError
from hypervl_jax.training.telemetry.profiling import StepProfiler, StepRange, missed, parse_steps
from tests.isolated import in_own_process


def test_steps_are_written_as_a_range():
    assert parse_steps("100:105") == StepRange(100, 105)


@pytest.mark.parametrize("text", ["100", "5:5", "7:3", "-1:3", "a:b", "1:2:3", ""])
def test_other_words_are_refused(text):
    with pytest.raises(ConfigError, match="write FIRST:END"):
        parse_steps(text)


@pytest.mark.parametrize(
    ("steps", "told"), [(None, False), ((0, 3), True), ((18, 20), False), ((29, 40), False), ((30, 40), True)]
)
def test_steps_that_this_start_does_not_train_are_told(steps, told):
    notice = missed(StepRange(*steps) if steps else None, 19, 30)
    assert (notice is not None) == told
    assert notice is None or "this start trains 19:30" in notice


def traces(directory):
    return sorted((directory / "profile").rglob("*.xplane.pb"))


@in_own_process
def test_the_chosen_steps_and_no_others_are_traced(tmp_path):
    profiler, step = StepProfiler(tmp_path, StepRange(2, 4)), jax.jit(lambda x: jnp.sin(x) + 1)
    x, said = jnp.ones(8), {}
    for number in range(1, 6):
        said[number] = profiler.before(number, x)
        with jax.profiler.StepTraceAnnotation("train", step_num=1000 + number):
            x = step(x)
    assert {number for number, text in said.items() if text} == {4}
    assert str(tmp_path / "profile") in said[4]
    (trace,) = traces(tmp_path)
    events = [
        dict(event.stats)
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    assert sorted(event["step_num"] for event in events) == [1002, 1003]
    assert profiler.close(x) is None


@in_own_process
def test_a_start_within_the_range_traces_the_rest_and_its_end_closes_the_trace(tmp_path):
    profiler = StepProfiler(tmp_path, StepRange(2, 10))
    assert profiler.before(7, None) is None
    assert "XProf" in profiler.close(jnp.ones(1))
    assert len(traces(tmp_path)) == 1
