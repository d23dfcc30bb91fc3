"""Duplicates across the whole set, found by grouping: no process ever holds more than a group's first few members.

    rows ─by content hash─► exact duplicates out ─by keys of signatures─► pairs of near duplicates
         ─connected components─► all of a component but one out

Of equal records the one that is read first stays; what an earlier source holds stays there; of near duplicates the one with most pixels, then with the longest text, then
with the smallest content hash: a choice that depends on the set alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterable, Iterator

import apache_beam as beam

from data_pipelines.ingest.config import IngestConfig
from data_pipelines.ingest.signatures import hamming, image_keys, similarity, text_keys
from data_pipelines.ingest.staging import StagedRow

COMPONENT_ROUNDS = 5
"""Rounds of label passing. A chain of duplicates shrinks by half in a round, so 2⁵ links in a row are joined; a longer chain (we
know of none) keeps more than one of its records, never none."""

_LEADERS = 16
"""Members of a group that all others are compared with. Groups are small (26 bits of a hash, or a band of a MinHash): the limit
bounds the time of one that is not."""

Rank = str
"""Identity of a record that sorts by preference: the smallest stays."""


def rank(row: StagedRow) -> Rank:
    """What an earlier source holds first, then most pixels, then the longest text, then the smallest content hash."""
    pixels = sum(h * w for h, w in zip(row.image_heights, row.image_widths, strict=True))
    return f"{int(not row.earlier)}{2**52 - pixels:014x}{2**32 - row.text_length:09x}{row.content_hash}"


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
        config = self._config
        signed = rows | "signatures" >> beam.FlatMap(_signed_keys, config)
        pairs = signed | "groups" >> beam.GroupByKey() | "compare" >> beam.FlatMap(_similar_pairs, config)
        links = pairs | "distinct pairs" >> beam.Distinct()
        for number in range(COMPONENT_ROUNDS):
            links = links | f"pass labels {number}" >> PassLabels()
        return links | "larger ends" >> beam.Keys() | "distinct" >> beam.Distinct()


def _signed_keys(row: StagedRow, config: IngestConfig) -> Iterator[tuple[Hashable, tuple[Rank, object]]]:
    """(key, (rank, signature)): near duplicates have a key in common."""
    if row.image_hashes and config.image_distance >= 0 and config.same_image != "keep":
        text = row.text_fingerprint if config.same_image == "same_text" else 0
        for block, bits in image_keys(row.image_hashes[0], config.image_distance):
            yield f"image {len(row.image_hashes)} {text:x} {block} {bits:x}", (rank(row), row.image_hashes)
    elif row.text_signature and config.text_similarity > 0:
        for band, data in text_keys(row.text_signature, config.text_similarity):
            yield f"text {band} {data.hex()}", (rank(row), row.text_signature)


def _similar_pairs(
    group: tuple[str, Iterable[tuple[Rank, object]]], config: IngestConfig
) -> Iterator[tuple[Rank, Rank]]:
    """(larger rank, smaller rank) of members that are near duplicates of one of the group's first."""
    key, members = group
    similar = (
        _images_similar(config.image_distance) if key.startswith("image") else _texts_similar(config.text_similarity)
    )
    leaders = heapq.nsmallest(_LEADERS, members)
    for name, signature in members:
        for leader, other in leaders:
            if leader < name and similar(signature, other):
                yield name, leader


def _images_similar(distance: int) -> Callable[[tuple[int, ...], tuple[int, ...]], bool]:
    return lambda left, right: all(hamming(a, b) <= distance for a, b in zip(left, right, strict=True))


def _texts_similar(threshold: float) -> Callable[[bytes, bytes], bool]:
    return lambda left, right: similarity(left, right) >= threshold


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
