"""The release card of a finished run: what the parameters are, what they saw, how they measure."""

from __future__ import annotations

import datetime
import pathlib
from collections.abc import Mapping
from typing import Any

from data_pipelines.lanes import manifest_hashes
from experiments.config import ExperimentConfig
from experiments.preflight import heldout_data
from experiments.workdir import CHECKPOINTS, RELEASE, as_json
from hypervl_jax.architecture import BRANCHES
from hypervl_jax.text.tokenizer import Tokenizer
from hypervl_jax.training.loop import Outcome
from hypervl_jax.training.telemetry.records import git_revision, write_json

RELEASE_TEXT = "RELEASE.md"


def release_card(config: ExperimentConfig, tokenizer: Tokenizer, outcome: Outcome) -> dict[str, Any]:
    """The card as JSON. `manifests` are SHA-256 of the sources' manifests, which hold the checksums of all their files."""
    splits = [config.data, *heldout_data(config).values()]
    return {
        "name": config.name,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git": git_revision(),
        "step": outcome.step,
        "parameters": config.architecture.parameter_counts(),
        "tokens": outcome.tokens,
        "branch_steps": outcome.branch_steps,
        "heldout": outcome.heldout,
        "manifests": {f"{data.split}/{name}": sha for data in splits for name, sha in manifest_hashes(data).items()},
        "tokenizer": tokenizer.fingerprint,
        "config": as_json(config),
    }


def write_release(workdir: pathlib.Path, card: Mapping[str, Any]) -> pathlib.Path:
    """Writes `RELEASE.md`, then `release.json` by rename, beside the final checkpoint; returns the path of the readable one."""
    home = workdir / CHECKPOINTS
    (home / RELEASE_TEXT).write_text(release_text(card))
    write_json(home / RELEASE, card)
    return home / RELEASE_TEXT


def release_text(card: Mapping[str, Any]) -> str:
    """The card for people."""
    tokens = card["tokens"]
    total = max(sum(tokens.values()), 1)
    steps = ", ".join(f"{card['branch_steps'][branch]} of {branch}" for branch in BRANCHES)
    lines = [
        f"# {card['name']}, step {card['step']}",
        f"Finished {card['time']} with code {card['git']}. The parameters are in `{card['step']}/params`, what they mean in `description/`.",
        f"Steps of each branch: {steps}.",
        "## Tokens seen",
        "LLM positions that are not padding, visual tokens included.",
        _table(("source", "tokens", "share"), [(name, f"{n:,}", f"{n / total:.1%}") for name, n in tokens.items()]),
        "## Held-out losses",
        heldout_table(card["heldout"]) or "Not evaluated.",
        "## Parameters",
        _table(("part", "parameters"), [(part, f"{count:,}") for part, count in card["parameters"].items()]),
        "## Data",
        f"Tokenizer and template: `{card['tokenizer']}`.",
        _table(("source", "SHA-256 of its manifest"), list(card["manifests"].items())),
        "## Configuration",
        "\n".join(["```", *(f"{key} = {value!r}" for key, value in card["config"].items()), "```"]),
    ]
    return "\n\n".join(lines) + "\n"


def heldout_table(heldout: Mapping[str, float]) -> str:
    """Cross-entropy of both branches, KL and agreement, over all and by source; empty without values."""
    columns = ("cross_entropy/base", "cross_entropy/large", "kl", "agreement")
    sources = sorted(key.removeprefix("kl/") for key in heldout if key.startswith("kl/"))
    rows = [("all", *(heldout[name] for name in columns))] if heldout else []
    rows += [(source, *(heldout[f"{name}/{source}"] for name in columns)) for source in sources]
    return (
        _table(("source", *columns), [(row[0], *(f"{value:.4f}" for value in row[1:])) for row in rows]) if rows else ""
    )


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
