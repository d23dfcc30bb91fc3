"""The commands and settings of docs/sources.md read files in the layouts that the page describes."""

from __future__ import annotations

import json
import pathlib
import re
import shlex
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet
import pytest

from data_pipelines.ingest.config import load_config
from data_pipelines.ingest.readers.registry import make_reader
from data_pipelines.records import Record, read_manifest
from tests.data_pipelines.corpora import tokenizer
from tests.data_pipelines.ingest.raw_sources import caption, picture, write_jsonl
from tests.data_pipelines.ingest.test_ingest_boxes import CAPTIONS, HELMET
from tests.data_pipelines.ingest.test_ingest_interleaved import write_pages
from tests.data_pipelines.ingest.test_ingest_llava import talk, write_tar, zip_of
from tests.data_pipelines.ingest.test_ingest_pages import document, lines, page, plain
from tests.data_pipelines.ingest.test_ingest_readers import as_record

PAGE = (pathlib.Path(__file__).parents[3] / "docs" / "sources.md").read_text()


def of_the_page(name: str, folder: pathlib.Path) -> tuple[list[str], str]:
    """(source and options, settings as YAML) of a row of the page, for raw files below a folder."""
    (row,) = re.findall(rf"^\| {name} \|.*$", PAGE, re.MULTILINE)
    source, settings = row.split("|")[3:5]
    command = re.search("`([^`]+)`", source)[1].replace("raw/", f"{folder}/raw/")
    named = [text for text in re.findall("`([^`]+)`", settings) if re.match(r"[a-z_]+: ", text)]
    return ["--source", *shlex.split(command)], "\n".join(named)


def blip3(folder: pathlib.Path, captions: object) -> None:
    text = json.dumps(captions)
    details = json.dumps({"url": "u", "caption": text, "key": "0", "status": "success"})
    write_tar(
        folder / "00000.tar", {"0.jpg": picture(0, form="JPEG"), "0.json": details.encode(), "0.txt": text.encode()}
    )


def os_atlas(folder: pathlib.Path) -> None:
    (folder / "mobile_domain").mkdir()
    whole = zip_of({f"amex_images/{number}.png": picture(number) for number in range(3)})
    for place, part in enumerate(("aa", "ab")):
        data = whole[:4000] if not place else whole[4000:]
        (folder / "mobile_domain" / f"amex_images_part_{part}").write_bytes(data)
    boxes = [{"instruction": caption(number), "bbox": [0, 0.1 * number, 0.5, 1]} for number in range(3)]
    entries = [{"img_filename": f"{number}.png", **box} for number, box in enumerate(boxes)]
    (folder / "mobile_domain" / "amex_raw.json").write_text(json.dumps(entries))


def cambrian(folder: pathlib.Path) -> None:
    (folder / "gqa").mkdir()
    (folder / "gqa" / "0.png").write_bytes(picture(0))
    write_jsonl(
        folder / "jsons" / "Cambrian7M.jsonl",
        [{"id": 0, "image": "gqa/0.png", "conversations": talk("?"), "source": "x"}],
    )


def mammoth(folder: pathlib.Path) -> None:
    for kind in ("single", "multi"):
        (folder / f"{kind}_image_data" / kind).mkdir(parents=True)
        (folder / f"{kind}_image_data" / kind / "0.png").write_bytes(picture(0))
    for name, path in (("mammoth_si_10M", "single/0.png"), ("mammoth_ov_2M", "multi/0.png")):
        (folder / f"{name}.json").write_text(
            json.dumps([{"image": path, "conversations": talk("?")}, {"video": "0.mp4"}])
        )


def mantis(folder: pathlib.Path) -> None:
    (folder / "nlvr2").mkdir()
    said = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "Blotches."}]
    row = {"id": "0", "images": [{"bytes": None, "path": "0.png"}], "conversation": said, "source": "x"}
    struct = pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    table = pa.Table.from_pylist([row])
    table = table.set_column(table.schema.get_field_index("images"), "images", table["images"].cast(struct))
    pa.parquet.write_table(table, folder / "nlvr2" / "train-00000-of-00001.parquet")
    (folder / "nlvr2" / "train_images.zip").write_bytes(zip_of({"0.png": picture(0)}))


def pdfa(folder: pathlib.Path) -> None:
    files = {"0.json": lines(["One"], ["Two"]), "0.pdf": document("PDF", [page("One"), page("Two")])}
    write_tar(folder / "pdfa-eng-train-0000.tar", files)


def idl(folder: pathlib.Path) -> None:
    files = {
        "a.json": plain(["One"]),
        "a.pdf": b"-",
        "a.tif": document("TIFF", [page("One", "1")], compression="group4"),
    }
    write_tar(folder / "idl-train-00000.tar", files)


RAW: dict[str, tuple[Callable[[pathlib.Path], object], str]] = {
    "blip3-ocr": (lambda folder: blip3(folder, CAPTIONS), "MACK SHOP [192, 37, 817, 203], OPEN [0, 500, 999, 999]"),
    "blip3-grounding": (
        lambda folder: blip3(folder, [[HELMET, 2, True]]),
        "A red jersey [205, 207, 638, 994] on a player.",
    ),
    "pdfa": (pdfa, "One"),
    "idl": (idl, "One"),
    "os-atlas": (os_atlas, "[0, 0, 500, 999]"),
    "cambrian": (cambrian, "Blotches."),
    "mammoth-vl": (mammoth, "Blotches."),
    "mantis": (mantis, "Blotches."),
    "obelics": (write_pages, "Last."),
}
"""Source -> what makes its raw files, and the last answer of the first record."""


@pytest.mark.parametrize("name", RAW)
def test_layouts_of_the_named_sources(name: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "raw" / name).mkdir(parents=True)
    make, answer = RAW[name]
    make(tmp_path / "raw" / name)
    (_, source, *options), settings = of_the_page(name, tmp_path)
    (tmp_path / "filters.yaml").write_text(settings)
    reader = make_reader(source, dict(option.split("=", 1) for option in options[1::2]))
    config = load_config(f"{tmp_path}/filters.yaml")
    items = [as_record(item, config) for unit in reader.units() for item in reader.read(unit)]
    assert not [item for item in items if not isinstance(item, Record) and item.failure]
    records = [item for item in items if isinstance(item, Record)]
    assert records[0].images
    assert records[0].turns[-1].text == answer
    assert records[0].turns[0].text != "<image>" or name == "obelics"


def test_documents_from_the_command_line(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("apache_beam")
    from tests.data_pipelines.ingest.test_ingest_command import ingest

    (tmp_path / "raw" / "pdfa").mkdir(parents=True)
    pdfa(tmp_path / "raw" / "pdfa")
    source, settings = of_the_page("pdfa", tmp_path)
    (tmp_path / "filters.yaml").write_text(settings)
    tokenizer().save(tmp_path)
    output = tmp_path / "train" / "pdfa"
    given = {"--name": "pdfa", "--output": output, "--licence": "x", "--config": tmp_path / "filters.yaml"}
    status, _, errors = ingest([*source, *(str(text) for pair in given.items() for text in pair)])
    assert (status, errors) == (0, "")
    assert read_manifest(output).records == 2
