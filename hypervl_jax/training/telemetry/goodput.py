"""Where a run's time goes: every second belongs to one activity of the loop, and the account is kept over all starts.

    start        until the first batch is there: imports, joining the processes, restoring, reading ahead; going back after a spike
    compile      the first call of the step: tracing, and compiling or reading the compilation cache
    data_wait    the devices had nothing to do because no batch was ready
    step         everything else: the devices compute
    checkpoint   saving, as far as the loop waits for it
    evaluation   held-out losses, their own compilation included
    lost         steps and waits that were repeated, because a start resumed, or a rewind went back, before them

Goodput is the share of `step`. Times are those of process 0: its loop waits for the slowest host at every step.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hypervl_jax.training.telemetry.records import write_json

START, COMPILE, DATA_WAIT, STEP = "start", "compile", "data_wait", "step"
CHECKPOINT, EVALUATION, LOST = "checkpoint", "evaluation", "lost"
ACTIVITIES = (START, COMPILE, DATA_WAIT, STEP, CHECKPOINT, EVALUATION)
"""What a loop can be doing; `LOST` is a judgement made later."""

TRAINING = (STEP, DATA_WAIT)
"""Activities whose time is lost when the steps are repeated."""

GOODPUT = "goodput.json"
WRITE_SECONDS = 15.0
"""Least seconds between two writes of the account at log boundaries: a killed process loses at most these."""


class ActivityClock:
    """Adds up the seconds of each activity; there is always exactly one.

    Only the loop's thread may change the activity; any thread may read it.

    Args:
        started: clock time at which the start-up began; now when None.
        clock: seconds that only grow.
    """

    def __init__(self, started: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self._now = (START, clock() if started is None else started)

    @property
    def now(self) -> tuple[str, float]:
        """The activity, and the clock time at which it began."""
        return self._now

    def switch(self, activity: str) -> None:
        """Ends one activity and begins another."""
        (ending, since), now = self._now, self.clock()
        self._seconds[ending] += now - since
        self._now = (activity, now)

    @contextlib.contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """The activity inside the block; the one before comes back after it."""
        before = self._now[0]
        self.switch(activity)
        try:
            yield
        finally:
            self.switch(before)

    def move(self, seconds: float, origin: str, target: str) -> None:
        """Books seconds of `origin` as `target`: what a wait was is known only when the step before it has ended."""
        self._seconds[origin] -= seconds
        self._seconds[target] += seconds

    def totals(self) -> dict[str, float]:
        """Seconds of each activity up to now."""
        activity, since = self._now
        return self._seconds | {activity: self._seconds[activity] + self.clock() - since}


class Goodput:
    """The account of a run over all its starts, in `<directory>/goodput.json`.

    Args:
        directory: the run's.
        clock: of this start.
        resume_step: the step this start goes on from; training that earlier starts did beyond it was lost.
        enabled: False neither reads nor writes: processes other than 0.
    """

    def __init__(
        self, directory: pathlib.Path, clock: ActivityClock, resume_step: int = 0, enabled: bool = True
    ) -> None:
        self._path, self._clock, self._enabled = directory / GOODPUT, clock, enabled
        found = read_goodput(self._path) if enabled else {}
        self._before = {name: found.get("seconds", {}).get(name, 0.0) for name in (*ACTIVITIES, LOST)}
        self._marks: dict[int, dict[str, float]] = {int(step): mark for step, mark in found.get("marks", {}).items()}
        self._starts = found.get("starts", 0) + 1
        self._stopped = found.get("stopped_seconds", 0.0)
        if "written" in found:
            self._stopped += max(time.time() - found["written"] - sum(clock.totals().values()), 0.0)
        self._lose_after(resume_step, self._before)
        self._written = clock.clock()

    def mark(self, step: int) -> None:
        """Notes that a checkpoint keeps all training before `step`; later training is lost if a start resumes from it."""
        totals = self.totals()
        self._marks[step] = {name: totals[name] for name in TRAINING}
        self.write(force=True)

    def rewind(self, step: int) -> None:
        """Books the training since checkpoint `step` as lost."""
        self._lose_after(step, self.totals())

    def _lose_after(self, step: int, totals: Mapping[str, float]) -> None:
        """`totals` of all starts become those marked at the last checkpoint up to `step`."""
        self._marks = {marked: mark for marked, mark in self._marks.items() if marked <= step}
        kept = self._marks[max(self._marks)] if self._marks else dict.fromkeys(TRAINING, 0.0)
        for name in TRAINING:
            excess = totals[name] - kept[name]
            self._before[name] -= excess
            self._before[LOST] += excess

    def totals(self) -> dict[str, float]:
        """Seconds of each activity and of `LOST`, over all starts up to now."""
        now = self._clock.totals()
        return {name: seconds + now.get(name, 0.0) for name, seconds in self._before.items()}

    def metrics(self) -> dict[str, float]:
        """The goodput, and seconds by activity, for a metrics line."""
        totals = self.totals()
        return {"goodput": share(totals, STEP)} | {f"goodput_seconds/{name}": value for name, value in totals.items()}

    def write(self, force: bool = False) -> None:
        """Writes the account, unless it was written less than `WRITE_SECONDS` ago."""
        if not self._enabled or not (force or self._clock.clock() - self._written >= WRITE_SECONDS):
            return
        values: dict[str, Any] = {"starts": self._starts, "stopped_seconds": self._stopped, "written": time.time()}
        write_json(self._path, values | {"seconds": self.totals(), "marks": self._marks})
        self._written = self._clock.clock()

    def summary(self) -> str:
        """The whole account in one line."""
        totals = self.totals()
        parts = (f"{name.replace('_', ' ')} {_clock_time(totals[name])} ({share(totals, name):.1%})" for name in totals)
        stopped = f"; stopped between them {_clock_time(self._stopped)}" if self._starts > 1 else ""
        return f"goodput {share(totals, STEP):.1%} over {self._starts} start(s): {', '.join(parts)}{stopped}"


def read_goodput(path: pathlib.Path) -> dict[str, Any]:
    """What a `goodput.json` says; empty when there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def share(totals: Mapping[str, float], name: str) -> float:
    """Share of one activity in the time of all."""
    return totals[name] / max(sum(totals.values()), 1e-9)


def _clock_time(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
