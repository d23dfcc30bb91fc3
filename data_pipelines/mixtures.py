"""Which sample a lane draws next, as a pure function of the seed and the lane's own counters.

A few pure functions are enough for data that does not care how many hosts, workers or prefetched batches there are:

    what is due ─next_source─► source ─(draw·lanes + lane)─► place in that source's endless stream ─shuffled_index─► record
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

from hypervl_jax.vision.anyres import ALPHA_UNIT

WEIGHT_RESOLUTION = 2**24
"""Integer weights of a mixture add up to about this: a share is exact to 6e-8."""

_STRIDE_UNIT = 2**32
_PHASE_EPOCH = -1
"""Stands for the epoch where a shuffle is that of lanes, not of records."""

ALPHA_MIN = ALPHA_UNIT // 10
"""The least α that HyperVL uses, in thousandths."""

_MASK = 2**64 - 1
_ROUNDS = 3


def integer_weights(shares: Sequence[float]) -> tuple[int, ...]:
    """Integers in proportion to the shares; 0 only for share 0."""
    total = math.fsum(shares)
    return tuple(max(1, round(share / total * WEIGHT_RESOLUTION)) if share else 0 for share in shares)


def sampling_odds(token_shares: Sequence[float], mean_tokens: Sequence[float]) -> tuple[float, ...]:
    """The part of all SAMPLES that each source gives, so that its TOKENS have the wanted share: share / mean tokens, normalised."""
    rates = [share / mean for share, mean in zip(token_shares, mean_tokens, strict=True)]
    return tuple(rate / math.fsum(rates) for rate in rates)


def next_source(weights: Sequence[int], due: Sequence[int]) -> int:
    """The source whose turn it is: the least `due` among those with a weight, the first of equals.

    Raises `ValueError` when no source has a weight.
    """
    return min((source for source, weight in enumerate(weights) if weight), key=due.__getitem__)


def stride(tokens: int, weight: int) -> int:
    """How far a sample of `tokens` tokens puts off its source's next turn.

    This is stride scheduling (Waldspurger and Weihl, 1995; start-time fair queueing of Goyal, Vin and Cheng, 1996) with
    tokens as the service: at any moment each source has had its share of the tokens to within one sample, whatever the
    samples' lengths, in exact integers and with one number of history a source.
    """
    return tokens * _STRIDE_UNIT // weight


class ShuffleKey(NamedTuple):
    """Round keys of one epoch's permutation."""

    left: tuple[int, ...]
    right: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def shuffle_key(seed: int, source: str, epoch: int) -> ShuffleKey:
    """Keys of a source's order in one epoch. They depend on its name, so that adding a source moves no other's order."""
    words = struct.unpack(f"<{2 * _ROUNDS}Q", _digest("shuffle", seed, source, epoch, 16 * _ROUNDS))
    return ShuffleKey(words[:_ROUNDS], words[_ROUNDS:])


def shuffled_index(index: int, size: int, key: ShuffleKey) -> int:
    """A pseudo-random permutation of 0..size-1, one element at a time, in constant time and memory.

    A generalised Feistel network over Z_a × Z_b with a·b barely above `size`, walking on while outside (Black and
    Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Grain's own shuffle costs about the same, but reaching it
    imports jax, and its order may change with its version; this order is part of our checkpoints.
    """
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    while True:
        row, column = divmod(index, columns)
        for left, right in zip(*key, strict=True):
            row = (row + _mix(column ^ left)) % rows
            column = (column + _mix(row ^ right)) % columns
        index = row * columns + column
        if index < size:
            return index


def lane_phases(weight: int, lengths: Sequence[int], lanes: int, seed: int, source: str) -> list[int]:
    """When a source's first turn is due in each lane, as if each had been under way for ever.

    A lane that began with nothing due would give each source a sample too many or too few, the more the more lengths vary: the
    sample that is under way at a moment is longer than the mean one. So each lane begins at its own place among the tokens of
    all the samples, one behind the other, and the first turn is due when the sample at that place ends.

    Args:
        weight: of the source.
        lengths: of samples of the source, in tokens.
        lanes: how many.
        seed: decides which lane begins where.
        source: its name.
    """
    ends = list(itertools.accumulate(lengths))
    key = shuffle_key(seed, source, _PHASE_EPOCH)
    places = [(2 * shuffled_index(lane, lanes, key) + 1) * ends[-1] // (2 * lanes) for lane in range(lanes)]
    return [stride(ends[bisect.bisect_right(ends, place)] - place, weight) for place in places]


def drawn_record(place: int, size: int, seed: int, source: str) -> int:
    """The record at `place` of a source's endless stream: one permutation of its `size` records after another."""
    epoch, index = divmod(place, size)
    return shuffled_index(index, size, shuffle_key(seed, source, epoch))


def drawn_alpha(place: int, alpha: int, seed: int, source: str, jitter: float) -> int:
    """α in thousandths of the sample at `place`: `alpha`, or for a share `jitter` of samples uniform in 100..1000."""
    if not jitter:
        return alpha
    bits = _mix(place ^ _jitter_key(seed, source))
    jittered = (bits >> 32) < jitter * 2**32
    return ALPHA_MIN + (bits & 0xFFFFFFFF) % (ALPHA_UNIT - ALPHA_MIN + 1) if jittered else alpha


@functools.lru_cache(maxsize=4096)
def _jitter_key(seed: int, source: str) -> int:
    return int.from_bytes(_digest("alpha", seed, source, 0, 8), "little")


def _digest(purpose: str, seed: int, source: str, epoch: int, size: int) -> bytes:
    return hashlib.blake2b(f"{purpose}\0{seed}\0{source}\0{epoch}".encode(), digest_size=size).digest()


def _mix(word: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): each input bit changes about half of the output's 64."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _MASK
    return word ^ (word >> 31)
