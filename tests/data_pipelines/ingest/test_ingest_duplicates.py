"""Duplicates by grouping: what is near, what is not, chains, and one representative that depends on nothing but the set."""

# ruff: noqa: E402 (the extras are asked for before what imports them)
from __future__ import annotations

import collections
import dataclasses
import io
import itertools
import random
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from PIL import Image, ImageEnhance

beam = pytest.importorskip("apache_beam")
datasketch = pytest.importorskip("datasketch")
imagehash = pytest.importorskip("imagehash")

from apache_beam.testing.util import assert_that, equal_to

from data_pipelines.ingest.config import IngestConfig
from data_pipelines.ingest.deduplication import (
    COMPONENT_ROUNDS,
    DropExactDuplicates,
    NearDuplicates,
    PassLabels,
    _groups,
    _keys,
    _members,
    _signatures,
    _similar_pairs,
    rank,
)
from data_pipelines.ingest.filters import repeated_share
from data_pipelines.ingest.signatures import (
    band_shape,
    hamming,
    image_hash,
    image_keys,
    similarity,
    text_fingerprint,
    text_keys,
    text_signature,
    words,
)
from data_pipelines.ingest.staging import StagedRow
from tests.data_pipelines.ingest.raw_sources import picture

WORDS = [f"word{number}" for number in range(5000)]


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def text(seed: int, length: int = 120) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def row(
    name: str, images: tuple[int, ...] = (), words: str = "", side: int = 64, unit: int = 0, offset: int = 0
) -> StagedRow:
    """A staged row of square pictures with the given hashes, or of a text."""
    return StagedRow(
        unit=unit,
        offset=offset,
        length=1,
        checksum=0,
        image_heights=(side,) * len(images),
        image_widths=(side,) * len(images),
        text_length=len(words),
        task="",
        content_hash=name * 32,
        pieces=(),
        licence="",
        language="en",
        image_hashes=images,
        text_fingerprint=text_fingerprint(words),
        text_signature=b"" if images else text_signature(words, 128),
    )


def grouped(items: Iterable[tuple[bytes, object]]) -> list[tuple[bytes, list[object]]]:
    groups = collections.defaultdict(list)
    for key, value in items:
        groups[key].append(value)
    return list(groups.items())


def flat(function: Callable[..., Iterable[object]], items: Iterable[object], *settings: object) -> list[object]:
    return [value for item in items for value in function(item, *settings)]


def near_pairs(rows: list[StagedRow], config: IngestConfig) -> set[tuple[bytes, bytes]]:
    """The pairs that `NearDuplicates` compares and finds similar, grouped here."""
    groups = flat(_groups, grouped(flat(_keys, rows, config)))
    members = flat(_members, grouped(flat(_signatures, rows, config) + groups))
    return set(flat(_similar_pairs, grouped(members), config))


def check_pairs(rows: list[StagedRow], names: str, **settings: object) -> None:
    """As `check_dropped`, but groups and joins here: what is a pair depends on the keys and the comparison alone."""
    links = near_pairs(rows, dataclasses.replace(IngestConfig(), **settings))
    smallest = {rank(item): rank(item) for item in rows}
    for _, (larger, smaller) in itertools.product(rows, links):
        smallest[larger] = smallest[smaller] = min(smallest[larger], smallest[smaller])
    assert sorted(name.hex()[-1] for name, first in smallest.items() if name != first) == sorted(names)


def check_dropped(rows: list[StagedRow], names: str, **settings: object) -> None:
    """Compares the names (first letters of the content hashes) of the near duplicates that are left out."""
    config = dataclasses.replace(IngestConfig(), **settings)
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        near = pipeline | beam.Create(rows) | NearDuplicates(config)
        assert_that(near | beam.Map(lambda name: name.hex()[-1]), equal_to(list(names)))


def test_image_hash_is_that_of_imagehash_and_bears_small_changes() -> None:
    data = picture(3, side=200)
    rgb = decoded(data)
    value = image_hash(rgb)
    assert f"{value:016x}" == str(imagehash.phash(Image.fromarray(rgb)))
    image = Image.fromarray(rgb)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=60)
    changed = [
        decoded(buffer.getvalue()),
        np.asarray(image.resize((150, 150))),
        np.asarray(ImageEnhance.Brightness(image).enhance(1.1)),
    ]
    assert all(hamming(value, image_hash(other)) <= 3 for other in changed)
    assert min(hamming(value, image_hash(decoded(picture(other)))) for other in range(4, 24)) > 12


@pytest.mark.parametrize("distance", [0, 1, 3, 6])
def test_near_hashes_always_have_a_key_in_common(distance: int) -> None:
    draws = random.Random(distance)
    for _ in range(300):
        value = draws.getrandbits(64)
        other = value
        for bit in draws.sample(range(64), distance):
            other ^= 1 << bit
        assert set(image_keys(value, distance)) & set(image_keys(other, distance))


def test_text_signature_is_that_of_datasketch_and_estimates_jaccard() -> None:
    base = text(1, 400).split()
    changed = base[:]
    changed[10] = changed[200] = "other"
    shingles = [{tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (base, changed)]
    exact = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
    left, right = (text_signature(" ".join(words), 256) for words in (base, changed))
    assert similarity(left, right) == pytest.approx(exact, abs=4 * 0.5 / 16)
    assert similarity(left, text_signature(text(2, 400), 256)) < 0.05
    assert text_signature("One, two!", 64) == text_signature("one TWO", 64)


def test_scripts_without_spaces_are_compared_by_character() -> None:
    assert words("图中有多少人?") == list("图中有多少人")
    assert words("JAXでﾃｽﾄを2回、ラーメン") == ["jax", *"でテストを", "2", *"回ラーメン"]
    assert words("ที่นี่ OK") == ["ที่", "นี่", "ok"]
    assert words("한국어 텍스트, naïve café_9") == ["한국어", "텍스트", "naïve", "café_9"]
    chinese = "委员会于每月第一个星期一在市政厅开会听取全部报告并讨论新桥的修建计划以及春天的选举结果"
    changed = chinese.replace("春天", "秋天")
    assert similarity(text_signature(chinese, 256), text_signature(changed, 256)) > 0.5
    assert repeated_share(words(chinese * 3)) > 0.6 > 0.1 > repeated_share(words(chinese + changed[:3]))


def test_bands_find_pairs_above_the_threshold() -> None:
    for threshold in (0.5, 0.8, 0.95):
        bands, rows = band_shape(threshold, 128)
        assert bands * rows <= 128
        assert 1 - (1 - threshold**rows) ** bands > 0.95
        assert 1 - (1 - (threshold / 2) ** rows) ** bands < 0.5
    bands, _ = band_shape(0.8, 128)
    assert len(list(text_keys(text_signature("x", 128), 0.8))) == bands


def test_exact_duplicates_keep_the_first_of_the_source() -> None:
    rows = [row("a", unit=2), row("a", unit=1, offset=7), row("a", unit=1, offset=3), row("b", unit=5)]
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        kept = pipeline | beam.Create(rows) | DropExactDuplicates()
        assert_that(
            kept | beam.Map(lambda item: (item.content_hash[0], item.unit, item.offset)),
            equal_to([("a", 1, 3), ("b", 5, 0)]),
        )


def test_larger_picture_then_longer_text_then_smaller_hash_stays() -> None:
    large, long, small, other = (
        row("d", (5,), side=128),
        row("c", (5,), "long"),
        row("a", (5,), "x"),
        row("b", (5,), "x"),
    )
    assert sorted([other, small, long, large], key=rank) == [large, long, small, other]
    check_dropped([other, small, long, large], "abc", same_image="drop")


def test_what_an_earlier_source_holds_stays_there() -> None:
    large, held = row("b", (5,), side=128), row("a", (5,))._replace(length=0)
    assert sorted([large, held], key=rank) == [held, large]
    check_pairs([large, held], "b", same_image="drop")


def test_rules_for_the_same_picture() -> None:
    rows = [
        row("a", (0b111,), "What is it?"),
        row("b", (0,), "what is IT"),
        row("c", (0,), "Why?"),
        row("d", (0b1111,), "What is it?"),
    ]
    check_pairs(rows, "bd", same_image="same_text", image_distance=3)  # b is near a and d
    check_pairs(rows, "d", same_image="same_text", image_distance=2)
    check_pairs(rows, "bcd", same_image="drop", image_distance=3)
    check_pairs(rows, "", same_image="keep")
    check_pairs(rows, "", same_image="drop", image_distance=-1)


def test_all_pictures_of_a_record_must_be_near() -> None:
    rows = [row("a", (0, 2**40 - 1), "x"), row("b", (1, 2**40 - 1), "x"), row("c", (0, 0), "x"), row("d", (0,), "x")]
    check_pairs(rows, "b")


def test_near_texts_are_found_and_others_are_not() -> None:
    base = text(7).split()
    near = [*base[:60], "changed", *base[61:]]
    far = [*base[:30], *text(8, 90).split()]
    rows = [row(name, words=" ".join(words)) for name, words in (("a", base), ("b", near), ("c", far))]
    check_dropped(rows, "b")
    check_pairs(rows, "b")
    check_pairs(rows, "", text_similarity=0.0)


def test_texts_are_grouped_by_keys_without_their_signatures() -> None:
    """An engine on one machine holds all of these at once: with the signature, 18 keys of a text took 65 kB of memory."""
    keys = list(_keys(row("a", words=text(7)), IngestConfig()))
    assert len(keys) == band_shape(0.8, 128)[0] == 18
    assert {len(bucket) + len(member) for bucket, member in keys} == {44}
    assert {member[-28:] for _, member in keys} == {rank(row("a", words=text(7)))}


def test_keys_of_one_member_are_no_groups_and_equal_groups_are_one() -> None:
    names = [bytes([number]) * 28 for number in range(4)]
    held = {b"a": names[:1], b"b": names[:2], b"c": names[1::-1], b"d": names[:3], b"e": names[3:]}
    members = [key * 14 + name for key, listed in held.items() for name in listed]
    found = dict(grouped((name, group) for name, (_, group) in _groups((b"..", members))))
    pair, three = found[names[0]][0], found[names[2]][0]
    assert pair != three
    assert found == {names[0]: [pair, pair, three], names[1]: [pair, pair, three], names[2]: [three]}
    shuffled = random.Random(0).sample(members, len(members))
    assert sorted(_groups((b"..", shuffled))) == sorted(_groups((b"..", members)))
    parts = (names[0], [(None, pair), (b"signature", None), (None, three), (None, pair)])
    assert sorted(_members(parts)) == sorted((group, (names[0], b"signature")) for group in (pair, three))


def test_pairs_are_those_of_bands_grouped_with_their_signatures() -> None:
    """The plain way, on clusters of which one has more members than are compared with all."""
    config, draws = IngestConfig(), random.Random(5)
    rows = []
    for number in range(40):
        words = text(number // 25 + number % 3 * (number >= 25)).split()
        words[draws.randrange(120)] = f"other{number}"
        rows.append(row("0", words=" ".join(words))._replace(content_hash=f"{draws.getrandbits(128):032x}"))
    bands = flat(lambda item: text_keys(item.text_signature, config.text_similarity), rows)
    members = [(rank(item), item.text_signature) for item in rows for _ in range(len(bands) // len(rows))]
    expected = {
        (name, leader)
        for _, group in grouped(zip(bands, members, strict=True))
        for leader, other in sorted(group)[:16]
        for name, signature in group
        if leader < name and similarity(signature, other) >= config.text_similarity
    }
    assert len(expected) > 250
    assert near_pairs(rows, config) == expected


def test_chain_of_duplicates_is_one_component() -> None:
    """Each link of the chain is near the next only; 2**rounds links are joined, whatever the order of the names."""
    names = [f"{number:03d}" for number in range(2**COMPONENT_ROUNDS)]
    random.Random(0).shuffle(names)
    links = [(max(pair), min(pair)) for pair in itertools.pairwise(names)]
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        result = pipeline | beam.Create(links)
        for number in range(COMPONENT_ROUNDS):
            result = result | f"round {number}" >> PassLabels()
        assert_that(result, equal_to([(name, "000") for name in sorted(names)[1:]]))
