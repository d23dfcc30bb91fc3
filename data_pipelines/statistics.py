"""Token statistics of a source: LLM positions and tiles at α = 1, in all and as a joint histogram over its records.

Mixtures turn token shares into odds with them, and plans find the tile budget that suits a row's length.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from data_pipelines.shard_index import IndexRow, ShardIndex
from hypervl_jax.architecture import TilingConfig
from hypervl_jax.vision.anyres import plan_image, prompt_tokens

_STEP_BITS = 3
"""2³ steps an octave: the limit of a histogram's cell exceeds a length by an eighth at most."""


class LengthCell(NamedTuple):
    """`records` records of `tiles` tiles each, at most `limit` positions long, with `tokens` positions in all."""

    limit: int
    tiles: int
    records: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class TokenStatistics:
    """What the records of a source take in rows, none compressed.

    Attributes:
        tiling: the AnyRes settings that it was counted with.
        tokens: LLM positions at α = 1: text, visual tokens and separators.
        tiles: at α = 1, thumbnails included.
        pixels: area of all images as stored; decoding costs by it.
        lengths: joint histogram of tokens and tiles, sorted; its `tokens` and `tiles · records` add up to the totals exactly.
    """

    tiling: TilingConfig
    tokens: int
    tiles: int
    pixels: int
    lengths: tuple[LengthCell, ...]

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> TokenStatistics:
        """The statistics that `dataclasses.asdict` wrote. Raises `ValueError`, `TypeError` or `KeyError` for anything else."""
        totals = {name: int(raw[name]) for name in ("tokens", "tiles", "pixels")}
        cells = tuple(LengthCell(*map(int, cell)) for cell in raw["lengths"])
        return cls(tiling=TilingConfig(**raw["tiling"]), lengths=cells, **totals)


class StatisticsCounter:
    """Adds records up to `TokenStatistics`."""

    def __init__(self, tiling: TilingConfig) -> None:
        self._tiling = tiling
        self._pixels = 0
        self._records: Counter[tuple[int, int]] = Counter()
        self._tokens: Counter[tuple[int, int]] = Counter()

    def add(self, sizes: Iterable[tuple[int, int]], text_length: int) -> None:
        """Counts one record: (height, width) of its images in pixels, and its text tokens."""
        sizes = list(sizes)
        plans = [plan_image(height, width, 1.0, self._tiling) for height, width in sizes]
        tokens = text_length + sum(prompt_tokens(plan, self._tiling) for plan in plans)
        cell = (length_limit(tokens), sum(plan.tiles for plan in plans))
        self._records[cell] += 1
        self._tokens[cell] += tokens
        self._pixels += sum(height * width for height, width in sizes)

    def merge(self, other: TokenStatistics) -> None:
        """Adds what another counter of the same tiling has counted. Raises `ValueError` for another tiling."""
        if other.tiling != self._tiling:
            raise ValueError(
                f"statistics of {other.tiling} cannot be added to those of {self._tiling}; count both again"
            )
        for cell in other.lengths:
            self._records[cell.limit, cell.tiles] += cell.records
            self._tokens[cell.limit, cell.tiles] += cell.tokens
        self._pixels += other.pixels

    def statistics(self) -> TokenStatistics:
        """What has been counted so far."""
        cells = sorted(self._records)
        return TokenStatistics(
            tiling=self._tiling,
            tokens=self._tokens.total(),
            tiles=sum(tiles * records for (_, tiles), records in self._records.items()),
            pixels=self._pixels,
            lengths=tuple(LengthCell(*cell, self._records[cell], self._tokens[cell]) for cell in cells),
        )


def length_limit(tokens: int) -> int:
    """The upper end of the histogram's cell that a length falls into: `tokens` rounded up to four significant bits."""
    width = 1 << max(0, tokens.bit_length() - _STEP_BITS - 1)
    return -(-tokens // width) * width


def count_rows(rows: Iterable[IndexRow], tiling: TilingConfig) -> TokenStatistics:
    """Statistics of records that are about to be written."""
    counter = StatisticsCounter(tiling)
    for row in rows:
        counter.add(zip(row.image_heights, row.image_widths, strict=True), row.text_length)
    return counter.statistics()


def measure(indexes: Iterable[ShardIndex], tiling: TilingConfig) -> TokenStatistics:
    """Statistics from the indexes of shards alone."""
    counter = StatisticsCounter(tiling)
    for index in indexes:
        for record in range(len(index)):
            counter.add(index.image_sizes(record), int(index.text_lengths[record]))
    return counter.statistics()


def merge_statistics(parts: Iterable[TokenStatistics], tiling: TilingConfig) -> TokenStatistics:
    """The sum of statistics that were counted with `tiling`."""
    counter = StatisticsCounter(tiling)
    for part in parts:
        counter.merge(part)
    return counter.statistics()
