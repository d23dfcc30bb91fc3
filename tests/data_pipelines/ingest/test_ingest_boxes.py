"""Boxes as text: BLIP-3's marked captions in img2dataset's layout, and OS-Atlas's elements."""

from __future__ import annotations

import json
import pathlib
import tarfile

import hypothesis
import pytest
from hypothesis import strategies

from data_pipelines.ingest.boxes import STEPS, box_text, marked_caption, place, plain_caption
from data_pipelines.ingest.config import FieldNames, IngestConfig
from data_pipelines.ingest.errors import Skip
from data_pipelines.ingest.readers.registry import make_reader
from data_pipelines.ingest.samples import Sample
from data_pipelines.records import Record
from hypervl_jax.text.conversation import Turn
from tests.data_pipelines.ingest.raw_sources import picture
from tests.data_pipelines.ingest.test_ingest_readers import add_member, as_record

SHOP = "<ocr>MACK SHOP</ocr><bbox>[0.192, 0.037][0.817, 0.203]</bbox>"
"""Level 6 of the example in the paper on BLIP-3 (arXiv 2408.08872)."""

CAPTIONS = [
    {"text": 'The text "MACK SHOP".', "granularity": 0, "include_datacomp_raw_cap": False},
    {"text": f"Our shop. {SHOP}", "granularity": 5, "include_datacomp_raw_cap": True},
    {
        "text": f"{SHOP}, <ocr>OPEN</ocr><bbox>[0, 0.5][1, 1.0]</bbox>",
        "granularity": 5,
        "include_datacomp_raw_cap": False,
    },
]
HELMET = "A <object>red jersey</object><bbox>[0.205, 0.207][0.638, 0.994]</bbox> on a player."


def test_marks_of_the_paper_in_our_form() -> None:
    assert plain_caption(SHOP) == "MACK SHOP [192, 37, 817, 203]"
    assert plain_caption(HELMET) == "A red jersey [205, 207, 638, 994] on a player."
    expected = "MACK SHOP [192, 37, 817, 203], OPEN [0, 500, 999, 999]"
    assert marked_caption(json.dumps(CAPTIONS)) == marked_caption(CAPTIONS) == expected
    assert marked_caption([[HELMET, 2, True], ["no boxes", 0, True]]) == plain_caption(HELMET)


@hypothesis.given(side=strategies.integers(1, 20_000), pixel=strategies.integers(0, 20_000))
def test_a_place_is_found_again_within_a_thousandth(side: int, pixel: int) -> None:
    pixel = min(pixel, side)
    assert 0 <= place(pixel / side) < STEPS
    assert abs(place(pixel / side) / STEPS - pixel / side) <= 1 / STEPS + 1e-12


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([0, 0, 1], "box_malformed"),
        ([0, 0, 1, True], "box_malformed"),
        ([0, 0, float("nan"), 1], "box_malformed"),
        ([0.5, 0, 0.4, 1], "box_malformed"),
        ([10, 20, 300, 400], "box_not_fractions"),
        ("0 0 1 1", "box_malformed"),
    ],
)
def test_other_boxes_are_failures(value: object, reason: str) -> None:
    with pytest.raises(Skip) as found:
        box_text(value)
    assert (found.value.reason, found.value.failure) == (reason, True)


@pytest.mark.parametrize(
    ("captions", "reason"),
    [
        ("no JSON", "no_places"),
        ('{"text": ""}', "no_places"),
        ('[{"text": "No boxes."}, 7]', "no_places"),
        (json.dumps([{"text": "<ocr>A</ocr><bbox>[0.1, 0.2]"}]), "box_malformed"),
        (json.dumps([{"text": "<ocr>A</ocr><bbox>[1, 2][30, 40]</bbox>"}]), "box_not_fractions"),
    ],
)
def test_other_captions_are_failures(captions: str, reason: str) -> None:
    config = IngestConfig(fields=FieldNames(places=("captions",)), prompt="Read it.")
    found = as_record(Sample("k", {"image": picture(0), "captions": captions}), config)
    assert (found.reason, found.failure) == (reason, True)


def test_blip3_by_img2dataset(tmp_path: pathlib.Path) -> None:
    """`--caption_col captions` writes the JSON text to KEY.txt and, as `caption`, to KEY.json."""
    with tarfile.open(tmp_path / "00000.tar", "w") as archive:
        text = json.dumps(CAPTIONS)
        add_member(archive, "000000000.jpg", picture(0, form="JPEG"))
        details = {"url": "https://b.example/0.jpg", "caption": text, "key": "000000000", "status": "success"}
        add_member(archive, "000000000.json", json.dumps(details).encode())
        add_member(archive, "000000000.txt", text.encode())
    reader = make_reader(f"webdataset:{tmp_path}/00000.tar", {})
    (sample,) = reader.read(reader.units()[0])
    config = IngestConfig(
        fields=FieldNames(places=("caption",)), prompt="Read the text, with its places.", images="required"
    )
    record = as_record(sample, config)
    assert isinstance(record, Record), record
    assert record.turns[0] == Turn("user", "<image>Read the text, with its places.")
    assert record.turns[1].text.startswith("MACK SHOP [192, 37, 817, 203], OPEN")
    assert record.metadata["url"] == "https://b.example/0.jpg"


def test_elements_of_os_atlas(tmp_path: pathlib.Path) -> None:
    """Both forms of its lists: an object an element, and an object a screenshot with its elements."""
    (tmp_path / "shot.png").write_bytes(picture(0))
    element = {"instruction": "save the file", "bbox": [0.1, 0.25, 0.2, 0.5], "data_type": "button"}
    several = [element, {"instruction": "close", "bbox": [0.9, 0, 1, 0.0625]}]
    rows = [
        {"img_filename": "shot.png", **element},
        {"img_filename": "shot.png", "elements": several},
        {"img_filename": "shot.png", "elements": [{"instruction": "no box"}]},
        {"img_filename": "shot.png", "elements": []},
    ]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    reader = make_reader(f"llava:{tmp_path}/x.json", {})
    config = IngestConfig(fields=FieldNames(elements=("elements",), box=("bbox",)), prompt="Where is this?")
    one, two, *others = [as_record(sample, config) for unit in reader.units() for sample in reader.read(unit)]
    first = (Turn("user", "<image>Where is this? save the file"), Turn("assistant", "[100, 250, 200, 500]"))
    assert one.turns == first
    assert two.turns == (*first, Turn("user", "Where is this? close"), Turn("assistant", "[900, 0, 999, 62]"))
    assert [item.reason for item in others] == ["missing_fields", "missing_fields"]
