"""The figures of the studies as Markdown: tables of the VRC's ablation and of the DCL arms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hypervl_jax.evaluation.analysis import percent
from hypervl_jax.evaluation.statistics import Estimate


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table with a line break at its end."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |\n" for line in lines)


def estimate(values: Mapping[str, float], signed: bool = False) -> str:
    """An estimate from its JSON form, in percent with its interval."""
    return percent(Estimate(**values), signed)


def share(value: float) -> str:
    """In percent."""
    return f"{100 * value:.1f} %".replace("-", "−")


def number(value: float | None) -> str:
    """With two decimals; nothing where there is none."""
    return "" if value is None else f"{value:.2f}".replace("-", "−")


def ablation_page(values: Mapping[str, Any]) -> str:
    """All tables of an ablation."""
    tasks = ", ".join(f"{name} ({items})" for name, items in values["tasks"].items())
    parts = [
        f"# The compressor's ablation\n\nItems: {tasks}; {values['left_out']} left out. Encoder {values['encoder']}. Scores in % with "
        f"95 % intervals; at α = 1 {estimate(values['full_score'])}, which is {estimate(values['reads'], True)} points above blank pictures.\n",
        "## Ways to choose α\n\n" + ways_table(values),
        *(f"## {row['name']} by task\n\n{task_table(row)}" for row in values["compressors"]),
        "## Latency\n\n" + latency_table(values),
        "## Dense small text, and pictures on which the compressor is unsure\n\n" + dense_table(values),
        _warnings(values["warnings"]),
    ]
    return "\n".join(parts)


def _warnings(warnings: Sequence[str]) -> str:
    lines = "".join(f"- {warning}\n" for warning in warnings) or "None was raised.\n"
    return f"## Failure signs\n\n{lines}"


def ways_table(values: Mapping[str, Any]) -> str:
    """Every way beside the tokens it takes, the VRC's with its differences at equal tokens."""
    rows = [_way_cells(f"α = {row['alpha']:g} for all", row, "") for row in values["uniform"]]
    for found in values["compressors"]:
        rows.append(_way_cells(f"**VRC, {found['name']}**", found["vrc"], ""))
        differences = found["vrc"]["against"]
        rows += [_way_cells(row["name"], row, estimate(differences[row["name"]], True)) for row in found["same_tokens"]]
        rows.append(_way_cells(f"VRC, {found['name']}, whole where unsure", found["unsure"], ""))
        rows.append(_way_cells(f"oracle α* at ε = {found['epsilon']:g}", found["oracle"], ""))
    header = (
        "way",
        "mean α",
        "tokens saved",
        "mean of tasks",
        "tiles saved",
        "score",
        "score kept",
        "VRC is better by",
    )
    return table(header, rows)


def _way_cells(name: str, row: Mapping[str, Any], difference: str) -> tuple[str, ...]:
    saved = (share(row[key]) for key in ("tokens_saved", "mean_tokens_saved", "tiles_saved"))
    return name, number(row["mean_alpha"]), *saved, estimate(row["score"]), estimate(row["retention"]), difference


def task_table(row: Mapping[str, Any]) -> str:
    """One compressor task by task."""
    cells = (
        (
            task["task"],
            task["items"],
            share(task["tokens_saved"]),
            share(task["tiles_saved"]),
            share(task["full_score"]),
            estimate(task["change"], True),
            number(task["mean_alpha"]),
            number(task["mean_optimal"]),
            share(task["over_compressed"]),
        )
        for task in row["tasks"]
    )
    header = (
        "task",
        "items",
        "tokens saved",
        "tiles saved",
        "score at α = 1",
        "change, points",
        "mean α",
        "mean α*",
        "Δ > ε",
    )
    follows = row["adaptivity"]
    rank = f"\nRank correlation of α with α*: {number(follows['tasks'])} over tasks, {number(follows['items'])} over items.\n"
    return table(header, cells) + rank


def latency_table(values: Mapping[str, Any]) -> str:
    """Milliseconds of an answer by step: whole images, the VRC, and one α at the same tokens."""
    rows = []
    for found in values["compressors"]:
        for way, steps in found["latency"].items():
            listed = ", ".join(f"{step} {time:.2f}" for step, time in steps.items())
            rows.append((found["name"], way, f"{sum(steps.values()):.2f}", listed))
    cost = values["flops"]
    flops = (
        f"\nFLOPs of the compressor: {share(cost['compressor'] / cost['base_tile'])} of one tile of the base encoder.\n"
    )
    return table(("compressor", "way", "ms an answer", "steps, ms"), rows) + flops


def dense_table(values: Mapping[str, Any]) -> str:
    """What happens on the images with the most edges, and where views of one picture are judged differently."""
    rows = (
        (
            found["name"],
            found["dense"]["items"],
            estimate(found["dense"]["change"], True),
            estimate(found["dense"]["rest"], True),
            number(found["dense"]["mean_alpha"]),
            share(found["unsure"]["share"]),
            estimate(found["unsure"]["against"][found["vrc"]["name"]], True),
            ", ".join(found["left_out"]),
        )
        for found in values["compressors"]
    )
    header = (
        "compressor",
        "dense items",
        "change there, points",
        "on the others",
        "mean α there",
        "unsure",
        "gain if whole",
        "never saw",
    )
    return table(header, rows)


def arms_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Scores of both branches of every arm, with what it cost and how far the branches agree."""
    cells = (
        (
            row["name"],
            len(row["runs"]),
            row["base_steps"],
            row["large_steps"],
            f"{row['teraflops']:.1f}",
            *(_branch_cells(row, branch) for branch in ("base", "large")),
            estimate(row["same_answer"]),
            f"{row['kl']['mean']:.3f}",
            f"{row['hidden_distance']['mean']:.3f}",
        )
        for row in rows
    )
    header = (
        *("arm", "seeds", "base steps", "large steps", "TFLOP", "base score", "large score"),
        *("same answer", "KL(large ‖ base)", "1 − cos of hidden states"),
    )
    return table(header, cells)


def _branch_cells(row: Mapping[str, Any], branch: str) -> str:
    found = row["branches"][branch]
    return f"{estimate(found['score'])} ± {100 * found['spread']:.1f}"


def contrasts_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Paired differences between arms, with the smallest difference that could have been seen."""
    cells = (
        (
            row["question"],
            row["branch"],
            f"{row['arm']} − {row['baseline']}",
            estimate(row["difference"], True),
            share(row["detectable"]),
        )
        for row in rows
    )
    return table(("question", "branch", "arms", "difference, points", "smallest detectable"), cells)
