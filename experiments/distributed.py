"""Joins the processes of one run, and parts them when one of them fails.

Where the processes come from, in the order in which it is tried:

    flags or environment   --coordinator, --num-processes, --process-id, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
                           JAX_PROCESS_ID; in an indexed Job or a JobSet JOB_COMPLETION_INDEX (and JOB_INDEX with
                           PROCESSES_IN_JOB, as xpk sets them) stand for the number of the process
    Cloud TPU, GKE, Slurm  what the platform says, read by JAX
    otherwise              one process

JAX's coordination service then watches over all of them: a process that sends no heartbeat for `HEARTBEAT_TIMEOUT` is lost, and
the others end within that time. The next start of the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import re
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.lost_process import Watch
from hypervl_jax.architecture import ConfigError, require

DEFAULT_PORT = 8476
HOST_NAME_BYTES = 128

START_TIMEOUT = ("HYPERVL_START_TIMEOUT", 600)
"""Environment variable and default: seconds in which all processes must have come."""

HEARTBEAT_TIMEOUT = ("HYPERVL_HEARTBEAT_TIMEOUT", 100)
"""Environment variable and default: seconds without a sign of life after which a process is lost, and the run with it."""

MAY_COME_FROM_OTHERS = re.compile(
    "(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): "
)
"""How an error of a computation over several processes begins when one of them may be lost."""

_COORDINATOR_STAYS = 5
_VERDICT_MARGIN = 20


class Processes(NamedTuple):
    """Where process 0 listens (`host:port`), how many processes there are, and which of them this is."""

    coordinator: str
    count: int
    index: int


def whole_number(environment: Mapping[str, str], name: str) -> int | None:
    """The value of an environment variable; None when it is not set. Raises `ConfigError` when it is no whole number."""
    text = environment.get(name)
    require(text is None or text.isdecimal(), f"the environment variable {name} is {text!r}; it must be a whole number")
    return None if text is None else int(text)


def index_in_jobs(environment: Mapping[str, str], count: int | None) -> int | None:
    """This process's number in an indexed Kubernetes Job, or in a JobSet of equal Jobs; None outside of both."""
    inside = whole_number(environment, "JOB_COMPLETION_INDEX")
    job = whole_number(environment, "JOB_INDEX") or 0
    job_size = whole_number(environment, "PROCESSES_IN_JOB") or count
    return None if inside is None or job_size is None else job * job_size + inside


def given_processes(
    coordinator: str | None, process_id: int | None, num_processes: int | None, environment: Mapping[str, str]
) -> Processes | None:
    """The processes as flags and environment give them; flags win. None when they do not, which is right on a cluster.

    Raises:
        ConfigError: something is missing, or does not fit together.
    """
    flagged = any(value is not None for value in (coordinator, process_id, num_processes))
    address = coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
    counts = (num_processes, *(whole_number(environment, name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_COUNT")))
    count = next((value for value in counts if value is not None), None)
    indices = (process_id, whole_number(environment, "JAX_PROCESS_ID"), index_in_jobs(environment, count))
    index = next((value for value in indices if value is not None), None)
    if address is None or count is None or index is None:
        require(
            not flagged,
            "--coordinator, --process-id and --num-processes belong together; give all three, or JAX_COORDINATOR_ADDRESS, "
            "JAX_PROCESS_ID and JAX_NUM_PROCESSES, or none of them",
        )
        return None
    require(0 <= index < count, f"--process-id {index} must lie in 0..{count - 1}")
    return Processes(address if ":" in address else f"{address}:{DEFAULT_PORT}", count, index)


def on_slurm(environment: Mapping[str, str]) -> bool:
    """Whether this is one of several tasks of a Slurm step.

    Raises:
        ConfigError: the job has several tasks, but this process was not started as one of them.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    if "SLURM_JOB_ID" not in environment or tasks == "1":
        return False
    require(
        "SLURM_STEP_NODELIST" in environment,
        f"this Slurm job has {tasks} tasks, but this process is none of them; start it by `srun`, or by `srun --ntasks=1` "
        "to run it alone",
    )
    return True


def on_tpu(environment: Mapping[str, str]) -> bool:
    """Whether this is a Cloud TPU host, on GKE (told by the environment) or a TPU VM (told by its metadata server)."""
    platform = (environment.get("JAX_PLATFORMS") or "tpu").split(",")[0]
    if platform != "tpu" or importlib.util.find_spec("libtpu") is None:
        return False
    named = {"TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "MEGASCALE_COORDINATOR_ADDRESS"} & environment.keys()
    return bool(named or glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def start_processes(coordinator: str | None, process_id: int | None, num_processes: int | None) -> None:
    """Joins the processes of this run; call it before anything touches a device. Returns when all of them are there.

    Args:
        coordinator: `host:port` of process 0, the same for all processes; None leaves it to the environment.
        process_id: of this process, from 0.
        num_processes: in all.

    Raises:
        ConfigError: flags and environment do not fit together, or do not say which processes there are.
    """
    given = given_processes(coordinator, process_id, num_processes, os.environ)
    if given is None and not on_slurm(os.environ) and not on_tpu(os.environ):
        return
    watch = Watch()
    _initialize(given)
    hosts = host_names()
    watch.tell_hosts(hosts)
    if jax.process_index() == 0 and len(hosts) > 1:
        print(f"{len(hosts)} processes have come; process 0 on {hosts[0]} coordinates them", file=sys.stderr)


def _initialize(given: Processes | None) -> None:
    try:
        jax.distributed.initialize(
            *(given or ()),
            cluster_detection_method=None if given is None else "deactivate",
            initialization_timeout=_seconds(START_TIMEOUT),
            heartbeat_timeout_seconds=_seconds(HEARTBEAT_TIMEOUT),
        )
    except ValueError as error:
        raise ConfigError(
            f"the processes of this run could not be found by themselves ({error}); give --coordinator, --process-id and "
            "--num-processes"
        ) from error


def _seconds(setting: tuple[str, int]) -> int:
    name, default = setting
    value = whole_number(os.environ, name)
    require(value is None or value > 0, f"the environment variable {name} must be a number of seconds above 0")
    return default if value is None else value


def host_names() -> list[str]:
    """Name of the host of every process, in their order. All processes must call it."""
    own = os.uname().nodename.encode()[:HOST_NAME_BYTES]
    padded = np.frombuffer(own.ljust(HOST_NAME_BYTES, b"\0"), np.uint8)
    table = np.asarray(multihost_utils.process_allgather(padded)).reshape(-1, HOST_NAME_BYTES)
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in table]


def among_others() -> bool:
    """Whether this process is one of several. Unlike `jax.process_count()` alone it starts no backend."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def await_verdict(error: Exception) -> None:
    """After an error that a lost process may have caused: gives the coordination service the time to find that out.

    When it does, this call does not return: the service ends this process, and `lost_process` says which one was lost.
    """
    if among_others() and MAY_COME_FROM_OTHERS.match(str(error)):
        print("a computation over all processes failed; waiting for word of the other processes", file=sys.stderr)
        time.sleep(_seconds(HEARTBEAT_TIMEOUT) + _VERDICT_MARGIN)


def leave(status: int) -> int:
    """Ends a failed process: alone it returns `status`; among others it exits at once.

    An orderly exit would wait for processes that are themselves waiting for this one. The coordinator goes last, because
    the others cannot end on their own terms after it.
    """
    if not among_others():
        return status
    if jax.process_index() == 0:
        time.sleep(_COORDINATOR_STAYS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
