"""`python -m tools.evaluate --checkpoint DIR --data ROOT`: answers held-out questions by real generation and scores them."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from data_pipelines.config import DataConfig, SourceShare
from data_pipelines.lanes import MissingData, manifest_hashes
from data_pipelines.records import PARAPHRASE_SEPARATOR, Record, RecordError, content_hash
from data_pipelines.sources import Source
from experiments import storage
from hypervl_jax import architecture
from hypervl_jax.architecture import BRANCHES, PARTS, ConfigError, require
from hypervl_jax.evaluation import analysis, benchmarks
from hypervl_jax.evaluation.benchmarks import (
    CONDITIONS,
    UNTRAINED,
    HeldoutTask,
    Item,
    ItemResult,
    Measurement,
    ResultsError,
    ResultsFile,
    evaluate,
    group,
    heldout_task,
)
from hypervl_jax.inference.assistant import AUTO, Assistant, load_assistant
from hypervl_jax.models.compressor_io import WEIGHTS as COMPRESSOR_WEIGHTS
from hypervl_jax.text.conversation import Turn
from hypervl_jax.text.tokenizer import TokenizerError
from hypervl_jax.training.checkpoint import CheckpointError, checkpoint_home, find_step, read_description
from hypervl_jax.training.state import abstract_parameters, initialise_parts
from hypervl_jax.training.telemetry.records import write_json
from hypervl_jax.vision.decoding import UndecodableImage
from hypervl_jax.vision.resolution import MAX_ALPHA, MIN_ALPHA

RESULTS, SUMMARY = "results.jsonl", "summary.json"
BOTH = "both"
UNTRAINED_SEED = 0
USAGE_ERROR = 2

_DESCRIPTION = """\
Answers the questions of held-out sources by greedy generation, and scores each answer by its task's metric (exact match for the
embedded tasks). Every answer is one line of DIR/results.jsonl; the same command goes on where it was stopped. DIR/summary.json
holds the table.

conditions:
  image      the trained model and the picture, at every --alpha
  blank      the trained model and a mid-grey picture of the same size: what can be guessed without seeing (first --alpha only)
  untrained  random parameters and the picture: what the answer format alone gives (first --alpha only)
"""

_EPILOG = """\
example:
  python -m tools.evaluate --checkpoint runs/demo/stage3 --compressor runs/demo/compressor --data runs/demo/data \\
      --alpha 1.0,auto --conditions image,blank,untrained --output runs/demo/evaluation
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "python -m tools.evaluate",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a run's --workdir, or the checkpoints directory in it")
    add("--step", type=int, metavar="N", help="of the checkpoint (default: the newest)")
    add("--compressor", metavar="DIR", help="what tools.train_compressor wrote; needed for --alpha auto")
    add("--data", required=True, metavar="ROOT", help="holds SPLIT/TASK, sources with answers in their last turn")
    add("--split", default="heldout", help="(default: heldout)")
    add("--tasks", default="digits,documents,charts,scenes", metavar="LIST", help="sources (default: %(default)s)")
    add("--encoder", default=BOTH, choices=(*BRANCHES, BOTH), help="(default: both)")
    add("--alpha", default="1.0", metavar="LIST", help="numbers from 0.1 to 1, or auto (default: %(default)s)")
    add(
        "--conditions", default="image,blank", metavar="LIST", help=f"of {', '.join(CONDITIONS)} (default: %(default)s)"
    )
    add("--limit", type=int, metavar="N", help="only the first N items of each task")
    add("--rows", type=int, default=benchmarks.BATCH_ROWS, metavar="N", help="items a batch (default: %(default)s)")
    add("--output", metavar="DIR", help="for results and summary (default: evaluation/ beside the checkpoints)")
    add("--json", action="store_true", help="print the summary as JSON on standard output")
    return made


def read_items(
    root: str | pathlib.Path, split: str, task: str, fingerprint: str, limit: int | None = None
) -> list[Item]:
    """The items of a source, in order: each record's last turn is the answer, all before it the question.

    Args:
        root, split, task: the source lies in `root/split/task`.
        fingerprint: of the model's tokenizer and template.
        limit: only so many, from the first.

    Raises:
        RecordError: no such source, a damaged one, or a record that does not end with an answer.
    """
    source = Source(pathlib.Path(root) / split / task, fingerprint)
    count = len(source) if limit is None else min(limit, len(source))
    return [_item(source.record(index), task) for index in range(count)]


def _item(record: Record, task: str) -> Item:
    *turns, last = record.turns or (Turn("", ""),)
    if last.role != "assistant" or not turns:
        raise RecordError(f"a record of {task} does not end with a question and its answer; evaluate other --tasks")
    others = str(record.metadata.get("paraphrases", "")).split(PARAPHRASE_SEPARATOR)
    return Item(
        identity=content_hash(record),
        task=task,
        turns=tuple(turns),
        images=record.images,
        answers=tuple(dict.fromkeys(text for text in (last.text, *others) if text)),
        kind=str(record.metadata.get("kind", "")),
        level=int(record.metadata.get("level", 0)),
    )


def parse_alphas(text: str) -> list[float | str]:
    """α's of a list such as "1.0,auto". Raises `ConfigError` for anything else."""
    try:
        alphas = [AUTO if part == AUTO else float(part) for part in _names(text)]
    except ValueError:
        raise ConfigError(f"--alpha {text!r} is no list of numbers and {AUTO!r}") from None
    for alpha in alphas:
        require(
            alpha == AUTO or MIN_ALPHA <= alpha <= MAX_ALPHA, f"--alpha {alpha} is not in [{MIN_ALPHA}, {MAX_ALPHA}]"
        )
    return alphas


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def planned(options: argparse.Namespace) -> list[Measurement]:
    """All ways to answer that were asked for. Raises `ConfigError` for those that cannot be."""
    alphas = parse_alphas(options.alpha)
    require(AUTO not in alphas or options.compressor is not None, "--alpha auto needs --compressor DIR")
    require(options.limit is None or options.limit > 0, f"--limit {options.limit} must be positive")
    require(options.rows > 0, f"--rows {options.rows} must be positive")
    encoders = BRANCHES if options.encoder == BOTH else (options.encoder,)
    return benchmarks.measurements(encoders, _names(options.conditions), alphas)


def subject(options: argparse.Namespace, assistant: Assistant) -> dict[str, Any]:
    """What the results are about: which model, VRC and data. Results of another subject are never mixed in."""
    mixture = tuple(SourceShare(task, 1.0) for task in _names(options.tasks))
    compressor = {"compressor": _compressor_identity(options.compressor)} if options.compressor else {}
    return {
        "model": _checkpoint_identity(options.checkpoint, options.step),
        **compressor,
        "tokenizer": assistant.tokenizer.fingerprint,
        "tiling": dataclasses.asdict(assistant.config.tiling),
        "split": options.split,
        "manifests": manifest_hashes(DataConfig(options.data, mixture, seed=0, split=options.split)),
    }


def _compressor_identity(directory: str) -> str:
    return hashlib.sha256((pathlib.Path(directory) / COMPRESSOR_WEIGHTS).read_bytes()).hexdigest()


def _checkpoint_identity(directory: str, step: int | None) -> dict[str, Any]:
    """Step and description of a checkpoint: training is deterministic, so they name its parameters."""
    home = checkpoint_home(directory)
    description = read_description(home)
    text = json.dumps([architecture.to_json(description.architecture), description.details], sort_keys=True)
    return {"step": find_step(home, step), "description": hashlib.sha256(text.encode()).hexdigest()}


def untrained(assistant: Assistant) -> Assistant:
    """The same architecture with random parameters, as a run that starts from nothing begins."""
    abstract, _ = abstract_parameters(assistant.config, assistant.runtime)
    shardings = {part: jax.tree.map(lambda _: _one_device(), abstract[part]) for part in PARTS}
    params = initialise_parts(assistant.config, assistant.runtime, PARTS, UNTRAINED_SEED, shardings)
    return Assistant(assistant.config, assistant.runtime, params, assistant.tokenizer)


def _one_device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def run(options: argparse.Namespace) -> list[ItemResult]:
    """Everything that was asked for; what the results file holds already is not answered again.

    Raises:
        ConfigError, CheckpointError, TokenizerError, RecordError, ResultsError, UndecodableImage: as their rooms say.
    """
    plan = planned(options)
    assistant = load_assistant(checkpoint_home(options.checkpoint), options.step, compressor=options.compressor)
    fingerprint = assistant.tokenizer.fingerprint
    tasks = [
        heldout_task(
            task, read_items(options.data, options.split, task, fingerprint, options.limit), assistant.tokenizer
        )
        for task in _names(options.tasks)
    ]
    require(bool(tasks), "give at least one of --tasks")
    with ResultsFile(output_directory(options) / RESULTS, subject(options, assistant)) as results:
        return _run_plan(plan, tasks, assistant, results, options.rows)


def _run_plan(
    plan: Sequence[Measurement], tasks: Sequence[HeldoutTask], trained: Assistant, results: ResultsFile, rows: int
) -> list[ItemResult]:
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parser().parse_args(arguments)
    explained = (
        ConfigError,
        CheckpointError,
        TokenizerError,
        RecordError,
        MissingData,
        ResultsError,
        UndecodableImage,
        storage.StorageError,
    )
    try:
        with storage.explained():
            rows = run(options)
            values = analysis.summary(rows)
            write_json(output_directory(options) / SUMMARY, values)
    except explained as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    if options.json:
        print(json.dumps(values, indent=1))
    else:
        Console().print(accuracy_table(rows))
        print(analysis.verdict_text(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
