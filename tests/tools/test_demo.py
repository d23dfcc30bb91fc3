"""The demo's bookkeeping: each step once, again when its inputs change, and a clean end on Ctrl-C."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from experiments.launch import parse, resolve
from hypervl_jax.evaluation.runs import planned
from tools import label_resolutions, train_compressor
from tools import report as report_tool
from tools.demo import HOME, Demo, DemoError, Step, main, read_record, run_command, step_keys, steps, what_runs
from tools.evaluate import parser as evaluate_parser

CONSOLE = Console(stderr=True, quiet=True)


def plan(*planned: Step):
    """These steps, wherever they are asked for."""
    return lambda workdir: planned


def archive(workdir: pathlib.Path, name: str, *sources: str) -> Step:
    """A step that packs files of this project into an archive, by a command of the standard library."""
    output = workdir / f"{name}.zip"
    files = [str(HOME / source) for source in sources]
    return Step(name, f"pack {name}", ("zipfile", "-c", str(output), *files), output, output, ())


def test_every_step_runs_once(tmp_path: pathlib.Path) -> None:
    planned_steps = [archive(tmp_path / "w", "a", "setup.py"), archive(tmp_path / "w", "b", "Makefile")]
    assert Demo(tmp_path / "w", plan(*planned_steps), CONSOLE).run()
    stamps = [step.product.stat().st_mtime_ns for step in planned_steps]
    assert not Demo(tmp_path / "w", plan(*planned_steps), CONSOLE).run()
    assert [step.product.stat().st_mtime_ns for step in planned_steps] == stamps
    record = read_record(tmp_path / "w")
    assert [(name, step.complete, step.seconds > 0) for name, step in record.items()] == [
        ("a", True, True),
        ("b", True, True),
    ]
    assert record["a"].command.startswith("python -m zipfile -c")


def test_a_changed_step_and_all_after_it_are_made_again(tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "w"
    first, last = archive(workdir, "a", "setup.py"), archive(workdir, "c", "LICENSE")
    Demo(workdir, plan(first, archive(workdir, "b", "Makefile"), last), CONSOLE).run()
    stamps = {name: (workdir / f"{name}.zip").stat().st_mtime_ns for name in "abc"}
    assert Demo(workdir, plan(first, archive(workdir, "b", "pyproject.toml"), last), CONSOLE).run()
    changed = {name for name, stamp in stamps.items() if (workdir / f"{name}.zip").stat().st_mtime_ns != stamp}
    assert changed == {"b", "c"}


def test_a_step_whose_product_is_gone_is_made_again(tmp_path: pathlib.Path) -> None:
    step = archive(tmp_path / "w", "a", "setup.py")
    Demo(tmp_path / "w", plan(step), CONSOLE).run()
    step.product.unlink()
    assert Demo(tmp_path / "w", plan(step), CONSOLE).run()
    assert step.product.exists()


def test_a_failing_step_stops_the_demo_and_is_tried_again(tmp_path: pathlib.Path) -> None:
    broken = dataclasses.replace(archive(tmp_path / "w", "b"), command=("zipfile", "-l", str(tmp_path / "missing.zip")))
    with pytest.raises(DemoError, match=r"(?s)pack b ended with status 1.*python -m zipfile.*goes on from here"):
        Demo(tmp_path / "w", plan(archive(tmp_path / "w", "a", "setup.py"), broken), CONSOLE).run()
    record = read_record(tmp_path / "w")
    assert [(name, step.complete) for name, step in record.items()] == [("a", True), ("b", False)]


def test_a_directory_with_other_things_is_left_alone(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["--workdir", str(tmp_path)]) == 1
    assert "holds no demo.json" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_code_that_defines_a_step_is_part_of_its_key(tmp_path: pathlib.Path) -> None:
    keys = step_keys(steps)
    without = [dataclasses.replace(step, code=()) for step in steps(pathlib.Path("WORKDIR"))]
    assert len(set(keys.values())) == len(keys) == 8
    assert not set(keys.values()) & set(step_keys(plan(*without)).values())
    for step in steps(tmp_path):
        assert all(list(HOME.glob(pattern)) for pattern in step.code), step.name


def test_a_finished_step_stays_however_its_directory_is_written(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = lambda workdir: [archive(workdir, "a", "setup.py")]
    assert Demo(pathlib.Path("w"), made, CONSOLE).run()
    for written in (tmp_path / "w", pathlib.Path("../") / tmp_path.name / "w"):
        assert not Demo(written, made, CONSOLE).run()
    monkeypatch.chdir(tmp_path / "w")
    assert not Demo(pathlib.Path("."), made, CONSOLE).run()


def test_only_what_runs_counts_of_the_code() -> None:
    source = 'LIMIT = 3\n"""Most."""\n\n\ndef limit() -> int:\n    return LIMIT\n'
    reworded = '"""A module."""\nLIMIT = 3  # most\n\n\ndef limit() -> int:\n    """The limit."""\n    return LIMIT\n'
    assert what_runs(source) == what_runs(reworded)
    assert what_runs(source) != what_runs(source.replace("3", "4"))


def test_interrupting_a_command_lets_it_save(tmp_path: pathlib.Path) -> None:
    # A test runner's worker processes ignore SIGINT; a terminal's Python does not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    code = (
        "import pathlib, signal, sys, time\n"
        f"def save(*_):\n    pathlib.Path({str(saved)!r}).touch()\n    sys.exit(0)\n"
        f"signal.signal(signal.SIGTERM, save)\npathlib.Path({str(ready)!r}).touch()\ntime.sleep(60)\n"
    )

    def interrupt() -> None:
        while not ready.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run_command((sys.executable, "-c", code), dict(os.environ))
    signal.signal(signal.SIGINT, before)
    assert saved.exists()


def test_the_steps_are_commands_that_their_tools_accept(tmp_path: pathlib.Path) -> None:
    commands = {step.name: step.command for step in steps(tmp_path)}
    for stage in ("stage1", "stage2", "stage3"):
        module, *arguments = commands[stage]
        assert (module, resolve(*parse(arguments)).name) == ("experiments.launch", f"tiny_{stage}")
    assert label_resolutions._parser().parse_args(commands["labels"][1:]).output == str(tmp_path / "labels")
    assert train_compressor._parser().parse_args(commands["compressor"][1:]).output == str(tmp_path / "compressor")
    assert report_tool.parser().parse_args(commands["report"][1:]).workdir == str(tmp_path)
    options = evaluate_parser().parse_args(commands["evaluation"][1:])
    assert [(each.condition, each.alpha) for each in planned(options)][::2] == [
        ("image", 1.0),
        ("image", 1.0),
        ("blank", 1.0),
        ("untrained", 1.0),
    ]


@pytest.mark.slow
def test_the_whole_demo(tmp_path: pathlib.Path) -> None:
    """From nothing to a model that reads, and a second call that has nothing to do: about 15 minutes on two cores."""
    command = (sys.executable, "-m", "tools.demo", "--workdir", str(tmp_path / "demo"))
    one_device = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    first = subprocess.run(command, cwd=HOME, env=one_device, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-2000:]
    passed = re.search(r"On (\d) of 4 tasks every encoder beats the blank image", first.stdout)
    assert passed, first.stdout
    assert int(passed[1]) >= 3, first.stdout
    page = pathlib.Path(first.stdout.splitlines()[-1].removeprefix("report: "))
    assert page.stat().st_size > 100_000
    again = subprocess.run(command, cwd=HOME, env=one_device, capture_output=True, text=True, timeout=60)
    assert "already complete" in again.stdout
    assert str(page) in again.stdout
