"""Duplicates across the whole set, found by grouping: no process ever holds more than a group's first few members.

    rows ─by content hash─► exact duplicates out ─by keys of signatures─► groups of two or more, without signatures
         ─by member, then by group─► their signatures compared: pairs of near duplicates
         ─connected components─► all of a component but one out

Of equal records the one that is read first stays; what an earlier source holds stays there; of near duplicates the one with most pixels, then with the longest text, then
with the smallest content hash: a choice that depends on the set alone.

A text has some twenty keys, and most keys have a single member. So what is grouped by them is small, 44 bytes a key: a signature of
half a kilobyte travels once for its record, and once more for each group that the record is in with others.
"""

from __future__ import annotations

import collections
import heapq
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import xxhash

from data_pipelines.ingest.config import IngestConfig
from data_pipelines.ingest.signatures import hamming, image_keys, similarity, text_keys
from data_pipelines.ingest.staging import StagedRow

COMPONENT_ROUNDS = 5
"""Rounds of label passing. A chain of duplicates shrinks by half in a round, so 2⁵ links in a row are joined; a longer chain (we
know of none) keeps more than one of its records, never none."""

_LEADERS = 16
"""Members of a group that all others are compared with. Groups are small (26 bits of a hash, or a band of a MinHash): the limit
bounds the time of one that is not."""

_BUCKET_BYTES = 2
"""Keys of signatures are 128-bit hashes, so that no two meet by chance; those that begin with the same bytes are grouped together.
An engine that groups in memory spends some 300 bytes on each of its groups, and a key of one member is not worth that."""

_KEY_BYTES = 16 - _BUCKET_BYTES

Rank = bytes
"""Identity of a record that sorts by preference, 28 bytes: the smallest stays."""

Signature = bytes | tuple[int, tuple[int, ...]]
"""MinHash of a text; or the text that pictures must share (0: any) and their hashes."""


def rank(row: StagedRow) -> Rank:
    """What an earlier source holds first, then most pixels, then the longest text, then the smallest content hash."""
    pixels = sum(h * w for h, w in zip(row.image_heights, row.image_widths, strict=True))
    size = ((not row.earlier) << 55) + 2**52 - pixels
    return size.to_bytes(7, "big") + (2**32 - row.text_length).to_bytes(5, "big") + bytes.fromhex(row.content_hash)


class DropExactDuplicates(beam.PTransform):
    """Rows -> one row of each content hash: an earlier source's, else the first in the order of the source."""

    def expand(self, rows: beam.PCollection[StagedRow]) -> beam.PCollection[StagedRow]:
        """Keys by content hash and keeps the minimum."""
        keyed = rows | "by content" >> beam.Map(lambda row: (row.content_hash, row))
        return keyed | "first" >> beam.CombinePerKey(_first) | "rows" >> beam.Values()


def _first(rows: Iterable[StagedRow]) -> StagedRow:
    return min(rows, key=lambda row: (not row.earlier, row.unit, row.offset))


class NearDuplicates(beam.PTransform):
    """Rows -> ranks of the rows to leave out: all of each connected component of near duplicates but its smallest."""

    def __init__(self, config: IngestConfig) -> None:
        super().__init__()
        self._config = config

    def expand(self, rows: beam.PCollection[StagedRow]) -> beam.PCollection[Rank]:
        """Groups by signature keys, compares within groups, and joins the pairs."""
        # The types choose Beam's coders for bytes, a third shorter than those for anything.
        keys = rows | "keys" >> beam.FlatMap(_keys, self._config).with_output_types(tuple[bytes, bytes])
        groups = keys | "buckets" >> beam.GroupByKey() | "groups" >> beam.FlatMap(_groups).with_output_types(_PART)
        signatures = rows | "signatures" >> beam.FlatMap(_signatures, self._config).with_output_types(_PART)
        parts = (signatures, groups) | "both" >> beam.Flatten() | "by member" >> beam.GroupByKey()
        members = parts | "members" >> beam.FlatMap(_members).with_output_types(tuple[bytes, tuple[Rank, Any]])
        pairs = members | "by group" >> beam.GroupByKey() | "compare" >> beam.FlatMap(_similar_pairs, self._config)
        links = pairs | "distinct pairs" >> beam.Distinct()
        for number in range(COMPONENT_ROUNDS):
            links = links | f"pass labels {number}" >> PassLabels()
        return links | "larger ends" >> beam.Keys() | "distinct" >> beam.Distinct()


_PART = tuple[Rank, tuple[Any, Any]]
"""(a record, its signature and None), or (a record, None and a group that it is in)."""


def _signature(row: StagedRow, config: IngestConfig) -> Signature | None:
    """What a row is compared by; None for one that is not compared."""
    if row.image_hashes and config.image_distance >= 0 and config.same_image != "keep":
        return (row.text_fingerprint if config.same_image == "same_text" else 0, row.image_hashes)
    return row.text_signature or None if config.text_similarity > 0 else None


def _signatures(row: StagedRow, config: IngestConfig) -> Iterator[tuple[Rank, tuple[Signature, None]]]:
    signature = _signature(row, config)
    if signature is not None:
        yield rank(row), (signature, None)


def _keys(row: StagedRow, config: IngestConfig) -> Iterator[tuple[bytes, bytes]]:
    """(bucket, rest of the key and rank) for each key: near duplicates have a key in common."""
    signature = _signature(row, config)
    member = rank(row) if signature is not None else b""
    for name in () if signature is None else _key_names(signature, config):
        key = xxhash.xxh3_128_digest(name)
        yield key[:_BUCKET_BYTES], key[_BUCKET_BYTES:] + member


def _key_names(signature: Signature, config: IngestConfig) -> Iterator[bytes]:
    if isinstance(signature, bytes):
        for band, data in text_keys(signature, config.text_similarity):
            yield b"text %d %s" % (band, data)
        return
    text, hashes = signature
    for block, bits in image_keys(hashes[0], config.image_distance):
        yield b"image %d %x %d %x" % (len(hashes), text, block, bits)


def _groups(bucket: tuple[bytes, Iterable[bytes]]) -> Iterator[tuple[Rank, tuple[None, bytes]]]:
    """The members of each key in a bucket that has several; keys with the same members give one name to their group."""
    _, members = bucket
    counts: collections.Counter[bytes] = collections.Counter()
    sums: collections.Counter[bytes] = collections.Counter()
    for member in members:
        key = member[:_KEY_BYTES]
        counts[key] += 1
        # A sum does not depend on the order in which an engine gives them.
        sums[key] += xxhash.xxh3_128_intdigest(member[_KEY_BYTES:])
    for member in members:
        key = member[:_KEY_BYTES]
        if counts[key] > 1:
            yield member[_KEY_BYTES:], (None, (sums[key] % 2**128).to_bytes(16, "big"))


def _members(
    parts: tuple[Rank, Iterable[tuple[Signature | None, bytes | None]]],
) -> Iterator[tuple[bytes, tuple[Rank, Signature]]]:
    """A record and its signature for each of its groups; a record has one group for each of its keys at most."""
    name, values = parts
    signature = next(signature for signature, group in values if group is None)
    groups = {group for _, group in values if group is not None}
    return ((group, (name, signature)) for group in sorted(groups))


def _similar_pairs(
    group: tuple[bytes, Iterable[tuple[Rank, Signature]]], config: IngestConfig
) -> Iterator[tuple[Rank, Rank]]:
    """(larger rank, smaller rank) of members that are near duplicates of one of the group's first."""
    _, members = group
    leaders = heapq.nsmallest(_LEADERS, members)
    for name, signature in members:
        for leader, other in leaders:
            if leader < name and _similar(signature, other, config):
                yield name, leader


def _similar(left: Signature, right: Signature, config: IngestConfig) -> bool:
    """Whether two signatures with a key in common, hence of one kind, are those of near duplicates."""
    if isinstance(left, bytes):
        return similarity(left, right) >= config.text_similarity
    return all(hamming(a, b) <= config.image_distance for a, b in zip(left[1], right[1], strict=True))


class PassLabels(beam.PTransform):
    """One round of connected components, by the large-star and small-star steps of Kiveris et al. (SoCC 2014).

    Links (larger, smaller) -> links with the same components, nearer to stars whose centre is a component's smallest member.
    """

    def expand(self, links: beam.PCollection[tuple[Rank, Rank]]) -> beam.PCollection[tuple[Rank, Rank]]:
        """Large-star over both directions, then small-star over the smaller neighbours."""
        both = links | "both ways" >> beam.FlatMap(lambda link: (link, link[::-1]))
        large = both | "neighbours" >> beam.GroupByKey() | "large star" >> beam.FlatMap(_large_star)
        small = large | "distinct" >> beam.Distinct() | "smaller" >> beam.GroupByKey()
        return small | "small star" >> beam.FlatMap(_small_star) | "distinct again" >> beam.Distinct()


def _large_star(group: tuple[Rank, Iterable[Rank]]) -> Iterator[tuple[Rank, Rank]]:
    """Larger neighbours are linked to the smallest of the neighbourhood."""
    node, neighbours = group
    smallest = min(node, min(neighbours))
    return ((other, smallest) for other in neighbours if other > node)


def _small_star(group: tuple[Rank, Iterable[Rank]]) -> Iterator[tuple[Rank, Rank]]:
    """The node and its smaller neighbours are linked to the smallest of them."""
    node, neighbours = group
    smallest = min(neighbours)
    yield node, smallest
    yield from ((other, smallest) for other in neighbours if other != smallest)
