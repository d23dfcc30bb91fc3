"""Runs one after the other on this machine."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from rich.console import Console

from experiments.stopping import terminate_as_interrupt
from experiments.sweep_runs import COMPLETE, Run
from hypervl_jax.architecture import require

OUTPUT = "output.log"
_POLL_SECONDS = 0.5


def describe(runs: Sequence[Run], options: Mapping[str, str]) -> str:
    """The commands that would be run, one a line."""
    _check(options)
    return "\n".join(shlex.join(("python", *run.words)) for run in runs)


def execute(runs: Sequence[Run], options: Mapping[str, str]) -> dict[str, str]:
    """Runs all, with a line that follows the one at work; what a run prints goes to `<name>.output.log` beside its directory.

    Returns:
        Why runs failed, by name. A failed run does not keep the others from running.
    """
    _check(options)
    console, failures = Console(stderr=True), {}
    for number, run in enumerate(runs, 1):
        label = f"{number}/{len(runs)} {run.name}"
        started = time.monotonic()
        with terminate_as_interrupt():
            reason = _execute(run, console, label)
        if reason:
            failures[run.name] = reason
        console.print(
            f"{label}: {reason or 'done'} after {time.monotonic() - started:.0f} s", highlight=False, markup=False
        )
    return failures


def _check(options: Mapping[str, str]) -> None:
    require(not options, f"--set {', '.join(options)}: the local engine has no options")


def _execute(run: Run, console: Console, label: str) -> str:
    """Starts one run and waits for it; why it failed, or nothing. Interrupted, it asks the run to save and end."""
    log = run.directory.with_name(f"{run.directory.name}.{OUTPUT}")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output, console.status(label) as line:
        process = subprocess.Popen([sys.executable, *run.words], stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                line.update(f"{label}: {run.progress()}")
                time.sleep(_POLL_SECONDS)
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
    if process.returncode == 0:
        # A run that was asked to stop saves and ends with 0.
        return "" if run.state() == COMPLETE else f"stopped before it was complete ({log}); the same command goes on"
    lines = [text for text in log.read_text(errors="replace").splitlines() if text.strip()]
    return f"failed with status {process.returncode}: {lines[-1].strip() if lines else 'it printed nothing'} ({log})"
