"""Handwritten digits: real scans composed into single digits, strips and forms.

The scans are the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, UCI Machine Learning
Repository, 1998, CC BY 4.0), 1,797 images of 8×8 pixels, as scikit-learn ships them. A scan belongs to one split only.
"""

from __future__ import annotations

import functools
import random

import numpy as np
import xxhash
from PIL import Image

from data_pipelines.rendered.pictures import (
    CELL,
    COLOURS,
    DEMO_FRAMING,
    HELD_OUT,
    PAPERS,
    Canvas,
    Frame,
    Framing,
    Picture,
    Question,
    encode_picture,
    plural,
    vary,
)

LICENCE = "CC-BY-4.0 (UCI Optical Recognition of Handwritten Digits)"

_INKS = ("black", "black", "blue", "red")
_HELD_OUT_ONE_IN = 5
_FIELDS = ("room", "seat", "desk", "gate", "line")
_ORDER = {"first": 0, "last": -1}


@functools.cache
def scans(split: str) -> tuple[tuple[Image.Image, ...], ...]:
    """The scans of a split by digit, as 8×8 grey masks; the split follows from the pixels, so copies stay together."""
    from sklearn.datasets import load_digits  # takes seconds to import; every launch imports this module

    by_digit: tuple[list[Image.Image], ...] = tuple([] for _ in range(10))
    data = load_digits()
    for pixels, digit in zip(data.images, data.target, strict=True):
        grey = np.rint(pixels * (255 / 16)).astype(np.uint8)
        held_out = xxhash.xxh3_64_intdigest(grey.tobytes()) % _HELD_OUT_ONE_IN == 0
        if held_out is (split == HELD_OUT):
            by_digit[digit].append(Image.fromarray(grey))
    return tuple(map(tuple, by_digit))


class _Sheet:
    """A canvas with one ink, and the scans of one split."""

    def __init__(self, rng: random.Random, split: str, frame: Frame) -> None:
        self._rng, self._scans = rng, scans(split)
        self.ink_name = rng.choice(_INKS)
        paper = rng.choice(PAPERS)
        self.ink = vary(COLOURS[self.ink_name], rng)
        self.canvas = Canvas(frame, paper)

    def write(self, digit: int, x: float, y: float, size: float) -> None:
        """Prints a random scan of a digit into a square, with more or less ink."""
        gain = self._rng.uniform(1.0, 1.6)
        mask = self._rng.choice(self._scans[digit]).point([min(255, int(level * gain)) for level in range(256)])
        self.canvas.stamp(x, y, size, mask, self.ink)

    def questions(self) -> tuple[Question, ...]:
        """What can be asked about any sheet."""
        return (Question("ink", "What colour is the ink?", self.ink_name, 1, 0.15),)


def draw(rng: random.Random, split: str, plain: bool = False, framing: Framing = DEMO_FRAMING) -> Picture:
    """A single digit, a strip of two to five, or a form, with its questions; a single one on one tile where `plain`."""
    frame = framing.choose(rng, plain)
    sheet = _Sheet(rng, split, frame)
    roomy = frame.width >= 96 and frame.height >= 40
    layout = _single if plain else rng.choices((_single, _strip, _form), (70, 25, 12 if roomy else 0))[0]
    caption, questions = layout(rng, sheet)
    image = encode_picture(sheet.canvas.finish(), rng)
    return Picture(image, frame.scale, caption, (*questions, *sheet.questions()))


def _single(rng: random.Random, sheet: _Sheet) -> tuple[str, list[Question]]:
    """One digit on a cell of the grid."""
    frame, digit = sheet.canvas.frame, rng.randrange(10)
    x, y = (CELL * rng.randint(0, side // CELL - 1) for side in (frame.width, frame.height))
    sheet.write(digit, x, y, CELL)
    text = rng.choice(("Which digit is this?", "What digit do you see?"))
    return f"A {sheet.ink_name} {digit}.", [Question("which", text, str(digit), 1)]


def _strip(rng: random.Random, sheet: _Sheet) -> tuple[str, list[Question]]:
    """Digits on neighbouring cells in a row, or in a column where the picture is tall."""
    frame = sheet.canvas.frame
    across = frame.width >= frame.height
    long, short = max(frame.width, frame.height), min(frame.width, frame.height)
    count = rng.randint(2, min(5, long // CELL))
    start = CELL * rng.randint(0, long // CELL - count)
    side = CELL * rng.randint(0, short // CELL - 1)
    digits = [rng.randrange(10) for _ in range(count)]
    for position, digit in enumerate(digits):
        along = start + position * CELL
        sheet.write(digit, *((along, side) if across else (side, along)), CELL)
    written = "".join(map(str, digits))
    return f"{count} {sheet.ink_name} digits: {written}.", _strip_questions(rng, digits)


def _strip_questions(rng: random.Random, digits: list[int]) -> list[Question]:
    written = "".join(map(str, digits))
    questions = [
        Question(f"{order}_digit", f"What is the {order} digit?", str(digits[at]), 1, 0.25)
        for order, at in _ORDER.items()
    ]
    counting = rng.choice(("How many digits are there?", "Count the digits."))
    reading = rng.choice(("Transcribe the digits.", "Read the digits."))
    questions.append(Question("count", counting, str(len(digits)), 1, 0.2))
    questions.append(Question("transcribe", reading, written, 2 if len(digits) <= 3 else 3, 0.3, (" ".join(written),)))
    return questions


def _form(rng: random.Random, sheet: _Sheet) -> tuple[str, list[Question]]:
    """Rows of a printed label and one or two handwritten digits."""
    frame = sheet.canvas.frame
    cell = CELL
    count = rng.randint(1, min(3, frame.height // cell))
    labels = rng.sample(_FIELDS, count)
    label_size = 0.75 * cell if cell == CELL else 0.55 * cell
    column = CELL * -(
        -int(max(sheet.canvas.text_width(f"{label}:", "Sans", label_size) for label in labels) + 4) // CELL
    )
    pitch = CELL * max(cell // CELL, frame.height // count // CELL)
    facts = []
    for row, label in enumerate(labels):
        digits = [rng.randrange(10) for _ in range(rng.randint(1, 2))]
        sheet.canvas.text(3, row * pitch + cell / 2, f"{label}:", "Sans", label_size, sheet.ink, "lm")
        for position, digit in enumerate(digits):
            sheet.write(digit, column + position * cell, row * pitch, cell)
        facts.append((label, "".join(map(str, digits))))
    level = 2 if count == 1 else 3
    questions = [
        Question(f"field_{label}", f"What is the {label} number?", value, level, 1 / count, (" ".join(value),))
        for label, value in facts
    ]
    questions.append(Question("fields", "How many fields are there?", str(count), 1, 0.3))
    return (
        f"A form with {plural(count, 'field')}: {', '.join(f'{label} {value}' for label, value in facts)}.",
        questions,
    )
