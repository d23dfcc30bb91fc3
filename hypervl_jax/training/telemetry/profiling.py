"""XProf traces of chosen steps."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

import jax

from hypervl_jax.architecture import ConfigError

PROFILE = "profile"


class StepRange(NamedTuple):
    """Steps `first` to `end` - 1."""

    first: int
    end: int


def parse_steps(text: str) -> StepRange:
    """The steps 100 to 104 from "100:105". Raises `ConfigError` on anything that is not such a range."""
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise ConfigError(f"steps {text!r} are not a range; write FIRST:END, e.g. 100:105 for the steps 100 to 104")
    return StepRange(int(first), int(end))


def missed(steps: StepRange | None, begin: int, end: int) -> str | None:
    """What to tell the user when a start that trains the steps `begin` to `end` - 1 traces none of those asked for."""
    if steps is None or (steps.first < end and begin < steps.end):
        return None
    return f"nothing will be traced: steps {steps.first}:{steps.end} were asked for, this start trains {begin}:{end}"


class StepProfiler:
    """Traces the chosen steps of this process into `<directory>/profile`, and only those: the devices are drained at both ends.

    A start that resumes within the range traces the rest of it.

    Args:
        directory: the run's.
        steps: to trace; None: nothing.
    """

    def __init__(self, directory: pathlib.Path, steps: StepRange | None) -> None:
        self.directory = directory / PROFILE
        self._steps = steps
        self._tracing = False

    def before(self, step: int, previous: jax.Array | None) -> str | None:
        """Begins or ends the trace when it is time; returns what to tell the user when it has ended.

        Args:
            step: about to be given to the devices.
            previous: a result of the step before; None when there is none under way.
        """
        if self._steps is None:
            return None
        if self._tracing and step >= self._steps.end:
            return self.close(previous)
        if not self._tracing and self._steps.first <= step < self._steps.end:
            jax.block_until_ready(previous)
            jax.profiler.start_trace(self.directory)
            self._tracing = True
        return None

    def close(self, previous: jax.Array | None) -> str | None:
        """Ends a trace that is under way."""
        if not self._tracing:
            return None
        jax.block_until_ready(previous)
        jax.profiler.stop_trace()
        self._tracing = False
        return f"XProf trace in {self.directory}; look at it with `xprof --logdir {self.directory}` or TensorBoard"
