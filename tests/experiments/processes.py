"""Real launches in real processes, and what they leave behind, for the tests of resuming and of several processes."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp

from hypervl_jax.training.checkpoint import find_step

SMALL = {
    "architecture.vision_base.num_layers": 1,
    "architecture.vision_base.hidden_size": 32,
    "architecture.vision_base.num_heads": 2,
    "architecture.vision_base.intermediate_size": 64,
    "architecture.vision_large.num_layers": 1,
    "architecture.vision_large.hidden_size": 48,
    "architecture.vision_large.num_heads": 2,
    "architecture.vision_large.intermediate_size": 96,
    "architecture.decoder.num_layers": 1,
    "architecture.decoder.hidden_size": 32,
    "architecture.decoder.intermediate_size": 128,
    "architecture.decoder.head_dim": 8,
    "batch.rows": 8,
    "batch.length": 256,
    "batch.tiles": 12,
    "optimizer.warmup_steps": 4,
    "loop.log_every": 4,
    "loop.evaluate_every": 8,
    "heldout.batches": 1,
}
"""Overrides of `tiny` under which a step takes milliseconds; the code is the same."""

UNTIMED = ("seconds", "data_wait")
"""Metrics that measure time, hence differ between two equal runs."""


def command(data: pathlib.Path, workdir: pathlib.Path, overrides: Mapping[str, object], *options: str) -> list[str]:
    """The launch command of the small run."""
    keys = [f"--config.{key}={value}" for key, value in {**SMALL, **overrides}.items()]
    module = [sys.executable, "-m", "experiments.launch", "--config", "tiny"]
    return [*module, "--data", str(data), "--workdir", str(workdir), *options, *keys]


def recorded(words: Sequence[str], record: pathlib.Path, seconds: float = 0.0) -> list[str]:
    """The launch command that also records its rows in `record` and takes at least `seconds` for a batch."""
    launch = words.index("experiments.launch")
    return [*words[:launch], "tests.experiments.recording_launch", str(record), str(seconds), *words[launch + 1 :]]


def environment(devices: int = 1, **variables: object) -> dict[str, str]:
    """This process's environment with `devices` CPU devices and further variables. Programs are compiled fast, not made fast."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    given = {name: str(value) for name, value in variables.items()}
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **given}


class Launch(subprocess.Popen):
    """A started command in a process group of its own. Its output goes to a file, so that it never waits for a reader."""

    def __init__(self, words: Sequence[str], variables: Mapping[str, str]):
        self._file = tempfile.TemporaryFile("ab+")  # noqa: SIM115 - it lives as long as the process
        super().__init__(words, env=variables, stdout=self._file, stderr=subprocess.STDOUT, start_new_session=True)

    def output(self) -> str:
        """What it has printed so far."""
        return os.pread(self._file.fileno(), 1 << 24, 0).decode(errors="replace")


def start(words: Sequence[str], devices: int = 1, **variables: object) -> Launch:
    """Starts a launch on `devices` CPU devices."""
    return Launch(words, environment(devices, **variables))


def start_together(commands: Sequence[Sequence[str]], devices: int, **variables: object) -> list[Launch]:
    """Starts one run of several processes, which find each other by the environment.

    They share no compiled programs: on the CPU only process 0 finds its own in the cache, and the others, still compiling, would
    come too late for the 30 seconds that Gloo waits for a first meeting.
    """
    joint = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": len(commands)}
    joint |= {"JAX_ENABLE_COMPILATION_CACHE": "false", **variables}
    return [start(words, devices, JAX_PROCESS_ID=index, **joint) for index, words in enumerate(commands)]


def finish(process: Launch, timeout: float = 600) -> str:
    """Waits for a launch that must succeed; returns what it printed."""
    process.wait(timeout)
    assert process.returncode == 0, process.output()[-4000:]
    return process.output()


def kill(process: Launch) -> None:
    """SIGKILL to the launch and its workers."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_until(condition: Callable[[], bool], process: Launch, timeout: float = 300) -> None:
    """Polls every millisecond until `condition()`; fails when the process ends first."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.output()[-4000:]
        assert time.monotonic() < deadline, f"the awaited moment did not come:\n{process.output()[-4000:]}"
        time.sleep(0.001)


def metric_lines(workdir: pathlib.Path, name: str = "metrics") -> list[dict[str, float]]:
    """Lines of a metrics file without the measured times."""
    path = workdir / f"{name}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{key: value for key, value in line.items() if key not in UNTIMED} for line in lines]


def last_checkpoint(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint by path: parameters, moments, counters, lane states."""
    directory = workdir / "checkpoints"
    step = find_step(directory)
    arrays = {}
    for item in ("params", "optimizer", "lanes"):
        arrays |= {
            f"{item}{path}": value for path, value in _flatten(read_arrays(directory / str(step) / item)).items()
        }
    return {"step": np.asarray(step), **arrays}


def read_arrays(item: pathlib.Path) -> object:
    """One item of a checkpoint as whole numpy arrays, on whatever devices it was saved."""
    checkpointer = ocp.PyTreeCheckpointer()
    saved = checkpointer.metadata(item).item_metadata.tree
    whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
    return checkpointer.restore(item, args=ocp.args.PyTreeRestore(restore_args=whole))


def _flatten(tree: object, path: str = "") -> dict[str, np.ndarray]:
    if isinstance(tree, Mapping):
        entries = tree.items()
    elif isinstance(tree, list | tuple):
        entries = enumerate(tree)
    else:
        return {} if tree is None else {path: np.asarray(tree)}
    return {key: value for name, child in entries for key, value in _flatten(child, f"{path}/{name}").items()}


def free_port() -> int:
    """A TCP port on this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
