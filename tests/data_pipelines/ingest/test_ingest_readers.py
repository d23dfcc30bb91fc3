"""Readers against files written by other people's libraries, and against files made to harm."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import pathlib
import tarfile
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet
import pytest
from tensorboardX.record_writer import RecordWriter

from data_pipelines.ingest import storage
from data_pipelines.ingest.config import FieldNames, IngestConfig
from data_pipelines.ingest.errors import IngestError, Skip
from data_pipelines.ingest.readers import webdataset as webdataset_reader
from data_pipelines.ingest.readers.registry import READERS, make_reader
from data_pipelines.ingest.samples import Sample, SourceTags, to_record
from data_pipelines.records import Record
from hypervl_jax.text.conversation import Turn, count_image_slots
from tests.data_pipelines.ingest.raw_sources import caption, picture, write_jsonl, write_webdataset

SHOWN = {"bytes": picture(0), "path": "0.png"}
"""A picture as Hugging Face's `datasets` keeps it."""


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
    with pytest.raises(IngestError, match="kinds are interleaved, jsonl, llava"):
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
    assert reasons(items) == [
        "member_is_link",
        "missing_fields",
        "member_too_large",
        "not_json",
        "undecodable:empty",
    ]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in"]
    assert not pathlib.Path("/tmp/hypervl-escaped.png").exists()


def test_truncated_tar_keeps_what_is_whole(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("webdataset")
    write_webdataset(tmp_path / "tars", count=4, per_shard=10)
    path = tmp_path / "tars" / "00000.tar"
    path.write_bytes(path.read_bytes()[:-15_000])
    items = read_all(f"webdataset:{path}")
    assert 1 <= sum(isinstance(item, Record) for item in items) < 4
    assert reasons(items)[-1:] == ["file_damaged"]


def write_tar(path: pathlib.Path, keys: Sequence[int], kinds: Sequence[str] = ("png", "txt")) -> list[int]:
    """A tar of captioned pictures; returns where each member begins."""
    with tarfile.open(path, "w") as archive:
        for key in keys:
            for kind in kinds:
                add_member(archive, f"{key}.{kind}", caption(key).encode() if kind == "txt" else picture(key))
    with tarfile.open(path) as archive:
        return [member.offset for member in archive]


@pytest.mark.parametrize("damage", ["flipped bit", "zeroed header", "cut between members", "second archive"])
def test_damaged_tar_does_not_end_in_silence(tmp_path: pathlib.Path, damage: str) -> None:
    """`tarfile` takes each of these for the end of the archive."""
    path = tmp_path / "x.tar"
    third = write_tar(path, range(5))[6]
    whole = bytearray(path.read_bytes())
    if damage == "flipped bit":
        whole[third + 3] ^= 8
    elif damage == "zeroed header":
        whole[third : third + 512] = bytes(512)
    elif damage == "cut between members":
        del whole[third:]
    else:
        whole = whole * 2
    path.write_bytes(bytes(whole))
    items = read_all(f"webdataset:{path}")
    assert reasons(items) == ["file_damaged"]
    assert len(items) - 1 == (4 if damage == "second archive" else 2)


def test_last_caption_before_the_damage_is_no_text(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.tar"
    last_picture = write_tar(path, range(2), ("txt", "png"))[3]
    path.write_bytes(path.read_bytes()[: last_picture + 700])
    items = read_all(f"webdataset:{path}")
    assert [len(item.images) for item in items if isinstance(item, Record)] == [1]
    assert reasons(items) == ["file_damaged"]


def test_linked_picture_is_counted_with_its_caption(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.tar"
    write_tar(path, [0])
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.LNKTYPE, "0.png"
        archive.addfile(link)
        add_member(archive, "1.txt", b"A caption without its picture.")
    assert reasons(read_all(f"webdataset:{path}")) == ["member_is_link"]


def test_member_that_occurs_twice_is_counted(tmp_path: pathlib.Path) -> None:
    """One record of two pictures and the last caption would be neither sample; damage of the file is not hidden by it."""
    path = tmp_path / "x.tar"
    write_tar(path, [0, 1, 1, 2])
    items = read_all(f"webdataset:{path}")
    assert [item.images for item in items if isinstance(item, Record)] == [(picture(0),), (picture(2),)]
    assert reasons(items) == ["duplicate_member"]
    assert items[1].failure
    third = write_tar(path, [0, 1, 1])[-1]
    path.write_bytes(path.read_bytes()[:third])
    assert reasons(read_all(f"webdataset:{path}")) == ["file_damaged"]


def test_pictures_are_in_the_order_of_their_numbers(tmp_path: pathlib.Path) -> None:
    """`webdataset.TarWriter` sorts the members of a sample as text."""
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        pictures = {f"page{number}.png": picture(number) for number in range(12)}
        writer.write({"__key__": "a", "txt": "Twelve pages.", **pictures})
    with tarfile.open(tmp_path / "x.tar") as archive:
        assert archive.getnames()[1:4] == ["a.page1.png", "a.page10.png", "a.page11.png"]
    (record,) = read_all(f"webdataset:{tmp_path}/x.tar")
    assert list(record.images) == [picture(number) for number in range(12)]


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


def test_column_that_a_parquet_does_not_have_is_refused(tmp_path: pathlib.Path) -> None:
    pa.parquet.write_table(pa.table({"image": [picture(0)], "text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(IngestError, match="no column 'imagee'; there are image, text"):
        read_all(f"parquet:{tmp_path}", columns="imagee,text")


def test_tfds_builder_without_tensorflow(tmp_path: pathlib.Path) -> None:
    tfds = pytest.importorskip("tensorflow_datasets")

    class Notes(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> object:
            kinds = {
                "image": tfds.features.Image(),
                "caption": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["cat", "dog"]),
                "views": tfds.features.Sequence(tfds.features.Image()),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(kinds))

        def _split_generators(self, manager: object) -> dict[str, object]:
            return {"train": self._generate_examples(), "test": self._generate_examples()}

        def _generate_examples(self) -> object:
            for number in range(6):
                views = [io.BytesIO(picture(number + more)) for more in (100, 200)]
                described = {"caption": caption(number), "label": number % 2, "views": views}
                yield number, {"image": io.BytesIO(picture(number)), **described}

    builder = Notes(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    source = f"tfds:{builder.data_dir}"
    assert reasons(read_all(source)) == ["unused_picture"] * 6
    reader, one = make_reader(source, {}), IngestConfig(fields=FieldNames(ignored=("views",)))
    samples = [sample for unit in reader.units() for sample in reader.read(unit)]
    records = [as_record(sample, one) for sample in samples]
    assert sorted(record.turns[1].text for record in records) == sorted(map(caption, range(6)))
    assert {record.images[0] for record in records} == {picture(number) for number in range(6)}
    several = IngestConfig(fields=FieldNames(images=("views",), ignored=("image",)))
    expected = {(picture(number + 100), picture(number + 200)) for number in range(6)}
    assert {as_record(sample, several).images for sample in samples} == expected
    reader = make_reader(source, {"split": "test"})
    labels = IngestConfig(prompt="Cat or dog?", fields=one.fields)
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
    assert list(tfds_reader._examples(path, 3)) == [b"one", b"", b"three"]
    whole = path.read_bytes()
    for damaged in (whole[:-2], whole.replace(b"three", b"thref"), b"\xff" * 40, whole[: -(8 + 4 + 5 + 4)], b""):
        path.write_bytes(damaged)
        assert isinstance(list(tfds_reader._examples(path, 3))[-1], Skip)


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
        {"id": "5", "image": "a.png", "conversations": [{"from": "narrator", "value": "x"}]},
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


@pytest.mark.parametrize(
    "unnamed", [picture(0), {"bytes": picture(0, form="JPEG"), "path": None}, [{"bytes": None, "path": "a/b.WebP"}]]
)
def test_picture_under_another_name_is_not_lost(unnamed: object) -> None:
    fields = {"image_1": unnamed, "caption": "Blotches.", "text": b"BMW and GIF are words"}
    lost = as_record(Sample("k", fields))
    assert (lost.reason, lost.failure) == ("unused_picture", True)
    assert "'image_1' holds a picture" in lost.detail
    assert as_record(Sample("k", {"image": picture(1), **fields})).reason == "unused_picture"
    ignored = IngestConfig(fields=FieldNames(ignored=("image_1",)))
    assert as_record(Sample("k", {"image": picture(1), **fields}), ignored).images == (picture(1),)


def test_pictures_in_several_fields_are_taken_by_a_pattern() -> None:
    fields = {f"image_{number}": {"bytes": picture(number)} for number in (10, 2, 1)} | {
        "image_3": None,
        "caption": "Three.",
    }
    config = IngestConfig(fields=FieldNames(images=("image", "image_*")))
    assert as_record(Sample("k", fields), config).images == (picture(1), picture(2), picture(10))


def test_sources_can_say_whether_they_have_pictures() -> None:
    plain, pictured = Sample("k", {"text": "One."}), Sample("k", {"image": picture(0), "text": "One."})
    for rule, expected in (
        ("any", (Record, Record)),
        ("required", ("picture_missing", Record)),
        ("none", (Record, "picture_unexpected")),
    ):
        for sample, outcome in zip((plain, pictured), expected, strict=True):
            found = as_record(sample, IngestConfig(images=rule))
            assert (found.reason if isinstance(found, Skip) else type(found)) == outcome
    with pytest.raises(IngestError, match="images is 'some'; it must be any or required or none"):
        IngestConfig(images="some")


@pytest.mark.parametrize(
    ("source", "fields"),
    [
        ("docmatix", {"images": [SHOWN, SHOWN], "texts": [{"user": "What is it?", "assistant": "Blotches.", "source": "PDFA"}]}),
        ("pixmo-docs", {"image": SHOWN, "questions": {"question": ["What is it?"], "answer": ["Blotches."]}}),
        ("finevision", {"images": [SHOWN], "texts": [{"user": "What?", "assistant": "That."}], "relevance_ratings": [5], "source": "x"}),
        ("cauldron", {"images": [SHOWN], "texts": [{"user": "What?", "assistant": "That.", "source": "ai2d"}]}),
        ("llava-onevision", {"id": "0", "image": SHOWN, "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]}),
        ("fineweb-edu", {"text": "One.", "url": "http://a.example/1"}),
        ("finemath", {"text": "1 + 1 = 2.", "url": "http://a.example/1"}),
        ("smoltalk", {"messages": [{"content": "Hi", "role": "user"}, {"content": "Ho", "role": "assistant"}], "source": "x"}),
        ("tulu-3", {"id": "0", "messages": [{"content": "Hi", "role": "user"}, {"content": "Ho", "role": "assistant"}], "source": "x"}),
    ],
)  # fmt: skip
def test_fields_of_the_named_sources(source: str, fields: dict[str, object]) -> None:
    """With the settings that docs/sources.md gives; lists of addresses come as img2dataset's layout, which has its own test."""
    names = FieldNames(conversation=("questions",)) if source == "pixmo-docs" else FieldNames()
    shows = "images" in fields or "image" in fields
    record = as_record(Sample("k", fields), IngestConfig(fields=names, images="required" if shows else "none"))
    assert isinstance(record, Record), record
    assert record.turns[-1].role == "assistant"
    assert len(record.images) == count_image_slots(record.turns) == (len(fields.get("images", ["one"])) if shows else 0)


def test_conversations_by_column() -> None:
    """PixMo-Docs' questions, and turns as TFDS gives a sequence of features."""
    config = IngestConfig(fields=FieldNames(conversation=("questions", "turns")))
    questions = {"question": ["How many bars?", "Which is tallest?"], "answer": ["3", "The last."]}
    expected = [
        ("user", "<image>How many bars?"),
        ("assistant", "3"),
        ("user", "Which is tallest?"),
        ("assistant", "The last."),
    ]
    found = as_record(Sample("k", {"image": {"bytes": picture(0), "path": None}, "questions": questions}), config)
    assert [(turn.role, turn.text) for turn in found.turns] == expected
    turns = {"from": [b"human", b"gpt"], "value": [b"Hello?", b"Good day."]}
    assert as_record(Sample("k", {"turns": turns}), config).turns == (
        Turn("user", "Hello?"),
        Turn("assistant", "Good day."),
    )
    skipped = as_record(Sample("k", {"turns": {**turns, "value": [b"Hello?"]}}), config)
    assert (skipped.reason, skipped.detail) == ("conversation_type", "lists of unequal length under from, value")


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
