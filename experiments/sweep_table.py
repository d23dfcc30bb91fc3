"""What a sweep found: one table as Markdown, CSV and JSON, and one plot."""

from __future__ import annotations

import csv
import json
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.sweep_runs import Run, finite

MAIN = (
    "step",
    "tokens",
    "cross_entropy/base",
    "cross_entropy/large",
    "kl",
    "agreement",
    "tokens_saved/all",
    "chance_lost/all",
)
"""Columns of the Markdown table, where they were measured; CSV and JSON hold everything."""

PLOTTED = (("cross_entropy/base", "cross_entropy/large"), ("tokens_saved/all", "chance_lost/all"))
"""Groups of measures that share a plot; the first that was measured is drawn."""


class Row(NamedTuple):
    """One run: name, state ("complete", "begun", "new", or why it failed), settings, measures."""

    name: str
    state: str
    settings: Mapping[str, str]
    results: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """JSON form; what is not finite becomes null."""
        results = {name: value if finite(value) else None for name, value in self.results.items()}
        return {"run": self.name, "state": self.state, "settings": dict(self.settings), "results": results}


def collect(runs: Sequence[Run], failures: Mapping[str, str]) -> list[Row]:
    """The rows of all runs, in the order of the sweep."""
    return [Row(run.name, failures.get(run.name) or run.state(), run.settings, run.results()) for run in runs]


def write(rows: Sequence[Row], directory: pathlib.Path, title: str) -> list[pathlib.Path]:
    """Writes `table.md`, `table.csv`, `table.json` and, with something to show, `plot.png`; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / name for name in ("table.md", "table.csv", "table.json")]
    paths[0].write_text(f"# {title}\n\n{markdown(rows)}")
    _write_csv(rows, paths[1])
    paths[2].write_text(json.dumps([row.to_json() for row in rows], indent=1) + "\n")
    return paths + plot(rows, directory / "plot.png", title)


def markdown(rows: Sequence[Row]) -> str:
    """The table for people."""
    columns = [name for name in MAIN if any(name in row.results for row in rows)]
    lines = [("run", "state", *columns), ("---",) * (2 + len(columns))]
    lines += [
        (row.name, row.state.replace("|", "/"), *(_number(row.results.get(name)) for name in columns)) for row in rows
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:,.0f}" if value == int(value) and abs(value) >= 1 else f"{value:.4f}"


def _write_csv(rows: Sequence[Row], path: pathlib.Path) -> None:
    settings = list(dict.fromkeys(name for row in rows for name in row.settings))
    measures = list(dict.fromkeys(name for row in rows for name in row.results))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "state", *settings, *measures])
        for row in rows:
            given = [row.settings.get(name, "") for name in settings]
            writer.writerow([row.name, row.state, *given, *(row.results.get(name, "") for name in measures)])


def plot(rows: Sequence[Row], path: pathlib.Path, title: str) -> list[pathlib.Path]:
    """Draws the first group of `PLOTTED` that was measured over what varies; the path, or nothing without measures."""
    shown = next((group for group in PLOTTED if any(_measured(row, name) for row in rows for name in group)), ())
    if not shown:
        return []
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is missing; pip install 'hypervl-jax[demo]' and --collect", file=sys.stderr)
        return []

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(title=title, ylabel=shown[0].split("/")[0].replace("_", " "))
    label, places, numeric = horizontal(rows)
    for name in shown:
        points = [(place, row.results[name]) for place, row in zip(places, rows, strict=True) if _measured(row, name)]
        axes.plot(*zip(*points, strict=True), marker="o", label=name) if points else None
    if not numeric:
        axes.set_xticks(places, [row.name for row in rows], rotation=30, ha="right")
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    return [path]


def _measured(row: Row, name: str) -> bool:
    return finite(row.results.get(name))


def horizontal(rows: Sequence[Row]) -> tuple[str, list[float], bool]:
    """What varies, the place of each run on the axis, and whether it is a number; else runs stand side by side."""
    names = {name for row in rows for name in row.settings}
    try:
        (name,) = names
        return name, [float(row.settings[name]) for row in rows], True
    except (ValueError, KeyError):
        return "", [float(place) for place in range(len(rows))], False
