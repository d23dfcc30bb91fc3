"""Batch: the one contract between data and learning. All shapes are static; the leading axis is rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from hypervl_jax.architecture import TilingConfig, require

TEXT_POSITION = -1


class Batch(NamedTuple):
    """Packed rows. Axes: b rows, l tokens, t tiles, s tile side in pixels.

    A row holds several samples ("segments", numbered from 1 in the row). `positions` restart in each sample. `targets` are the
    next ids; a sample's last position has loss weight 0. `visual_index` says which visual token of the row stands at a
    position (tile number * tokens per tile + cell), -1 for text.
    """

    tokens: Int32[Any, "b l"]
    targets: Int32[Any, "b l"]
    loss_weights: Float32[Any, "b l"]
    segments: Int32[Any, "b l"]
    positions: Int32[Any, "b l"]
    tiles: UInt8[Any, "b t s s 3"]
    tile_segments: Int32[Any, "b t"]
    visual_index: Int32[Any, "b l"]
    sources: Int32[Any, "b l"]


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """Static sizes of a global batch: `rows` × `length` tokens with `tiles` tile slots a row."""

    rows: int
    length: int
    tiles: int

    def __post_init__(self) -> None:
        require(
            min(self.rows, self.length) >= 1 and self.tiles >= 0,
            f"batch rows {self.rows} and length {self.length} must be positive, tiles {self.tiles} not negative",
        )

    def validate_with(self, tiling: TilingConfig) -> None:
        """Raises `ConfigError` unless tiles fit the tokens of a row and one image fits the tiles, or there are none: text alone."""
        visual = self.tiles * tiling.tokens_per_tile
        require(
            visual <= self.length,
            f"{self.tiles} tiles of {tiling.tokens_per_tile} tokens are {visual} tokens: more than the row's {self.length}; lower batch.tiles or raise batch.length",
        )
        require(
            self.tiles == 0 or self.tiles >= tiling.tile_limit,
            f"batch.tiles {self.tiles} is below the {tiling.tile_limit} tiles one image may take (tiling.max_tiles); such an image would never fit "
            "a row; 0 is for text alone",
        )

    def array_shapes(self, tile_size: int) -> Batch:
        """(shape, dtype) of each field, as a Batch."""
        row = (self.rows, self.length)
        integers, reals = (row, np.dtype(np.int32)), (row, np.dtype(np.float32))
        tiles = ((self.rows, self.tiles, tile_size, tile_size, 3), np.dtype(np.uint8))
        return Batch(
            integers,
            integers,
            reals,
            integers,
            integers,
            tiles,
            ((self.rows, self.tiles), np.dtype(np.int32)),
            integers,
            integers,
        )


def empty_batch(shape: BatchShape, tile_size: int) -> Batch:
    """A batch of padding rows in host memory."""
    return unfilled_batch(shape, tile_size)._replace(tiles=np.zeros(*shape.array_shapes(tile_size).tiles))


def unfilled_batch(shape: BatchShape, tile_size: int) -> Batch:
    """`empty_batch`, but its tiles hold anything: for one who writes them all, since clearing them first takes time."""
    shapes = shape.array_shapes(tile_size)
    cleared = Batch(*(np.zeros(size, dtype) for size, dtype in shapes._replace(tiles=((0,), np.uint8))))
    cleared.visual_index.fill(TEXT_POSITION)
    return cleared._replace(tiles=np.empty(*shapes.tiles))


class LoadedBatch(NamedTuple):
    """One host's rows of a global batch, and the lanes' state after them.

    `lane_states` int32 [rows of this host, k] is what `BatchLoader.restore` takes: the state as of this batch consumed.
    """

    batch: Batch
    lane_states: Int32[np.ndarray, "b k"]


class BatchLoader(Protocol):
    """What training asks of a data loader; `data_pipelines.lanes.LaneLoader` is the one we ship.

    Row i of every global batch comes from lane i. `lane_states` of all hosts, stacked by lane, restore on any host count.
    """

    lanes: tuple[int, ...]
    state_size: int

    def initial_states(self) -> Int32[np.ndarray, "b k"]:
        """State of this host's lanes before the first batch."""

    def iterate(self, lane_states: Int32[np.ndarray, "b k"]) -> Iterator[LoadedBatch]:
        """Batches of this host's lanes, from the given states on; endless unless a source stops."""
