"""Lists of conversations of any size, and the pictures that they name in folders and archives."""

from __future__ import annotations

import io
import itertools
import json
import pathlib
import tarfile
import zipfile
from collections.abc import Sequence

import hypothesis
import pytest
from hypothesis import strategies

from data_pipelines.ingest import storage
from data_pipelines.ingest.errors import IngestError, Skip
from data_pipelines.ingest.readers import json_parts, pictures
from data_pipelines.ingest.readers.registry import make_reader
from data_pipelines.records import Record
from tests.data_pipelines.ingest.raw_sources import picture, write_jsonl
from tests.data_pipelines.ingest.test_ingest_readers import read_all, reasons

VALUES = strategies.recursive(
    strategies.none() | strategies.integers() | strategies.text('a,"\\{}[]é\n'),
    lambda inner: strategies.lists(inner) | strategies.dictionaries(strategies.text("a]\\"), inner),
)


def talk(text: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": "Blotches."}]


@hypothesis.settings(
    max_examples=40, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], deadline=None
)
@hypothesis.given(
    entries=strategies.lists(VALUES, max_size=6),
    indent=strategies.sampled_from([None, 1]),
    block=strategies.integers(3, 40),
    size=strategies.integers(1, 5),
)
def test_parts_of_a_list_are_the_list(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, entries: list[object], indent: int, block: int, size: int
) -> None:
    """Against `json.loads` of the whole, wherever the blocks of the pass end."""
    monkeypatch.setattr(storage, "_BLOCK", block)
    path = tmp_path / "x.json"
    path.write_text(json.dumps(entries, indent=indent, ensure_ascii=False), encoding="utf-8")
    hypothesis.assume(path.read_bytes()[:1] == b"[")
    parts = json_parts.split(str(path), size)
    assert list(itertools.chain(*(json_parts.read(str(path), part) for part in parts))) == list(enumerate(entries))
    assert all(part == json_parts.Part.parse(str(part)) for part in parts)
    assert len(parts) <= -(-len(entries) // size) + (not entries)


def test_list_that_breaks_off_and_other_files(tmp_path: pathlib.Path) -> None:
    whole = json.dumps([{"a": ["x,]", {}]}, "b\\", 1]).encode()
    path = tmp_path / "x.json"
    for end in range(1, len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(IngestError, match="breaks off at byte"):
            json_parts.split(str(path), 1)
    for other in (b"", b'{"a": []}\n', b'"text"'):
        path.write_bytes(other)
        with pytest.raises(IngestError, match="is not a JSON list; names of JSON Lines end in"):
            json_parts.split(str(path), 1)


def test_part_that_is_no_json_is_damage_of_the_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.json").write_bytes(b'[{"a": 0}, {broken}, {"a": 1}]')
    items = read_all(f"llava:{tmp_path}/x.json", per_unit="1")
    assert reasons(items) == ["missing_fields", "file_damaged", "missing_fields"]


@pytest.mark.parametrize("more", ['[{"b": 1}]', ',{"b": 1}]', "null", "]", "\0"])
@pytest.mark.parametrize("block", [5, 2**20])
def test_what_follows_a_list_is_not_lost_in_silence(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, more: str, block: int
) -> None:
    monkeypatch.setattr(storage, "_BLOCK", block)
    (tmp_path / "x.json").write_text(f'[{{"a": 0}}, {{"a": 1}}]\n\n {more}\n')
    with pytest.raises(IngestError, match=r"x\.json goes on after its list, which ends before byte 20"):
        make_reader(f"llava:{tmp_path}/x.json", {"per_unit": "1"}).units()
    (tmp_path / "x.json").write_text('[{"a": 0}, {"a": 1}] \r\n\t\n')
    assert len(make_reader(f"llava:{tmp_path}/x.json", {"per_unit": "1"}).units()) == 2


def test_list_that_another_bracket_ends_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.json").write_text('[{"a": 0}, {"a": 1}}')
    with pytest.raises(IngestError, match="the list ends with '}'"):
        json_parts.split(str(tmp_path / "x.json"), 1)


def test_large_parts_end_early_and_large_entries_are_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_parts, "PART_BYTES", 100)
    write_jsonl(tmp_path / "x.jsonl", [{"text": "x" * 40}] * 10)
    (tmp_path / "x.json").write_text(json.dumps([{"text": "x" * 40}] * 10))
    for name in ("x.json", "x.jsonl"):
        assert [part.first for part in json_parts.split(str(tmp_path / name), 10_000)] == [0, 2, 4, 6, 8]
    monkeypatch.setattr(json_parts, "ENTRY_BYTES", 45)
    for name in ("x.json", "x.jsonl"):
        with pytest.raises(IngestError, match=r"entry 0 at byte \d has over 45 bytes"):
            json_parts.split(str(tmp_path / name), 10_000)


def test_json_lines_are_read_in_parts(tmp_path: pathlib.Path) -> None:
    entries = [{"image": f"{number}.png", "conversations": talk(f"No {number}?")} for number in range(7)]
    for number in range(7):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    write_jsonl(tmp_path / "chat.jsonl", entries)
    with (tmp_path / "chat.jsonl").open("a") as file:
        file.write('\n{broken\n[1]\n{"a": 1}\n{"video": "7.mp4"}')  # and no line break at the end
    items = read_all(f"llava:{tmp_path}/chat.jsonl", per_unit="2")
    kept = [item for item in items if isinstance(item, Record)]
    assert [record.images for record in kept] == [(picture(number),) for number in range(7)]
    assert [record.metadata["key"].rpartition(":")[2] for record in kept] == list("0123456")
    assert reasons(items) == ["not_json", "conversation_type", "missing_fields", "video"]


def zip_of(members: dict[str, bytes], **options: object) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def write_tar(path: pathlib.Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_pictures_in_archives_parts_and_folders(tmp_path: pathlib.Path) -> None:
    """A list beside a zip in parts, as OS-Atlas has them, a deflated zip, a tar and a folder."""
    whole = zip_of({"shots/a.png": picture(0), "shots/b/c.png": picture(1)})
    for place, part in enumerate(("aa", "ab", "ac")):
        (tmp_path / f"shots_part_{part}").write_bytes(whole[place * 999 : (place + 1) * 999 if place < 2 else None])
    (tmp_path / "more.zip").write_bytes(zip_of({"d.png": picture(2)}, compression=zipfile.ZIP_DEFLATED))
    write_tar(tmp_path / "more.tar", {"./e.png": picture(3)})
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "f.png").write_bytes(picture(4))
    names = ["a.png", "b/c.png", "d.png", "e.png", "f.png", "shots/a.png"]
    write_jsonl(tmp_path / "x.jsonl", [{"image": name, "conversations": talk("?")} for name in names])
    images = "{folder}/shots_part_*,{folder}/more.zip,{folder}/more.tar,{folder}/loose"
    records = read_all(f"llava:{tmp_path}/x.jsonl", images=images)
    assert [record.images for record in records] == [(picture(seed),) for seed in (0, 1, 2, 3, 4, 0)]


def test_list_and_zip_in_a_remote_store() -> None:
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    entries = [{"image": "a.png", "conversations": talk(f"{number}?")} for number in range(3)]
    store.pipe_file("/lists/x.json", json.dumps(entries).encode())
    whole = zip_of({"shots/a.png": picture(0)})
    store.pipe_file("/lists/part_a", whole[:500])
    store.pipe_file("/lists/part_b", whole[500:])
    records = read_all("llava:memory://lists/x.json", images="{folder}/part_*", per_unit="2")
    assert [record.images for record in records] == [(picture(0),)] * 3


def read_names(location: str, names: Sequence[str]) -> list[str]:
    places, found = pictures.find(location, ""), []
    for name in names:
        try:
            found.append(str(len(pictures.read(places, name))))
        except Skip as skip:
            found.append(skip.reason)
    return found


def test_names_of_folders_and_of_other_file_systems_are_counted(tmp_path: pathlib.Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "0.png").write_bytes(b"1")
    (tmp_path / "x.zip").write_bytes(zip_of({"a::b": b"22"}))
    names = ["sub", ".", "sub/", "0.png::zip", "zip::0.png", "0.png"]
    expected = [*["not_a_file"] * 3, "path_outside", "path_outside", "1"]
    assert read_names(str(tmp_path), names) == expected
    assert read_names(f"{tmp_path}/x.zip,{tmp_path}", ["a::b"]) == ["2"]
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe_file("/folders/sub/0.png", b"1")
    assert read_names("memory://folders", ["sub", "sub/0.png"]) == ["not_a_file", "1"]


def test_hostile_and_damaged_archives(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "PICTURE_BYTES", 5_000)
    bomb = zip_of({"bomb": bytes(1_000_000)}, compression=zipfile.ZIP_DEFLATED)
    claim, size = bomb.rindex(b"PK\x01\x02") + 24, 4
    (tmp_path / "lies.zip").write_bytes(bomb[:claim] + (10).to_bytes(size, "little") + bomb[claim + size :])
    (tmp_path / "bomb.zip").write_bytes(bomb)
    whole = zip_of({"x/a": b"1", "y/a": b"22", "../up": b"333", "flip": b"a text of its own"})
    (tmp_path / "x.zip").write_bytes(whole.replace(b"of its own", b"of my own.", 1))
    write_tar(tmp_path / "x.tar", {"big": bytes(6_000), "small": b"55555", "../out": b"666666"})
    monkeypatch.chdir(tmp_path)
    assert read_names(f"{tmp_path}/bomb.zip", ["bomb"]) == ["member_too_large"]
    assert read_names(f"{tmp_path}/lies.zip", ["bomb"]) == ["member_damaged"]
    names = ["x/a", "y/a", "a", "up", "../up", "/x/a", "flip", "none", 7]
    expected = ["1", "2", "ambiguous_name", "3", "path_outside", "path_outside", "member_damaged", "missing_file"]
    assert read_names(f"{tmp_path}/x.zip", names) == [*expected, "path_outside"]
    assert read_names(f"{tmp_path}/x.tar", ["big", "small", "out"]) == ["member_too_large", "5", "6"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bomb.zip", "lies.zip", "x.tar", "x.zip"]
    (tmp_path / "cut.zip").write_bytes(whole[:-30])
    (tmp_path / "x.tar.gz").write_bytes(b"")
    for location, message in ((f"{tmp_path}/cut.zip", "not a whole zip"), (f"{tmp_path}/x.tar.gz", "unpack it")):
        with pytest.raises(IngestError, match=message):
            pictures.find(location, "")
