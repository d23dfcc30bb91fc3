"""`python -m tools.demo`: the whole of HyperVL at a tiny size, from nothing to a report page, in minutes on two cores."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.stopping import terminate_as_interrupt

HOME = pathlib.Path(__file__).parents[1]
RECORD = "demo.json"
PAGE = "report.html"
COMPILED = "compiled"
"""Compiled programs, so that later steps and a resumed demo need not compile again."""

TASKS = ("digits", "documents", "charts", "scenes")
LABELLED_IMAGES = 300
"""Of each task, which the resolution compressor learns from."""

COMPRESSOR_STEPS = 200
"""Updates of the compressor: two thirds of the tool's default, for the demo's minutes."""

STOP_SECONDS = 60.0
"""A training step saves on SIGTERM; this is how long it may take."""

INTERRUPTED, FAILED, USAGE_ERROR = 130, 1, 2

_DESCRIPTION = """\
Runs every step as a user would, each a command of its own: embedded data, three training stages with both encoders, resolution
labels made by the model itself, the resolution compressor, evaluation by generation, and a report page. Stop it with Ctrl-C at any
time; the same command goes on from there. A step whose inputs changed (its command, the code that defines it, or a step
before it) is made again."""


class DemoError(Exception):
    """The demo cannot go on; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: short, for tables.
        title: what it does.
        command: module and arguments.
        output: what it makes: a file or a directory, removed when it is out of date.
        product: the path in it that exists once the step is complete.
        code: patterns of project files that define what the step makes.
        inputs: names of the steps whose outcome it uses; the one before it where None.
    """

    name: str
    title: str
    command: tuple[str, ...]
    output: pathlib.Path
    product: pathlib.Path
    code: tuple[str, ...]
    inputs: tuple[str, ...] | None = None


Plan = Callable[[pathlib.Path], Sequence[Step]]
"""From a workdir to the steps in it."""


def steps(workdir: pathlib.Path) -> list[Step]:
    """The demo's steps, in order."""
    at = lambda *parts: str(workdir.joinpath(*parts))
    data, model, compressor = at("data"), at("stage3"), at("compressor")
    checkpoints = at("stage3", "checkpoints")
    compression = ("hypervl_jax/training/compress*.py", "hypervl_jax/models/compressor*.py", "hypervl_jax/mobilenet.py")
    return [
        Step(
            "data",
            "embedded data",
            ("data_pipelines.rendered", "--output", data),
            workdir / "data",
            workdir / "data" / "rendered.json",
            ("data_pipelines/rendered/*.py", "data_pipelines/records.py"),
        ),
        _stage(workdir, 1, "captions"),
        _stage(workdir, 2, "all tasks"),
        _stage(workdir, 3, "the picture tasks, rate down to 0"),
        Step(
            "labels",
            "resolution labels, made by the model",
            (
                *("tools.label_resolutions", "--checkpoint", checkpoints, "--data", data, "--sources", ",".join(TASKS)),
                *("--limit", str(LABELLED_IMAGES), "--output", at("labels")),
            ),
            workdir / "labels",
            workdir / "labels" / "labels.json",
            ("tools/label_*.py", *compression),
        ),
        Step(
            "compressor",
            "resolution compressor (VRC)",
            (
                *("tools.train_compressor", "--labels", at("labels"), "--data", data),
                *("--checkpoint", checkpoints, "--steps", str(COMPRESSOR_STEPS), "--output", compressor),
            ),
            workdir / "compressor",
            workdir / "compressor" / "compressor.safetensors",
            ("tools/train_compressor.py", *compression),
        ),
        Step(
            "evaluation",
            "evaluation by generation",
            (
                *("tools.evaluate", "--checkpoint", model, "--compressor", compressor, "--data", data),
                *("--alpha", "1.0,auto", "--conditions", "image,blank,untrained", "--output", at("evaluation")),
            ),
            workdir / "evaluation",
            workdir / "evaluation" / "summary.json",
            (*(f"hypervl_jax/evaluation/{name}.py" for name in ("metrics", "benchmarks", "runs")), "tools/evaluate.py"),
        ),
        Step(
            "report",
            "report page",
            ("tools.report", "--workdir", str(workdir), "--output", at(PAGE)),
            workdir / PAGE,
            workdir / PAGE,
            ("hypervl_jax/evaluation/*.py", "tools/report.py"),
        ),
    ]


def _stage(workdir: pathlib.Path, number: int, what: str) -> Step:
    home = workdir / f"stage{number}"
    before = workdir / f"stage{number - 1}"
    start = (f"--config.initialize_from.checkpoint={before}",) if number > 1 else ()
    return Step(
        name=home.name,
        title=f"stage {number}: {what}",
        command=(
            *("experiments.launch", "--config", f"tiny_stage{number}"),
            *("--workdir", str(home), "--data", str(workdir / "data"), *start),
        ),
        output=home,
        product=home / "checkpoints" / "release.json",
        code=("experiments/configs/tiny*.py", "hypervl_jax/architecture.py"),
    )


@dataclasses.dataclass
class StepRecord:
    """What is known of a step: the key of its inputs, its command line, seconds spent on it, whether it is complete."""

    key: str
    command: str
    seconds: float = 0.0
    complete: bool = False


Record = dict[str, StepRecord]


def read_record(workdir: pathlib.Path) -> Record:
    """What `<workdir>/demo.json` says; empty without one. Raises `DemoError` when it cannot be read."""
    path = workdir / RECORD
    try:
        return {name: StepRecord(**values) for name, values in json.loads(path.read_text("utf-8")).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        raise DemoError(f"{path} cannot be read ({error}); remove {workdir} or give another --workdir") from error


def write_record(workdir: pathlib.Path, record: Record) -> None:
    """Replaces `<workdir>/demo.json` as a whole."""
    temporary = workdir / f"{RECORD}.writing"
    values = {name: dataclasses.asdict(step) for name, step in record.items()}
    temporary.write_text(json.dumps(values, indent=1) + "\n", "utf-8")
    temporary.replace(workdir / RECORD)


def step_keys(plan: Plan) -> dict[str, str]:
    """A key for each step: of its command, of the code that defines it, and of the steps whose outcome it uses.

    However the workdir is written, and wherever it is moved, the keys are the same.
    """
    keys, previous = {}, ""
    for step in plan(pathlib.Path("WORKDIR")):
        used = (previous,) if step.inputs is None else tuple(keys[name] for name in step.inputs)
        digest = hashlib.sha256("\0".join((*used, *step.command)).encode())
        for path in sorted(path for pattern in step.code for path in HOME.glob(pattern)):
            digest.update(what_runs(path.read_text("utf-8")).encode())
        keys[step.name] = previous = digest.hexdigest()
    return keys


def what_runs(source: str) -> str:
    """A module's syntax tree without comments, docstrings and layout: what can change the outcome of a step."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [part for part in body if not _is_text(part)]
    return ast.dump(tree)


def _is_text(statement: ast.stmt) -> bool:
    """Whether a statement is a text that nobody reads at run time, as a docstring is."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def command_line(step: Step) -> str:
    """The step as a user would type it."""
    return shlex.join(("python", "-m", *step.command))


class Demo:
    """One demo in one directory.

    Args:
        workdir: new, empty, or of an earlier demo.
        plan: the steps in a directory, in order.
        console: where it says what it does.

    Raises:
        DemoError: the directory holds something else.
    """

    def __init__(self, workdir: pathlib.Path, plan: Plan, console: Console) -> None:
        self.workdir, self.steps, self.console = workdir, plan(workdir), console
        self.record = read_record(workdir)
        if not self.record and workdir.exists() and any(workdir.iterdir()):
            raise DemoError(f"{workdir} is not empty and holds no {RECORD}; give another --workdir")
        workdir.mkdir(parents=True, exist_ok=True)
        self.keys = step_keys(plan)

    def is_done(self, step: Step) -> bool:
        """Whether the step is complete with its present inputs."""
        known = self.record.get(step.name)
        return known is not None and known.complete and known.key == self.keys[step.name] and step.product.exists()

    def run(self) -> bool:
        """Runs what is not done; False when there was nothing to do.

        Raises:
            DemoError: a step failed.
        """
        began, ran = time.monotonic(), False
        for number, step in enumerate(self.steps, 1):
            if self.is_done(step):
                continue
            elapsed = format_seconds(time.monotonic() - began)
            self.console.print(f"[bold]\\[{number}/{len(self.steps)}] {step.title}[/bold]  ({elapsed} elapsed)")
            self.console.print(f"  {command_line(step)}", style="dim", soft_wrap=True, highlight=False)
            self._run_step(step)
            ran = True
        return ran

    def _run_step(self, step: Step) -> None:
        known = self.record.get(step.name)
        if known is None or known.key != self.keys[step.name] or known.complete:
            _remove(step.output)
            known = StepRecord(self.keys[step.name], command_line(step))
        self.record[step.name] = known
        write_record(self.workdir, self.record)
        before, began = known.seconds, time.monotonic()
        try:
            status = run_command((sys.executable, "-m", *step.command), _environment(self.workdir))
        finally:
            known.seconds = round(before + time.monotonic() - began, 3)
            write_record(self.workdir, self.record)
        if status != 0 or not step.product.exists():
            raise DemoError(
                f"{step.title} ended with status {status}{'' if step.product.exists() else f' and left no {step.product}'}. "
                f"Its command was\n  {known.command}\nThe same demo command goes on from here"
            )
        known.complete = True
        write_record(self.workdir, self.record)


def _remove(path: pathlib.Path) -> None:
    """Removes a step's output, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _environment(workdir: pathlib.Path) -> dict[str, str]:
    """The steps' environment: this one, with compiled programs kept in the workdir."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(workdir.absolute() / COMPILED),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    return {**cache, **os.environ}


def run_command(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs a command to its end and returns its status; its output goes to standard error.

    A session of its own keeps Ctrl-C from reaching it: it gets SIGTERM instead, on which training saves.

    Raises:
        KeyboardInterrupt: once the command has ended after Ctrl-C.
    """
    process = subprocess.Popen(command, stdout=sys.stderr, env=environment, start_new_session=True)
    try:
        return process.wait()
    except KeyboardInterrupt:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()
        raise


def format_seconds(seconds: float) -> str:
    """Minutes and seconds: 3:07."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def time_table(record: Record, planned: Sequence[Step]) -> Table:
    """Where the time went."""
    total = sum(record[step.name].seconds for step in planned)
    table = Table(title=f"Where the {format_seconds(total)} minutes went", title_justify="left")
    for heading, side in (("step", "left"), ("minutes", "right"), ("share", "right")):
        table.add_column(heading, justify=side)
    for step in planned:
        seconds = record[step.name].seconds
        table.add_row(step.title, format_seconds(seconds), f"{seconds / max(total, 1e-9):.0%}")
    return table


def show(demo: Demo, ran: bool) -> None:
    """The tables and the page's path, on standard output."""
    # Imported late: a demo that has to wait for minutes should say so at once.
    from hypervl_jax.evaluation.analysis import verdict_text
    from hypervl_jax.evaluation.benchmarks import read_results
    from hypervl_jax.evaluation.runs import RESULTS, accuracy_table

    _, rows = read_results(demo.workdir / "evaluation" / RESULTS)
    console = Console()
    console.print(accuracy_table(rows))
    console.print(verdict_text(rows), soft_wrap=True, highlight=False)
    console.print(time_table(demo.record, demo.steps))
    print("complete" if ran else "already complete; nothing had to be done")
    print(f"report: {(demo.workdir / PAGE).absolute()}")


def outcome(demo: Demo, ran: bool) -> dict[str, Any]:
    """The same as JSON."""
    return {
        "page": str((demo.workdir / PAGE).absolute()),
        "already_complete": not ran,
        "seconds": {step.name: demo.record[step.name].seconds for step in demo.steps},
        "evaluation": json.loads((demo.workdir / "evaluation" / "summary.json").read_text("utf-8")),
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("python -m tools.demo", description=_DESCRIPTION)
    made.add_argument("--workdir", default="runs/demo", metavar="DIR", help="for everything (default: %(default)s)")
    made.add_argument("--json", action="store_true", help="print the outcome as JSON on standard output")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parser().parse_args(arguments)
    try:
        with terminate_as_interrupt():
            workdir = pathlib.Path(options.workdir)
            demo = Demo(workdir, steps, Console(stderr=True))
            ran = demo.run()
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    if options.json:
        print(json.dumps(outcome(demo, ran), indent=1))
    else:
        show(demo, ran)
    return 0


if __name__ == "__main__":
    sys.exit(main())
