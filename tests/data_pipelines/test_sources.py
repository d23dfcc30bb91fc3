import itertools
import pathlib
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pytest
from corpora import TILING, mixed_records, sample, tokenizer, write

from data_pipelines.errors import RecordError
from data_pipelines.packing import Budget
from data_pipelines.records import Record, ShardEntry, content_hash
from data_pipelines.sources import DamagedShard, Source, read_alphas, sampled_lengths
from hypervl_jax.architecture import TilingConfig
from hypervl_jax.text.conversation import encode_conversation
from hypervl_jax.vision.decoding import decode_image

RECORDS = mixed_records(25, "s", images=2)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("sources")
    write(root, "s", RECORDS, per_shard=8)
    return root / "train" / "s"


@pytest.fixture
def copied(written: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(written, tmp_path / "s"))


def opened(directory: pathlib.Path) -> Source:
    return Source(directory, tokenizer().fingerprint)


def encoded_length(record: Record, source: Source, number: int, alpha: int, tiling: TilingConfig) -> int:
    return len(encode_conversation(record.turns, tokenizer(), source.plans(number, alpha, tiling), tiling).tokens)


def test_random_access_over_shards(written: pathlib.Path) -> None:
    source = opened(written)
    assert len(source) == 25
    for number in (24, 0, 7, 8, 16, 15):
        assert source.record(number) == RECORDS[number]


def test_sizes_are_those_of_the_decoded_images(written: pathlib.Path) -> None:
    source = opened(written)
    for number, record in enumerate(RECORDS):
        assert source.sizes(number).images == [decode_image(image).shape[:2] for image in record.images]


@pytest.mark.parametrize("alpha", [1000, 370])
@pytest.mark.parametrize("extras", [False, True])
def test_cost_is_the_length_of_the_encoded_conversation(written: pathlib.Path, alpha: int, extras: bool) -> None:
    tiling = TilingConfig(64, 8, 2, 4, thumbnail=extras, separators=extras)
    source = opened(written)
    for number, record in enumerate(RECORDS):
        tokens, tiles = source.cost(number, alpha, tiling)
        assert tokens == encoded_length(record, source, number, alpha, tiling)
        assert tiles == sum(plan.tiles for plan in source.plans(number, alpha, tiling))


def test_records_outside_the_source_are_refused(written: pathlib.Path) -> None:
    for number in (-1, 25):
        with pytest.raises(IndexError, match="which has 25"):
            opened(written).record(number)


def test_pickles_small_and_reads_after(written: pathlib.Path) -> None:
    source = opened(written)
    source.record(0)
    data = pickle.dumps(source)
    assert len(data) < 1000
    assert pickle.loads(data).record(20) == RECORDS[20]


def test_another_tokenizer_is_refused(written: pathlib.Path) -> None:
    with pytest.raises(RecordError, match="make the source again with this tokenizer"):
        Source(written, "another")


def test_a_truncated_shard_is_refused_at_open(copied: pathlib.Path) -> None:
    shard = sorted(copied.glob("*.array_record"))[1]
    shard.write_bytes(shard.read_bytes()[:-70_000])
    with pytest.raises(RecordError, match=shard.name):
        opened(copied)


def test_a_shard_of_the_right_size_without_records_stops_at_the_first_read(copied: pathlib.Path) -> None:
    shard = sorted(copied.glob("*.array_record"))[1]
    shard.write_bytes(bytes(shard.stat().st_size))
    source = opened(copied)
    assert source.record(0) == RECORDS[0]
    with pytest.raises(DamagedShard, match=f"{shard.name} has 0 records, the manifest says 8"):
        source.record(8)


def test_an_index_of_other_records_is_refused(copied: pathlib.Path) -> None:
    indexes = sorted(copied.glob("*.index.arrow"))
    shutil.copy(indexes[-1], indexes[0])
    with pytest.raises(RecordError, match="has 1 records, the manifest says 8"):
        opened(copied)


@pytest.mark.parametrize("place", [0.3, 0.5, 0.7])
def test_a_damaged_index_stops_at_its_first_use(copied: pathlib.Path, place: float) -> None:
    index = sorted(copied.glob("*.index.arrow"))[1]
    data = bytearray(index.read_bytes())
    data[int(len(data) * place)] ^= 1
    index.write_bytes(data)
    source = Source(copied, tokenizer().fingerprint, check=False)
    assert len(source.sizes(7).images) == len(RECORDS[7].images)
    with pytest.raises(DamagedShard, match=f"{index.name} is missing or differs from its checksum"):
        source.sizes(8)
    index.unlink()
    with pytest.raises(DamagedShard, match=f"{index.name} is missing or differs from its checksum"):
        source.cost(8, 1000, TILING)


def test_a_damaged_record_names_its_shard_and_spares_the_others(copied: pathlib.Path) -> None:
    shard = sorted(copied.glob("*.array_record"))[0]
    data = bytearray(shard.read_bytes())
    data[300] ^= 255
    shard.write_bytes(data)
    source = opened(copied)
    with pytest.raises(RecordError, match=shard.name) as caught:
        source.record(0)
    assert not isinstance(caught.value, DamagedShard)
    assert source.record(7) == RECORDS[7]
    with pytest.raises(RecordError, match=f"{shard.name} .*checksum"):
        source.verify()


def test_checksums_of_an_intact_source(written: pathlib.Path) -> None:
    opened(written).verify()


def test_sampled_lengths_are_those_that_fit_a_row(tmp_path: pathlib.Path) -> None:
    write(tmp_path, "s", [sample(i, [(64, 64)] * (i % 2), 3) for i in range(10)])
    source = opened(tmp_path / "train" / "s")
    costs = [source.cost(i, 1000, TILING)[0] for i in range(10)]
    assert sampled_lengths(source, Budget(100, 1), TILING, splits=False) == costs
    assert sampled_lengths(source, Budget(100, 0), TILING, splits=False) == costs[::2]
    assert sampled_lengths(source, Budget(2, 1), TILING, splits=True) == [2]
    with pytest.raises(RecordError, match="no record that fits"):
        sampled_lengths(source, Budget(2, 1), TILING, splits=False)


def test_statistics_come_from_all_over_a_large_source_and_open_few_shards() -> None:
    source = Source.__new__(Source)
    counts = [3, 7000, 0, 11, 40_000, 1, 900] * 40
    source._shards = [ShardEntry(f"{i}", count, 0, "", "") for i, count in enumerate(counts) if count]
    source._starts = list(itertools.accumulate((shard.records for shard in source._shards), initial=0))
    records = source.spread()
    assert all(0 <= record < len(source) for record in records)
    assert 2000 < len(set(records)) <= 64 * 64
    assert len({source._locate(record)[0] for record in records}) <= 64
    assert np.histogram(records, 8, (0, len(source)))[0] == pytest.approx(len(records) / 8, rel=0.2)


def write_alphas(path: pathlib.Path, columns: dict[str, list]) -> pathlib.Path:
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def test_alphas_are_found_by_content_hash(written: pathlib.Path, tmp_path: pathlib.Path) -> None:
    chosen = {3: 0.25, 20: 0.5, 8: 1.0}
    columns = {
        "content_hash": [content_hash(RECORDS[i]) for i in chosen] + ["0" * 32],
        "alpha": [*chosen.values(), 0.1],
    }
    alphas = opened(written).alphas(read_alphas(write_alphas(tmp_path / "alphas.arrow", columns)))
    expected = np.full(25, 1000)
    expected[[3, 20]] = 250, 500
    np.testing.assert_array_equal(alphas, expected)


@pytest.mark.parametrize("columns", [{"content_hash": ["a"], "alpha": [1.5]}, {"hash": ["a"], "alpha": [1.0]}])
def test_a_bad_table_of_alphas_is_refused(columns: dict[str, list], tmp_path: pathlib.Path) -> None:
    path = write_alphas(tmp_path / "alphas.arrow", columns)
    with pytest.raises(RecordError, match="no table of predicted"):
        read_alphas(path)
