"""Plans in processes of their own: at an error of its own libtpu ends the process that it runs in, with a dump of its stack."""

from __future__ import annotations

import json
import multiprocessing
import os
import pathlib
import re
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import ParamSpec, TypeVar

import jax
from jax.experimental import serialize_executable

from data_pipelines.child_processes import end_with_parent
from experiments import plan_report
from experiments.config import ExperimentConfig
from experiments.planning import Compiled, CompilerFailed, Plan, plan
from hypervl_jax.planning.chips import Topology

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_LAST_WORDS = re.compile(r"^(?:F\d{4} \S+\s+\d+ (.*)|ERROR: (.*))$", re.MULTILINE)
"""How libtpu says why it ends its process: a fatal line of its log, or an error in its flags."""


def plan_apart(
    config: ExperimentConfig,
    topology: Topology,
    mfu: float,
    price_per_chip_hour: float | None,
    directory: pathlib.Path | None = None,
) -> Plan:
    """`planning.plan` in a new process, which saves it to `directory`; raises what that raises, and `CompilerFailed` when it dies."""
    return apart(_plan_and_save, config, topology, mfu, price_per_chip_hour, directory)


def _plan_and_save(
    config: ExperimentConfig,
    topology: Topology,
    mfu: float,
    price_per_chip_hour: float | None,
    directory: pathlib.Path | None,
) -> Plan:
    # The TPU compiler needs no TPU, and a TPU of this machine is none of the planner's business.
    jax.config.update("jax_platforms", "cpu")
    made = plan(config, topology, mfu, price_per_chip_hour)
    if directory:
        save(directory, made)
    return made.plan


def save(directory: pathlib.Path, made: Compiled) -> None:
    """Writes plan.json and, when the step was compiled for it and fits, the executable as `jax` serializes it and its HLO.

    The executable is for people who trust its origin: reading it back (`serialize_executable.deserialize_and_load`) unpickles.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "plan.json").write_text(json.dumps(plan_report.to_json(made.plan), indent=1))
    if made.executable is not None:
        (directory / "step.hlo.txt").write_text(made.text)
        (directory / "step.executable").write_bytes(serialize_executable.serialize(made.executable)[0])


def apart(function: Callable[Arguments, Result], *arguments: Arguments.args, **keywords: Arguments.kwargs) -> Result:
    """What `function` returns or raises in a new process, to which function and arguments are pickled.

    Its standard error is kept from the terminal, and it ends when this process does, killed or not. Raises `CompilerFailed` with its
    last words when it dies.
    """
    with tempfile.TemporaryDirectory() as directory:
        said = pathlib.Path(directory) / "stderr"
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(said,)) as pool:
            try:
                return pool.submit(function, *arguments, **keywords).result()
            except BrokenProcessPool:
                raise CompilerFailed(last_words(said.read_text(errors="replace"))) from None


def _begin(errors: pathlib.Path) -> None:
    """In the new process: sends standard error to a file by its descriptor (libtpu does not write through Python), and ends with the parent."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    end_with_parent()


def last_words(said: str) -> str:
    """Why a process died, by its standard error."""
    found = _LAST_WORDS.search(said)
    return next(filter(None, found.groups())).strip() if found else "no reason given; host memory may have run out"
