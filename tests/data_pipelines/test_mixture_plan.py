import dataclasses
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from data_pipelines import mixture_plan
from data_pipelines.config import DataConfig, EpochLimit, ShareChange, SourceShare
from data_pipelines.manifest import Manifest, ShardEntry
from data_pipelines.mixture_plan import Exhausted, fill_bounds, foretell, simulate_fill, simulated_samples, source_facts
from data_pipelines.packing import Budget
from data_pipelines.statistics import LengthCell, StatisticsCounter
from hypervl_jax.architecture import TilingConfig

TILING = TilingConfig(64, 8, 2, 4)
BUDGET = Budget(256, 8)


def facts(name: str, records: list[tuple[list[tuple[int, int]], int]], rule: str = "split") -> mixture_plan.SourceFacts:
    """Of records given as (sizes of images, text length)."""
    counter = StatisticsCounter(TILING)
    for sizes, text in records:
        counter.add(sizes, text)
    shards = (ShardEntry("shard-00000-of-00001.array_record", len(records), 1000, "", ""),)
    manifest = Manifest(name, "CC0-1.0", "", "", shards, len(records), 0, 0, {})
    return source_facts(name, manifest, counter.statistics(), BUDGET, rule)


def mixture(**changes: object) -> DataConfig:
    sources = (SourceShare("a", 2.0), SourceShare("b", 1.0), SourceShare("c", 1.0))
    return DataConfig(**{"root": "", "mixture": sources, "seed": 0, **changes})


def test_facts_tell_what_rows_hold() -> None:
    records = [([(64, 64)], 10), ([], 200), ([], 300), ([(128, 128)] * 3, 10)]
    split, drop = (facts("s", records, rule) for rule in ("split", "drop"))
    assert (split.records, split.too_long, split.too_many_tiles, split.oversize_share) == (4, 1, 1, 0.5)
    assert (drop.usable, drop.tokens, drop.tiles) == (2, 26 + 200, 1)
    assert (split.usable, split.tokens, split.tiles) == (4, 26 + 200 + 300 + 202, 13)
    assert drop.mean_tokens == 113
    assert drop.mean_bytes == 250


def test_without_limits_each_source_gives_its_share() -> None:
    reading = foretell(mixture(), [10, 10, 10], token_budget=1000, step_tokens=10)
    assert reading.tokens == pytest.approx((500, 250, 250))
    assert reading.reached == 1000
    assert reading.exhausted == ()


def test_a_run_that_stops_ends_with_its_first_source() -> None:
    limited = mixture(epoch_limits=(EpochLimit("b", 2.0),))
    reading = foretell(limited, [10, 50, 10], token_budget=1000, step_tokens=10)
    assert reading.reached == pytest.approx(400)
    assert reading.exhausted == (Exhausted("b", pytest.approx(400)),)
    assert reading.tokens == pytest.approx((200, 100, 100))


def test_a_run_that_reweights_goes_on_to_the_end_of_all_sources() -> None:
    limited = mixture(epoch_limit=2.0, over_limit="reweight")
    reading = foretell(limited, [300, 50, 100], token_budget=1000, step_tokens=10)
    # b ends at 400 (a 200, c 100); then a and c, 2 to 1, until c ends at 700 with a 400; a alone to 900.
    assert [source.name for source in reading.exhausted] == ["b", "c", "a"]
    assert [source.tokens for source in reading.exhausted] == pytest.approx([400, 700, 900])
    assert reading.reached == pytest.approx(900)
    assert foretell(limited, [300, 50, 100], 800, 10).reached == 800


def test_changes_of_shares_come_at_their_steps() -> None:
    changed = mixture(changes=(ShareChange(50, "a", 0.0), ShareChange(75, "c", 3.0)))
    reading = foretell(changed, [1, 1, 1], token_budget=1000, step_tokens=10)
    # 500 tokens by 2:1:1, 250 by 0:1:1, 250 by 0:1:3
    assert reading.tokens == pytest.approx((250, 125 + 125 + 62.5, 125 + 125 + 187.5))


def test_a_source_that_only_enters_later_can_be_the_only_one_left() -> None:
    late = mixture(
        epoch_limits=(EpochLimit("a", 1.0), EpochLimit("b", 1.0), EpochLimit("c", 1.0)), over_limit="reweight"
    )
    late = dataclasses.replace(
        late, mixture=(*late.mixture[:2], SourceShare("c", 0.0)), changes=(ShareChange(10, "c", 1.0),)
    )
    reading = foretell(late, [500, 500, 500], token_budget=1500, step_tokens=10)
    assert reading.reached == pytest.approx(1500)


def test_simulated_samples_have_the_shares_and_lengths_of_the_sources() -> None:
    chance = np.random.default_rng(0)
    known = [
        facts("a", [([(64, 64)] * int(chance.integers(1, 4)), int(chance.integers(5, 90))) for _ in range(400)]),
        facts("b", [([], int(chance.integers(100, 250))) for _ in range(300)]),
        facts("c", [([], 12)] * 50),
    ]
    stream = simulated_samples(known, (0.5, 0.3, 0.2), BUDGET)
    drawn = [next(stream) for _ in range(6000)]
    tokens = Counter()
    for sample in drawn:
        tokens[sample.source] += sample.tokens
        assert BUDGET.holds(sample)
    for source, share in enumerate((0.5, 0.3, 0.2)):
        assert tokens[source] / tokens.total() == pytest.approx(share, abs=0.01)
        of_source = [sample for sample in drawn if sample.source == source]
        assert np.mean([s.tokens for s in of_source]) == pytest.approx(known[source].mean_tokens, rel=0.05)
        assert np.mean([s.tiles for s in of_source]) == pytest.approx(
            known[source].tiles / known[source].usable, rel=0.05
        )


def test_fill_of_samples_that_fit_together_is_whole() -> None:
    halves = [facts("a", [([], 128)] * 10)]
    fill = simulate_fill(halves, (1.0,), BUDGET, window=8)
    assert fill == mixture_plan.Fill(8, 1.0, 0.0, 2.0, 1.0, 0.0)


def test_bounds_of_the_fills_follow_from_tiles_for_a_token() -> None:
    # 26 tokens with a tile, 200 without: at even shares of the tokens a row of 256 asks 256 · (1/26) / 2 = 4.92 tiles.
    known = [facts("a", [([(64, 64)], 10)] * 10), facts("b", [([], 200)] * 10)]
    assert fill_bounds(known, (1.0, 1.0), Budget(256, 8)) == pytest.approx((1.0, 128 / 26 / 8))
    assert fill_bounds(known, (1.0, 1.0), Budget(256, 4)) == pytest.approx((4 / (128 / 26), 1.0))
    assert fill_bounds(known, (1.0, 0.0), Budget(256, 8)) == pytest.approx((8 / (256 / 26), 1.0))
    assert fill_bounds(known[1:], (1.0,), Budget(256, 0)) == (1.0, 0.0)


def long_tail(length: int, most_tiles: int) -> mixture_plan.SourceFacts:
    """Nine captions of one or two tiles to one document of six to many, as sizes and texts that a source would hold."""
    chance, counter = random.Random(length), StatisticsCounter(TilingConfig())
    for _ in range(3000):
        short = chance.random() < 0.9
        tiles = chance.choice((1, 2)) if short else chance.randint(6, most_tiles)
        # Pictures of a tile each: what counts are tiles and tokens of the record.
        counter.add([(512, 512)] * tiles, chance.randint(30, 200) if short else chance.randint(200, 1000))
    shards = (ShardEntry("shard-00000-of-00001.array_record", 3000, 1000, "", ""),)
    manifest = Manifest("tail", "CC0-1.0", "", "", shards, 3000, 0, 0, {})
    return source_facts("tail", manifest, counter.statistics(), Budget(length, length // 256), "drop")


@pytest.mark.parametrize(("length", "most_tiles", "tiles"), [(4096, 12, (12, 13, 14)), (8192, 16, (24, 26, 28))])
def test_rows_of_a_long_tail_are_as_full_as_the_mixture_allows(
    length: int, most_tiles: int, tiles: tuple[int, ...], record_property: Callable[[str, object], None]
) -> None:
    tail = long_tail(length, most_tiles)
    for budget in (Budget(length, count) for count in tiles):
        fill = simulate_fill([tail], (1.0,), budget, window=64)
        record_property(f"{length}/{budget.tiles}", str(fill))
        assert fill.reaches(0.97), fill
        assert max(fill.token_bound, fill.tile_bound) == 1
        assert fill.token_fill <= 1.02 * fill.token_bound
        assert fill.tile_fill <= 1.02 * fill.tile_bound


def test_a_fill_below_its_bound_does_not_reach() -> None:
    good = mixture_plan.Fill(24, 0.93, 0.98, 10.0, token_bound=0.95, tile_bound=1.0)
    assert good.reaches(0.97)
    assert not good._replace(token_fill=0.92).reaches(0.97)
    assert not good._replace(tile_fill=0.96).reaches(0.97)


def test_lengths_spread_evenly_around_the_mean_of_their_cell() -> None:
    cell = LengthCell(limit=288, tiles=0, records=10, tokens=2700)
    lengths = [mixture_plan._length_in(cell, spread, 300) for spread in np.linspace(0, 1, 101)]
    assert np.mean(lengths) == pytest.approx(270, abs=0.1)
    assert (min(lengths), max(lengths)) == (252, 288)


def test_tile_budgets_hold_one_image_and_fit_the_row() -> None:
    assert list(mixture_plan.tile_budgets(4096, 12, 256)) == [12, 13, 14, 15, 16]
