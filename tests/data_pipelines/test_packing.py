import itertools
import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.config import DataConfig, SourceShare
from data_pipelines.packing import Budget, Sample, pack_row
from hypervl_jax.architecture import TilingConfig

BUDGET = Budget(tokens=100, tiles=6)


def samples_of(costs: list[tuple[int, int]]) -> list[Sample]:
    return [Sample(0, draw, draw, 1000, tokens, tiles) for draw, (tokens, tiles) in enumerate(costs)]


def pack_all(samples: list[Sample], budget: Budget, window: int) -> list[list[Sample]]:
    remaining, pending = iter(samples), []
    return list(iter(lambda: pack_row(pending, lambda: next(remaining, None), budget, window), []))


fitting = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 6)), max_size=80)


@settings(max_examples=150, deadline=None)
@given(fitting, st.integers(1, 12))
def test_packing_invariants(costs: list[tuple[int, int]], window: int) -> None:
    samples = samples_of(costs)
    rows = pack_all(samples, BUDGET, window)
    assert all(sum(s.tokens for s in row) <= 100 and sum(s.tiles for s in row) <= 6 for row in rows)
    assert sorted(s.draw for row in rows for s in row) == list(range(len(samples)))


@settings(max_examples=100, deadline=None)
@given(fitting, st.integers(1, 12))
def test_no_sample_waits_longer_than_the_window(costs: list[tuple[int, int]], window: int) -> None:
    remaining, pending, entered = iter(samples_of(costs)), [], {}
    for row in range(len(costs)):
        packed = pack_row(pending, lambda: next(remaining, None), BUDGET, window)
        for sample in pending:
            entered.setdefault(sample.draw, row)
        assert all(row - entered.get(sample.draw, row) <= window for sample in packed)


@settings(max_examples=100, deadline=None)
@given(fitting, st.integers(1, 12))
def test_a_row_closes_only_when_nothing_in_the_window_fits(costs: list[tuple[int, int]], window: int) -> None:
    remaining, pending = iter(samples_of(costs)), []
    while row := pack_row(pending, lambda: next(remaining, None), BUDGET, window):
        tokens, tiles = 100 - sum(s.tokens for s in row), 6 - sum(s.tiles for s in row)
        assert not any(s.tokens <= tokens and s.tiles <= tiles for s in pending)


def test_the_fullest_row_with_the_oldest_sample() -> None:
    # After 50 tokens, 20 + 30 fill the row; the largest that fits, 40, would leave it open.
    rows = pack_all(samples_of([(50, 0), (20, 0), (40, 0), (30, 0), (10, 6), (5, 0)]), BUDGET, 6)
    assert [[s.draw for s in row] for row in rows] == [[0, 1, 3], [2, 4, 5]]


def test_of_equally_full_rows_the_one_with_older_samples() -> None:
    rows = pack_all(samples_of([(60, 0), (40, 0), (25, 0), (15, 0), (40, 0)]), BUDGET, 5)
    assert [[s.draw for s in row] for row in rows] == [[0, 1], [2, 3, 4]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=9))
def test_no_choice_from_the_window_fills_a_row_better(costs: list[tuple[int, int]]) -> None:
    """Against all subsets, one by one."""
    samples, budget = samples_of(costs), Budget(60, 4)
    row = pack_all(samples, budget, window=20)[0]
    choices = (
        (samples[0], *others) for size in range(len(samples)) for others in itertools.combinations(samples[1:], size)
    )
    sums = [(sum(s.tokens for s in choice), sum(s.tiles for s in choice)) for choice in choices]
    fullest = max((tokens, tiles) for tokens, tiles in sums if tokens <= 60 and tiles <= 4)
    assert sum(s.tokens for s in row) == fullest[0]
    assert sum(s.tiles for s in row) == fullest[1] or fullest[0] == 60


def test_short_samples_fill_a_row_that_the_window_could_not() -> None:
    rows = pack_all(samples_of([(3, 0)] * 100), BUDGET, 4)
    assert [len(row) for row in rows] == [33, 33, 33, 1]


def test_a_sample_of_exactly_the_budget_fits_alone() -> None:
    assert BUDGET.holds(samples_of([(100, 6)])[0])
    assert not any(map(BUDGET.holds, samples_of([(101, 0), (1, 7), (0, 0)])))


def test_text_only_rows_without_tile_slots() -> None:
    rows = pack_all(samples_of([(60, 0), (50, 0), (40, 0)]), Budget(100, 0), 3)
    assert [[s.draw for s in row] for row in rows] == [[0, 2], [1]]


@pytest.mark.parametrize(("window", "fill"), [(8, 0.95), (32, 0.99)])
def test_fill_on_a_long_tail(window: int, fill: float, record_property: Callable[[str, object], None]) -> None:
    lengths = random.Random(0)
    costs = [(min(4096, int(40 * lengths.paretovariate(0.9))), lengths.choice((0, 0, 1, 1, 2, 4))) for _ in range(4000)]
    budget = Budget(4096, 16)
    rows = pack_all(samples_of(costs), budget, window)[:-5]
    filled = [max(sum(s.tokens for s in row) / 4096, sum(s.tiles for s in row) / 16) for row in rows]
    record_property("fill", sum(filled) / len(filled))
    assert sum(filled) / len(filled) > fill


class LongTail(NamedTuple):
    """Nine short captions with one or two tiles to one document with many; text lengths in tokens."""

    length: int
    most_tiles: int

    def samples(self, count: int) -> list[Sample]:
        chance, costs = random.Random(self.length), []
        for _ in range(count):
            short = chance.random() < 0.9
            tiles = chance.choice((1, 2)) if short else chance.randint(6, self.most_tiles)
            text = chance.randint(30, 200) if short else chance.randint(200, 1000)
            costs.append((256 * tiles + text, tiles))
        return samples_of(costs)


@pytest.mark.parametrize(
    ("tail", "tiles"),
    [(LongTail(4096, 12), tiles) for tiles in (12, 13, 14)] + [(LongTail(8192, 16), tiles) for tiles in (24, 25, 26)],
)
def test_rows_of_a_long_tail_are_full_and_nothing_that_fits_is_lost(
    tail: LongTail, tiles: int, record_property: Callable[[str, object], None]
) -> None:
    """The budget that runs out first is filled to 0.97, the other one to 0.97 of what the mixture then leaves for it."""
    budget, samples = Budget(tail.length, tiles), tail.samples(3_000)
    fitting = [sample for sample in samples if budget.holds(sample)]
    rows = pack_all(fitting, budget, DataConfig("", (SourceShare("s", 1.0),), 0).window)
    assert sorted(s.draw for row in rows for s in row) == [s.draw for s in fitting]
    assert tiles >= TilingConfig().tile_limit
    assert len(fitting) == len(samples) or tail.length == 4096
    full = rows[:-10]
    tokens, used_tiles = (
        sum(getattr(s, name) for row in full for s in row) / len(full) for name in ("tokens", "tiles")
    )
    token_fill, tile_fill = tokens / tail.length, used_tiles / tiles
    tiles_for_a_token = sum(s.tiles for s in fitting) / sum(s.tokens for s in fitting)
    asked = tiles_for_a_token * tail.length / tiles  # tile slots asked for by positions, were both to run out together
    most_tokens, most_tiles = min(1, 1 / asked), min(1, asked)
    record_property("fills", (token_fill, tile_fill))
    record_property("bounds", (most_tokens, most_tiles))
    assert max(most_tokens, most_tiles) == 1
    assert token_fill >= 0.97 * most_tokens
    assert tile_fill >= 0.97 * most_tiles
