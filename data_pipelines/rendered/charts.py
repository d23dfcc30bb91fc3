"""Bar, line and pie charts with questions about colours, counts, trends and values."""

from __future__ import annotations

import random

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
    plural,
    vary,
)

LICENCE = "Apache-2.0"

PAINTS = ("red", "green", "blue", "orange", "purple", "black")
"""Colours whose numbers can be read on white paper."""

_TOP = 9
"""Values are whole numbers from 1 to 9, and an axis ends here."""

_GRID: Colour = (205, 205, 205)
_AXIS: Colour = (60, 60, 60)
_KINDS = {"bar": 0.3, "line": 0.75, "pie": 0.5}
"""How likely the kind is asked for, so that the three answers come equally often."""


def draw(rng: random.Random, split: str, plain: bool = False, framing: Framing = DEMO_FRAMING) -> Picture:
    """A chart with its questions, on one tile where `plain`; `split` only matters to generators with texts or scans."""
    del split
    frame = framing.choose(rng, plain)
    kind, chart = rng.choices((("bar", _bars), ("line", _line), ("pie", _pie)), (50, 20, 30))[0]
    canvas, caption, questions = chart(rng, frame)
    questions.append(
        Question("kind", "What kind of chart is this?", kind, 1, _KINDS[kind], (f"{kind} chart", f"a {kind} chart"))
    )
    return Picture(encode_picture(canvas.finish(), rng), frame.scale, caption, tuple(questions))


class _Axes:
    """The plot area of a bar or line chart: maps values to heights and draws the axes, with or without a grid."""

    def __init__(self, canvas: Canvas, headroom: float, grid: bool) -> None:
        self.canvas = canvas
        self.left, self.bottom = 4, canvas.frame.height - 4
        self.width = canvas.frame.width - self.left - 3
        self.unit = (self.bottom - headroom) / _TOP
        if grid:
            for value in range(1, _TOP + 1) if self.unit >= 5 else (3, 6, 9):
                self._line((self.left, self.y(value)), (self.left + self.width, self.y(value)), _GRID)

    def y(self, value: float) -> float:
        """Height of a value, in units from the top."""
        return self.bottom - value * self.unit

    def draw_axes(self) -> None:
        """The two axes, over whatever was plotted."""
        self._line((self.left, 2), (self.left, self.bottom), _AXIS)
        self._line((self.left, self.bottom), (self.left + self.width, self.bottom), _AXIS)

    def _line(self, start: tuple[float, float], end: tuple[float, float], colour: Colour) -> None:
        self.canvas.draw.line(self.canvas.points(start, end), colour, self.canvas.pixels(1))


def _values(rng: random.Random, count: int) -> list[int]:
    """Values of which one is the largest, usually by two or more."""
    highest = rng.randint(5, _TOP)
    margin = min(highest - 1, rng.choice((1, 2, 2, 3)))
    values = [rng.randint(1, highest - margin) for _ in range(count - 1)]
    values.insert(rng.randrange(count), highest)
    return values


def _bars(rng: random.Random, frame: Frame) -> tuple[Canvas, str, list[Question]]:
    """Bars on columns of cells, each with its value below it in the bar's colour."""
    count = rng.randint(2, min(4, frame.width // CELL))
    values, names = _values(rng, count), rng.sample(PAINTS, count)
    canvas = Canvas(frame, rng.choice(PAPERS))
    pitch = CELL * (frame.width // CELL // count)
    bottom = CELL * (frame.height // CELL - 1)
    unit = (bottom - 2) / _TOP
    for index, (value, name) in enumerate(zip(values, names, strict=True)):
        left, colour = index * pitch, vary(COLOURS[name], rng)
        canvas.draw.rectangle(canvas.box(left + 2, bottom - value * unit, CELL - 4, value * unit), colour)
        canvas.text(left + CELL / 2, bottom + CELL / 2, str(value), "Sans-Bold", CELL, colour, "mm")
    canvas.draw.line(canvas.points((0, bottom), (frame.width, bottom)), _AXIS, canvas.pixels(1))
    tallest = names[values.index(max(values))]
    shown = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
    return canvas, f"A bar chart: {shown}, {tallest} tallest.", _bar_questions(rng, values, names)


def _bar_questions(rng: random.Random, values: list[int], names: list[str]) -> list[Question]:
    order = sorted(range(len(values)), key=values.__getitem__, reverse=True)
    ranked, ranked_names = [values[index] for index in order], [names[index] for index in order]
    asked = rng.choice(("What colour is the tallest bar?", "Which colour has the tallest bar?"))
    questions = [
        Question("tallest", asked, ranked_names[0], 1, 1.0),
        Question("bars", rng.choice(("How many bars are there?", "Count the bars.")), str(len(values)), 1, 0.4),
    ]
    if len(values) > 2 and ranked[-2] > ranked[-1]:
        questions.append(Question("shortest", "What colour is the shortest bar?", ranked_names[-1], 1, 0.4))
    if len(values) > 2 and ranked[1] > ranked[2]:
        questions.append(Question("second", "What colour is the second tallest bar?", ranked_names[1], 3, 0.15))
    chosen = rng.randrange(len(values))
    questions.append(Question("value", f"What is the value of the {names[chosen]} bar?", str(values[chosen]), 2, 1.0))
    text = f"How much taller is the {ranked_names[0]} bar than the {ranked_names[1]} bar?"
    questions.append(Question("difference", text, str(ranked[0] - ranked[1]), 3, 0.1))
    return questions


def _line(rng: random.Random, frame: Frame) -> tuple[Canvas, str, list[Question]]:
    count = rng.randint(3, min(6, frame.width // 9))
    rising = rng.random() < 0.5
    values = sorted(rng.sample(range(1, _TOP + 1), count), reverse=not rising)
    name = rng.choice(PAINTS)
    canvas = Canvas(frame, rng.choice(PAPERS), oversample=2)
    axes = _Axes(canvas, 5, rng.random() < 0.6)
    step = (axes.width - 8) / (count - 1)
    places = [(axes.left + 5 + index * step, axes.y(value)) for index, value in enumerate(values)]
    colour, radius = vary(COLOURS[name], rng), 2.5
    canvas.draw.line(canvas.points(*places), colour, canvas.pixels(1.5))
    for x, y in places:
        canvas.draw.ellipse(canvas.box(x - radius, y - radius, 2 * radius, 2 * radius), colour)
    axes.draw_axes()
    trend = "rising" if rising else "falling"
    questions = [
        Question("trend", "Is the line rising or falling?", trend, 1, 1.0),
        Question("line_colour", "What colour is the line?", name, 1, 0.5),
        Question("points", "How many points has the line?", str(count), 2, 0.4),
    ]
    if axes.unit >= 5:
        questions.append(Question("last_value", "What is the last value?", str(values[-1]), 3, 0.2))
    return canvas, f"A line chart: {name}, {trend}, {plural(count, 'point')}.", questions


def _pie(rng: random.Random, frame: Frame) -> tuple[Canvas, str, list[Question]]:
    count = rng.randint(2, 4)
    shares = _shares(rng, count)
    names = rng.sample(PAINTS, count)
    canvas = Canvas(frame, rng.choice(PAPERS), oversample=2)
    size = min(frame.width, frame.height) * rng.uniform(0.75, 0.95)
    x, y = rng.uniform(0, frame.width - size), rng.uniform(0, frame.height - size)
    angle = rng.uniform(0, 360)
    for share, name in zip(shares, names, strict=True):
        canvas.draw.pieslice(
            canvas.box(x, y, size, size), angle, angle + 360 * share, vary(COLOURS[name], rng), canvas.paper
        )
        angle += 360 * share
    largest, smallest = names[shares.index(max(shares))], names[shares.index(min(shares))]
    asked = rng.choice(("What colour is the largest slice?", "Which colour has the largest slice?"))
    questions = [
        Question("largest", asked, largest, 2, 0.8),
        Question("slices", rng.choice(("How many slices are there?", "Count the slices.")), str(count), 1, 0.6),
    ]
    if count > 2:
        questions.append(Question("smallest", "What colour is the smallest slice?", smallest, 3, 0.2))
    return canvas, f"A pie chart: {largest} largest, {plural(count, 'slice')}.", questions


def _shares(rng: random.Random, count: int) -> list[float]:
    """Parts of a whole in random order, each 1.35 to 1.9 times the one before it, so that the order can be seen."""
    parts = [1.0]
    for _ in range(count - 1):
        parts.append(parts[-1] * rng.uniform(1.35, 1.9))
    rng.shuffle(parts)
    return [part / sum(parts) for part in parts]
