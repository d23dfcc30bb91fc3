"""How long each step takes and how long the devices wait for its batch, measured without making the loop wait for a device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

import jax


class StepTime(NamedTuple):
    """Seconds of one step.

    Attributes:
        seconds: from the end of the step before to the end of this one; after a pause (start, compilation, checkpoint, evaluation), from
            the end of the pause.
        data_wait: those of them in which the devices had nothing to do because the batch was not there.
        host_wait: that the loop waited for the batch.
    """

    seconds: float
    data_wait: float
    host_wait: float


class StepTimer:
    """Measures steps in a thread that waits for their results; the loop runs ahead of the devices undisturbed. A context manager.

    What the host waited says little by itself: while the devices are still busy with earlier steps, waiting costs nothing. Only
    the part of it after the end of the step before is `data_wait`.

    Args:
        on_end: called in the thread whenever a step has ended.
        clock: seconds that only grow.
    """

    def __init__(self, on_end: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.monotonic) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="step-times")
        self._on_end, self._clock = on_end, clock
        self._ended = self._resumed = -math.inf

    def __enter__(self) -> StepTimer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def resume(self) -> None:
        """A pause ends now; no step may be under way."""
        self._resumed = self._clock()

    def dispatched(self, received: float, waited: float, result: jax.Array) -> Future[StepTime]:
        """Takes a step that has just been given to the devices.

        Args:
            received: clock time at which its batch was there.
            waited: seconds the loop had waited for the batch.
            result: any array that is ready when the step has ended and is not donated to the next.
        """
        return self._executor.submit(self._measure, received, waited, self._resumed, result)

    def _measure(self, received: float, waited: float, resumed: float, result: jax.Array) -> StepTime:
        jax.block_until_ready(result)
        end, begin = self._clock(), max(self._ended, resumed)
        self._ended = end
        self._on_end()
        return StepTime(end - begin, max(received - max(begin, received - waited), 0.0), waited)


class StallAlarm:
    """Says once that the devices wait for data.

    Args:
        share: of a step's time above which waiting for its batch is a stall.
        steps: in a row that must stall.
    """

    def __init__(self, share: float = 0.1, steps: int = 50) -> None:
        self._share, self._steps = share, steps
        self._in_a_row, self._raised = 0, False

    def update(self, time: StepTime) -> str | None:
        """Takes the next step; returns the warning when it is due."""
        stalled = time.data_wait > self._share * time.seconds
        self._in_a_row = self._in_a_row + 1 if stalled else 0
        if self._raised or self._in_a_row < self._steps:
            return None
        self._raised = True
        return (
            f"the devices wait for data: over {self._share:.0%} of the step time for {self._steps} steps in a row, at last "
            f"{time.data_wait:.3g} of {time.seconds:.3g} s. Raise data.workers (processes that decode), then data.prefetch and "
            "loop.prefetch (batches ahead); if the workers are not busy, the storage of data.root is too slow. Said once"
        )
