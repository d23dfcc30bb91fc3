"""Rendered documents: titles, page numbers, totals, stamps and real English text in several fonts, sizes and densities."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Iterator

from PIL import Image

from data_pipelines.rendered.passages import passages
from data_pipelines.rendered.pictures import (
    CELL,
    COLOURS,
    DEMO_FRAMING,
    PAPERS,
    Canvas,
    Colour,
    Framing,
    Picture,
    Question,
    encode_picture,
    font,
    plural,
    vary,
)

LICENCE = "Apache-2.0 (rendered); texts in the public domain"

TITLES = ("MENU", "NEWS", "POEM", "BILL", "LIST", "FORM", "HELP", "PLAN", "NOTE", "TEST")
STAMP_COLOURS = ("red", "green", "blue", "purple")

_BOLD = "Sans-Bold"
"""Titles and numbers."""

_FAMILIES = ("Sans", "Serif", "SansMono")
_MARGIN = 3
_SKEWED_SHARE = 0.2
_READABLE_SIZE = 8
"""Text of fewer units cannot be read at scale 1, so nobody is asked to."""


@dataclasses.dataclass
class _Page:
    """A page being laid out: what is on it so far, as questions and as parts of the caption."""

    rng: random.Random
    split: str
    canvas: Canvas
    family: str
    ink: Colour
    questions: list[Question] = dataclasses.field(default_factory=list)
    parts: list[str] = dataclasses.field(default_factory=list)

    @property
    def width(self) -> int:
        """Units."""
        return self.canvas.frame.width

    @property
    def height(self) -> int:
        """Units."""
        return self.canvas.frame.height


def draw(rng: random.Random, split: str, plain: bool = False, framing: Framing = DEMO_FRAMING) -> Picture:
    """A page with a title, a page number or a total and, as far as there is room, text and a stamp; no text where `plain`."""
    frame = framing.choose(rng, plain)
    paper = rng.choice(PAPERS)
    page = _Page(rng, split, Canvas(frame, paper), rng.choice(_FAMILIES), vary((30, 30, 34), rng))
    title_on_top = rng.random() < 0.5
    first, last = 0, CELL * (frame.height // CELL - 1)
    _title(page, *((first, "top") if title_on_top else (last, "bottom")))
    body = (CELL + 2, last - 2)
    first_line = 0.0 if plain else _body(page, *body)
    if rng.random() < 0.6:
        _stamp(page, body[0] + first_line, body[1])
    _number(page, last if title_on_top else first)
    image = encode_picture(page.canvas.finish() if plain else _skew(page.canvas.finish(), rng, paper), rng)
    return Picture(image, frame.scale, f"A page: {', '.join(page.parts)}.", tuple(page.questions))


def _title(page: _Page, top: int, place: str) -> None:
    """One large word of a closed set on a row of cells."""
    word = page.rng.choice(TITLES)
    size = min(CELL, CELL * (page.width - 4) / page.canvas.text_width(word, _BOLD, CELL))
    page.canvas.text(2, top + CELL / 2, word, _BOLD, size, page.ink, "lm")
    asked = page.rng.choice(("What is the title?", "Which word is the title?"))
    page.parts.append(f"{word} at the {place}")
    page.questions.append(Question("title", asked, word, 1, 1.0, (word.lower(), word.capitalize())))
    page.questions.append(Question("title_place", "Is the title at the top or the bottom?", place, 1, 0.25))


def _number(page: _Page, top: int) -> None:
    """A page number at either end of a row of cells, or a total, each digit on a cell."""
    columns = page.width // CELL
    if columns < 4 or page.rng.random() < 0.7:
        value, column = page.rng.randint(1, 9), page.rng.choice((0, columns - 1))
        asked = page.rng.choice(("What is the page number?", "Which page is this?"))
        page.questions.append(Question("page_number", asked, str(value), 1, 0.9))
        page.parts.append(f"number {value}")
    else:
        value, column = page.rng.randint(1, page.rng.choice((9, 99))), 2
        page.canvas.text(1, top + CELL / 2, "Total", _BOLD, 10, page.ink, "lm")
        page.questions.append(Question("total", "What is the total?", str(value), 2, 0.7))
        page.parts.append(f"total {value}")
    for place, digit in enumerate(str(value), column):
        page.canvas.text(CELL * (place + 0.5), top + CELL / 2, digit, _BOLD, CELL, page.ink, "mm")


def _stamp(page: _Page, top: float, bottom: float) -> None:
    """A coloured round stamp over the text, below its first line."""
    size = min(2 * CELL, bottom - top)
    if size < 8:
        return
    name = page.rng.choice(STAMP_COLOURS)
    x, y = page.rng.uniform(0, page.width - size), page.rng.uniform(top, bottom - size)
    fill = vary(COLOURS[name], page.rng)
    page.canvas.draw.ellipse(page.canvas.box(x, y, size, size), fill)
    inner = page.canvas.box(x + size * 0.12, y + size * 0.12, size * 0.76, size * 0.76)
    page.canvas.draw.ellipse(inner, None, page.canvas.paper, page.canvas.pixels(size * 0.05))
    page.questions.append(
        Question("stamp", page.rng.choice(("What colour is the stamp?", "Which colour is the stamp?")), name, 1, 0.3)
    )
    page.parts.append(f"{name} stamp")


def _body(page: _Page, top: float, bottom: float) -> float:
    """Fills the space between the bands with text, and returns the height of its first line in units."""
    size = page.rng.choice((6, 7, 8, 9, 10)) if page.height >= 96 else page.rng.choice((5, 6, 7, 8))
    pitch = size * 1.25
    lines = int((bottom - top) / pitch)
    if lines < 1:
        return 0
    words = _text_from(page.rng, page.split)
    name = page.family
    if page.width >= 90 and page.rng.random() < 0.35:
        _columns(page, words, name, size, top, lines)
    else:
        _paragraphs(page, words, name, size, top, lines)
    return pitch


def _text_from(rng: random.Random, split: str) -> Iterator[str]:
    """Words of a random passage from a random place on, round and round."""
    words = rng.choice(passages(split)).split()
    start = rng.randrange(len(words))
    return itertools.cycle(words[start:] + words[:start])


def _columns(page: _Page, words: Iterator[str], name: str, size: float, top: float, lines: int) -> None:
    """Two columns, or three where there is room, of the same number of lines."""
    count = page.rng.randint(2, 3 if page.width >= 130 else 2)
    gutter = 8
    width = (page.width - 2 * _MARGIN - gutter * (count - 1)) / count
    for column in range(count):
        x = _MARGIN + column * (width + gutter)
        for line in range(lines):
            _line(page, words, name, size, x, top + line * size * 1.25, width)
    page.questions.append(Question("columns", "How many columns are there?", str(count), 1, 0.25))
    page.parts.append(plural(count, "column"))


def _paragraphs(page: _Page, words: Iterator[str], name: str, size: float, top: float, lines: int) -> None:
    """One to four paragraphs with a clear gap between them."""
    count = page.rng.randint(1, min(4, (lines + 1) // 2))
    each = min(6, (lines - (count - 1)) // count)
    first: list[str] = []
    for paragraph in range(count):
        for line in range(each):
            y = top + (paragraph * (each + 1) + line) * size * 1.25
            width = (page.width - 2 * _MARGIN) * (page.rng.uniform(0.4, 0.9) if line == each - 1 > 0 else 1)
            written = _line(page, words, name, size, _MARGIN, y, width)
            first = first or written
    page.questions.append(Question("paragraphs", "How many paragraphs are there?", str(count), 1, 0.35))
    page.parts.append(plural(count, "paragraph"))
    if size >= _READABLE_SIZE and page.canvas.text_width(first[0], name, size) <= page.width - 2 * _MARGIN:
        word = first[0].strip(".,;:?!")
        page.questions.append(
            Question("first_word", "What is the first word of the text?", word, 3, 0.25, (first[0], word.lower()))
        )


def _line(page: _Page, words: Iterator[str], name: str, size: float, x: float, y: float, width: float) -> list[str]:
    """Writes as many words as fit into a line, at least one."""
    space = page.canvas.text_width(" ", name, size)
    line: list[str] = []
    used = 0.0
    for word in words:
        used += _word_width(word, name, page.canvas.pixels(size)) / page.canvas.pixels_per_unit + space
        if line and used - space > width:
            break
        line.append(word)
    page.canvas.text(x, y, " ".join(line), name, size, page.ink)
    return line


@functools.lru_cache(100_000)
def _word_width(word: str, name: str, pixels: int) -> float:
    return font(name, pixels).getlength(word)


def _skew(image: Image.Image, rng: random.Random, paper: Colour) -> Image.Image:
    """One page in five lies a little askew on the scanner."""
    if rng.random() >= _SKEWED_SHARE:
        return image
    return image.rotate(rng.uniform(-3, 3), Image.Resampling.BICUBIC, fillcolor=paper)
