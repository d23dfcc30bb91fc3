"""`python -m tools.compare_arms`: the runs of a DCL sweep on the same held-out questions, with the noise of items and seeds.

    runs ARM.seed=N of a sweep ─► both encoders answer and are compared (tools.compare_encoders) ─► arms, paired differences

<run>/comparison/   what `tools.compare_encoders` writes for the run; runs that have it are not measured again
<output>/arms.json  all figures; arms.md says them in tables; arms.png
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from data_pipelines.config import DataConfig, SourceShare
from data_pipelines.lanes import manifest_hashes
from experiments import storage
from experiments.workdir import CHECKPOINTS, RELEASE, read_json
from hypervl_jax.architecture import BRANCHES, ConfigError, require
from hypervl_jax.evaluation import study_plots, study_text
from hypervl_jax.evaluation.arm_study import HIDDEN, KL, SAME_ANSWER, ArmRun, Arms
from hypervl_jax.evaluation.benchmarks import ItemResult, read_results
from hypervl_jax.evaluation.consistency import imbalance_warnings
from hypervl_jax.evaluation.runs import names
from hypervl_jax.planning.useful import step_flops
from hypervl_jax.training.batch import BatchShape
from hypervl_jax.training.checkpoint import read_description
from hypervl_jax.training.telemetry.records import write_json
from tools import compare_encoders
from tools.evaluate import EXPLAINED
from tools.label_files import LabelError

SUMMARY, PAGE, MEASURED = "arms.json", "arms.md", "measured.json"
SEED = ".seed="
USAGE_ERROR, RUN_ERROR, SUCCESS = 2, 1, 0

_DESCRIPTION = """\
Reads the complete runs of sweeps such as dcl_arms (directories ARM.seed=N; without a seed it is 0), lets both encoders of each answer
the same held-out questions, and compares the arms: scores with spreads over seeds, how often both encoders say the same, KL and
distance of the last hidden states; for the questions of the DCL study the paired difference with its 95 % bootstrap interval over items
and seeds, and the smallest difference that could have been seen."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("python -m tools.compare_arms", description=_DESCRIPTION)
    add = made.add_argument
    add("--sweep", required=True, action="append", metavar="DIR", help="holds the runs; may be repeated")
    add("--data", required=True, metavar="ROOT", help="holds SPLIT/TASK, sources with answers in their last turn")
    add("--split", default="heldout", help="(default: heldout)")
    add("--tasks", default="digits,documents,charts,scenes", metavar="LIST", help="sources (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="only the first N items of each task")
    add("--output", required=True, metavar="DIR", help="of the figures")
    add("--json", action="store_true", help="print the figures as one JSON object on the last line")
    return made


class Measured(NamedTuple):
    """One run's figures, and the identities of the items they belong to."""

    run: ArmRun
    tasks: list[str]
    items: list[str]
    warnings: list[str]


def find_runs(sweeps: Sequence[str]) -> list[pathlib.Path]:
    """Directories of complete runs, sorted. Raises `ConfigError` without any."""
    found = [
        path.parents[1] for sweep in sweeps for path in sorted(pathlib.Path(sweep).glob(f"*/{CHECKPOINTS}/{RELEASE}"))
    ]
    require(bool(found), f"{', '.join(sweeps)} holds no complete run; `python -m experiments.sweep` makes them")
    return found


def measure(directory: pathlib.Path, options: argparse.Namespace) -> Measured:
    """Compares the encoders of one run, or reads what was found before for the same checkpoint, items and data."""
    path = directory / "comparison" / MEASURED
    key = _key(directory, options)
    known = read_json(path) or {}
    if known.get("key") != key:
        known = {"key": key, **_compare(directory, options)}
        write_json(path, known)
    arm, _, seed = directory.name.partition(SEED)
    card = read_json(directory / CHECKPOINTS / RELEASE) or {}
    values = {name: np.array(column) for name, column in known["values"].items()}
    run = ArmRun(arm, int(seed or 0), card["branch_steps"], teraflops(directory, card), values)
    return Measured(run, known["tasks"], known["items"], known["warnings"])


def _key(directory: pathlib.Path, options: argparse.Namespace) -> dict[str, Any]:
    card = read_json(directory / CHECKPOINTS / RELEASE) or {}
    mixture = tuple(SourceShare(task, 1.0) for task in names(options.tasks))
    manifests = manifest_hashes(DataConfig(options.data, mixture, seed=0, split=options.split))
    return {"time": card["time"], "step": card["step"], "limit": options.limit, "manifests": manifests}


def _compare(directory: pathlib.Path, options: argparse.Namespace) -> dict[str, Any]:
    """Scores and distances of all items, in the order of tasks and identities."""
    words = ["--checkpoint", str(directory), "--data", options.data, "--split", options.split, "--tasks", options.tasks]
    asked = compare_encoders.parser().parse_args(words + (["--limit", str(options.limit)] if options.limit else []))
    compared, _, _ = compare_encoders.run(asked)
    _, answers = read_results(compare_encoders.output_directory(asked) / compare_encoders.RESULTS)
    scores = {(row.encoder, row.task, row.identity): row for row in answers}
    found = sorted((item for task in compared for item in task.items), key=lambda item: (item.task, item.identity))
    score = lambda branch: [_score(scores, branch, item.task, item.identity) for item in found]
    return {
        "tasks": [item.task for item in found],
        "items": [item.identity for item in found],
        "values": {
            **{branch: score(branch) for branch in BRANCHES},
            SAME_ANSWER: [float(item.same_answer) for item in found],
            KL: [item.kl for item in found],
            HIDDEN: [item.hidden_distance for item in found],
        },
        "warnings": imbalance_warnings(compared, asked.least_agreement),
    }


def _score(rows: Mapping[tuple[str, str, str], ItemResult], branch: str, task: str, identity: str) -> float:
    return rows[branch, task, identity].score


def teraflops(directory: pathlib.Path, card: Mapping[str, Any]) -> float:
    """FLOPs of a run's training in 10¹²: forward and backward passes and the teacher's, padding counted."""
    config, architecture = card["config"], read_description(directory / CHECKPOINTS).architecture
    shape = BatchShape(*(int(config[f"batch.{name}"]) for name in ("rows", "length", "tiles")))
    frozen = set(config["optimizer.frozen"])
    moving = tuple(part for part in card["parameters"] if part not in frozen)
    joint = config["consistency.alternation"] == "joint"
    teacher = config["consistency.kl_weight"] > 0 and config["consistency.alternation"] not in BRANCHES
    arms = [(BRANCHES, card["branch_steps"]["base"])] if joint else [((b,), card["branch_steps"][b]) for b in BRANCHES]
    return sum(steps * step_flops(architecture, shape, arm, moving, teacher).total() for arm, steps in arms) / 1e12


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, as plain values.

    Raises:
        ConfigError, CheckpointError, TokenizerError, RecordError, ResultsError, UndecodableImage, LabelError: as their rooms say.
    """
    console, measured = Console(stderr=True), []
    directories = find_runs(options.sweep)
    for number, directory in enumerate(directories, 1):
        console.print(f"{number}/{len(directories)} {directory.name}", highlight=False, markup=False)
        measured.append(measure(directory, options))
    first = measured[0]
    for directory, found in zip(directories, measured, strict=True):
        require(found.items == first.items, f"{directory} was measured on other items than {directories[0]}")
    values = Arms([found.run for found in measured], first.tasks).to_json()
    by_run = {f"{found.run.arm}{SEED}{found.run.seed}": found.warnings for found in measured if found.warnings}
    counts = {task: first.tasks.count(task) for task in dict.fromkeys(first.tasks)}
    return {"tasks": counts, **values, "warnings": by_run}


def page(values: Mapping[str, Any]) -> str:
    """The tables."""
    warnings = "".join(f"- {run}: {text}\n" for run, texts in values["warnings"].items() for text in texts)
    return (
        f"# The arms of DCL\n\nItems: {', '.join(f'{task} ({count})' for task, count in values['tasks'].items())}. Scores in % with 95 % "
        f"intervals over items and seeds ± standard deviation over seeds.\n\n{study_text.arms_table(values['arms'])}\n"
        f"{study_text.contrasts_table(values['contrasts'])}\n## Failure signs\n\n{warnings or 'None was raised.'}\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parser().parse_args(arguments)
    home = pathlib.Path(options.output)
    try:
        with storage.explained():
            values = run(options)
            home.mkdir(parents=True, exist_ok=True)
            write_json(home / SUMMARY, values)
            (home / PAGE).write_text(page(values), "utf-8")
            study_plots.arms(values["arms"], home / study_plots.ARMS)
    except (*EXPLAINED, LabelError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return RUN_ERROR
    print(page(values), file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps(values))
    return SUCCESS


if __name__ == "__main__":
    sys.exit(main())
