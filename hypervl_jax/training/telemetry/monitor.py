"""`Monitor`: what the loop tells its watchers, in one place. It reads no device outside log boundaries and changes no result."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from types import TracebackType

import jax

from hypervl_jax.architecture import require
from hypervl_jax.training.batch import BatchShape
from hypervl_jax.training.feed import DeviceFeed, FedBatch
from hypervl_jax.training.host_metrics import HostMetrics
from hypervl_jax.training.telemetry.goodput import COMPILE, DATA_WAIT, START, STEP, ActivityClock, Goodput
from hypervl_jax.training.telemetry.metrics_log import MetricsLog
from hypervl_jax.training.telemetry.profiling import StepProfiler, StepRange
from hypervl_jax.training.telemetry.progress import ProgressLine
from hypervl_jax.training.telemetry.step_times import StallAlarm, StepTime, StepTimer
from hypervl_jax.training.telemetry.utilization import Utilization, memory_in_use


@dataclasses.dataclass(frozen=True)
class MonitorConfig:
    """How one start of a run is watched. Nothing of it changes what the run computes.

    Attributes:
        started: value of `time.monotonic` when the program started; None: when the trainer was made.
        profile_steps: to trace for XProf.
        hang_seconds: without progress after which the stacks of all threads are written down; 0: never.
        stall_share: of the step time above which waiting for data is a stall.
        stall_steps: in a row that must stall before the run says so.
    """

    started: float | None = None
    profile_steps: StepRange | None = None
    hang_seconds: float = 600.0
    stall_share: float = 0.1
    stall_steps: int = 50

    def __post_init__(self) -> None:
        require(self.hang_seconds >= 0, f"hang_seconds {self.hang_seconds} must not be negative; 0 is no watchdog")
        require(0 < self.stall_share < 1, f"stall_share {self.stall_share} must lie between 0 and 1")
        require(self.stall_steps >= 1, f"stall_steps {self.stall_steps} must be positive")


class Window:
    """Sums over the steps read since the last performance line."""

    def __init__(self) -> None:
        self.arms: Counter[int] = Counter()
        self.last_step, self.seconds, self.data_wait, self.tokens, self.tiles = 0, 0.0, 0.0, 0.0, 0.0

    def add(self, step: int, values: Mapping[str, float], time: StepTime) -> None:
        """Takes one step."""
        self.last_step = step
        self.arms[int(values["arm"])] += 1
        self.seconds, self.data_wait = self.seconds + time.seconds, self.data_wait + time.data_wait
        self.tokens, self.tiles = self.tokens + values["tokens"], self.tiles + values["tiles"]

    def metrics(self, shape: BatchShape, chips: int) -> dict[str, float]:
        """Means over the window; the fills are the shares of positions and tile slots that are not padding."""
        steps, seconds = self.arms.total(), max(self.seconds, 1e-9)
        return {
            "steps": steps,
            "step_seconds": seconds / steps,
            "data_wait_share": self.data_wait / seconds,
            "tokens_per_second_per_chip": self.tokens / seconds / chips,
            "tiles_per_second_per_chip": self.tiles / seconds / chips,
            "token_fill": self.tokens / (steps * shape.rows * shape.length),
            "tile_fill": self.tiles / max(steps * shape.rows * shape.tiles, 1),
        }


class Monitor:
    """Watches one start of a run; a context manager.

    Writes, from process 0, `metrics.jsonl` (what each step computed, and its time), `performance.jsonl` (rates, MFU, memory and
    goodput over each log window), `evaluations.jsonl` and `goodput.json`; from every process its traces.

    Args:
        config: how to watch.
        workdir: of the run, on a file system.
        step: at which this start goes on.
        line: progress on the terminal.
        utilization: of the mesh.
        shape: of the global batch.
        clock: that has run since the start.
        on_step_end: called, in another thread, whenever a step has ended.
    """

    def __init__(
        self,
        config: MonitorConfig,
        workdir: os.PathLike[str],
        step: int,
        line: ProgressLine,
        utilization: Utilization,
        shape: BatchShape,
        clock: ActivityClock,
        on_step_end: Callable[[], None],
    ) -> None:
        directory, self._primary = pathlib.Path(workdir), jax.process_index() == 0
        self.metrics, self.evaluations, self.performance = (
            MetricsLog(directory, name, step, self._primary) for name in ("metrics", "evaluations", "performance")
        )
        self.line, self.clock = line, clock
        self.goodput = Goodput(directory, clock, step, self._primary)
        self._timer = StepTimer(on_step_end, clock.clock)
        self._profiler = StepProfiler(directory, config.profile_steps)
        self._alarm = StallAlarm(config.stall_share, config.stall_steps)
        self._utilization, self._shape = utilization, shape
        self._window = Window()
        self._compiled = False
        self._received, self._waited = 0.0, 0.0
        self._result: jax.Array | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Monitor:
        for watcher in (self.metrics, self.evaluations, self.performance, self.line, self._timer):
            self._stack.enter_context(watcher)
        self.line.message(self._utilization.describe())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            self._tell(self._profiler.close(self._result if error is None else None))
            self.goodput.write(force=True)
            self.line.message(self.goodput.summary())

    # ---------------------------------------------------------------- the steps

    def next_batch(self, feed: DeviceFeed) -> FedBatch:
        """Waits for the next batch; the wait for the first one belongs to the start."""
        starting = self.clock.now[0] == START
        with self.clock.during(START if starting else DATA_WAIT):
            fed = next(feed)
        self._received, self._waited = self.clock.clock(), fed.waited
        if starting:
            self._begin()
        return fed

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the call that gives a step to the devices; the first call of a start traces and compiles."""
        self._tell(self._profiler.before(number, self._result))
        compiling, self._compiled = not self._compiled, True
        with (
            self.clock.during(COMPILE if compiling else STEP),
            jax.profiler.StepTraceAnnotation("train", step_num=number),
        ):
            yield
        if compiling:
            self._begin()

    def _begin(self) -> None:
        """The time of steps, and of waiting for data, counts from here."""
        self.clock.switch(STEP)
        self._timer.resume()
        self._received, self._waited = self.clock.clock(), 0.0

    def dispatched(self, result: jax.Array) -> Future[StepTime]:
        """Takes a step that the devices have got; its time is there as soon as `result` is."""
        self._result = result
        return self._timer.dispatched(self._received, self._waited, result)

    @contextlib.contextmanager
    def pause(self, activity: str) -> Iterator[None]:
        """A checkpoint or an evaluation, with no step under way: its time does not count for rates."""
        with self.line.pause(), self.clock.during(activity):
            yield
        self._timer.resume()

    # ---------------------------------------------------------------- what was measured

    def record(self, measured: HostMetrics, tokens_seen: int) -> None:
        """Takes what a step measured, and writes its line."""
        step, values, time = measured
        self.clock.move(time.host_wait - time.data_wait, DATA_WAIT, STEP)
        self._tell(self._alarm.update(time), everywhere=True)
        self._window.add(step, values, time)
        line = {**values, "tokens_seen": tokens_seen, "seconds": time.seconds, "data_wait": time.data_wait}
        self.metrics.write(step, line)
        self.line.update(step + 1, tokens_seen, line)

    def write_performance(self, sources: Mapping[str, float]) -> None:
        """Writes the line of the steps recorded since the last one, if there are any, with figures of the sources."""
        window, self._window = self._window, Window()
        if not window.arms:
            return
        line = window.metrics(self._shape, self._utilization.chips)
        mfu = self._utilization.mfu(window.arms, window.seconds)
        if mfu is not None:
            line["mfu"] = mfu
            self.line.mfu = mfu
        line |= memory_in_use(jax.local_devices()) | self.goodput.metrics()
        line |= sources
        self.performance.write(window.last_step, line)
        self.goodput.write()

    def rewind(self, step: int) -> None:
        """Forgets `step` and everything after it; a new start-up begins."""
        for log in (self.metrics, self.evaluations, self.performance):
            log.rewind(step)
        self.goodput.rewind(step)
        self._window = Window()
        self.clock.switch(START)

    def _tell(self, text: str | None, everywhere: bool = False) -> None:
        """A message from process 0, or from whichever process has it."""
        if text and self._primary:
            self.line.message(text)
        elif text and everywhere:
            print(f"process {jax.process_index()}: {text}", file=sys.stderr, flush=True)
