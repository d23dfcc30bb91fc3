"""Series of numbers by step: JSON lines and TensorBoard, each step once however often a run is killed and resumed."""

from __future__ import annotations

import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from types import TracebackType

import tensorboardX
from tensorboardX.proto.summary_pb2 import Summary


class MetricsLog:
    """Appends one JSON object per step to `<directory>/<name>.jsonl` and scalars to `<directory>/tensorboard/<name>`.

    A context manager. Each line reaches the operating system in one write, so a killed process loses none and breaks at most the last. Opening
    at `resume_step` removes the lines of that step and later ones: after any number of kills and resumes the file holds each
    step once. TensorBoard is told to forget the same steps.

    Args:
        directory: on a file system that can append and rename (a bucket must be mounted); made if needed.
        name: of the series, e.g. "train" or "heldout".
        resume_step: the first step that will be written from here on.
        enabled: False writes nothing: processes other than 0.
    """

    def __init__(
        self, directory: str | os.PathLike[str], name: str, resume_step: int = 0, enabled: bool = True
    ) -> None:
        self._enabled = enabled
        self._path = pathlib.Path(directory) / f"{name}.jsonl"
        self._tensorboard = pathlib.Path(directory) / "tensorboard" / name
        if enabled:
            self._open(resume_step)

    def _open(self, step: int) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        truncate_metrics(self._path, step)
        self._file = self._path.open("ab", buffering=0)
        # The library names files by the second; the suffix keeps a quick reopening from overwriting, and the order of names.
        self._writer = tensorboardX.SummaryWriter(
            str(self._tensorboard), purge_step=step, filename_suffix=f".{time.time_ns()}"
        )

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes what step `step` measured; NaN means "not measured" and is left out."""
        if not self._enabled:
            return
        known = {name: float(value) for name, value in values.items() if not math.isnan(value)}
        self._file.write(json.dumps({"step": step} | _json_numbers(known)).encode() + b"\n")
        # One event for all: the writer's `add_scalar` costs a queue and a lock for each.
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in known.items()]
        self._writer.file_writer.add_summary(Summary(value=scalars), step)

    def rewind(self, step: int) -> None:
        """Forgets `step` and everything after it."""
        if self._enabled:
            self.close()
            self._open(step)

    def flush(self) -> None:
        """Forces everything written so far to disk."""
        if self._enabled:
            os.fsync(self._file.fileno())
            self._writer.flush()

    def close(self) -> None:
        """Closes the files; safe to call twice."""
        if self._enabled and not self._file.closed:
            self.flush()
            self._file.close()
            self._writer.close()


def _json_numbers(values: Mapping[str, float]) -> dict[str, float | str]:
    """Infinities as the strings "inf" and "-inf", which `float` reads back: JSON has no number for them."""
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}


def truncate_metrics(path: pathlib.Path, step: int) -> None:
    """Removes the lines of `step` and later ones, and broken lines, by writing a new file and renaming it."""
    if not path.exists():
        return
    temporary = path.with_name(f"{path.name}.writing")
    with path.open("rb") as old, temporary.open("wb") as new:
        new.writelines(line for line in old if _is_before(line, step))
        new.flush()
        os.fsync(new.fileno())
    temporary.replace(path)


def _is_before(line: bytes, step: int) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        return json.loads(line)["step"] < step
    except (ValueError, KeyError, TypeError):
        return False


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """All whole lines of a file that `MetricsLog` wrote, in order; for reports and tests."""
    lines = pathlib.Path(path).read_text().splitlines(keepends=True)
    whole = (json.loads(line) for line in lines if line.endswith("\n"))
    return [{name: value if name == "step" else float(value) for name, value in line.items()} for line in whole]
