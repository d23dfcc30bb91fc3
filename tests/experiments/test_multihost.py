"""Several hosts: how they find each other, that each loads its own lanes, changes of their number, and losing one."""

import json
import os
import pathlib
import signal
import sys
import time

import numpy as np
import pytest

from experiments.distributed import Processes, given_processes, on_slurm, on_tpu
from experiments.lost_process import sentence
from hypervl_jax.architecture import ConfigError
from hypervl_jax.training.checkpoint import steps_in
from tests.experiments import processes

STEPS, ROWS = 48, 8
RUN = {
    "loop.steps": STEPS,
    "loop.evaluate_every": 0,
    "heldout.batches": 0,
    "checkpoint.every": 8,
    "checkpoint.keep": 100,
}
GRACE_SECONDS = 30
MESHES = {
    (2, 4): {"data": 2, "fsdp": 2, "tensor": 2},
    (1, 8): {"data": 1, "fsdp": 8, "tensor": 1},
    (4, 2): {"data": 2, "fsdp": 4, "tensor": 1},
    (2, 1): {"data": 1, "fsdp": 2, "tensor": 1},
}
"""Mesh for each (processes, devices of a process)."""

# ---------------------------------------------------------------- finding each other

ADDRESS = {"JAX_COORDINATOR_ADDRESS": "w-0.run"}
XPK = {**ADDRESS, "JAX_PROCESS_COUNT": "8", "PROCESSES_IN_JOB": "4", "JOB_INDEX": "1", "JOB_COMPLETION_INDEX": "2"}


@pytest.mark.parametrize(
    ("flags", "environment", "expected"),
    [
        ((None, None, None), {}, None),
        (("w-0:1", 1, 2), {}, Processes("w-0:1", 2, 1)),
        ((None, None, None), ADDRESS, None),
        (
            (None, None, None),
            {**ADDRESS, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            Processes("w-0.run:8476", 2, 1),
        ),
        (
            ("w-1:5", 0, None),
            {**ADDRESS, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            Processes("w-1:5", 2, 0),
        ),
        ((None, None, None), XPK, Processes("w-0.run:8476", 8, 6)),
        (
            (None, None, None),
            {**ADDRESS, "JAX_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "3"},
            Processes("w-0.run:8476", 4, 3),
        ),
    ],
)
def test_flags_and_environment_give_the_processes(flags, environment, expected):
    assert given_processes(*flags, environment) == expected


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (("w-0:1", None, None), {}, "belong together"),
        (("w-0:1", 2, 2), {}, "must lie in 0..1"),
        ((None, None, None), {**XPK, "JOB_INDEX": "2"}, "must lie in 0..7"),
        ((None, None, None), {**ADDRESS, "JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'"),
    ],
)
def test_wrong_processes_are_refused(flags, environment, message):
    with pytest.raises(ConfigError, match=message):
        given_processes(*flags, environment)


STEP = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[1-4]"}


@pytest.mark.parametrize(
    ("environment", "slurm", "tpu"),
    [
        ({}, False, False),
        (STEP, True, False),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1"}, False, False),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, False, True),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2", "JAX_PLATFORMS": "cpu"}, False, False),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "10.0.0.1", "JAX_PLATFORMS": "tpu,cpu"}, False, True),
    ],
)
def test_clusters_are_recognised(environment, slurm, tpu):
    pytest.importorskip("libtpu")
    assert (on_slurm(environment), on_tpu(environment)) == (slurm, tpu)


def test_a_slurm_job_of_several_tasks_without_srun_is_refused():
    with pytest.raises(ConfigError, match="srun"):
        on_slurm({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"})


# ---------------------------------------------------------------- losing one

MEETING = """
import os, pathlib, sys, numpy as np
from jax.experimental import multihost_utils
from experiments import distributed

distributed.start_processes(None, None, None)
while True:
    try:
        multihost_utils.process_allgather(np.ones(1))
        pathlib.Path(sys.argv[1]).touch()
    except Exception as error:
        distributed.await_verdict(error)
        raise
"""
"""A run that only meets, over and over."""


def test_sentences_name_the_lost():
    text = "JAX distributed service detected fatal errors … The following tasks are unhealthy (stopped sending heartbeats):\n{}\nThe"
    hosts = ["w-0", "w-1", "w-2"]
    assert sentence(text.format("2"), hosts).startswith("process 2 (host w-2) stopped answering")
    assert sentence(text.format("1\n2"), hosts).startswith("process 1 (host w-1), process 2 (host w-2) stopped")
    assert sentence(text.format("1"), []).startswith("process 1 stopped answering")


def last_line(process: processes.Launch) -> str:
    """The last line printed, by the process or by the listener that outlives it for a moment."""
    deadline = time.monotonic() + 5
    while "error: " not in process.output().splitlines()[-1] and time.monotonic() < deadline:
        time.sleep(0.05)
    return process.output().splitlines()[-1]


def meet(tmp_path: pathlib.Path, **variables) -> list[processes.Launch]:
    commands = [[sys.executable, "-c", MEETING, str(tmp_path / f"met{index}")] for index in range(2)]
    return processes.start_together(commands, 1, **variables)


@pytest.mark.parametrize(("lost", "words"), [(1, "stopped answering"), (0, "which coordinates the run, is gone")])
def test_the_others_name_a_killed_process_and_end(tmp_path, lost, words):
    started = meet(tmp_path, HYPERVL_HEARTBEAT_TIMEOUT=6)
    for index, process in enumerate(started):
        processes.wait_until((tmp_path / f"met{index}").exists, process)
    processes.kill(started[lost])
    survivor = started[1 - lost]
    assert survivor.wait(timeout=6 + 15) == -signal.SIGABRT
    last = last_line(survivor)
    assert last.startswith(f"error: process {lost} (host {os.uname().nodename})"), survivor.output()
    assert words in last


def test_a_process_that_never_comes_is_waited_for_only_so_long(tmp_path):
    first, second = meet(tmp_path, HYPERVL_START_TIMEOUT=5)
    processes.kill(second)
    assert first.wait(timeout=60) != 0
    assert "error: not all processes of the run came in time" in last_line(first)


# ---------------------------------------------------------------- whole runs


def rows_in(records: pathlib.Path) -> dict[tuple[int, int], str]:
    """Hash by (lane, row number) of all records in a directory; a row that was supplied twice must be the same."""
    found = {}
    for line in (line for path in records.iterdir() for line in path.read_text().splitlines()):
        entry = json.loads(line)
        key = (entry["lane"], entry["row"])
        assert found.setdefault(key, entry["hash"]) == entry["hash"]
    return found


def lanes_in(record: pathlib.Path) -> set[int]:
    return {json.loads(line)["lane"] for line in record.read_text().splitlines()}


def lines(workdir: pathlib.Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


class Run:
    """One run in one workdir, which several starts of any number of processes may share."""

    def __init__(self, data: pathlib.Path, workdir: pathlib.Path):
        self.data, self.workdir, self.records = data, workdir / "run", workdir / "records"
        self.records.mkdir()
        self.starts = 0

    def start(self, layout: tuple[int, int], seconds: float = 0.0, **variables) -> list[processes.Launch]:
        count, devices = layout
        overrides = {**RUN, **{f"mesh.{axis}": size for axis, size in MESHES.get(layout, {}).items()}}
        words = processes.command(self.data, self.workdir, overrides)
        self.starts += 1
        own = [self.records / f"{self.starts}-{index}.jsonl" for index in range(count)]
        commands = [processes.recorded(words, record, seconds) for record in own]
        if count == 1:
            return [processes.start(commands[0], devices, **variables)]
        return processes.start_together(commands, devices, **variables)

    def losses(self) -> np.ndarray:
        found = processes.metric_lines(self.workdir)
        assert [line["step"] for line in found] == list(range(STEPS)), "each step once"
        return np.array([line["loss"] for line in found])


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory) -> Run:
    run = Run(data, tmp_path_factory.mktemp("uninterrupted"))
    processes.finish(run.start((1, 1))[0])
    return run


def assert_same_run(run: Run, reference: Run) -> None:
    np.testing.assert_allclose(run.losses(), reference.losses(), rtol=1e-4)
    found, expected = rows_in(run.records), rows_in(reference.records)
    used = {(lane, row) for lane in range(ROWS) for row in range(STEPS)}
    assert {key: found[key] for key in used} == {key: expected[key] for key in used}
    lanes = [processes.last_checkpoint(each.workdir)["lanes/states"] for each in (run, reference)]
    np.testing.assert_array_equal(*lanes)


def terminate_one(started: list[processes.Launch]) -> list[str]:
    """SIGTERM to the last process alone; all must save and end in the grace time. What they printed."""
    began = time.monotonic()
    started[-1].send_signal(signal.SIGTERM)
    printed = [processes.finish(process, GRACE_SECONDS) for process in started]
    assert time.monotonic() - began < GRACE_SECONDS
    return printed


def test_a_run_moves_from_2x4_to_1x8_to_4x2_by_sigterm_to_one_process(data, uninterrupted, tmp_path):
    run = Run(data, tmp_path)
    for layout, seconds in (((2, 4), 0.2), ((1, 8), 0.1)):
        before = lines(run.workdir)
        started = run.start(layout, seconds)
        processes.wait_until(lambda before=before: lines(run.workdir) >= before + 4, started[0])
        assert "preempted at step" in terminate_one(started)[0]
        assert steps_in(run.workdir / "checkpoints")[-1] < STEPS, "the signal came before the end"
    for process in run.start((4, 2)):
        processes.finish(process)
    assert_same_run(run, uninterrupted)
    per_host = [lanes_in(run.records / name) for name in ("1-0.jsonl", "1-1.jsonl")]
    assert per_host == [set(range(4)), set(range(4, 8))], "each host loads its own rows and no others"
    quarters = [lanes_in(run.records / f"3-{index}.jsonl") for index in range(4)]
    assert quarters == [{0, 1}, {2, 3}, {4, 5}, {6, 7}]


def test_a_killed_host_ends_the_run_by_name_and_the_next_start_goes_on(data, uninterrupted, tmp_path):
    run, timeout = Run(data, tmp_path), 10
    started = run.start((2, 1), 0.1, HYPERVL_HEARTBEAT_TIMEOUT=timeout)
    processes.wait_until(lambda: 8 in steps_in(run.workdir / "checkpoints") and lines(run.workdir) >= 12, started[0])
    processes.kill(started[1])
    assert started[0].wait(timeout + GRACE_SECONDS) != 0
    assert "error: process 1 (host " in last_line(started[0]), started[0].output()
    processes.finish(run.start((1, 1))[0])
    assert_same_run(run, uninterrupted)


def test_hosts_that_do_not_share_the_workdir_are_told(data, tmp_path):
    runs = [Run(data, tmp_path / name) for name in ("a", "b") if (tmp_path / name).mkdir() is None]
    words = [processes.command(data, run.workdir, RUN) for run in runs]
    started = processes.start_together(words, 1)
    for process in started:
        assert process.wait(timeout=120) == 1, process.output()
        assert "error: process 1 of 2 does not see" in process.output()
