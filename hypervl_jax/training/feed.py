"""From a host's loaded rows to global device arrays, a few batches ahead, the data state travelling with its batch."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int32

from hypervl_jax import partitioning
from hypervl_jax.architecture import require
from hypervl_jax.training.batch import Batch, BatchLoader, LoadedBatch


class FedBatch(NamedTuple):
    """A global batch on the devices, this host's lane states after it, and the seconds the consumer waited for it."""

    batch: Batch
    lane_states: Int32[np.ndarray, "b k"]
    waited: float


def local_rows(rows: int, sharding: NamedSharding) -> tuple[int, ...]:
    """Global row numbers whose data this process must supply, in order."""
    ways = int(np.prod([sharding.mesh.shape[axis] for axis in partitioning.ROW_AXES]))
    require(
        rows % ways == 0,
        f"{rows} rows cannot be split over the {ways} row shards of the mesh {dict(sharding.mesh.shape)}",
    )
    slices = sharding.addressable_devices_indices_map((rows,)).values()
    return tuple(sorted({row for index in slices for row in range(*index[0].indices(rows))}))


def to_global(local: np.ndarray, rows: int, lanes: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    """A global array [rows, …] of which this host holds the rows `lanes`; `local[i]` is global row `lanes[i]`."""
    place = {lane: index for index, lane in enumerate(lanes)}

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        return local[[place[row] for row in range(*index[0].indices(rows))]]

    return jax.make_array_from_callback((rows, *local.shape[1:]), sharding, shard)


def to_local(array: jax.Array, lanes: tuple[int, ...]) -> np.ndarray:
    """This host's rows of a global array sharded by rows; the inverse of `to_global`."""
    found: dict[int, np.ndarray] = {}
    for piece in array.addressable_shards:
        start = piece.index[0].indices(array.shape[0])[0] if piece.index else 0
        found.update({start + offset: row for offset, row in enumerate(np.asarray(piece.data))})
    return np.stack([found[lane] for lane in lanes])


class DeviceFeed:
    """Iterates over a loader's batches as global arrays, prepared by one thread up to `depth` batches ahead.

    Errors of the loader are raised in the consumer. `close` stops the thread; it is safe to call twice.

    Raises:
        ConfigError: the loader reads other lanes than the rows whose data this process must supply.
    """

    def __init__(self, loader: BatchLoader, lane_states: np.ndarray, rows: int, mesh: Mesh, depth: int):
        self._sharding = partitioning.row_sharding(mesh)
        self._rows = rows
        self._lanes = tuple(loader.lanes)
        own = local_rows(rows, self._sharding)
        require(self._lanes == own, f"the loader reads the lanes {self._lanes}; this process feeds the rows {own}")
        self._source = loader.iterate(lane_states)
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=max(depth, 1))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="device-feed", daemon=True)
        self._thread.start()

    def _put(self, item: Any) -> None:
        while not self._stopped.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
        return None

    def _fill(self) -> None:
        try:
            for loaded in self._source:
                self._put(self._to_device(loaded))
                if self._stopped.is_set():
                    return
            self._put(StopIteration())
        except BaseException as error:
            self._put(error)

    def _to_device(self, loaded: LoadedBatch) -> tuple[Batch, np.ndarray]:
        batch = jax.tree.map(lambda x: to_global(x, self._rows, self._lanes, self._sharding), loaded.batch)
        return batch, loaded.lane_states

    def __iter__(self) -> Iterator[FedBatch]:
        return self

    def __next__(self) -> FedBatch:
        """The next batch; raises what the loader raised."""
        start = time.perf_counter()
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._put(item)
            raise item
        return FedBatch(*item, waited=time.perf_counter() - start)

    def close(self) -> None:
        """Stops the thread and the loader's workers."""
        self._stopped.set()
        self._thread.join(timeout=60)
        close = getattr(self._source, "close", None)
        if close is not None and not self._thread.is_alive():
            close()
