"""Parameters that a run starts from: published towers and language model, or an earlier stage."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from experiments.config import RANDOM, ExperimentConfig, InitializeConfig
from hypervl_jax.architecture import BRANCHES, DECODER, PARTS, HyperVLConfig, vision_part
from hypervl_jax.models.huggingface import LoadReport, load_decoder, load_vision
from hypervl_jax.training.checkpoint import checkpoint_home, find_step, load_params
from hypervl_jax.training.loop import PretrainedLoader

Say = Callable[[str], None]


def pretrained_loader(config: ExperimentConfig, say: Say) -> PretrainedLoader:
    """What `Trainer` calls at step 0: the parts that come from somewhere; `say` is told where every part comes from."""
    source = config.initialize_from
    if source.checkpoint:
        return functools.partial(load_stage, source.checkpoint, say)
    return functools.partial(load_published, config.architecture, source, say)


def load_stage(path: str, say: Say, targets: Mapping[str, Any]) -> dict[str, Any]:
    """All parts from the newest checkpoint of an earlier run, into the shardings of `targets`."""
    home = checkpoint_home(path)
    step = find_step(home)
    say(f"all parameters from step {step} in {home}")
    return load_params(home, targets, step)


def load_published(
    architecture: HyperVLConfig, source: InitializeConfig, say: Say, targets: Mapping[str, Any]
) -> dict[str, Any]:
    """Towers and language model from Hugging Face directories; `say` is told where every part comes from."""
    params, reports = read_published(architecture, source, targets)
    for part, report in reports.items():
        say(f"{part}: {listing(report)}")
    return params


def read_published(
    architecture: HyperVLConfig, source: InitializeConfig, targets: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, LoadReport]]:
    """The parts that come from Hugging Face directories, shard by shard into the shardings of `targets`; a report of every part."""
    readers = {vision_part(branch): (load_vision, architecture.vision(branch)) for branch in BRANCHES}
    readers[DECODER] = (load_decoder, architecture.decoder)
    directories = {DECODER: source.llm} | {
        vision_part(branch): getattr(source, vision_part(branch)) for branch in BRANCHES
    }
    params, reports = {}, {}
    for part in PARTS:
        directory = directories.get(part, RANDOM)
        reports[part] = LoadReport.random(targets[part])
        if directory != RANDOM:
            load, config = readers[part]
            shardings = jax.tree.map(lambda leaf: leaf.sharding, targets[part])
            params[part], reports[part] = load(directory, config, shardings)
    return params, reports


def listing(report: LoadReport) -> str:
    """A part's summary, then the name of every parameter by where it came from. Keys left out may be a whole text tower."""
    paths = {kind: getattr(report, kind) for kind in ("resampled", "initialised", "taken")}
    lines = [f"  {kind}: {' '.join(names)}" for kind, names in paths.items() if names]
    return "\n".join([report.summary(), *lines])
