"""A thread that writes down what every other thread is doing when the loop hangs."""

from __future__ import annotations

import datetime
import faulthandler
import io
import pathlib
import sys
import threading
from types import TracebackType

from hypervl_jax.training.telemetry.goodput import CHECKPOINT, COMPILE, EVALUATION, START, ActivityClock

PATIENCE = {START: 10.0, COMPILE: 10.0, CHECKPOINT: 10.0, EVALUATION: 10.0}
"""Activities that may take this many times as long as a step or a wait for data."""


class Watchdog:
    """Dumps the stacks of all threads when no step ends and the activity does not change for too long. A context manager.

    The stacks go to `<directory>/stacks-<process>.txt`, which is appended to, and to standard error; once for each hang. The run
    is left alone: whether to kill it is for whoever started it to decide.

    Args:
        directory: the run's.
        clock: what the loop is doing.
        seconds: a step or a wait for data may take; `PATIENCE` says how many times that for other activities. 0: no watchdog.
        process: number of this process.
    """

    def __init__(self, directory: pathlib.Path, clock: ActivityClock, seconds: float, process: int = 0) -> None:
        self._path = directory / f"stacks-{process}.txt"
        self._clock, self._seconds = clock, seconds
        self._beat, self._reported = clock.clock(), -1.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def beat(self) -> None:
        """A step has ended."""
        self._beat = self._clock.clock()

    def _watch(self) -> None:
        while not self._stopped.wait(min(self._seconds / 4, 5.0)):
            activity, since = self._clock.now
            alive = max(since, self._beat)
            silent = self._clock.clock() - alive
            if silent > self._seconds * PATIENCE.get(activity, 1.0) and alive != self._reported:
                self._reported = alive
                self._report(activity, silent)

    def _report(self, activity: str, silent: float) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        now = datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds")
        heading = f"{now}: no progress for {silent:.0f} s; the loop is in: {activity.replace('_', ' ')}. Stacks of all threads"
        with self._path.open("a+") as file:
            begin = file.seek(0, io.SEEK_END)
            file.write(f"{heading}:\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(begin)
            text = file.read()
        print(f"{text}(also in {self._path})", file=sys.stderr, flush=True)
