"""Readers against files written by other people's libraries, and against files made to harm."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import pathlib
import tarfile

import pyarrow as pa
import pyarrow.parquet
import pytest
from tensorboardX.record_writer import RecordWriter

from data_pipelines.ingest import storage
from data_pipelines.ingest.config import IngestConfig
from data_pipelines.ingest.errors import IngestError, Skip
from data_pipelines.ingest.readers import webdataset as webdataset_reader
from data_pipelines.ingest.readers.registry import READERS, make_reader
from data_pipelines.ingest.samples import Sample, SourceTags, to_record
from data_pipelines.records import Record
from hypervl_jax.text.conversation import Turn
from tests.data_pipelines.ingest.raw_sources import caption, picture, write_jsonl, write_webdataset


def read_all(source: str, **options: str) -> list[Record | Skip]:
    """All samples of a source, as records or skips."""
    reader = make_reader(source, options)
    return [as_record(item) for unit in reader.units() for item in reader.read(unit)]


def as_record(item: Sample | Skip, config: IngestConfig | None = None) -> Record | Skip:
    try:
        return item if isinstance(item, Skip) else to_record(item, SourceTags("s", "t"), config or IngestConfig())
    except Skip as skip:
        return skip


def reasons(items: list[Record | Skip]) -> list[str]:
    return [item.reason for item in items if isinstance(item, Skip)]


def test_every_reader_has_a_class() -> None:
    pytest.importorskip("tensorflow_datasets")
    for place in READERS.values():
        module, _, name = place.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_unknown_kind_and_option_are_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(IngestError, match="kinds are jsonl, llava"):
        make_reader("csv:x", {})
    with pytest.raises(IngestError, match="no option 'speed'; it has images, per_unit"):
        make_reader("llava:x.json", {"speed": "1"})
    with pytest.raises(IngestError, match="names no file"):
        make_reader(f"jsonl:{tmp_path}/nothing-*.jsonl", {}).units()


def test_webdataset_of_the_library(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("webdataset")
    write_webdataset(tmp_path / "tars", count=8, per_shard=5)
    records = read_all(f"webdataset:{tmp_path}/tars/{{00000..00001}}.tar")
    assert [record.images[0] for record in records] == [picture(number) for number in range(8)]
    assert records[3].turns == (Turn("user", "<image>"), Turn("assistant", caption(3)))
    assert records[3].metadata["url"] == "http://a.example/3"


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def test_img2dataset_layout(tmp_path: pathlib.Path) -> None:
    """00000.tar with KEY.jpg, KEY.txt, KEY.json, and a table and statistics beside it that are no samples."""
    with tarfile.open(tmp_path / "00000.tar", "w") as archive:
        for number in range(3):
            details = {
                "url": f"https://b.example/{number}.jpg",
                "caption": caption(number),
                "key": f"{number:09d}",
                "status": "success",
            }
            details |= {"error_message": None, "width": 64, "height": 64, "exif": "{}", "sha256": "0" * 64}
            add_member(archive, f"{number:09d}.jpg", picture(number, form="JPEG"))
            add_member(archive, f"{number:09d}.txt", caption(number).encode())
            add_member(archive, f"{number:09d}.json", json.dumps(details).encode())
    (tmp_path / "00000.parquet").write_bytes(b"table")
    (tmp_path / "00000_stats.json").write_text("{}")
    records = read_all(f"webdataset:{tmp_path}")
    assert [record.turns[1].text for record in records] == list(map(caption, range(3)))
    assert [record.metadata["url"] for record in records] == [f"https://b.example/{number}.jpg" for number in range(3)]


def test_hostile_tar_writes_nothing_and_is_counted(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset_reader, "MAX_MEMBER_BYTES", 10_000)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "in" / "x.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        for name in ("../../escaped", "/tmp/hypervl-escaped"):
            add_member(archive, f"{name}.png", picture(1))
            add_member(archive, f"{name}.txt", b"outside")
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        add_member(archive, "code.pyd", b"cos\nsystem\n(S'touch ran'\ntR.")
        add_member(archive, "large.png", bytes(20_000))
        add_member(archive, "wrong.json", b"[1, 2]")
        add_member(archive, "nothing.png", b"")
        add_member(archive, "nothing.txt", b"zero bytes")
        add_member(archive, "scan.tif", b"II*\0")
        add_member(archive, "scan.txt", b"not without its picture")
    items = read_all(f"webdataset:{path}")
    kept = [record for record in items if isinstance(record, Record)]
    assert [record.turns[1].text for record in kept] == ["outside", "outside", "not without its picture"]
    assert [len(record.images) for record in kept] == [1, 1, 1]
    assert reasons(items) == ["missing_fields", "member_too_large", "not_json", "undecodable:empty"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in"]
    assert not pathlib.Path("/tmp/hypervl-escaped.png").exists()


def test_truncated_tar_keeps_what_is_whole(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("webdataset")
    write_webdataset(tmp_path / "tars", count=4, per_shard=10)
    path = tmp_path / "tars" / "00000.tar"
    path.write_bytes(path.read_bytes()[:-15_000])
    items = read_all(f"webdataset:{path}")
    assert 1 <= sum(isinstance(item, Record) for item in items) < 4
    assert reasons(items)[-1:] == ["archive_damaged"]


def test_parquet_of_datasets(tmp_path: pathlib.Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "images": datasets.Sequence(datasets.Image()),
            "texts": [{"user": datasets.Value("string"), "assistant": datasets.Value("string")}],
        }
    )
    rows = [
        {
            "images": [{"bytes": picture(number)}, {"bytes": picture(number + 50)}],
            "texts": [{"user": "Compare.", "assistant": f"No {number}."}],
        }
        for number in range(5)
    ]
    datasets.Dataset.from_list(rows, features).to_parquet(str(tmp_path / "train-00000-of-00001.parquet"))
    records = read_all(f"parquet:{tmp_path}/*.parquet")
    assert [record.images for record in records] == [(picture(n), picture(n + 50)) for n in range(5)]
    assert records[2].turns == (Turn("user", "<image><image>Compare."), Turn("assistant", "No 2."))


def test_damaged_parquet_and_missing_bytes(tmp_path: pathlib.Path) -> None:
    table = pa.table(
        {"image": [{"bytes": None, "path": "a.png"}, {"bytes": picture(0), "path": None}], "caption": ["a", "b"]}
    )
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    items = read_all(f"parquet:{tmp_path}")
    assert reasons(items) == ["image_not_embedded", "file_damaged"]
    assert items[1].turns[1].text == "b"


def test_tfds_builder_without_tensorflow(tmp_path: pathlib.Path) -> None:
    tfds = pytest.importorskip("tensorflow_datasets")

    class Notes(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> object:
            kinds = {
                "image": tfds.features.Image(),
                "caption": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(kinds))

        def _split_generators(self, manager: object) -> dict[str, object]:
            return {"train": self._generate_examples(), "test": self._generate_examples()}

        def _generate_examples(self) -> object:
            for number in range(6):
                yield number, {"image": io.BytesIO(picture(number)), "caption": caption(number), "label": number % 2}

    builder = Notes(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    source = f"tfds:{builder.data_dir}"
    records = read_all(source)
    assert sorted(record.turns[1].text for record in records) == sorted(map(caption, range(6)))
    assert {record.images[0] for record in records} == {picture(number) for number in range(6)}
    reader = make_reader(source, {"split": "test"})
    labels = IngestConfig(prompt="Cat or dog?")
    asked = [as_record(sample, labels) for sample in reader.read(reader.units()[0])]
    assert {record.turns[1].text for record in asked} == {"cat", "dog"}
    assert asked[0].turns[0].text == "<image>Cat or dog?"
    with pytest.raises(IngestError, match="no split 'dev'; it has "):
        make_reader(source, {"split": "dev"}).units()
    shard = pathlib.Path(reader.units()[0])
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert [item.reason for item in reader.read(str(shard))] == ["file_damaged"]


def test_tfrecord_of_tensorboardx(tmp_path: pathlib.Path) -> None:
    tfds_reader = pytest.importorskip("data_pipelines.ingest.readers.tfds")
    path = tmp_path / "x.tfrecord-00000-of-00001"
    writer = RecordWriter(str(path))
    for data in (b"one", b"", b"three"):
        writer.write(data)
    writer.close()
    assert list(tfds_reader._examples(path)) == [b"one", b"", b"three"]
    whole = path.read_bytes()
    for damaged in (whole[:-2], whole.replace(b"three", b"thref"), b"\xff" * 40):
        path.write_bytes(damaged)
        assert isinstance(list(tfds_reader._examples(path))[-1], Skip)


def test_llava_json_and_folder(tmp_path: pathlib.Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(picture(0))
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Blotches."}]
    entries = [
        {"id": "0", "image": "a.png", "conversations": talk},
        {"id": "1", "conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Good day."}]},
        {"id": "2", "image": "b.png", "conversations": talk},
        {"id": "3", "image": "../chat.json", "conversations": talk},
        {"id": "4", "conversations": talk},
        {"id": "5", "image": "a.png", "conversations": [{"from": "tool", "value": "x"}]},
        "no object",
    ]
    (tmp_path / "chat.json").write_text(json.dumps(entries))
    items = read_all(f"llava:{tmp_path}/chat.json", images=str(tmp_path / "pictures"), per_unit="3")
    assert items[0].turns == (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "Blotches."))
    assert items[0].images == (picture(0),)
    assert items[1].images == ()
    assert reasons(items) == ["missing_file", "path_outside", "wrong_image_count", "unknown_role", "conversation_type"]


def test_jsonl_plain_and_gzipped(tmp_path: pathlib.Path) -> None:
    write_jsonl(
        tmp_path / "a.jsonl",
        [
            {"text": "One."},
            {"title": "no text"},
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                    {"role": "assistant", "content": "Ho"},
                ]
            },
        ],
    )
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("\n{broken\n[1]\n")
    data = gzip.compress(b'{"text": "Two.", "lang": "en", "license": "CC0-1.0"}\n' * 400, mtime=0)
    (tmp_path / "b.jsonl.gz").write_bytes(data)
    (tmp_path / "c.jsonl.gz").write_bytes(data[:-9])
    items = read_all(f"jsonl:{tmp_path}")
    assert reasons(items) == ["missing_fields", "not_json", "not_json", "file_damaged"]
    assert items[0].turns == (Turn("assistant", "One."),)
    assert items[2].turns == (Turn("user", "Hi"), Turn("assistant", "Ho"))
    assert (items[5].language, items[5].licence) == ("en", "CC0-1.0")


def test_commonest_answer_and_own_field_names() -> None:
    fields = {"image": {"bytes": picture(0)}, "question": "How many?", "answers": ["2", "two", "two"]}
    assert as_record(Sample("k", fields)).turns[1].text == "two"
    config = IngestConfig(fields=IngestConfig().fields.__class__(caption=("alt",)))
    assert as_record(Sample("k", {"image": picture(0), "alt": "Blotches."}), config).turns[1].text == "Blotches."


def test_units_do_not_depend_on_the_listing_order(tmp_path: pathlib.Path) -> None:
    for name in ("b", "a", "c"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}])
    assert [storage.parent(unit) for unit in make_reader(f"jsonl:{tmp_path}", {}).units()] == [str(tmp_path)] * 3
    assert [record.turns[0].text for record in read_all(f"jsonl:{tmp_path}/*.jsonl")] == ["a", "b", "c"]
