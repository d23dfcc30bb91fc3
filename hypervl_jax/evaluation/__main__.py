"""`python -m hypervl_jax.evaluation`: answers public benchmarks from local files by real generation and scores them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from hypervl_jax.architecture import ConfigError, require
from hypervl_jax.evaluation import analysis, failure_signs
from hypervl_jax.evaluation.benchmark_files import (
    BenchmarkFileError,
    parse_scores,
    read_task,
    write_predictions,
)
from hypervl_jax.evaluation.benchmarks import IMAGE, HeldoutTask, ItemResult, ResultsError, ResultsFile, group
from hypervl_jax.evaluation.registry import (
    BENCHMARKS,
    OPENCOMPASS,
    PAPER_AVERAGE,
    Benchmark,
    benchmark,
    benchmark_score,
    expand,
    is_scored,
    opencompass_average,
)
from hypervl_jax.evaluation.runs import (
    RESULTS,
    SUMMARY,
    add_measurement_options,
    add_model_options,
    model_identity,
    names,
    output_directory,
    planned,
    run_plan,
)
from hypervl_jax.inference.assistant import load_assistant
from hypervl_jax.text.conversation import ConversationError
from hypervl_jax.text.tokenizer import TokenizerError
from hypervl_jax.training.checkpoint import CheckpointError, checkpoint_home
from hypervl_jax.training.telemetry.records import write_json
from hypervl_jax.vision.decoding import UndecodableImage

USAGE_ERROR, RUN_ERROR, SUCCESS = 2, 1, 0
PREDICTIONS = "predictions"

_DESCRIPTION = """\
Answers the questions of benchmark files by greedy generation. DATA holds NAME.tsv of each task in VLMEvalKit's format; nothing is
downloaded. Every answer is one line of DIR/results.jsonl, and the same command goes on where it was stopped. DIR/summary.json holds
the scores with 95 % intervals, DIR/predictions/ one file for each task and way to answer, as judges and servers take it.
"""

_EPILOG = """\
tasks:
{tasks}
  opencompass: the nine files of OpenCompass's average of eight

examples:
  python -m hypervl_jax.evaluation --checkpoint runs/stage3 --data benchmarks --tasks AI2D_TEST,OCRBench --encoder both
  python -m hypervl_jax.evaluation --checkpoint runs/stage3 --compressor runs/compressor --data benchmarks --tasks opencompass \\
      --alpha auto,1.0 --scores MMVet=44.2,MMBench_TEST_EN_V11=70.1,MMBench_TEST_CN_V11=68.0

exit status:
  0  evaluated    1  a file cannot be read or written    2  it could not be evaluated as asked
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    tasks = "\n".join(f"  {row.name:<20} {row.metric}, {row.aggregate}" for row in BENCHMARKS.values())
    made = argparse.ArgumentParser(
        "python -m hypervl_jax.evaluation",
        description=_DESCRIPTION,
        epilog=_EPILOG.format(tasks=tasks),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(made)
    add = made.add_argument
    add("--data", required=True, metavar="DIR", help="holds NAME.tsv of every task")
    add("--tasks", required=True, metavar="LIST", help="names of the list below")
    add("--max-new-tokens", type=int, metavar="N", help="longest answer (default: each task's)")
    add("--scores", default="", metavar="LIST", help="NAME=SCORE of judges and servers, for OpenCompass's average")
    add_measurement_options(made, conditions=IMAGE)
    return made


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What was measured: tasks with their questions, and all answers."""

    benchmarks: Mapping[str, Benchmark]
    tasks: Mapping[str, HeldoutTask]
    rows: Sequence[ItemResult]


def run(options: argparse.Namespace) -> Evaluated:
    """Everything that was asked for; what the results file holds already is not answered again.

    Raises:
        ConfigError, BenchmarkFileError, CheckpointError, ConversationError, TokenizerError, ResultsError, UndecodableImage: as their
            rooms say.
    """
    plan = planned(options)
    chosen = {name: benchmark(name) for name in expand(names(options.tasks))}
    require(bool(chosen), "give at least one of --tasks")
    require(options.max_new_tokens is None or options.max_new_tokens > 0, "--max-new-tokens must be positive")
    tasks = {name: read_task(options.data, row, options.limit) for name, row in chosen.items()}
    if options.max_new_tokens:
        tasks = {name: dataclasses.replace(task, max_new_tokens=options.max_new_tokens) for name, task in tasks.items()}
    assistant = load_assistant(checkpoint_home(options.checkpoint), options.step, compressor=options.compressor)
    subject = {
        **model_identity(options),
        "tokenizer": assistant.tokenizer.fingerprint,
        "tiling": dataclasses.asdict(assistant.config.tiling),
        "max_new_tokens": options.max_new_tokens,
    }
    with ResultsFile(output_directory(options) / RESULTS, subject) as results:
        return Evaluated(chosen, tasks, run_plan(plan, list(tasks.values()), assistant, results, options.rows))


def summary(found: Evaluated, given: Mapping[str, float]) -> dict[str, Any]:
    """Scores of every task and way to answer, OpenCompass's eight of each way, and what the two encoders and the VRC do to answers.

    Args:
        found: by `run`.
        given: scores of judges and servers by file, on a scale of 100.
    """
    groups = group(found.rows)
    table, scores = [], {}
    for (name, measurement), result in groups.items():
        task, items = found.benchmarks[name], found.tasks[name].items
        score = benchmark_score(task, items, result) if is_scored(task, items) else None
        cells = score._asdict() if score else dict.fromkeys(("mean", "low", "high"))
        line = {"task": name, **measurement._asdict(), "metric": task.metric, "aggregate": task.aggregate, **cells}
        table.append(line | {"items": len(result.items), "unfinished": sum(not row.stopped for row in result.items)})
        if score and measurement.condition == IMAGE:
            scores.setdefault((measurement.encoder, measurement.alpha), {})[name] = 100 * score.mean
    averages = []
    for (encoder, alpha), known in scores.items():
        parts, average = opencompass_average({**known, **given})
        averages.append({"encoder": encoder, "alpha": alpha, "parts": parts, "average": average})
    said = analysis.summary(found.rows)
    kept = {name: said[name] for name in ("savings", "agreement")}
    return {"table": table, "opencompass": averages, **kept, "warnings": failure_signs.of_results(groups)}


def write_all(found: Evaluated, values: Mapping[str, Any], options: argparse.Namespace) -> None:
    """The summary, and a predictions file for each task and way to answer."""
    home = output_directory(options)
    write_json(home / SUMMARY, values)
    for (name, measurement), result in group(found.rows).items():
        file = f"{name}-{'-'.join(map(str, measurement))}.tsv"
        task = found.tasks[name]
        write_predictions(options.data, home / PREDICTIONS / file, task, found.benchmarks[name].split, result)


def score_table(values: Mapping[str, Any]) -> Table:
    """The scores for a terminal."""
    table = Table(caption="score in % [95 % interval] as the benchmark publishes it", title_justify="left")
    for heading in ("task", "encoder", "α", "seen", "items", "score"):
        table.add_column(heading, no_wrap=True)
    for line in values["table"]:
        interval = (
            f"{100 * line['mean']:.1f} [{100 * line['low']:.1f}, {100 * line['high']:.1f}]"
            if line["mean"] is not None
            else ""
        )
        cells = (line["encoder"], line["alpha"], line["condition"], line["items"])
        table.add_row(line["task"], *map(str, cells), interval or "by a judge or server only: see predictions")
    return table


def average_sentence(row: Mapping[str, Any]) -> str:
    """What is known of OpenCompass's average for one way to answer."""
    way = f"OpenCompass, encoder {row['encoder']}, α {row['alpha']}"
    if row["average"] is not None:
        return f"{way}: average of the eight {row['average']:.1f} (the paper's: {PAPER_AVERAGE})"
    missing = [name for name in OPENCOMPASS if name not in row["parts"]]
    return f"{way}: {len(row['parts'])} of 8 scores known; missing: {', '.join(missing)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parser().parse_args(arguments)
    refused = (ConfigError, CheckpointError, TokenizerError, ResultsError, UndecodableImage, ConversationError)
    try:
        given = parse_scores(options.scores)
        found = run(options)
        values = summary(found, given)
        write_all(found, values, options)
        failure_signs.tell(values["warnings"])
    except refused as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except (BenchmarkFileError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return RUN_ERROR
    if options.json:
        print(json.dumps(values))
        return SUCCESS
    Console().print(score_table(values))
    for row in values["opencompass"]:
        if row["parts"]:
            print(average_sentence(row))
    return SUCCESS


if __name__ == "__main__":
    sys.exit(main())
