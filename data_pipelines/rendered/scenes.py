"""Scenes of simple shapes: colours, shapes, counts and positions, saved as photographs are (JPEG)."""

from __future__ import annotations

import dataclasses
import math
import random

from PIL import Image

from data_pipelines.rendered.pictures import (
    CELL,
    COLOURS,
    DEMO_FRAMING,
    PAPERS,
    Canvas,
    Colour,
    Frame,
    Framing,
    Picture,
    Question,
    encode_picture,
    listing,
    plural,
    vary,
)

LICENCE = "Apache-2.0"

PAINTS = ("red", "green", "blue", "black")

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
_CORNERS = ("top left", "top right", "bottom left", "bottom right")


def _star() -> list[tuple[float, float]]:
    radii = (1.0, 0.42) * 5
    return [(r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5)) for k, r in enumerate(radii)]


_POLYGONS = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -0.95), (0.95, 0.85), (-0.95, 0.85)],
    "star": _star(),
    "cross": [
        *((-0.3, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3), (0.3, 0.3)),
        *((0.3, 0.95), (-0.3, 0.95), (-0.3, 0.3), (-0.95, 0.3), (-0.95, -0.3), (-0.3, -0.3)),
    ],
}
"""Corners of the shapes with straight sides, for radius 1 around the origin."""


@dataclasses.dataclass(frozen=True)
class _Thing:
    shape: str
    colour: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def phrase(self) -> str:
        """With its article."""
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self}"


class _Stage:
    """Places things into boxes of the picture, in units."""

    def __init__(self, rng: random.Random, frame: Frame) -> None:
        self.rng, self.frame = rng, frame
        self.canvas = Canvas(frame, rng.choice(PAPERS), oversample=2)
        self._shade(vary((205, 215, 220), rng, 25))

    def _shade(self, colour: Colour) -> None:
        """A soft shadow that deepens towards the bottom."""
        size = self.canvas.image.size
        self.canvas.image.paste(
            colour, (0, 0), Image.linear_gradient("L").point([level // 4 for level in range(256)]).resize(size)
        )

    @property
    def cells(self) -> int:
        """Cells of the visual tokens that lie in the picture."""
        return (self.frame.width // CELL) * (self.frame.height // CELL)

    def place(self, thing: _Thing, x: float, y: float, width: float, height: float) -> None:
        """Draws a thing on a cell of the visual tokens in a box, or, where there is room, sometimes on four."""
        size = CELL * (2 if min(width, height) >= 2 * CELL and self.rng.random() < 0.25 else 1)
        left, top = (_aligned(self.rng, start, side, size) for start, side in ((x, width), (y, height)))
        self._draw(thing, left + size / 2, top + size / 2, size * self.rng.uniform(0.38, 0.47))

    def _draw(self, thing: _Thing, centre_x: float, centre_y: float, radius: float) -> None:
        fill = vary(COLOURS[thing.colour], self.rng)
        if thing.shape in _POLYGONS:
            points = [(centre_x + radius * px, centre_y + radius * py) for px, py in _POLYGONS[thing.shape]]
            self.canvas.draw.polygon(self.canvas.points(*points), fill)
            return
        box = self.canvas.box(centre_x - radius, centre_y - radius, 2 * radius, 2 * radius)
        ring = thing.shape == "ring"
        self.canvas.draw.ellipse(box, None if ring else fill, fill, self.canvas.pixels(radius * 0.36))

    def scatter(self, things: list[_Thing]) -> None:
        """Puts things on different cells of the visual tokens."""
        columns = self.frame.width // CELL
        for thing, place in zip(things, self.rng.sample(range(self.cells), len(things)), strict=True):
            self.place(thing, place % columns * CELL, place // columns * CELL, CELL, CELL)


def _aligned(rng: random.Random, start: float, side: float, size: int) -> int:
    """A multiple of the cell's side from which `size` units end before `start + side`; at or after `start` where one is."""
    last = int((start + side - size) // CELL)
    return CELL * rng.randint(min(math.ceil(start / CELL), last), last)


def draw(rng: random.Random, split: str, plain: bool = False, framing: Framing = DEMO_FRAMING) -> Picture:
    """A scene with its questions, one or two things on one tile where `plain`; `split` matters to other generators."""
    del split
    frame = framing.choose(rng, plain)
    stage = _Stage(rng, frame)
    compose = rng.choices(
        (_single, _pair, _group, _corners, _crowd), (70, 20, 10, 0, 0) if plain else (40, 25, 20, 7, 8)
    )[0]
    caption, questions = compose(stage)
    image = encode_picture(stage.canvas.finish(), rng, photographic=True)
    return Picture(image, frame.scale, f"{caption[0].upper()}{caption[1:]}.", tuple(questions))


def _things(rng: random.Random, count: int) -> list[_Thing]:
    """Things that differ in shape and in colour."""
    return [
        _Thing(shape, colour)
        for shape, colour in zip(rng.sample(SHAPES, count), rng.sample(PAINTS, count), strict=True)
    ]


def _single(stage: _Stage) -> tuple[str, list[Question]]:
    """One thing."""
    thing = _things(stage.rng, 1)[0]
    stage.scatter([thing])
    shape_text = stage.rng.choice(("What shape is this?", "Which shape do you see?"))
    colour_text = stage.rng.choice(("What colour is the shape?", "Which colour do you see?"))
    return thing.phrase, [
        Question("shape", shape_text, thing.shape, 1),
        Question("colour", colour_text, thing.colour, 1, 0.3),
    ]


def _pair(stage: _Stage) -> tuple[str, list[Question]]:
    """Two things side by side or one above the other."""
    first, second = _things(stage.rng, 2)
    width, height = stage.frame.width, stage.frame.height
    across = width > height * 1.5 or (height < width * 1.5 and stage.rng.random() < 0.5)
    if across:
        boxes, relation, opposite = (
            ((0, 0, width / 2, height), (width / 2, 0, width / 2, height)),
            "left of",
            "right of",
        )
    else:
        boxes, relation, opposite = ((0, 0, width, height / 2), (0, height / 2, width, height / 2)), "above", "below"
    stage.place(first, *boxes[0])
    stage.place(second, *boxes[1])
    subject, other, answer = (first, second, relation) if stage.rng.random() < 0.5 else (second, first, opposite)
    choice = "left or right of" if across else "above or below"
    questions = [
        Question("colour_of", f"What colour is the {subject.shape}?", subject.colour, 1, 0.3),
        Question("shape_of", f"What shape is {subject.colour}?", subject.shape, 1, 1.0),
        Question("side", f"Is the {subject.shape} {choice} the {other.shape}?", answer.removesuffix(" of"), 2, 0.5),
    ]
    return f"{first.phrase} {relation} {second.phrase}", questions


def _group(stage: _Stage) -> tuple[str, list[Question]]:
    """One to six things of one kind."""
    thing, count = _things(stage.rng, 1)[0], stage.rng.randint(1, min(6, stage.cells))
    stage.scatter([thing] * count)
    text = stage.rng.choice(("How many shapes are there?", "Count the shapes."))
    questions = [
        Question("count", text, str(count), 1, 1.0),
        Question("shape_all", "Which shape is it?", thing.shape, 1, 0.3),
    ]
    return plural(count, str(thing)), questions


def _corners(stage: _Stage) -> tuple[str, list[Question]]:
    """One thing in each corner."""
    things = _things(stage.rng, 4)
    width, height = stage.frame.width / 2, stage.frame.height / 2
    for index, thing in enumerate(things):
        stage.place(thing, index % 2 * width, index // 2 * height, width, height)
    corner = stage.rng.randrange(4)
    questions = [
        Question("corner_shape", f"What shape is in the {_CORNERS[corner]}?", things[corner].shape, 2, 1.0),
        Question(
            "corner_colour", f"What colour is the shape in the {_CORNERS[corner]}?", things[corner].colour, 2, 0.3
        ),
    ]
    return listing([f"{thing.phrase} in the {name}" for thing, name in zip(things, _CORNERS, strict=True)]), questions


def _crowd(stage: _Stage) -> tuple[str, list[Question]]:
    """Two kinds of things, one to four of each."""
    kinds = _things(stage.rng, 2)
    counts = [stage.rng.randint(1, min(4, stage.cells // 2)) for _ in kinds]
    stage.scatter([thing for thing, count in zip(kinds, counts, strict=True) for _ in range(count)])
    asked = stage.rng.randrange(2)
    questions = [
        Question("count_kind", f"How many {kinds[asked].colour} shapes are there?", str(counts[asked]), 2, 1.0),
        Question("count_all", "How many shapes are there in all?", str(sum(counts)), 3, 0.5),
    ]
    return listing([plural(count, str(thing)) for thing, count in zip(kinds, counts, strict=True)]), questions
