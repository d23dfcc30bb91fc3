"""`python -m experiments.launch --config compressor`: the compressor (VRC) as a run among others, with typed overrides.

The training itself is `tools.train_compressor`, which this starts as a command of its own, as sweeps do: tools lie above this room.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Sequence

import ml_collections

from experiments.named import COMPRESSOR
from experiments.overrides import apply_override, config_text, from_config_dict, to_config_dict
from experiments.sweeps import TRAIN_COMPRESSOR
from hypervl_jax.architecture import ConfigError, require
from hypervl_jax.models.compressor_io import DESCRIPTION
from hypervl_jax.training.compression import DEFAULT_EPSILON, DEFAULT_FLOOR
from hypervl_jax.training.compressor_training import CompressorTrainConfig

_NOT_HERE = (
    "debug",
    "hardware",
    "accept_changes",
    "profile_steps",
    "devices",
    "coordinator",
    "process_id",
    "num_processes",
)
"""Options of a launch that say nothing to a training on one device that takes minutes."""


@dataclasses.dataclass(frozen=True)
class CompressorExperiment:
    """What trains a compressor. Our choices but for ε, which is to be studied at 0.01, 0.05 and 0.10.

    Attributes:
        name: of the configuration.
        labels: directory that `tools.label_resolutions` filled.
        data: root of the data that was labelled.
        checkpoint: a run's workdir, for the compressor's architecture, the tiling and the tokenizer.
        alphas: file of the side table that is written too; empty for none.
        epsilon, floor: of α*.
        backbone: one of `hypervl_jax.mobilenet.BACKBONES`; empty for that of the checkpoint's configuration.
        width: factor of the named backbone's channels.
        pretrained: timm's file of that backbone, or its directory; empty for random weights.
        leave_out: tasks whose labels are not used.
        drop_blind: leave out labels whose answer can be guessed without the image.
        training: how it is trained.
    """

    name: str
    labels: str
    data: str
    checkpoint: str
    alphas: str
    epsilon: float
    floor: float
    backbone: str
    width: float
    pretrained: str
    leave_out: tuple[str, ...]
    drop_blind: bool
    training: CompressorTrainConfig

    def words(self, output: pathlib.Path) -> Iterator[str]:
        """The command line of `tools.train_compressor`."""
        flags = {
            **{name: getattr(self, name) for name in ("labels", "data", "checkpoint", "epsilon", "floor")},
            **{
                "output": output,
                "alphas_output": self.alphas,
                "backbone": self.backbone,
                "pretrained": self.pretrained,
            },
            **{"width": self.width, "leave_out": ",".join(self.leave_out), **dataclasses.asdict(self.training)},
        }
        for name, value in flags.items():
            if value != "":
                yield from (f"--{name.replace('_', '-')}", str(value))
        if self.drop_blind:
            yield "--drop-blind"

    def made(self) -> dict[str, object]:
        """What the description of a compressor that this makes says of it."""
        backbone = {"name": self.backbone, "width": self.width, "pretrained": self.pretrained}
        settings = dataclasses.asdict(self.training)
        chosen = {"epsilon": self.epsilon, "floor": self.floor, "left_out": list(self.leave_out)}
        return {**chosen, "backbone": backbone, "settings": settings}


def get_config() -> ml_collections.ConfigDict:
    """The configuration as the command line changes it."""
    paths = dict.fromkeys(("labels", "checkpoint", "alphas", "backbone", "pretrained"), "")
    choices = {"epsilon": DEFAULT_EPSILON, "floor": DEFAULT_FLOOR, "width": 1.0, "leave_out": (), "drop_blind": False}
    training = CompressorTrainConfig()
    return to_config_dict(CompressorExperiment(name=COMPRESSOR, data="data", **paths, **choices, training=training))


def resolve(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> CompressorExperiment:
    """The typed configuration. Raises `ConfigError`."""
    config = get_config()
    for path, text in [("data", options.data)] * bool(options.data) + list(overrides):
        apply_override(config, CompressorExperiment, path, text)
    return from_config_dict(CompressorExperiment, config)


def is_complete(config: CompressorExperiment, workdir: pathlib.Path) -> bool:
    """Whether the workdir holds this compressor. Raises `ConfigError` when it holds another, or something else."""
    description = workdir / DESCRIPTION
    if not description.exists():
        require(
            not workdir.exists(), f"{workdir} exists and holds no compressor; choose another --workdir, or remove it"
        )
        return False
    try:
        before = json.loads(description.read_text("utf-8"))["details"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{description} does not describe a compressor ({error}); choose another --workdir"
        ) from error
    now = json.loads(json.dumps(config.made()))
    changed = [key for key, value in now.items() if before.get(key) != value]
    require(not changed, f"{workdir} holds a compressor that differs in {', '.join(changed)}; choose another --workdir")
    return True


def launch(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Trains the compressor into the workdir, which is complete once it exists; returns the exit status.

    Raises `ConfigError` for what cannot be trained as asked.
    """
    config = resolve(options, overrides)
    if options.print:
        print(config_text(config), end="")
        return 0
    given = [name for name in _NOT_HERE if getattr(options, name) is not None and getattr(options, name) is not False]
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
    require(not given, f"{flags}: the compressor is trained on one device, in minutes; leave it out")
    for name in ("labels", "checkpoint"):
        require(bool(getattr(config, name)), f"{COMPRESSOR} needs --config.{name}=DIR")
    workdir = pathlib.Path(options.workdir or pathlib.Path("runs") / config.name)
    if is_complete(config, workdir):
        print(f"{config.name} is complete: {workdir}", file=sys.stderr)
        return 0
    return subprocess.run([sys.executable, "-m", TRAIN_COMPRESSOR, *config.words(workdir)], check=False).returncode
