"""Documents of pages: PDF files drawn by PDFium, TIFF files by Pillow, both written by others' libraries."""

from __future__ import annotations

import io
import json
import pathlib
import signal
import subprocess
import sys
import tarfile
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_pipelines.ingest import page_pictures
from data_pipelines.ingest.config import IngestConfig
from data_pipelines.ingest.errors import IngestError
from data_pipelines.ingest.readers.registry import make_reader
from data_pipelines.records import Record
from hypervl_jax.text.conversation import Turn
from hypervl_jax.vision.decoding import decode_image
from tests.data_pipelines.ingest.test_ingest_readers import add_member, as_record

pytest.importorskip("pypdfium2")

SETTINGS = IngestConfig(prompt="Transcribe this page.", images="required")


def page(text: str, mode: str = "RGB", size: tuple[int, int] = (300, 200)) -> Image.Image:
    picture = Image.new(mode, size, "white")
    ImageDraw.Draw(picture).text((20, 20), text, fill="black", font_size=32)
    return picture


def document(kind: str, pages: Sequence[Image.Image], **options: object) -> bytes:
    buffer = io.BytesIO()
    pages[0].save(buffer, kind, save_all=True, append_images=list(pages[1:]), **options)
    return buffer.getvalue()


def write_tar(path: pathlib.Path, documents: Sequence[dict[str, bytes]]) -> str:
    with tarfile.open(path, "w") as archive:
        for number, files in enumerate(documents):
            for kind, data in files.items():
                add_member(archive, f"{number:07d}.{kind}", data)
    return f"pages:{path}"


def read_all(source: str, **options: str) -> list[object]:
    reader = make_reader(source, options)
    return [as_record(item, SETTINGS) for unit in reader.units() for item in reader.read(unit)]


def lines(*pages: Sequence[str]) -> bytes:
    """As pdfa-eng-wds has them."""
    places = {"bbox": [[0.1, 0.1, 0.5, 0.1]], "score": [1.0]}
    described = [
        {"lines": {"text": list(text), **places}, "words": {"text": ["no"]}, "images_bbox": []} for text in pages
    ]
    return json.dumps({"pages": described}).encode()


def plain(*pages: Sequence[str]) -> bytes:
    """As idl-wds has them."""
    return json.dumps({"pages": [{"text": list(text), "bbox": [], "poly": [], "score": []} for text in pages]}).encode()


def test_pages_of_a_pdf(tmp_path: pathlib.Path) -> None:
    drawn = [page("One"), page("Two"), page("Three")]
    pdf = document("PDF", drawn, resolution=72)  # a pixel is a point
    source = write_tar(tmp_path / "x.tar", [{"json": lines(["One", "more"], [], ["Three"]), "pdf": pdf}])
    first, second, third = read_all(source, resolution="72")
    assert (second.reason, second.failure) == ("page_without_text", False)
    assert first.turns == (Turn("user", "<image>Transcribe this page."), Turn("assistant", "One\nmore"))
    assert (third.turns[1].text, third.metadata["key"]) == ("Three", f"{tmp_path}/x.tar:/0000000:2")
    for record, original in ((first, drawn[0]), (third, drawn[2])):
        rendered = decode_image(record.images[0]).astype(int)
        assert rendered.shape == (200, 300, 3)
        assert np.abs(rendered - np.asarray(original)).mean() < 3  # Pillow keeps pages as JPEG
    assert decode_image(read_all(source)[0].images[0]).shape == (417, 625, 3)
    assert [len(read_all(source, pages=count)) for count in "125"] == [1, 2, 3]


def test_pages_of_a_fax_stay_bilevel(tmp_path: pathlib.Path) -> None:
    drawn = [page("One", "1"), page("Two", "1", (200, 300))]
    tiff = document("TIFF", drawn, compression="group4")
    files = {"json": plain(["One"], ["Two", "more"]), "ocr": b"old", "pdf": b"not this one", "tif": tiff}
    records = read_all(write_tar(tmp_path / "x.tar", [files]))
    assert [record.turns[1].text for record in records] == ["One", "Two\nmore"]
    for record, original in zip(records, drawn, strict=True):
        assert Image.open(io.BytesIO(record.images[0])).mode == "1"
        assert (decode_image(record.images[0]) == np.asarray(original.convert("RGB"))).all()


def test_damaged_and_mismatched_documents(tmp_path: pathlib.Path) -> None:
    pdf = document("PDF", [page("One")])
    documents = [
        {"json": lines(["One"]), "pdf": pdf[:40]},
        {"json": lines(["One"], ["Two"]), "pdf": pdf},
        {"json": lines(["One"]), "tif": b"II*\0"},
        {"json": b"[]", "pdf": pdf},
        {"json": lines(["One"]), "jpg": b"x"},
        {"pdf": pdf},
        {"json": json.dumps({"pages": [{"words": {"text": ["One", "word"]}}]}).encode(), "pdf": pdf},
    ]
    *failures, whole = read_all(write_tar(tmp_path / "x.tar", documents))
    reasons = [
        "document_damaged",
        "page_count",
        "document_damaged",
        "missing_fields",
        "missing_fields",
        "missing_fields",
    ]
    assert [(item.reason, item.failure) for item in failures] == [(reason, True) for reason in reasons]
    assert whole.turns[1].text == "One word"
    (tmp_path / "cut.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:2000])
    assert [item.reason for item in read_all(f"pages:{tmp_path}/cut.tar")][-1] == "file_damaged"
    with pytest.raises(IngestError, match="pages is '0'; it must be a positive whole number"):
        make_reader(f"pages:{tmp_path}/x.tar", {"pages": "0"}).units()


def test_large_pages_are_not_drawn(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their header: a page of 200 inches, and a TIFF of 40 million bilevel pixels in a few hundred bytes."""
    poster = document("PDF", [page("One", size=(200, 200))], resolution=1)
    assert list(page_pictures.pdf_pages(poster, 150, 1)) == [1, [b"", page_pictures.TOO_LARGE]]
    bomb = document("TIFF", [Image.new("1", (8000, 5000))], compression="group4")
    assert len(bomb) < 10_000
    assert list(page_pictures.tiff_pages(bomb, 1)) == [1, [b"", page_pictures.TOO_LARGE]]
    monkeypatch.setattr(page_pictures, "PAGE_PIXELS", 10**8)
    assert isinstance(list(page_pictures.tiff_pages(bomb, 1))[1][0], bytes)


@pytest.mark.parametrize(
    ("work", "status"), [("while True: pass", -signal.SIGXCPU), (f"bytes({2 * page_pictures.MEMORY_BYTES})", 1)]
)
def test_limits_of_a_document_hold(work: str, status: int) -> None:
    """A library that loops or takes all memory, in the place of Pillow."""
    program = f"""
import sys
from data_pipelines.ingest import page_pictures
def endless(data, pages):
    {work}
    yield 0
page_pictures.CPU_SECONDS, page_pictures.tiff_pages = 1, endless
sys.argv = ["", "tif", "1", "1"]
page_pictures.main()
"""
    root = pathlib.Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, input=b"", capture_output=True, check=False)
    assert done.returncode == status


def test_document_that_takes_too_long_is_counted(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages_reader = pytest.importorskip("data_pipelines.ingest.readers.pages")
    monkeypatch.setattr(pages_reader, "_SECONDS", 0.01)
    source = write_tar(tmp_path / "x.tar", [{"json": lines(["One"]), "pdf": document("PDF", [page("One")])}])
    assert [item.reason for item in read_all(source)] == ["document_too_slow"]
    monkeypatch.undo()
    assert [type(item) for item in read_all(source)] == [Record]
