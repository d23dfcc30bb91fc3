"""`python -m tools.report --workdir DIR`: one HTML page about a run, or about a demo's runs and evaluation together."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.records import RecordError
from experiments import storage
from experiments.workdir import CHECKPOINTS, RELEASE, read_json
from hypervl_jax.architecture import ConfigError, TilingConfig, require
from hypervl_jax.evaluation.benchmarks import Item, ItemResult, ResultsError, read_results
from hypervl_jax.evaluation.report import Contents, TrainingRun, build_page
from hypervl_jax.evaluation.runs import RESULTS
from hypervl_jax.training.telemetry.metrics_log import read_metrics
from hypervl_jax.training.telemetry.records import RUN_RECORD, git_revision
from tools.demo import DemoError, read_record
from tools.evaluate import read_items

METRICS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
USAGE_ERROR = 2

_DESCRIPTION = """\
Builds one HTML page that needs no other file: training curves, scores with intervals against the controls, what the resolution
compressor saves, the agreement of the encoders, time per answer, and sample pictures. Whatever was not measured is left out.
DIR is the --workdir of a run, or a directory of several (as the demo's), shown in the order they were started."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("python -m tools.report", description=_DESCRIPTION)
    add = made.add_argument
    add("--workdir", required=True, metavar="DIR", help="of a run, or of several")
    add("--evaluation", metavar="DIR", help="what tools.evaluate wrote (default: evaluation/ in the workdir)")
    add("--data", metavar="ROOT", help="the evaluated data, for the samples (default: data/ in the workdir)")
    add("--title", default="HyperVL", help="(default: %(default)s)")
    add("--output", metavar="FILE", help="the page (default: report.html in the workdir)")
    add("--json", action="store_true", help="print what the page holds as JSON on standard output")
    return made


def run_directories(workdir: pathlib.Path) -> list[pathlib.Path]:
    """The directories with metrics: the workdir itself or those in it, in the order of their first start."""
    candidates = [workdir, *(path for path in workdir.iterdir() if path.is_dir())]
    found = [path for path in candidates if (path / METRICS).exists()]
    return sorted(found, key=lambda path: (_first_start(path).get("time", ""), path.name))


def _first_start(directory: pathlib.Path) -> Mapping[str, Any]:
    return _starts(directory)[0] if _starts(directory) else {}


def _starts(directory: pathlib.Path) -> Sequence[Mapping[str, Any]]:
    """Every start of a run, as its record tells."""
    return (read_json(directory / RUN_RECORD) or {}).get("starts", [])


def read_run(directory: pathlib.Path) -> TrainingRun:
    """A run's logs."""
    evaluations = directory / EVALUATIONS
    return TrainingRun(
        name=directory.name,
        metrics=read_metrics(directory / METRICS),
        evaluations=read_metrics(evaluations) if evaluations.exists() else [],
        card=read_json(directory / CHECKPOINTS / RELEASE) or {},
    )


def evaluated_items(subject: Mapping[str, Any], rows: Sequence[ItemResult], data: pathlib.Path) -> dict[str, Item]:
    """The evaluated questions by identity; none where the data is not at hand any more."""
    tasks = dict.fromkeys(row.task for row in rows)
    try:
        return {
            item.identity: item
            for task in tasks
            for item in read_items(data, subject["split"], task, subject["tokenizer"])
        }
    except RecordError as error:
        print(f"no samples: {error}", file=sys.stderr)
        return {}


def machine() -> str:
    """Processor, usable cores and memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [_processor(), f"{cores} cores", f"{platform.system()} {platform.machine()}"]
    with_memory = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
    if with_memory:
        parts.insert(2, f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB")
    return ", ".join(filter(None, parts))


def _processor() -> str:
    """The processor's name where the system tells it."""
    information = pathlib.Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def gather_facts(directories: Sequence[pathlib.Path], subject: Mapping[str, Any]) -> list[tuple[str, str]]:
    """When, where and with what all of this was made."""
    starts = [start for directory in directories for start in _starts(directory)]
    codes = dict.fromkeys(str(start["git"]) for start in starts) or {git_revision(): None}
    facts = [
        ("Date", datetime.datetime.now(datetime.UTC).isoformat(" ", "minutes").replace("+00:00", " UTC")),
        ("Code", ", ".join(codes)),
        ("Machine", machine()),
    ]
    if starts:
        packages, devices = starts[-1]["packages"], starts[-1]["devices"]
        names = [f"{name} {packages[name]}" for name in PACKAGES if name in packages]
        facts.append(("Devices", f"{devices['count']} × {devices['kind']}"))
        facts.append(("Software", ", ".join([f"Python {starts[-1]['python']}", *names])))
    if subject:
        facts.append(("Evaluated", f"step {subject['model']['step']}, split {subject['split']}"))
    return facts


def gather(options: argparse.Namespace) -> Contents:
    """Everything there is to show.

    Raises:
        OSError: no such directory.
        ResultsError, DemoError, ConfigError: a file that cannot be read, or nothing to show.
    """
    workdir = pathlib.Path(options.workdir)
    directories = run_directories(workdir)
    results = pathlib.Path(options.evaluation or workdir / "evaluation") / RESULTS
    subject, rows = read_results(results) if results.exists() else ({}, [])
    require(bool(directories or rows), f"{workdir} holds no {METRICS} and no evaluation; give a run's --workdir")
    record = read_record(workdir)
    commands = [step.command for step in record.values()] or [
        shlex.join(["python", *start["command"]]) for path in directories for start in _starts(path)[-1:]
    ]
    return Contents(
        title=options.title,
        runs=[read_run(directory) for directory in directories],
        results=rows,
        tiling=TilingConfig(**subject["tiling"]) if subject else None,
        items=evaluated_items(subject, rows, pathlib.Path(options.data or workdir / "data")) if rows else {},
        facts=gather_facts(directories, subject),
        commands=commands,
        seconds={name: step.seconds for name, step in record.items() if step.complete},
    )


def write_page(contents: Contents, output: pathlib.Path) -> None:
    """Writes the page as a whole. Raises `OSError` when it cannot be written."""
    temporary = output.with_name(f"{output.name}.writing")
    temporary.write_text(build_page(contents), "utf-8")
    temporary.replace(output)


def outcome(contents: Contents, output: pathlib.Path) -> dict[str, Any]:
    """What the page holds, as JSON."""
    return {
        "page": str(output.absolute()),
        "runs": {run.name: len(run.metrics) for run in contents.runs},
        "results": len(contents.results),
        "facts": dict(contents.facts),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parser().parse_args(arguments)
    output = pathlib.Path(options.output or pathlib.Path(options.workdir) / "report.html")
    try:
        with storage.explained():
            contents = gather(options)
            write_page(contents, output)
    except (ConfigError, ResultsError, DemoError, storage.StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    print(json.dumps(outcome(contents, output), indent=1) if options.json else f"report: {output.absolute()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
