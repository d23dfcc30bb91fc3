"""Plots of the studies as files that stand in a Markdown page: white ground, readable in grey.

Needs matplotlib (`pip install hypervl-jax[demo]`).
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PARETO, ADAPTIVITY, ARMS, SETTINGS = "pareto.png", "adaptivity.png", "arms.png", "settings.png"

_MARKS = {"vrc": ("o", "#0ea5b7"), "unsure": ("P", "#3b82f6"), "oracle": ("*", "#16a34a")}
_RULES = {"uniform": ("s", "#64748b"), "entropy": ("^", "#ca8a04"), "edges": ("v", "#db2777")}
_BRANCHES = {"base": "#3b82f6", "large": "#ea7317"}
_DPI = 120


def _save(figure: Figure, path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})


def pareto(values: Mapping[str, Any], path: pathlib.Path) -> None:
    """Score over visual tokens: uniform scaling as a line, every other way as marks with the score's interval."""
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    curve = values["uniform"]
    kept = lambda row: 100 * (1 - row["tokens_saved"])
    axes.plot(
        [kept(row) for row in curve],
        [100 * row["score"]["mean"] for row in curve],
        color="#64748b",
        label="one α for all",
    )
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in values["compressors"]:
        for found in (row["vrc"], row["unsure"], row["oracle"], *row["same_tokens"]):
            groups.setdefault(found["kind"], []).append(found)
    for kind, rows in groups.items():
        mark, colour = {**_MARKS, **_RULES}[kind]
        means = np.array([100 * row["score"]["mean"] for row in rows])
        bounds = np.array([[100 * row["score"][side] for row in rows] for side in ("low", "high")])
        axes.errorbar(
            [kept(row) for row in rows],
            means,
            np.abs(bounds - means),
            fmt=mark,
            color=colour,
            label=kind,
            elinewidth=0.7,
            markersize=7,
        )
    axes.set(xlabel="visual tokens, % of those at α = 1", ylabel="score, mean over tasks, %")
    axes.grid(alpha=0.2)
    axes.legend(fontsize=8)
    _save(figure, path)


def adaptivity(values: Mapping[str, Any], path: pathlib.Path) -> None:
    """Mean α of each task by the VRC over that of the oracle, a panel for each compressor."""
    rows = values["compressors"]
    figure = Figure(figsize=(2.9 * len(rows) + 0.6, 3.2), layout="constrained")
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False).flat, rows, strict=True):
        axes.plot((0, 1), (0, 1), color="#64748b", linewidth=0.8, linestyle="--")
        for task in row["tasks"]:
            place = task["mean_optimal"], task["mean_alpha"]
            axes.plot(*place, "o", color="#0ea5b7")
            axes.annotate(task["task"], place, xytext=(5, -4), textcoords="offset points", fontsize=8)
        axes.set(
            title=row["name"],
            xlabel="mean α* of the oracle",
            ylabel="mean α of the VRC",
            xlim=(0, 1.05),
            ylim=(0, 1.05),
        )
        axes.grid(alpha=0.2)
    _save(figure, path)


def arms(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Score of each branch in each arm: the mean over seeds with its interval, and every seed as a dot."""
    figure = Figure(figsize=(7, 0.5 * len(rows) + 1.3), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        for offset, (branch, found) in zip((-0.12, 0.12), row["branches"].items(), strict=False):
            _interval(axes, place + offset, found, _BRANCHES[branch])
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="score, mean over tasks, %\n(blue: base, orange: large; bars: 95 % over items and seeds)")
    axes.grid(alpha=0.2, axis="x")
    _save(figure, path)


def _interval(axes: Axes, place: float, found: Mapping[str, Any], colour: str) -> None:
    score = found["score"]
    axes.plot([100 * score["low"], 100 * score["high"]], [place, place], color=colour)
    axes.plot(100 * score["mean"], place, "o", color=colour)
    axes.plot([100 * seed for seed in found["seeds"]], [place] * len(found["seeds"]), "|", color=colour, markersize=9)


def settings(sweeps: Mapping[str, Sequence[Mapping[str, Any]]], path: pathlib.Path) -> None:
    """Base and Large scores of the exploratory arms, a panel for each setting that was varied."""
    figure = Figure(figsize=(3.1 * len(sweeps) + 0.6, 3.2), layout="constrained")
    grid = figure.subplots(1, len(sweeps), squeeze=False, sharey=True)
    for axes, (name, rows) in zip(grid.flat, sweeps.items(), strict=True):
        for branch, colour in _BRANCHES.items():
            points = [
                (place, 100 * row["branches"][branch]["score"]["mean"])
                for place, row in enumerate(rows)
                if branch in row["branches"]
            ]
            axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=branch) if points else None
        axes.set_xticks(range(len(rows)), [row["name"] for row in rows], rotation=40, ha="right", fontsize=8)
        axes.set(title=name, ylabel="score, %")
        axes.grid(alpha=0.2)
    grid.flat[0].legend(fontsize=8)
    _save(figure, path)
