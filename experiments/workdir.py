"""A run's directory: the configuration it belongs to, and whether the run is complete.

<workdir>/config.json     the configuration of the last start: a launch with another one is refused
<workdir>/lock            held by process 0 of the run at work
<workdir>/run.json        every start: code, packages, machine, configuration
<workdir>/*.jsonl         metrics and held-out losses; the same in `tensorboard/`
<workdir>/checkpoints/    checkpoints, their description, and at the end the release card
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any, TextIO

from data_pipelines.locks import InUse, lock_file
from experiments.config import ExperimentConfig
from experiments.overrides import flatten
from hypervl_jax.architecture import ConfigError, require
from hypervl_jax.training.checkpoint import steps_in
from hypervl_jax.training.telemetry.records import write_json

CONFIG = "config.json"
LOCK = "lock"
CHECKPOINTS = "checkpoints"
RELEASE = "release.json"

_locks: list[TextIO] = []
"""Held until the process ends, however it ends: a lock goes with its file."""

LENGTH = ("loop.steps", "loop.token_budget")
"""Keys that decide when a run ends."""

MAY_CHANGE = (
    "mesh.",
    "runtime.",
    "checkpoint.",
    "heldout.",
    "initialize_from.",
    "tokenizer",
    "data.root",
    "data.workers",
    "data.prefetch",
    "data.failure_limit",
    "objective.loss_chunk_tokens",
    "objective.accumulation",
    "loop.token_budget",
    "loop.evaluate_every",
    "loop.nonfinite_limit",
    "loop.spike_limit",
    "loop.prefetch",
)
"""Keys that a resumed run may change: they decide where, how fast and how long it runs, not what a step computes (beyond
rounding). `loop.steps` is not among them: it is the horizon of the schedules, so changing it would change steps already done."""


def as_json(config: ExperimentConfig) -> dict[str, Any]:
    """The configuration by path, as it comes back from JSON."""
    return json.loads(json.dumps(flatten(config)))


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
    """The object in a JSON file; None when there is no file. Raises `ConfigError` when the file holds anything else."""
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}); restore it from a copy, or remove it") from error
    require(isinstance(values, dict), f"{path} is damaged (no JSON object); restore it from a copy, or remove it")
    return values


def differing_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Keys with other values, or that only one side has, without those that may change."""
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return [key for key in changed if not key.startswith(MAY_CHANGE)]


def check_same_run(workdir: pathlib.Path, config: ExperimentConfig) -> None:
    """Raises `ConfigError` naming the keys when the directory belongs to a run with another configuration.

    Without a checkpoint it belongs to none: a start that failed on the way leaves no claim.
    """
    if last_step(workdir) is None:
        return
    before, now = read_json(workdir / CONFIG), as_json(config)
    keys = differing_keys(before, now) if before else []
    if before and keys:
        changes = ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in keys)
        raise ConfigError(
            f"{workdir} belongs to another run: {changes}. Choose another --workdir, launch with the same configuration, "
            "or accept the change for the steps to come with --accept-changes"
        )


def is_complete(workdir: pathlib.Path, config: ExperimentConfig) -> bool:
    """Whether the run has its release card, for this length."""
    card, now = read_json(workdir / CHECKPOINTS / RELEASE), as_json(config)
    finished = (card or {}).get("config", {})
    return card is not None and all(finished.get(key) == now[key] for key in LENGTH)


def last_step(workdir: pathlib.Path) -> int | None:
    """Step of the newest checkpoint; None before the first."""
    return max(steps_in(workdir / CHECKPOINTS), default=None)


def lock(workdir: pathlib.Path) -> None:
    """Keeps other runs out of the directory for as long as this process lives. For process 0 only.

    Where the storage knows no locks, as buckets do not, nothing is kept out. Raises `ConfigError` when another process is at work.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        _locks.append(lock_file(workdir / LOCK))
    except InUse as error:
        raise ConfigError(
            f"{workdir} is in use by {error}: wait for it, end it, or choose another --workdir"
        ) from error


def claim(workdir: pathlib.Path, config: ExperimentConfig) -> None:
    """Writes down which configuration the directory belongs to. For process 0 only."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / CONFIG, as_json(config))
