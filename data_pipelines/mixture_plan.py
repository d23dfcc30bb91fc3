"""What a mixture will read, foretold from the manifests alone: odds, epochs, how far it reaches, and how full its rows get.

manifests ─statistics─► usable tokens of each source ─shares─► odds, epochs, end
                      └► samples as the mixture would draw them ─pack_row─► token fill and tile fill for each tile budget
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from data_pipelines import mixtures
from data_pipelines.config import SPLIT, STOP, DataConfig
from data_pipelines.manifest import Manifest
from data_pipelines.packing import Budget, Sample, pack_row
from data_pipelines.statistics import LengthCell, TokenStatistics

SIMULATED_ROWS = 200
"""Rows that fills are simulated with: their standard error is then below 0.2 points."""

_EXACT = 1e-9


@dataclasses.dataclass(frozen=True)
class SourceFacts:
    """One pass over a source, as far as rows of a budget can hold it.

    Attributes:
        name: of the source.
        records: in all.
        stored_bytes: of its shards.
        pixels: of its images as stored.
        tokens: LLM positions of the records that are used; of over-long ones too where they are split.
        tiles: of the same records.
        usable: records that are used.
        too_long: records with more positions than a row.
        too_many_tiles: records whose positions fit a row but whose tiles do not.
        cells: joint histogram of the records that fit a row whole.
    """

    name: str
    records: int
    stored_bytes: int
    pixels: int
    tokens: int
    tiles: int
    usable: int
    too_long: int
    too_many_tiles: int
    cells: tuple[LengthCell, ...]

    @property
    def mean_tokens(self) -> float:
        """LLM positions of a record that is used."""
        return self.tokens / self.usable

    @property
    def mean_bytes(self) -> float:
        """Stored bytes of a record."""
        return self.stored_bytes / self.records

    @property
    def oversize_share(self) -> float:
        """The share of records that no row can hold: dropped, or split."""
        return (self.too_long + self.too_many_tiles) / self.records


def source_facts(name: str, manifest: Manifest, statistics: TokenStatistics, budget: Budget, rule: str) -> SourceFacts:
    """What rows of `budget` take of a source.

    A cell of the histogram counts as fitting when its mean length fits; for rows of 2ⁿ positions that is exact.

    Args:
        name: of the source.
        manifest: of the source.
        statistics: counted with the run's tiling.
        budget: of a row.
        rule: `data.oversize`.
    """
    long = [cell for cell in statistics.lengths if cell.tokens > budget.tokens * cell.records]
    short = [cell for cell in statistics.lengths if cell.tokens <= budget.tokens * cell.records]
    crowded = [cell for cell in short if cell.tiles > budget.tiles]
    fitting = tuple(cell for cell in short if cell.tiles <= budget.tiles and cell.tokens)
    used = [*fitting, *long, *crowded] if rule == SPLIT else fitting
    return SourceFacts(
        name=name,
        records=manifest.records,
        stored_bytes=sum(shard.bytes for shard in manifest.shards),
        pixels=statistics.pixels,
        tokens=sum(cell.tokens for cell in used),
        tiles=sum(cell.tiles * cell.records for cell in used),
        usable=sum(cell.records for cell in used),
        too_long=sum(cell.records for cell in long),
        too_many_tiles=sum(cell.records for cell in crowded),
        cells=fitting,
    )


class Exhausted(NamedTuple):
    """A source that was read as often as it may be, after `tokens` tokens of the stage."""

    name: str
    tokens: float


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a stage reads.

    Attributes:
        tokens: of each source, by its number.
        reached: tokens of the stage after which it ends: its budget, or less when the data runs out.
        exhausted: sources that reach their limit on the way, in order.
    """

    tokens: tuple[float, ...]
    reached: float
    exhausted: tuple[Exhausted, ...]


def foretell(config: DataConfig, epoch_tokens: Sequence[int], token_budget: float, step_tokens: float) -> Reading:
    """Follows the shares through a stage: from change to change, and from one source's end to the next.

    Args:
        config: shares, their changes, epoch limits and what happens at them.
        epoch_tokens: tokens of one pass over each source.
        token_budget: of the stage.
        step_tokens: tokens that a step takes, which says when changes come.
    """
    limits = config.epochs_allowed()
    left = [limit * tokens for limit, tokens in zip(limits, epoch_tokens, strict=True)]
    read, done, exhausted = [0.0] * len(left), 0.0, []
    starts, shares = zip(
        *((step * step_tokens, shares) for step, shares in config.shares_by_step().items()), strict=True
    )
    while done < token_budget * (1 - _EXACT):
        now = bisect.bisect_right(starts, done * (1 + _EXACT)) - 1
        rates = _rates(shares[now], left)
        if not rates:
            break
        until = [
            *starts[now + 1 : now + 2],
            token_budget,
            *(done + left[source] / rate for source, rate in rates.items()),
        ]
        advance = min(until) - done
        done += advance
        for source, rate in rates.items():
            read[source] += advance * rate
            left[source] -= advance * rate
        ended = [source for source in rates if left[source] <= _EXACT * (read[source] + 1)]
        for source in ended:
            left[source] = 0.0
            exhausted.append(Exhausted(config.mixture[source].name, done))
        if ended and config.over_limit == STOP:
            break
    return Reading(tuple(read), min(done, token_budget), tuple(exhausted))


def _rates(shares: Sequence[float], left: Sequence[float]) -> Mapping[int, float]:
    """Tokens that each source gives of every token read; those without a share or with nothing left give none."""
    active = {source: share for source, share in enumerate(shares) if share and left[source]}
    total = math.fsum(active.values())
    return {source: share / total for source, share in active.items()}


class Fill(NamedTuple):
    """How full the rows of a budget get, and how full they could.

    Attributes:
        tiles: slots of a row.
        token_fill: mean share of the positions that is used.
        tile_fill: mean share of the tile slots that is used.
        samples: a row.
        token_bound: what the mixture's tiles for a token allow of the positions; 1 where positions run out first.
        tile_bound: what they allow of the tile slots; 1 where tile slots run out first.
    """

    tiles: int
    token_fill: float
    tile_fill: float
    samples: float
    token_bound: float
    tile_bound: float

    def reaches(self, share: float) -> bool:
        """Whether both budgets are filled to so much of what the mixture allows, the binding one thus to so much of all."""
        return self.token_fill >= share * self.token_bound and self.tile_fill >= share * self.tile_bound


def simulate_fill(facts: Sequence[SourceFacts], shares: Sequence[float], budget: Budget, window: int) -> Fill:
    """Packs `SIMULATED_ROWS` rows of samples drawn as the mixture would draw them, by the packer that training uses.

    Lengths within a cell of the histograms are spread evenly around the cell's mean. Over-long records are left out.
    """
    samples, pending = simulated_samples(facts, shares, budget), []
    rows = [pack_row(pending, lambda: next(samples), budget, window) for _ in range(SIMULATED_ROWS)]
    tokens, tiles = (sum(getattr(sample, name) for row in rows for sample in row) for name in ("tokens", "tiles"))
    slots = max(budget.tiles, 1) * len(rows)
    filled = tokens / budget.tokens / len(rows), tiles / slots
    return Fill(budget.tiles, *filled, sum(map(len, rows)) / len(rows), *fill_bounds(facts, shares, budget))


def fill_bounds(facts: Sequence[SourceFacts], shares: Sequence[float], budget: Budget) -> tuple[float, float]:
    """`bounds_of` a mixture's tiles for a token, by the samples that fit the budget."""
    fitting = [[cell for cell in source.cells if cell.tiles <= budget.tiles] for source in facts]
    asked = [
        (share, sum(cell.tiles * cell.records for cell in cells) / sum(cell.tokens for cell in cells))
        for share, cells in zip(shares, fitting, strict=True)
        if cells
    ]
    rate = math.fsum(share * rate for share, rate in asked) / math.fsum(share for share, _ in asked)
    return bounds_of(rate, budget)


def bounds_of(tiles_for_a_token: float, budget: Budget) -> tuple[float, float]:
    """How much of a row's positions and of its tile slots can be used at most, however it is packed, as shares of both.

    Samples bring tiles and tokens in one proportion, on the mean, and the budget that runs out first ends the row.
    """
    tiles = budget.tokens * tiles_for_a_token
    return min(1.0, budget.tiles / tiles) if tiles else 1.0, min(1.0, tiles / max(budget.tiles, 1))


def simulated_samples(facts: Sequence[SourceFacts], shares: Sequence[float], budget: Budget) -> Iterator[Sample]:
    """An endless stream of samples that fit the budget, with the sources' shares of the tokens and their lengths."""
    fitting = [tuple(cell for cell in source.cells if cell.tiles <= budget.tiles) for source in facts]
    weights = [weight if cells else 0 for weight, cells in zip(mixtures.integer_weights(shares), fitting, strict=True)]
    ends = [list(itertools.accumulate(cell.records for cell in cells)) for cells in fitting]
    due, chance = [0] * len(facts), random.Random(0)
    for draw in itertools.count():
        source = mixtures.next_source(weights, due)
        cell = fitting[source][bisect.bisect_right(ends[source], chance.randrange(ends[source][-1]))]
        tokens = _length_in(cell, chance.random(), budget.tokens)
        due[source] += mixtures.stride(tokens, weights[source])
        yield Sample(source, draw, 0, 0, tokens, cell.tiles)


def _length_in(cell: LengthCell, spread: float, most: int) -> int:
    """A length within a cell, evenly spread around the cell's mean; `spread` is in 0..1."""
    mean = cell.tokens / cell.records
    return max(1, min(most, round(mean + (2 * spread - 1) * (cell.limit - mean))))


def tile_budgets(length: int, tile_limit: int, tokens_per_tile: int) -> range:
    """Tile budgets that rows of `length` positions may have: one image fits, and all tiles together do."""
    return range(tile_limit, length // tokens_per_tile + 1)


def mean_over_samples(odds: Sequence[float], values: Sequence[float]) -> float:
    """The mean over the samples of a mixture of a value that each source has."""
    return math.fsum(share * value for share, value in zip(odds, values, strict=True))
