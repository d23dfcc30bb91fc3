import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.mixtures import (
    drawn_alpha,
    drawn_record,
    integer_weights,
    lane_phases,
    next_source,
    sampling_odds,
    shuffle_key,
    shuffled_index,
    stride,
)


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 1000, 4099])
def test_shuffle_is_a_permutation(size: int) -> None:
    for epoch in range(2):
        key = shuffle_key(3, "charts", epoch)
        assert sorted(shuffled_index(i, size, key) for i in range(size)) == list(range(size))


def test_shuffle_depends_on_seed_source_and_epoch() -> None:
    keys = [
        shuffle_key(3, "charts", 0),
        shuffle_key(4, "charts", 0),
        shuffle_key(3, "scenes", 0),
        shuffle_key(3, "charts", 1),
    ]
    orders = [tuple(shuffled_index(i, 500, key) for i in range(500)) for key in keys]
    for left, right in itertools.combinations(orders, 2):
        assert sum(a == b for a, b in zip(left, right, strict=True)) < 10


@pytest.mark.parametrize("size", [5, 24, 97])
def test_every_record_is_equally_likely_at_every_place(size: int) -> None:
    epochs = 4000
    for place in (0, size // 2, size - 1):
        found = [shuffled_index(place, size, shuffle_key(1, "s", epoch)) for epoch in range(epochs)]
        counts, expected = np.bincount(found, minlength=size), epochs / size
        chi_square = ((counts - expected) ** 2 / expected).sum()
        # mean size - 1, deviation sqrt(2 (size - 1)): six deviations
        assert chi_square < size - 1 + 6 * np.sqrt(2 * (size - 1))


def test_neighbours_are_far_apart() -> None:
    size = 100_000
    order = np.array([shuffled_index(i, size, shuffle_key(0, "s", 0)) for i in range(20_000)])
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    assert np.abs(np.diff(order)).mean() == pytest.approx(size / 3, rel=0.03)


def test_drawn_records_go_epoch_by_epoch() -> None:
    epochs = [[drawn_record(place, 11, 5, "s") for place in range(e * 11, (e + 1) * 11)] for e in range(3)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


class Draws(NamedTuple):
    """Tokens and samples drawn of each source."""

    tokens: np.ndarray
    samples: np.ndarray


def drawn_tokens(shares: Sequence[float], lengths: Sequence[Sequence[int]], lanes: int, draws: int) -> Draws:
    """Tokens and samples by source after `draws` draws of each lane; the lengths of a source come round and round."""
    weights, sources = integer_weights(shares), range(len(shares))
    phases = [lane_phases(weights[s], lengths[s], lanes, 5, str(s)) for s in sources]
    tokens, samples = [0] * len(shares), [0] * len(shares)
    for lane in range(lanes):
        due, drawn = [phases[s][lane] for s in sources], [0] * len(shares)
        for _ in range(draws):
            source = next_source(weights, due)
            length = lengths[source][(drawn[source] * lanes + lane) % len(lengths[source])]
            drawn[source] += 1
            due[source] += stride(length, weights[source])
            tokens[source] += length
        samples = [total + own for total, own in zip(samples, drawn, strict=True)]
    return Draws(np.array(tokens), np.array(samples))


def long_tailed(sources: int, records: int) -> list[list[int]]:
    """Lengths of samples: log-normal, some sources nearly constant, others with deviations beyond their means."""
    rng = np.random.default_rng(0)
    means, spreads = rng.uniform(np.log(150), np.log(3000), sources), np.linspace(0.2, 1.5, sources)
    return [
        np.clip(rng.lognormal(mean - spread**2 / 2, spread, records), 5, 8192).astype(int).tolist()
        for mean, spread in zip(means, spreads, strict=True)
    ]


def test_token_shares_over_a_million_samples(record_property: Callable[[str, object], None]) -> None:
    wanted = np.array([0.26, 0.2, 0.15, 0.1, 0.08, 0.05, 0.04, 0.04, 0.03, 0.02, 0.015, 0.011, 0.004])
    lengths = long_tailed(len(wanted), 50_000)
    drawn = drawn_tokens(wanted, lengths, lanes=512, draws=1954)
    assert drawn.samples.sum() > 1_000_000
    realised = drawn.tokens / drawn.tokens.sum()
    points, of_itself = np.abs(realised - wanted).max(), np.abs(realised / wanted - 1)[wanted > 0.01].max()
    record_property("largest_deviation", (float(points), float(of_itself)))
    assert points < 0.005
    assert of_itself < 0.02
    odds = sampling_odds(wanted, [np.mean(known) for known in lengths])
    # Odds from mean lengths alone would miss the shares by as much as these differ: the samples drawn are not the mean ones.
    np.testing.assert_allclose(drawn.samples / drawn.samples.sum(), odds, rtol=0.06)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=8), st.lists(st.integers(1, 99), min_size=1, max_size=20))
def test_each_source_has_its_tokens_to_within_a_sample_at_any_moment(shares: list[int], lengths: list[int]) -> None:
    weights, due, tokens = integer_weights(shares), [0] * len(shares), np.zeros(len(shares))
    for draw in range(200):
        source = next_source(weights, due)
        length = lengths[draw % len(lengths)]
        due[source] += stride(length, weights[source])
        tokens[source] += length
        served = tokens / np.array(shares)  # equal for all sources but for the samples under way
        assert served.max() - served.min() <= 99 / min(shares) + 1e-3


def test_lanes_begin_at_places_spread_evenly_over_a_sources_tokens() -> None:
    lengths, weight = [10, 1, 89, 100], integer_weights([1.0])[0]
    rest = [due * weight / 2**32 for due in lane_phases(weight, lengths, 200, 3, "s")]
    # A place lies in a sample in proportion to its length, and about half of that sample, its own token whole, is still to come.
    assert np.mean(rest) == pytest.approx(
        sum(length * (length + 1) for length in lengths) / sum(lengths) / 2, rel=0.002
    )
    assert min(rest) > 0
    assert max(rest) <= 100
    assert rest != [due * weight / 2**32 for due in lane_phases(weight, lengths, 200, 3, "t")]


def test_a_source_without_a_share_is_never_drawn() -> None:
    weights = integer_weights([1.0, 0.0, 1e-12])
    assert weights[1] == 0
    assert weights[2] == 1
    assert next_source(weights, [5, 0, 9]) == 0
    with pytest.raises(ValueError, match="empty"):
        next_source((0, 0), (0, 0))


def test_odds_turn_token_shares_into_draws() -> None:
    shares, means = (3.0, 1.0, 1.0), (900.0, 100.0, 10.0)
    odds = np.array(sampling_odds(shares, means))
    assert odds.sum() == pytest.approx(1)
    np.testing.assert_allclose(odds * means / (odds @ means), np.array(shares) / 5, rtol=1e-12)


def test_random_alpha() -> None:
    alphas = np.array([drawn_alpha(place, 640, 9, "s", 0.25) for place in range(20_000)])
    jittered = alphas[alphas != 640]
    assert len(jittered) / len(alphas) == pytest.approx(0.25, abs=0.015)
    assert jittered.min() < 110
    assert jittered.max() > 990
    assert jittered.mean() == pytest.approx(550, abs=12)
    assert ((alphas >= 100) & (alphas <= 1000)).all()


def test_alpha_without_jitter_is_the_given_one() -> None:
    assert {drawn_alpha(place, 640, 9, "s", 0.0) for place in range(100)} == {640}
