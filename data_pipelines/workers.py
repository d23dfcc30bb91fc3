"""Worker processes for lanes, by Grain: each owns whole lanes, and an element is one row of each with the states after it.

Only this module imports Grain, and only a loader with workers imports this module, because Grain imports jax where it can.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import signal
import sys
import threading
import weakref
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np
from absl import flags

from data_pipelines.child_processes import end_with_parent
from data_pipelines.lanes import LaneRows
from hypervl_jax.training.batch import Batch, LoadedBatch
from hypervl_jax.vision.decoding import keep_memory

_START_MODULE = "data_pipelines.worker_start"
_STARTING = threading.Lock()

_SHARED_MEMORY_BYTES = 65_536
"""Arrays from this size on travel through shared memory; smaller ones are cheaper in the queue."""


class WorkerDied(RuntimeError):
    """A worker process ended without an error of its own, most often killed for want of memory."""


_OPEN: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()


def close_at_exit(iterator: Generator[Any, None, None]) -> Generator[Any, None, None]:
    """The same iterator, which is closed before the interpreter exits: later, its shared memory could not be freed."""
    _OPEN.add(iterator)
    return iterator


@atexit.register
def _close_open_iterators() -> None:
    for iterator in list(_OPEN):
        iterator.close()


def worker_steps(parts: Sequence[LaneRows], prefetch: int) -> Generator[list[LoadedBatch], None, None]:
    """One process for each of `parts`; gives, step by step, what each of them made. Closing the generator ends them.

    It keeps no reference to what it gives: the shared memory of a step is freed with the step.

    Args:
        parts: the lanes of each worker with their states.
        prefetch: steps that a worker prepares ahead.

    Raises:
        WorkerDied: a worker was killed; what it raises itself is raised here.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads its flags, which nothing has parsed outside an absl app
    streams = [iter(_dataset(part, prefetch)) for part in parts]
    try:
        yield _first_step(streams)
        while True:
            yield [_unflatten(next(stream)) for stream in streams]
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise WorkerDied(
            f"a data worker died ({error}); if the system ran out of memory, lower data.workers, data.prefetch or the rows of this host"
        ) from error
    finally:
        for stream in streams:
            stream.close()


def _first_step(streams: Sequence[grain.DatasetIterator]) -> list[LoadedBatch]:
    """Starts all workers at once and waits for the first element of each."""
    with _importing(_START_MODULE), ThreadPoolExecutor(len(streams)) as starters:
        return [_unflatten(element) for element in starters.map(next, streams)]


def _dataset(part: LaneRows, prefetch: int) -> grain.IterDataset:
    options = grain.experimental.DatasetOptions(min_shm_size=_SHARED_MEMORY_BYTES)
    dataset = grain.experimental.WithOptionsIterDataset(LanesDataset(part), options)
    # Grain buffers once in the process and once more in front of it.
    workers = grain.multiprocessing.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=(prefetch + 1) // 2)
    return dataset.mp_prefetch(workers, worker_init_fn=_initialise_worker)


class LanesDataset(grain.IterDataset):
    """A `LaneRows` as a Grain dataset: endless, with state."""

    def __init__(self, rows: LaneRows) -> None:
        super().__init__()
        self._rows = rows

    def __iter__(self) -> LanesIterator:
        return LanesIterator(self._rows)


class LanesIterator(grain.DatasetIterator):
    """Its elements are flat dictionaries of arrays, which travel through shared memory."""

    def __init__(self, rows: LaneRows) -> None:
        super().__init__()
        self._rows = rows.copy()

    def __next__(self) -> dict[str, np.ndarray]:
        loaded = next(self._rows)
        return {**loaded.batch._asdict(), "lane_states": loaded.lane_states}

    def get_state(self) -> dict[str, Any]:
        """The lanes' states after the rows made so far, as lists."""
        return {"lane_states": self._rows.states().tolist()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from `get_state`."""
        self._rows.set_states(np.array(state["lane_states"], np.int32))


def _unflatten(element: dict[str, np.ndarray]) -> LoadedBatch:
    return LoadedBatch(Batch(*(element[name] for name in Batch._fields)), element["lane_states"])


def _initialise_worker(index: int, count: int) -> None:
    """Runs in each worker: Ctrl-C is the main process's to handle, pictures reuse memory, and no worker outlives its parent."""
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_memory()
    end_with_parent()  # a worker that waits for room in its queue would wait for ever


@contextlib.contextmanager
def _importing(module: str) -> Iterator[None]:
    """While workers start, they import `module` instead of the main module.

    A spawned process imports the main module again. That would run a script without an `if __name__ == "__main__"` a second
    time, and would import the trainer's jax into every worker.
    """
    main = sys.modules["__main__"]
    with _STARTING:
        kept = getattr(main, "__spec__", None)
        main.__spec__ = importlib.util.find_spec(module)
        try:
            yield
        finally:
            main.__spec__ = kept
