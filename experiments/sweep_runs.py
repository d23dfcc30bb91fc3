"""The runs of a sweep: their commands, directories, states and results."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence

from experiments import launch, workdir
from experiments.config import ExperimentConfig
from experiments.named import load_config
from experiments.overrides import from_config_dict
from experiments.sweeps import LAUNCH, SWEEPS, Variant, command
from hypervl_jax.architecture import require
from hypervl_jax.planning.chips import Topology
from hypervl_jax.training.telemetry.records import write_json

COMPLETE, BEGUN, NEW = "complete", "begun", "new"

_TAIL_BYTES = 65_536


@dataclasses.dataclass(frozen=True)
class Run(abc.ABC):
    """One run of a sweep.

    Attributes:
        name: of the variant.
        settings: what the variant sets.
        directory: of the run; a function of configuration, sweep and variant alone.
        words: the command after `python`.
    """

    name: str
    settings: Mapping[str, str]
    directory: pathlib.Path
    words: tuple[str, ...]

    @property
    @abc.abstractmethod
    def proof(self) -> pathlib.Path:
        """A file that is there once the run is complete."""

    @property
    def job_name(self) -> str:
        """A name that Slurm and Kubernetes take: at most 40 lower-case letters, digits and dashes, unique by directory."""
        readable = re.sub("[^a-z0-9]+", "-", "-".join(self.directory.parts[-3:]).lower()).strip("-")
        digest = hashlib.sha256("/".join(self.directory.parts[-3:]).encode()).hexdigest()[:8]
        return f"{readable[:31].strip('-')}-{digest}"

    @abc.abstractmethod
    def state(self) -> str:
        """`COMPLETE`, `BEGUN` or `NEW`, as its directory says."""

    @abc.abstractmethod
    def check(self) -> None:
        """Raises `ConfigError` when the directory holds a run that was started with other settings."""

    @abc.abstractmethod
    def claim(self) -> None:
        """Writes down what the directory is for, where the command itself does not."""

    @abc.abstractmethod
    def check_on(self, topology: Topology) -> None:
        """Raises `ConfigError` when the run cannot be laid out on a topology."""

    @abc.abstractmethod
    def results(self) -> dict[str, float]:
        """What it has measured so far, by name; empty before the first measurement."""

    @abc.abstractmethod
    def progress(self) -> str:
        """How far it is, in a few words."""


@dataclasses.dataclass(frozen=True)
class LaunchRun(Run):
    """A training run."""

    @property
    def proof(self) -> pathlib.Path:
        """The release card."""
        return self.directory / workdir.CHECKPOINTS / workdir.RELEASE

    def state(self) -> str:
        """Complete with its release card for this length."""
        config = launch.resolve(*launch.parse(self.words[2:]))
        if workdir.is_complete(self.directory, config):
            return COMPLETE
        return BEGUN if (self.directory / workdir.CONFIG).exists() else NEW

    def check(self) -> None:
        """As a launch into the directory would."""
        options, overrides = launch.parse(self.words[2:])
        if not options.accept_changes:
            workdir.check_same_run(self.directory, launch.resolve(options, overrides))

    def claim(self) -> None:
        """A launch does it."""

    def check_on(self, topology: Topology) -> None:
        """As a launch on its devices would."""
        options, overrides = launch.parse(self.words[2:])
        config = launch.resolve(options, overrides, topology)
        config.mesh.sizes(topology.num_devices)

    def results(self) -> dict[str, float]:
        """Held-out losses of the release card, or the latest; the step they belong to."""
        card = workdir.read_json(self.proof)
        if card is not None:
            return {"step": card["step"], "tokens": sum(card["tokens"].values()), **card["heldout"]}
        return _last_line(self.directory / "evaluations.jsonl")

    def progress(self) -> str:
        """Step and loss of the newest metrics."""
        line = _last_line(self.directory / "metrics.jsonl")
        return f"step {line['step']:.0f}, loss {line['loss']:.3f}" if {"step", "loss"} <= line.keys() else "starting"


@dataclasses.dataclass(frozen=True)
class CompressorRun(Run):
    """A training of the compressor; its directory appears when it is complete."""

    @property
    def proof(self) -> pathlib.Path:
        """The compressor's description."""
        return self.directory / "description.json"

    def state(self) -> str:
        """Complete with its description."""
        return COMPLETE if self.proof.exists() else NEW

    @property
    def _claim(self) -> pathlib.Path:
        return self.directory.with_name(f"{self.directory.name}.command.json")

    def check(self) -> None:
        """The command that made the directory is the present one."""
        before = workdir.read_json(self._claim) if self.proof.exists() else None
        require(
            before is None or before["words"] == list(self.words),
            f"{self.directory} was made by another command ({self._claim}): remove it, or choose another --workdir",
        )

    def claim(self) -> None:
        """Writes the command beside the directory, which appears only when it is complete."""
        self._claim.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._claim, {"words": list(self.words)})

    def check_on(self, topology: Topology) -> None:
        """It runs on one device of anything."""

    def results(self) -> dict[str, float]:
        """Validation figures of every task as `name/task`."""
        description = workdir.read_json(self.proof)
        tasks = description["details"]["validation"] if description else {}
        return {
            f"{name}/{task}": value
            for task, row in tasks.items()
            for name, value in row.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }

    def progress(self) -> str:
        """Nothing is known before it is complete."""
        return "training"


def _last_line(path: pathlib.Path) -> dict[str, float]:
    """The numbers of the last whole line of a JSON-lines file; empty when there is none."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _TAIL_BYTES, 0))
        lines = file.read().split(b"\n")[:-1]
    values = json.loads(lines[-1]) if lines and lines[-1].startswith(b"{") else {}
    return {key: value for key, value in values.items() if isinstance(value, int | float)}


def finite(value: float | None) -> bool:
    """Whether there is a number to show."""
    return value is not None and math.isfinite(value)


def expand(config: str, sweep: str, home: pathlib.Path, extra: Sequence[str]) -> list[Run]:
    """All runs of a sweep over a named configuration.

    Args:
        config: name of the configuration.
        sweep: name of the sweep.
        home: directory of the sweep; each run has its own in it.
        extra: words that every run's command gets, before what the variant sets.

    Raises:
        ConfigError: an unknown configuration, or a variant that cannot work.
    """
    if command(sweep) == LAUNCH:
        options, overrides = launch.parse(["--config", config, *extra])
        return [_launch(config, variant, home, extra) for variant in SWEEPS[sweep](launch.resolve(options, overrides))]
    typed = from_config_dict(ExperimentConfig, load_config(config))
    return [_other(command(sweep), variant, home, extra) for variant in SWEEPS[sweep](typed)]


def _launch(config: str, variant: Variant, home: pathlib.Path, extra: Sequence[str]) -> LaunchRun:
    directory = home / variant.name
    overrides = [f"{launch.OVERRIDE}{path}={text}" for path, text in variant.settings.items()]
    words = ("-m", LAUNCH, "--config", config, "--workdir", str(directory), *extra, *overrides)
    launch.resolve(*launch.parse(words[2:]))
    return LaunchRun(variant.name, variant.settings, directory, words)


def _other(module: str, variant: Variant, home: pathlib.Path, extra: Sequence[str]) -> CompressorRun:
    directory = home / variant.name
    flags = [word for name, text in variant.settings.items() for word in (f"--{name.replace('_', '-')}", text)]
    words = ("-m", module, "--output", str(directory), *extra, *flags)
    return CompressorRun(variant.name, variant.settings, directory, words)


def choose(runs: Sequence[Run], names: Sequence[str]) -> list[Run]:
    """The runs with these names, in the order of the sweep; all of them without names. Raises `ConfigError` on an unknown one."""
    known = [run.name for run in runs]
    unknown = [name for name in names if name not in known]
    require(not unknown, f"the sweep has no run {', '.join(unknown)}; it has {', '.join(known)}")
    return [run for run in runs if not names or run.name in names]
