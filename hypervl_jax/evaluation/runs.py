"""What the commands that evaluate share: their options, the plan of measurements, the identity of what was measured, the table.

`python -m hypervl_jax.evaluation` reads benchmark files, `tools.evaluate` held-out sources of our own data; all else is here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from hypervl_jax import architecture
from hypervl_jax.architecture import BRANCHES, PARTS, ConfigError, require
from hypervl_jax.evaluation import analysis, benchmarks
from hypervl_jax.evaluation.benchmarks import (
    CONDITIONS,
    UNTRAINED,
    HeldoutTask,
    ItemResult,
    Measurement,
    ResultsFile,
    evaluate,
    group,
)
from hypervl_jax.inference.assistant import AUTO, Assistant
from hypervl_jax.models.compressor_io import WEIGHTS as COMPRESSOR_WEIGHTS
from hypervl_jax.training.checkpoint import checkpoint_home, find_step, read_description
from hypervl_jax.training.state import abstract_parameters, initialise_parts
from hypervl_jax.vision.resolution import MAX_ALPHA, MIN_ALPHA

RESULTS, SUMMARY = "results.jsonl", "summary.json"
BOTH = "both"
UNTRAINED_SEED = 0


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model."""
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a run's --workdir, or the checkpoints directory in it")
    add("--step", type=int, metavar="N", help="of the checkpoint (default: the newest)")
    add("--compressor", metavar="DIR", help="what tools.train_compressor wrote; needed for --alpha auto")


def add_measurement_options(parser: argparse.ArgumentParser, conditions: str) -> None:
    """How to answer; `conditions` is the default of --conditions."""
    add = parser.add_argument
    add("--encoder", default=BOTH, choices=(*BRANCHES, BOTH), help="(default: both)")
    add("--alpha", default="1.0", metavar="LIST", help="numbers from 0.1 to 1, or auto (default: %(default)s)")
    add("--conditions", default=conditions, metavar="LIST", help=f"of {', '.join(CONDITIONS)} (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="only the first N items of each task")
    add("--rows", type=int, default=benchmarks.BATCH_ROWS, metavar="N", help="items a batch (default: %(default)s)")
    add("--output", metavar="DIR", help="for results and summary (default: evaluation/ beside the checkpoints)")
    add("--json", action="store_true", help="print the summary as JSON on standard output")


def parse_alphas(text: str) -> list[float | str]:
    """α's of a list such as "1.0,auto". Raises `ConfigError` for anything else."""
    try:
        alphas = [AUTO if part == AUTO else float(part) for part in names(text)]
    except ValueError:
        raise ConfigError(f"--alpha {text!r} is no list of numbers and {AUTO!r}") from None
    for alpha in alphas:
        require(
            alpha == AUTO or MIN_ALPHA <= alpha <= MAX_ALPHA, f"--alpha {alpha} is not in [{MIN_ALPHA}, {MAX_ALPHA}]"
        )
    return alphas


def names(text: str) -> list[str]:
    """The parts of a list with commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def planned(options: argparse.Namespace) -> list[Measurement]:
    """All ways to answer that were asked for. Raises `ConfigError` for those that cannot be."""
    alphas = parse_alphas(options.alpha)
    require(AUTO not in alphas or options.compressor is not None, "--alpha auto needs --compressor DIR")
    require(options.limit is None or options.limit > 0, f"--limit {options.limit} must be positive")
    require(options.rows > 0, f"--rows {options.rows} must be positive")
    encoders = BRANCHES if options.encoder == BOTH else (options.encoder,)
    return benchmarks.measurements(encoders, names(options.conditions), alphas)


def model_identity(options: argparse.Namespace) -> dict[str, Any]:
    """Names the model and the VRC: training is deterministic, so step and description of a checkpoint name its parameters."""
    home = checkpoint_home(options.checkpoint)
    description = read_description(home)
    text = json.dumps([architecture.to_json(description.architecture), description.details], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    found: dict[str, Any] = {"model": {"step": find_step(home, options.step), "description": digest}}
    if options.compressor:
        weights = (pathlib.Path(options.compressor) / COMPRESSOR_WEIGHTS).read_bytes()
        found["compressor"] = hashlib.sha256(weights).hexdigest()
    return found


def untrained(assistant: Assistant) -> Assistant:
    """The same architecture with random parameters, as a run that starts from nothing begins."""
    abstract, _ = abstract_parameters(assistant.config, assistant.runtime)
    shardings = {part: jax.tree.map(lambda _: _one_device(), abstract[part]) for part in PARTS}
    params = initialise_parts(assistant.config, assistant.runtime, PARTS, UNTRAINED_SEED, shardings)
    return Assistant(assistant.config, assistant.runtime, params, assistant.tokenizer)


def _one_device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def run_plan(
    plan: Sequence[Measurement], tasks: Sequence[HeldoutTask], trained: Assistant, results: ResultsFile, rows: int
) -> list[ItemResult]:
    """Answers every task in every way, with a progress bar; what `results` holds is not answered again."""
    assistants, found = {False: trained}, []
    with _progress() as progress:
        line = progress.add_task("", total=len(plan) * sum(len(task.items) for task in tasks))
        for measurement in plan:
            random = measurement.condition == UNTRAINED
            if random not in assistants:
                assistants[random] = untrained(trained)
            for task in tasks:
                progress.update(line, description=f"{task.name} · {' '.join(map(str, measurement))}")
                step = lambda items: progress.update(line, advance=items)
                found += evaluate(assistants[random], task, measurement, results, step, rows).items
    return found


def _progress() -> Progress:
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)


def output_directory(options: argparse.Namespace) -> pathlib.Path:
    """Where results go: --output, or `evaluation` beside the checkpoints."""
    return pathlib.Path(options.output or checkpoint_home(options.checkpoint).parent / "evaluation")


def accuracy_table(rows: Sequence[ItemResult]) -> Table:
    """The table for a terminal: a line for each task and encoder, a column for each condition and α."""
    groups = group(rows)
    columns = list(dict.fromkeys((key.condition, key.alpha) for _, key in groups))
    table = Table(caption="score in % [95 % interval]", title_justify="left")
    for heading in ("task", "encoder", "items"):
        table.add_column(heading, no_wrap=True)
    for condition, alpha in columns:
        table.add_column(analysis.condition_name(condition, alpha), justify="right")
    for task, encoder in dict.fromkeys((task, key.encoder) for task, key in groups):
        results = [groups.get((task, Measurement(encoder, *column))) for column in columns]
        items = max(len(result.items) for result in results if result is not None)
        cells = ["" if result is None else analysis.percent(result.score) for result in results]
        table.add_row(task, encoder, str(items), *cells)
    return table
