"""A small set of realistic pictures: photographs from scikit-image grown to camera sizes, and pages of text.

Needs scikit-image and a Qwen3 vocabulary (`pip install hypervl-jax[benchmark]`). Nothing is downloaded.
"""

from __future__ import annotations

import io
import itertools
import pathlib
import textwrap
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.records import Record, write_source
from hypervl_jax.text.conversation import IMAGE_SLOT, Turn
from hypervl_jax.text.qwen import write_qwen3_tokenizer
from hypervl_jax.text.tokenizer import load_tokenizer

PHOTO_SIZES = ((480, 640), (768, 1024), (1080, 1440), (1500, 2000))
"""(height, width) in pixels."""

PAGE_SIZES = ((1754, 1240), (2200, 1700))
"""A4 at 150 dots an inch, US Letter at 200."""

PHOTOGRAPHS, PAGES = "photographs", "pages"

_PICTURES = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket")
_ESSAYS = (np.einsum, np.pad, np.histogram, np.percentile, np.linalg.svd, np.meshgrid)
"""Their documentation is the text of the pages and captions."""

_CAPTION_WORDS = 90
_MARGIN = 0.08
_LINES, _LINE_HEIGHT = 52, 1.3
_FORMATS = {"JPEG": {"quality": 90}, "PNG": {}}


def write_corpus(root: pathlib.Path) -> None:
    """Writes the tokenizer and the training split of both sources, `PHOTOGRAPHS` and `PAGES`, into an empty directory."""
    write_qwen3_tokenizer(root)
    tokenizer = load_tokenizer(root)
    for name, records in {PHOTOGRAPHS: _photographs(), PAGES: _pages()}.items():
        description, licence = f"{name} for the benchmark of the data path", "BSD-3-Clause"
        write_source(
            root / "train" / name, records, name=name, licence=licence, description=description, tokenizer=tokenizer
        )


def _photographs() -> Iterator[Record]:
    """Every picture in every size, as JPEG, with a caption."""
    import skimage.data  # an extra that only this function needs

    for number, (size, name) in enumerate(itertools.product(PHOTO_SIZES, _PICTURES)):
        words = _essay(number).split()
        caption = " ".join(words[:_CAPTION_WORDS])
        image = _encoded(grown(getattr(skimage.data, name)(), *size), "JPEG")
        yield Record((image,), _conversation("Describe the picture.", caption), PHOTOGRAPHS)


def _pages() -> Iterator[Record]:
    """Pages of both sizes as JPEG and as PNG, to be transcribed."""
    for number, (size, kind) in enumerate(itertools.product(PAGE_SIZES * len(_ESSAYS), _FORMATS)):
        pixels, text = page(_essay(number // len(PAGE_SIZES)), *size)
        yield Record((_encoded(pixels, kind),), _conversation("Transcribe the page.", text), PAGES)


def _conversation(question: str, answer: str) -> tuple[Turn, ...]:
    return Turn("user", f"{IMAGE_SLOT}\n{question}"), Turn("assistant", answer)


def _essay(number: int) -> str:
    """Running text that fills a page."""
    return " ".join((_ESSAYS[number % len(_ESSAYS)].__doc__ or "").split())


def grown(picture: UInt8[np.ndarray, "h w c"], height: int, width: int) -> UInt8[np.ndarray, "H W 3"]:
    """A picture repeated in mirrors up to a size, or cut to it: each pixel costs a decoder what it costs in a photograph.

    Enlarging would smooth it, and smooth pictures decode faster.
    """
    rows, columns = (max(0, wanted - has) for wanted, has in zip((height, width), picture.shape, strict=False))
    mirrored = np.pad(picture[..., :3], ((0, rows), (0, columns), (0, 0)), mode="symmetric")
    return np.ascontiguousarray(mirrored[:height, :width])


def page(text: str, height: int, width: int) -> tuple[UInt8[np.ndarray, "h w 3"], str]:
    """A page of black text on white, and the lines that stand on it."""
    across, down = width * (1 - 2 * _MARGIN), height * (1 - 2 * _MARGIN)
    font = ImageFont.load_default(down / _LINES / _LINE_HEIGHT)
    columns = int(across / font.getlength(text[:1000]) * len(text[:1000]))
    lines = textwrap.wrap(text, columns)[:_LINES]
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        draw.text((width * _MARGIN, height * _MARGIN + number * down / _LINES), line, "black", font)
    return np.asarray(image), "\n".join(lines)


def _encoded(pixels: UInt8[np.ndarray, "h w 3"], kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **_FORMATS[kind])
    return stream.getvalue()
