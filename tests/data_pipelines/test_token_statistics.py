"""Token statistics: exact sums, a histogram that keeps them, and manifests written before there were any."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.records import MANIFEST, RecordError, read_manifest, source_statistics
from data_pipelines.sources import Source
from data_pipelines.statistics import StatisticsCounter, TokenStatistics, length_limit
from hypervl_jax.architecture import TilingConfig
from tests.data_pipelines import corpora

FULL = TilingConfig()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("statistics")
    corpora.write(root, "s", corpora.mixed_records(40, "s", seed=3, images=2))
    return root / "train" / "s"


@pytest.mark.parametrize(
    "tiling", [FULL, corpora.TILING, dataclasses.replace(corpora.TILING, thumbnail=True, separators=True)]
)
def test_statistics_are_the_sums_that_packing_sees(directory: pathlib.Path, tiling: TilingConfig) -> None:
    statistics = source_statistics(directory, tiling)
    source = Source(directory, corpora.tokenizer().fingerprint)
    costs = [source.cost(record, 1000, tiling) for record in range(len(source))]
    assert (statistics.tokens, statistics.tiles) == tuple(map(sum, zip(*costs, strict=True)))
    assert statistics.pixels == sum(h * w for record in range(len(source)) for h, w in source.sizes(record).images)
    for cell in statistics.lengths:
        members = [tokens for tokens, tiles in costs if (length_limit(tokens), tiles) == (cell.limit, cell.tiles)]
        assert (len(members), sum(members)) == (cell.records, cell.tokens)
    assert sum(cell.records for cell in statistics.lengths) == len(source)


def test_manifest_holds_them_and_reads_them_back(directory: pathlib.Path) -> None:
    manifest = read_manifest(directory)
    assert manifest.statistics == source_statistics(directory, FULL)
    assert manifest.languages == {"en": 40}
    assert manifest.licences == {"CC0-1.0": 40}
    assert (manifest.samples_read, manifest.drops) == (0, {})


def test_older_manifest_is_read_and_its_source_measured(directory: pathlib.Path) -> None:
    path, whole = directory / MANIFEST, (directory / MANIFEST).read_text()
    expected = source_statistics(directory, FULL)
    raw = json.loads(whole)
    try:
        later = ("statistics", "licences", "languages", "samples_read", "drops", "origin")
        path.write_text(json.dumps({name: value for name, value in raw.items() if name not in later}))
        assert read_manifest(directory).statistics is None
        assert source_statistics(directory, FULL) == expected
        path.write_text(json.dumps(raw | {"statistics": {"tokens": 1}}))
        with pytest.raises(RecordError, match="unusable statistics"):
            read_manifest(directory)
    finally:
        path.write_text(whole)


@given(st.integers(0, 10**7))
def test_limit_is_at_most_an_eighth_above(tokens: int) -> None:
    limit = length_limit(tokens)
    assert tokens <= limit <= tokens + tokens // 8
    assert length_limit(limit) == limit


def test_parts_of_one_tiling_add_up() -> None:
    counter, left, right = (StatisticsCounter(FULL) for _ in range(3))
    for part, size in ((left, (700, 500)), (right, (30, 2000)), (left, (512, 512))):
        part.add([size], 17)
        counter.add([size], 17)
    left.merge(right.statistics())
    assert left.statistics() == counter.statistics()
    assert (
        TokenStatistics.from_json(json.loads(json.dumps(dataclasses.asdict(counter.statistics()))))
        == counter.statistics()
    )
    with pytest.raises(ValueError, match="count both again"):
        left.merge(StatisticsCounter(corpora.TILING).statistics())
