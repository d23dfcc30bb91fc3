"""What the picture generators share: seeds, frames (size and scale), colours, fonts, a canvas and the encoder.

A generator lays its picture out in *units*; a frame says how many pixels a unit is. With scale 1 every pixel carries detail;
with scale 3 the same picture has nine times the pixels and could be compressed to a ninth without harm. That spread is what a
resolution compressor has to learn.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import pathlib
import random
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import matplotlib
import numpy as np
import xxhash
from PIL import Image, ImageDraw, ImageFont

VERSION = 6
"""Part of every seed: another version is another data set."""

TRAIN, HELD_OUT = "train", "heldout"

Colour = tuple[int, int, int]

COLOURS: Mapping[str, Colour] = {
    "red": (214, 34, 40),
    "orange": (245, 140, 20),
    "yellow": (236, 206, 24),
    "green": (34, 150, 60),
    "blue": (32, 90, 210),
    "purple": (126, 48, 160),
    "pink": (246, 120, 180),
    "black": (24, 24, 24),
}
CELL = 16
"""Side of the pixels of one visual token of the tiny model, in units: what lies on one cell is one token's to see."""

PAPERS: tuple[Colour, ...] = ((255, 255, 255), (250, 246, 234), (240, 240, 240), (236, 244, 250))

_NOISY_SHARE = 0.3
_JPEG_QUALITY = 90


@dataclasses.dataclass(frozen=True)
class Question:
    """One question about a picture.

    Attributes:
        kind: which type of question, for reports.
        text: the wording.
        answer: the short answer that is scored.
        level: 1 easy, 2 medium, 3 hard.
        weight: how likely it is chosen among the questions of its picture.
        paraphrases: other right answers.
    """

    kind: str
    text: str
    answer: str
    level: int
    weight: float = 1.0
    paraphrases: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Picture:
    """An encoded picture, all that can be asked about it, and a caption that states what is easy to see."""

    image: bytes
    scale: float
    caption: str
    questions: tuple[Question, ...]


def item_random(split: str, task: str, index: int) -> random.Random:
    """The random numbers of one item: no two splits, tasks or indices share a seed."""
    return random.Random(xxhash.xxh3_128_intdigest(f"{VERSION}/{split}/{task}/{index}".encode()))


@dataclasses.dataclass(frozen=True)
class Frame:
    """A picture's size in units and the pixels per unit."""

    height: int
    width: int
    scale: float


class FrameChoice(NamedTuple):
    """How likely a kind of frame is, the ranges of its height and width in units, and its pixels per unit."""

    weight: float
    heights: tuple[int, int]
    widths: tuple[int, int]
    scale: float


class Framing(NamedTuple):
    """The frames of a source's pictures.

    Attributes:
        choices: of pictures that are not plain.
        plain_scales: pixels per unit of plain pictures, each as likely: one full tile at 1, no padding.
        asked: kinds of question to ask more or less often than the generators do: what their weights are multiplied by.
    """

    choices: tuple[FrameChoice, ...]
    plain_scales: tuple[float, ...] = (1.0,)
    asked: Mapping[str, float] = MappingProxyType({})

    def choose(self, rng: random.Random, plain: bool) -> Frame:
        """A size between a fraction of a tile and nine tiles, with little or much redundancy."""
        if plain:
            # A choice among one would still take a number from `rng`.
            scale = rng.choice(self.plain_scales) if len(self.plain_scales) > 1 else self.plain_scales[0]
            return Frame(4 * CELL, 4 * CELL, scale)
        _, heights, widths, scale = rng.choices(self.choices, [choice.weight for choice in self.choices])[0]
        return Frame(rng.randint(*heights), rng.randint(*widths), scale)


DEMO_FRAMING = Framing(
    tuple(
        FrameChoice(*row)
        for row in (
            (72, (64, 64), (64, 64), 1.0),
            (6, (40, 64), (40, 64), 1.0),
            (4, (64, 64), (128, 128), 1.0),
            (3, (128, 128), (64, 64), 1.0),
            (4, (64, 64), (64, 64), 2.0),
            (1, (64, 64), (64, 64), 3.0),
            (1, (48, 64), (96, 128), 1.5),
            (2, (64, 64), (150, 192), 1.0),
            (2, (150, 192), (64, 64), 1.0),
            (1, (48, 64), (260, 320), 1.0),
            (2, (128, 128), (128, 128), 1.0),
            (1, (100, 128), (150, 192), 1.0),
            (1, (150, 192), (150, 192), 1.0),
        )
    )
)
"""About one in eight pictures has three 64-pixel tiles or more; none has more than nine. Few can be compressed."""


def _study_framing(sharp: float, double: float, triple: float, asked: Mapping[str, float] | None = None) -> Framing:
    """Pictures of which these shares have 1, 2 and 3 pixels per unit.

    Every size but the smallest comes with more than one scale, so that a picture's size alone does not tell what it can lose.
    """
    choices = (
        (0.70 * sharp, (64, 64), (64, 64), 1.0),
        (0.08 * sharp, (64, 64), (128, 128), 1.0),
        (0.07 * sharp, (128, 128), (64, 64), 1.0),
        (0.15 * sharp, (128, 128), (128, 128), 1.0),
        (0.80 * double, (64, 64), (64, 64), 2.0),
        (0.10 * double, (64, 64), (96, 96), 2.0),
        (0.10 * double, (96, 96), (64, 64), 2.0),
        (0.70 * triple, (64, 64), (64, 64), 3.0),
        (0.30 * triple, (43, 64), (64, 64), 3.0),
    )
    frames = tuple(FrameChoice(*row) for row in choices)
    return Framing(frames, plain_scales=(1.0,) * 8 + (2.0, 3.0), asked=asked or {})


STUDY_FRAMINGS: Mapping[str, Framing] = {
    "documents": _study_framing(
        sharp=0.25,
        double=0.45,
        triple=0.30,
        asked={"title": 0.25, "page_number": 0.1, "total": 0.1, "first_word": 0.0, "title_place": 2.0, "stamp": 3.0},
    ),
    "scenes": _study_framing(sharp=0.45, double=0.35, triple=0.20),
    "charts": _study_framing(sharp=0.60, double=0.30, triple=0.10, asked={"value": 0.1, "difference": 0.0}),
    "digits": _study_framing(sharp=0.95, double=0.04, triple=0.01),
}
"""The mixture in which the VRC is studied. Pages are scanned with more pixels than their print needs, and are mostly asked about what
stands out on them; charts are asked about by colour and shape; digits have the pixels that reading them takes and hardly more. The
tiny model reads small glyphs at the very pixels it was trained on and at no others, however redundant they are, so where it has to
read them nothing can be saved: only digits are mostly of that kind. The shares are our choice, fixed before the study's training."""

FRAMINGS: Mapping[str, Mapping[str, Framing]] = {
    "demo": dict.fromkeys(STUDY_FRAMINGS, DEMO_FRAMING),
    "study": STUDY_FRAMINGS,
}
"""By the name of a mixture of sizes, then by task."""


@functools.cache
def font(name: str, pixels: int) -> ImageFont.FreeTypeFont:
    """A DejaVu font (`Sans`, `Serif-Bold`, `SansMono`, ...) as matplotlib ships it."""
    family = f"DejaVu{name}" if name[0] != "-" else f"DejaVuSans{name}"
    path = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{family}.ttf"
    return ImageFont.truetype(str(path), pixels, layout_engine=ImageFont.Layout.BASIC)


class Canvas:
    """Draws in units. `oversample` draws curves at a multiple of the size and averages, for smooth edges."""

    def __init__(self, frame: Frame, paper: Colour, oversample: int = 1) -> None:
        self.frame, self.paper, self._oversample = frame, paper, oversample
        self.pixels_per_unit = frame.scale * oversample
        size = tuple(round(side * frame.scale) * oversample for side in (frame.width, frame.height))
        self.image = Image.new("RGB", size, paper)
        self.draw = ImageDraw.Draw(self.image)

    def pixels(self, units: float) -> int:
        """Pixels of a length, at least 1."""
        return max(1, round(units * self.pixels_per_unit))

    def points(self, *units: tuple[float, float]) -> list[tuple[float, float]]:
        """Pixel positions of (x, y) points."""
        return [(x * self.pixels_per_unit, y * self.pixels_per_unit) for x, y in units]

    def box(self, x: float, y: float, width: float, height: float) -> tuple[int, int, int, int]:
        """Inclusive pixel corners of a rectangle, as Pillow's shapes take them."""
        left, top = round(x * self.pixels_per_unit), round(y * self.pixels_per_unit)
        return left, top, left + self.pixels(width) - 1, top + self.pixels(height) - 1

    def text(self, x: float, y: float, text: str, name: str, size: float, fill: Colour, anchor: str = "la") -> None:
        """Writes text of `size` units at a point; `anchor` as in Pillow."""
        position = (round(x * self.pixels_per_unit), round(y * self.pixels_per_unit))
        self.draw.text(position, text, fill, font(name, self.pixels(size)), anchor)

    def text_width(self, text: str, name: str, size: float) -> float:
        """Width of a text in units."""
        return font(name, self.pixels(size)).getlength(text) / self.pixels_per_unit

    def stamp(self, x: float, y: float, size: float, mask: Image.Image, fill: Colour) -> None:
        """Prints a grey-scale mask as ink into a square."""
        side = self.pixels(size)
        position = (round(x * self.pixels_per_unit), round(y * self.pixels_per_unit))
        self.image.paste(fill, position, mask.resize((side, side), Image.Resampling.BICUBIC))

    def finish(self) -> Image.Image:
        """The picture at its final size."""
        return self.image if self._oversample == 1 else self.image.reduce(self._oversample)


def encode_picture(image: Image.Image, rng: random.Random, photographic: bool = False) -> bytes:
    """PNG bytes of a clean drawing; JPEG bytes of a photographic one and of the three in ten that get scanner noise."""
    noisy = rng.random() < _NOISY_SHARE
    if noisy:
        image = _add_noise(image, rng)
    buffer = io.BytesIO()
    if noisy or photographic:
        image.save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


def _add_noise(image: Image.Image, rng: random.Random) -> Image.Image:
    """Adds the same normal noise, of 3 to 10 grey levels, to all channels."""
    pixels = np.asarray(image, np.float32)
    noise = np.random.default_rng(rng.getrandbits(64)).standard_normal(pixels.shape[:2], np.float32)
    return Image.fromarray(np.clip(pixels + rng.uniform(3, 10) * noise[..., None], 0, 255).astype(np.uint8))


def vary(colour: Colour, rng: random.Random, spread: int = 12) -> Colour:
    """A colour a little lighter, darker or off in hue, still the same by name."""
    red, green, blue = (min(255, max(0, channel + rng.randint(-spread, spread))) for channel in colour)
    return red, green, blue


def listing(items: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def plural(count: int, noun: str) -> str:
    """`1 bar`, `3 bars`, `2 crosses`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}{'es' if noun.endswith('s') else 's'}"


def reweighted(questions: Sequence[Question], asked: Mapping[str, float]) -> list[Question]:
    """The questions with the weights of their kinds multiplied, without those that are not asked; all, where none would be left."""
    weighed = [dataclasses.replace(each, weight=each.weight * asked.get(each.kind, 1.0)) for each in questions]
    return [each for each in weighed if each.weight > 0] or list(questions)


def choose_questions(rng: random.Random, questions: Sequence[Question], count: int) -> list[Question]:
    """Up to `count` questions of different kinds, by weight."""
    remaining, chosen = list(questions), []
    while remaining and len(chosen) < count:
        pick = rng.choices(remaining, [question.weight for question in remaining])[0]
        chosen.append(pick)
        remaining = [question for question in remaining if question.kind != pick.kind]
    return chosen
