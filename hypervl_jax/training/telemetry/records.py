"""A record of every start of a run, and JSON files that a killed process leaves whole."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from hypervl_jax.architecture import ConfigError

RUN_RECORD = "run.json"

_GIT_SECONDS = 10.0


def git_revision() -> str:
    """SHA of the checked-out code, with "+dirty" when tracked files differ from it; "unknown" outside a git checkout."""
    try:
        sha = _git("rev-parse", "HEAD")
        return sha + ("+dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    home = pathlib.Path(__file__).parent
    finished = subprocess.run(
        ["git", *arguments], cwd=home, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
    )
    return finished.stdout.strip()


def run_start(config_text: str, resume_step: int, command: Sequence[str]) -> dict[str, Any]:
    """What one start of a run is: code, packages, command, machine, devices, time (UTC) and configuration."""
    packages = {item.metadata["Name"]: item.version for item in importlib.metadata.distributions()}
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "resume_step": resume_step,
        "git": git_revision(),
        "command": list(command),
        "python": platform.python_version(),
        "host": platform.node(),
        "devices": {
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "packages": dict(sorted(packages.items())),
        "config": config_text,
    }


def write_run_record(workdir: str | os.PathLike[str], config_text: str, resume_step: int) -> None:
    """Appends this start to the list in `<workdir>/run.json`; the file is replaced as a whole. For process 0 only.

    Raises `ConfigError` when the file is damaged.
    """
    path = pathlib.Path(workdir) / RUN_RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        starts = json.loads(path.read_text())["starts"] if path.exists() else []
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}, the record of earlier starts, is damaged ({error!r}); move it away to begin a new record"
        ) from error
    write_json(path, {"starts": [*starts, run_start(config_text, resume_step, sys.argv)]})


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file by writing a new one and renaming it: a killed process leaves the old or the new, never half."""
    temporary = path.with_name(f"{path.name}.writing")
    with temporary.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
