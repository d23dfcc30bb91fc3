"""`python -m tools.evaluate --checkpoint DIR --data ROOT`: answers held-out questions by real generation and scores them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from data_pipelines.config import DataConfig, SourceShare
from data_pipelines.lanes import MissingData, manifest_hashes
from data_pipelines.records import PARAPHRASE_SEPARATOR, Record, RecordError, content_hash
from data_pipelines.sources import Source
from experiments import storage
from hypervl_jax.architecture import ConfigError, require
from hypervl_jax.evaluation import analysis, failure_signs
from hypervl_jax.evaluation.benchmarks import Item, ItemResult, ResultsError, ResultsFile, group, heldout_task
from hypervl_jax.evaluation.runs import (
    RESULTS,
    SUMMARY,
    accuracy_table,
    add_measurement_options,
    add_model_options,
    model_identity,
    names,
    output_directory,
    planned,
    run_plan,
)
from hypervl_jax.inference.assistant import Assistant, load_assistant
from hypervl_jax.text.conversation import Turn
from hypervl_jax.text.tokenizer import TokenizerError
from hypervl_jax.training.checkpoint import CheckpointError, checkpoint_home
from hypervl_jax.training.telemetry.records import write_json
from hypervl_jax.vision.decoding import UndecodableImage

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
    add_model_options(made)
    add = made.add_argument
    add("--data", required=True, metavar="ROOT", help="holds SPLIT/TASK, sources with answers in their last turn")
    add("--split", default="heldout", help="(default: heldout)")
    add("--tasks", default="digits,documents,charts,scenes", metavar="LIST", help="sources (default: %(default)s)")
    add_measurement_options(made, conditions="image,blank")
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


def subject(options: argparse.Namespace, assistant: Assistant) -> dict[str, Any]:
    """What the results are about: which model, VRC and data. Results of another subject are never mixed in."""
    mixture = tuple(SourceShare(task, 1.0) for task in names(options.tasks))
    return {
        **model_identity(options),
        "tokenizer": assistant.tokenizer.fingerprint,
        "tiling": dataclasses.asdict(assistant.config.tiling),
        "split": options.split,
        "manifests": manifest_hashes(DataConfig(options.data, mixture, seed=0, split=options.split)),
    }


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
        for task in names(options.tasks)
    ]
    require(bool(tasks), "give at least one of --tasks")
    with ResultsFile(output_directory(options) / RESULTS, subject(options, assistant)) as results:
        return run_plan(plan, tasks, assistant, results, options.rows)


EXPLAINED = (
    ConfigError,
    CheckpointError,
    TokenizerError,
    RecordError,
    MissingData,
    ResultsError,
    UndecodableImage,
    storage.StorageError,
)
"""What an evaluating command may meet in its input, and says in a sentence."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parser().parse_args(arguments)
    try:
        with storage.explained():
            rows = run(options)
            values = {**analysis.summary(rows), "warnings": failure_signs.of_results(group(rows))}
            write_json(output_directory(options) / SUMMARY, values)
            failure_signs.tell(values["warnings"])
    except EXPLAINED as error:
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
