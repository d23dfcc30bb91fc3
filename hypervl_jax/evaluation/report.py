"""The report of a run: what it learned, how it trained, what compression saves, how the encoders agree, with samples.

`tools.report` gathers the contents from disk; this room only turns them into a page. Whatever was not measured is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hypervl_jax.architecture import BRANCHES, TilingConfig
from hypervl_jax.evaluation import analysis, page, plots
from hypervl_jax.evaluation.analysis import Groups, Learned, Saving, percent
from hypervl_jax.evaluation.benchmarks import BATCH_ROWS, BLANK, IMAGE, Item, ItemResult, TaskResult, group, is_auto
from hypervl_jax.evaluation.gallery import sample_cards
from hypervl_jax.evaluation.plots import Series, Stage

LEVELS = {1: "easy", 2: "medium", 3: "hard"}


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """One run's logs.

    Attributes:
        name: of its configuration.
        metrics: lines of `metrics.jsonl`.
        evaluations: lines of `evaluations.jsonl`.
        card: its release card; empty while it is not finished.
    """

    name: str
    metrics: Sequence[Mapping[str, float]]
    evaluations: Sequence[Mapping[str, float]]
    card: Mapping[str, Any]

    @property
    def steps(self) -> int:
        """Steps that are logged."""
        return int(self.metrics[-1]["step"]) + 1 if self.metrics else 0


@dataclasses.dataclass(frozen=True)
class Contents:
    """Everything a page may show.

    Attributes:
        title: of the page.
        runs: training runs, each starting from the one before.
        results: of an evaluation; empty without one.
        tiling: of the evaluated model; None without an evaluation.
        items: the evaluated questions by identity, as far as they are at hand.
        facts: machine, commit, date: name and value.
        commands: that made all of this, in order.
        seconds: that each step took.
    """

    title: str
    runs: Sequence[TrainingRun]
    results: Sequence[ItemResult]
    tiling: TilingConfig | None
    items: Mapping[str, Item]
    facts: Sequence[tuple[str, str]]
    commands: Sequence[str]
    seconds: Mapping[str, float]


def build_page(contents: Contents) -> str:
    """The report as one HTML document without outside files."""
    groups = group(contents.results)
    sections = {
        "learned": page.section("learned", "What it learned", *_learned_parts(groups)),
        "samples": page.section("samples", "Samples", *_sample_parts(contents, groups)),
        "training": page.section("training", "Training", *_training_parts(contents.runs)),
        "compression": page.section("compression", "Resolution compressor", *_compression_parts(groups)),
        "encoders": page.section("encoders", "The two encoders", *_encoder_parts(groups)),
        "latency": page.section("latency", "Time per answer", *_latency_parts(groups)),
        "making": page.section("making", "How this was made", *_making_parts(contents)),
    }
    present = {anchor: text for anchor, text in sections.items() if text}
    links = "".join(f'<a href="#{anchor}">{anchor}</a>' for anchor in present)
    head = [f"<h1>{page.escape(contents.title)}</h1>", *_headline(contents, groups), f"<nav>{links}</nav>"]
    return page.page(contents.title, [*head, *present.values()])


def _headline(contents: Contents, groups: Groups) -> list[str]:
    """The verdict and the few numbers one looks for first."""
    numbers = []
    for branch in BRANCHES:
        results = (analysis.full_resolution(groups, task, branch, IMAGE) for task in analysis.tasks_of(groups))
        means = [result.score.mean for result in results if result is not None]
        if means:
            numbers.append((f"{100 * np.mean(means):.1f} %", f"{branch} encoder, mean of {len(means)} tasks"))
    if saved := analysis.savings(groups):
        tokens = 1 - np.mean([row.visual_tokens for row in saved])
        numbers.append((f"−{100 * tokens:.1f} %", "visual tokens with α = auto"))
        if full := sum(row.full.mean for row in saved):
            kept = sum(row.compressed.mean for row in saved) / full
            numbers.append((f"{100 * kept:.1f} %", "of the score kept with α = auto"))
    if agreed := analysis.agreements(groups):
        numbers.append(
            (f"{100 * np.mean([row.same_answer.mean for row in agreed]):.1f} %", "same answer, both encoders")
        )
    if contents.seconds:
        numbers.append((_duration(sum(contents.seconds.values())), "minutes from nothing to this page"))
    tiles = "".join(f'<div class="number"><b>{value}</b><span>{name}</span></div>' for value, name in numbers)
    lead = [page.paragraph(analysis.verdict_text(contents.results), "lead")] if contents.results else []
    return [*lead, f'<div class="numbers">{tiles}</div>' if tiles else ""]


# ---------------------------------------------------------------- what it learned


def _learned_parts(groups: Groups) -> list[str]:
    if not groups:
        return []
    scores = _score_rows(groups)
    conditions = list(dict.fromkeys(name for row in scores.values() for name in row))
    rows = [
        (f"{task} <span class='soft'>{encoder}</span>", *(_estimate(cells.get(name)) for name in conditions))
        for (task, encoder), cells in scores.items()
    ]
    estimates = {
        f"{task} {encoder}": {name: result.score for name, result in cells.items()}
        for (task, encoder), cells in scores.items()
    }
    counts = sorted({len(result.items) for cells in scores.values() for result in cells.values()})
    return [
        page.paragraph(
            f"Score in %, [95 % interval] (Wilson's where answers are right or wrong), {_range(counts)} held-out items a task, every "
            "answer generated greedily. “Blank image” is the trained model shown mid-grey of the same size; “untrained” has random parameters.",
            "note",
        ),
        page.panel(plots.accuracy_intervals(estimates)),
        page.table(("task, encoder", *conditions), rows),
        *_margin_parts(analysis.learned(groups)),
        page.folded("By level and kind of question", _kind_table(groups)),
    ]


def _score_rows(groups: Groups) -> dict[tuple[str, str], dict[str, TaskResult]]:
    """Results by task and encoder, then by the name of the condition."""
    rows: dict[tuple[str, str], dict[str, TaskResult]] = {}
    for task in analysis.tasks_of(groups):
        for encoder in BRANCHES:
            for (name, key), result in groups.items():
                if (name, key.encoder) == (task, encoder):
                    rows.setdefault((task, encoder), {})[analysis.condition_name(key.condition, key.alpha)] = result
    return rows


def _estimate(result: TaskResult | None) -> str:
    """A score with a small interval, as HTML."""
    return "" if result is None else _with_small_interval(percent(result.score))


def _with_small_interval(text: str) -> str:
    value, interval = text.split(" ", 1)
    return f"{value} <small>{interval}</small>"


def _range(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _margin_parts(rows: Sequence[Learned]) -> list[str]:
    """Paired differences to the controls, and whether they are wide enough."""
    if not rows:
        return []
    controls = list(dict.fromkeys(name for row in rows for name in row.margins))
    lines = [
        (
            f"{row.task} <span class='soft'>{row.encoder}</span>",
            *(
                _with_small_interval(percent(row.margins[name], signed=True)) if name in row.margins else ""
                for name in controls
            ),
            '<span class="yes">yes</span>' if row.learned else '<span class="no">no</span>',
        )
        for row in rows
    ]
    header = ("points more than", *(analysis.condition_name(name, 1.0) for name in controls), "≥ 20, intervals apart")
    return [page.table(header, lines), page.paragraph("Paired by item; intervals by bootstrap.", "note")]


def _kind_table(groups: Groups) -> str:
    """Scores by level and by kind of question, for each encoder with the picture and with a blank one."""
    columns = [(branch, condition) for condition in (IMAGE, BLANK) for branch in BRANCHES]
    rows = []
    for task in analysis.tasks_of(groups):
        results = [analysis.full_resolution(groups, task, *column) for column in columns]
        items = [{item.identity: item for item in result.items} if result else {} for result in results]
        every = {name: item for found in items for name, item in found.items()}
        kinds = sorted({(item.level, item.kind) for item in every.values()})
        for level, kind in kinds:
            members = [name for name, item in every.items() if (item.level, item.kind) == (level, kind)]
            means = (_mean([found[name].score for name in members if name in found]) for found in items)
            rows.append((f"{task} <span class='soft'>{kind}</span>", LEVELS.get(level, ""), str(len(members)), *means))
    return page.table(
        ("task, kind", "level", "items", *BRANCHES, *(f"{branch}, blank image" for branch in BRANCHES)), rows
    )


def _mean(scores: Sequence[float]) -> str:
    return f"{100 * np.mean(scores):.0f}" if scores else ""


def _sample_parts(contents: Contents, groups: Groups) -> list[str]:
    if not groups or contents.tiling is None:
        return []
    cards = sample_cards(groups, contents.items, contents.tiling)
    note = (
        "The first right and the first wrong items of each task by content hash; nobody picked them. Left the picture, right the tiles "
        "that the encoder got, at the same scale. Grey is padding; where it is faint it takes no place in the LLM's sequence."
    )
    return [page.paragraph(note, "note"), cards] if cards else []


# ---------------------------------------------------------------- training


def _training_parts(runs: Sequence[TrainingRun]) -> list[str]:
    logged = [run for run in runs if run.metrics]
    if not logged:
        return []
    ends = np.cumsum([run.steps for run in logged])
    offsets = [0, *map(int, ends[:-1])]
    stages = [Stage(run.name, offset, offset + run.steps) for run, offset in zip(logged, offsets, strict=True)]
    losses = {branch: _joined(logged, offsets, f"cross_entropy/{branch}") for branch in BRANCHES}
    kl = {
        "KL(large ‖ base), T = 1": _joined(logged, offsets, "kl"),
        "at temperature T": _joined(logged, offsets, "kl_at_temperature"),
    }
    agreement = {"same likeliest token": _joined(logged, offsets, "agreement")}
    parts = [
        page.panel(plots.training_curves(losses, stages, "cross-entropy, nats per answer token")),
        page.panels(
            plots.training_curves(_measured(kl), stages, "KL, nats", wide=False) if _measured(kl) else "",
            plots.training_curves(_measured(agreement), stages, "agreement of the branches", wide=False)
            if _measured(agreement)
            else "",
        ),
    ]
    heldout = _heldout_series(logged, offsets)
    parts += [page.panel(plots.heldout_curves(heldout, stages))] if heldout else []
    return [*parts, _stage_table(logged)]


def _joined(runs: Sequence[TrainingRun], offsets: Sequence[int], name: str, heldout: bool = False) -> Series:
    """A metric over the steps of all runs, one after the other."""
    lines = [run.evaluations if heldout else run.metrics for run in runs]
    parts = [plots.series(found, name, offset) for found, offset in zip(lines, offsets, strict=True)]
    return Series(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def _measured(curves: Mapping[str, Series]) -> dict[str, Series]:
    return {name: curve for name, curve in curves.items() if len(curve.steps)}


def _heldout_series(runs: Sequence[TrainingRun], offsets: Sequence[int]) -> dict[str, dict[str, Series]]:
    """Held-out cross-entropy by source and branch."""
    names = dict.fromkeys(name for run in runs for line in run.evaluations for name in line)
    sources = [name.removeprefix("kl/") for name in names if name.startswith("kl/")]
    curves = {
        source: {
            branch: _joined(runs, offsets, f"cross_entropy/{branch}/{source}", heldout=True) for branch in BRANCHES
        }
        for source in sources
    }
    return {source: _measured(branches) for source, branches in curves.items() if _measured(branches)}


def _stage_table(runs: Sequence[TrainingRun]) -> str:
    """Steps, tokens, time and final held-out losses of each run."""
    header = ("run", "steps", "tokens", "minutes", "held-out base", "held-out large", "KL", "agreement")
    return page.table(header, map(_stage_row, runs))


def _stage_row(run: TrainingRun) -> tuple[str, ...]:
    last = run.evaluations[-1] if run.evaluations else {}
    names = ("cross_entropy/base", "cross_entropy/large", "kl", "agreement")
    minutes = sum(line.get("seconds", 0.0) for line in run.metrics) / 60
    tokens = run.metrics[-1].get("tokens_seen", 0)
    values = (f"{last[name]:.3f}" if name in last else "" for name in names)
    return (page.escape(run.name), f"{run.steps:,}", f"{tokens:,.0f}", f"{minutes:.1f}", *values)


# ---------------------------------------------------------------- compression, encoders, time


def _compression_parts(groups: Groups) -> list[str]:
    rows = analysis.savings(groups)
    if not rows:
        return []
    alphas = {row.task: row.alphas for row in rows if row.encoder == BRANCHES[0]} or {
        row.task: row.alphas for row in rows
    }
    header = (
        "task, encoder",
        "mean α",
        "visual tokens",
        "encoder tiles",
        "score, α = 1",
        "score, α = auto",
        "change",
        "kept",
    )
    note = (
        "What the VRC's own α saves against α = 1 on the same items. LLM tokens and encoder tiles are different savings: tokens follow α, "
        "tiles only where a whole tile falls away. The change is paired, its interval by bootstrap, in points."
    )
    return [
        page.paragraph(note, "note"),
        page.table(header, map(_saving_row, rows)),
        page.panel(plots.alpha_histogram(alphas)),
    ]


def _saving_row(row: Saving) -> tuple[str, ...]:
    return (
        f"{row.task} <span class='soft'>{row.encoder}</span>",
        f"{np.mean(row.alphas):.2f}",
        _percent_change(row.visual_tokens),
        _percent_change(row.tiles),
        f"{100 * row.full.mean:.1f}",
        f"{100 * row.compressed.mean:.1f}",
        _with_small_interval(percent(row.score_change, signed=True)),
        f"{100 * row.retention:.1f} %",
    )


def _percent_change(left: float) -> str:
    return f"{100 * (left - 1):+.1f} %".replace("-", "−")


def _encoder_parts(groups: Groups) -> list[str]:
    rows = analysis.agreements(groups)
    header = ("task", "same answer", "both right", "only base", "only large", "both wrong", "items")
    lines = [
        (
            page.escape(row.task),
            _with_small_interval(percent(row.same_answer)),
            *map(str, (row.both_right, row.only_base, row.only_large, row.both_wrong, row.items)),
        )
        for row in rows
    ]
    note = "The same questions through both encoders at α = 1: how often the texts are the same, and who is right."
    return [page.paragraph(note, "note"), page.table(header, lines)] if rows else []


def _latency_parts(groups: Groups) -> list[str]:
    times = _mean_times(groups)
    if not times:
        return []
    note = (
        f"Mean milliseconds of each part, over all tasks, in batches of up to {BATCH_ROWS} on the machine below; compilation is left out. "
        "Answers given alone are slower; `python -m tools.profile_device` measures those."
    )
    return [page.paragraph(note, "note"), page.panel(plots.stacked_bars(times, "milliseconds per answer"))]


def _mean_times(groups: Groups) -> dict[str, dict[str, float]]:
    """Mean milliseconds by step, for each encoder with and without the VRC."""
    rows: dict[str, list[ItemResult]] = {}
    for (_, key), result in groups.items():
        if key.condition == IMAGE:
            name = f"{key.encoder}, {'α = auto' if is_auto(key) else f'α = {key.alpha:g}'}"
            rows.setdefault(name, []).extend(result.items)
    means = {name: analysis.mean_milliseconds(items) for name, items in sorted(rows.items())}
    return {name: {step.replace("_", " "): value for step, value in steps.items()} for name, steps in means.items()}


# ---------------------------------------------------------------- how it was made


def _making_parts(contents: Contents) -> list[str]:
    parts = [page.panel(page.facts(contents.facts))] if contents.facts else []
    if contents.seconds:
        minutes = {name: {"minutes": value / 60} for name, value in contents.seconds.items()}
        parts.append(page.panel(plots.stacked_bars(minutes, "minutes of each step")))
    parts += _card_parts(contents.runs)
    if contents.commands:
        parts.append(page.panel(f"<pre>{page.escape(chr(10).join(contents.commands))}</pre>"))
    return parts


def _card_parts(runs: Iterable[TrainingRun]) -> list[str]:
    """Parameters and tokens from the last release card."""
    cards = [run.card for run in runs if run.card]
    if not cards:
        return []
    parameters = cards[-1]["parameters"]
    tokens = {card["name"]: card["tokens"] for card in cards}
    rows = [
        (page.escape(part), f"{count:,}") for part, count in (*parameters.items(), ("all", sum(parameters.values())))
    ]
    seen = [
        (page.escape(name), page.escape(source), f"{count:,}")
        for name, found in tokens.items()
        for source, count in found.items()
    ]
    return [
        page.folded("Parameters", page.table(("part", "parameters"), rows)),
        page.folded("Tokens seen", page.table(("run", "source", "tokens"), seen)),
    ]


def _duration(seconds: float) -> str:
    """Minutes and seconds: 12:40."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
