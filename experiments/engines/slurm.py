"""Runs as Slurm jobs, submitted through submitit (github.com/facebookincubator/submitit, MIT; extra [slurm]).

Every task of a job runs the same command and finds the others by Slurm's variables (`experiments.distributed`). Before the time
limit, and before a preemption where the cluster signals it, the first task asks the run to save (SIGTERM: all tasks agree on
one step), and the job is queued again. `--set` takes the parameters of submitit's `update_parameters`: nodes, tasks_per_node,
gpus_per_node, cpus_per_task, mem_gb, timeout_min, and any of Slurm's with `slurm_` before it (slurm_partition, slurm_account, …).
"""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hypervl_jax.architecture import ConfigError

if TYPE_CHECKING:
    import submitit

    from experiments.sweep_runs import Run

MOST_TIMEOUTS = 1000
"""Time limits after which a job is queued again; submitit's own default, 3, would end a long stage."""

SIGNAL_SECONDS = 300
"""Seconds before the time limit at which a run is asked to save."""


class Command:
    """What a Slurm task runs. submitit pickles it into the job's folder, which is ours alone, and calls `checkpoint` in time."""

    def __init__(self, words: Sequence[str]):
        self.words = tuple(words)
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        """Runs the command. Raises `CalledProcessError` when it fails."""
        self.process = subprocess.Popen([sys.executable, *self.words], preexec_fn=_ignore_warning)
        status = self.process.wait()
        if status:
            raise subprocess.CalledProcessError(status, self.words)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Lets the run save, then queues the same command again: it resumes from its directory."""
        import submitit

        if self.process is not None:
            self.process.terminate()
            self.process.wait()
        return submitit.helpers.DelayedSubmission(Command(self.words))


def _ignore_warning() -> None:
    """Slurm's warning goes to every process of a task; only submitit, which started it, is to act on it."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def describe(runs: Sequence[Run], options: Mapping[str, str]) -> str:
    """Jobs that would be submitted: name, parameters, command."""
    _executor("described", "slurm", options, cluster="debug")
    shown = " ".join(f"{key}={value}" for key, value in parameters(options).items())
    return "\n".join(f"{run.job_name} [{shown}]: {shlex.join(('python', *run.words))}" for run in runs)


def execute(runs: Sequence[Run], options: Mapping[str, str], cluster: str = "slurm") -> dict[str, str]:
    """Submits a job for each run that is not queued already; returns why some could not be, by name."""
    submitit = _submitit()
    queued, failures = queued_names() if cluster == "slurm" else set(), {}
    for run in runs:
        if run.job_name in queued:
            print(f"{run.name}: queued or running already", file=sys.stderr)
            continue
        try:
            print(f"{run.name}: job {submit(run, options, cluster).job_id}", file=sys.stderr)
        except (submitit.core.utils.FailedJobError, RuntimeError) as error:
            failures[run.name] = f"not submitted: {error}"
    return failures


def submit(run: Run, options: Mapping[str, str], cluster: str) -> submitit.Job[None]:
    """Submits one run; its job's files lie beside its directory. Raises `ConfigError` for a parameter that submitit refuses."""
    folder = run.directory.with_name(f"{run.directory.name}.slurm")
    return _executor(run.job_name, str(folder), options, cluster).submit(Command(run.words))


def _submitit() -> ModuleType:
    """Raises `ConfigError` where it is not installed."""
    try:
        import submitit
    except ImportError as error:
        raise ConfigError("--on slurm needs submitit: pip install 'hypervl-jax[slurm]'") from error
    return submitit


def _executor(name: str, folder: str, options: Mapping[str, str], cluster: str) -> submitit.AutoExecutor:
    """submitit's executor with all parameters. Raises `ConfigError` for one that it refuses."""
    executor = _submitit().AutoExecutor(folder=folder, cluster=cluster, slurm_max_num_timeout=MOST_TIMEOUTS)
    try:
        executor.update_parameters(name=name, **parameters(options))
    except (NameError, TypeError, AssertionError) as error:
        raise ConfigError(f"--set: {error}") from error
    return executor


def parameters(options: Mapping[str, str]) -> dict[str, Any]:
    """submitit's parameters: ours, then the user's; whole numbers become numbers."""
    given = {key: int(text) if text.isdecimal() else text for key, text in options.items()}
    return {"slurm_signal_delay_s": SIGNAL_SECONDS, "stderr_to_stdout": True, **given}


def queued_names() -> set[str]:
    """Names of this user's jobs that wait or run. Raises `ConfigError` away from a Slurm cluster."""
    if shutil.which("squeue") is None:
        raise ConfigError(
            "there is no squeue here: start the sweep on a host that can submit to Slurm, or use --on local"
        )
    listed = subprocess.run(["squeue", "--me", "--noheader", "--format=%j"], capture_output=True, text=True, check=True)
    return set(listed.stdout.split())
