"""Puts a typed configuration together and trains: tokenizer, loader, held-out data, parameters, trainer, release card."""

from __future__ import annotations

import contextlib
import itertools
import logging
import pathlib
import sys
import tempfile
from collections.abc import Iterator

import jax
import numpy as np
from etils import epath
from jaxtyping import Int32

from data_pipelines.lanes import LaneLoader, heldout_batches, manifest_hashes, source_names
from experiments import workdir as workdirs
from experiments.config import ExperimentConfig
from experiments.overrides import config_text
from experiments.preflight import heldout_data
from experiments.pretrained import pretrained_loader
from experiments.release import release_card, write_release
from hypervl_jax.text.tokenizer import Tokenizer, load_tokenizer
from hypervl_jax.training.batch import Batch
from hypervl_jax.training.checkpoint import Description
from hypervl_jax.training.loop import Outcome, Trainer
from hypervl_jax.training.telemetry.monitor import MonitorConfig
from hypervl_jax.training.telemetry.records import write_run_record


def say(text: str) -> None:
    """A line on standard error, from process 0 only."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


class _Said(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


@contextlib.contextmanager
def shown_log() -> Iterator[None]:
    """Inside, what `hypervl_jax` logs of its choices (level INFO, e.g. the attention kernel) is said as by `say`."""
    logger, handler = logging.getLogger("hypervl_jax"), _Said()
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False  # libraries put handlers of their own at the root: every line would stand twice
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def heldout_stream(config: ExperimentConfig, tokenizer: Tokenizer, lanes: tuple[int, ...]) -> Iterator[Batch]:
    """This host's rows of the held-out batches, source after source, numbered as in the training mixture."""
    for number, data in heldout_data(config).items():
        batches = heldout_batches(data, config.batch, config.architecture.tiling, tokenizer, lanes)
        for batch in itertools.islice(batches, config.heldout.batches):
            yield batch._replace(sources=np.full_like(batch.sources, number))


def source_figures(loader: LaneLoader, lane_states: Int32[np.ndarray, "b k"]) -> dict[str, float]:
    """What `performance.jsonl` tells of each source so far: passes over it, and the share of its samples that was dropped."""
    epochs = {f"epochs/{name}": passes for name, passes in source_epochs(loader, lane_states).items()}
    dropped = {f"dropped/{name}": counters.dropped_share for name, counters in loader.report(lane_states).items()}
    return epochs | dropped


def source_epochs(loader: LaneLoader, lane_states: Int32[np.ndarray, "b k"]) -> dict[str, float]:
    """Passes over each source so far: samples drawn by these lanes, scaled to all lanes, over the records there are."""
    all_lanes, sources = loader.mixture.lanes, loader.mixture.sources
    drawn = [counters.drawn for counters in loader.report(lane_states).values()]
    records = [len(source) * len(lane_states) / all_lanes for source in sources]
    return {source.name: count / size for source, count, size in zip(sources, drawn, records, strict=True)}


def description(config: ExperimentConfig, tokenizer: Tokenizer, saved_tokenizer: pathlib.Path) -> Description:
    """What the run's checkpoints say of themselves."""
    details = {
        "config": workdirs.as_json(config),
        "sources": list(source_names(config.data)),
        "tokenizer": tokenizer.fingerprint,
        "manifests": manifest_hashes(config.data),
    }
    return Description(config.architecture, details, epath.Path(saved_tokenizer))


def make_trainer(
    config: ExperimentConfig,
    workdir: pathlib.Path,
    tokenizer: Tokenizer,
    described: Description,
    monitoring: MonitorConfig,
) -> Trainer:
    """The trainer of a configuration on all devices; once it runs, `workdir` gets the checkpoints' description."""
    tiling = config.architecture.tiling
    return Trainer(
        config.training_run(),
        workdir,
        make_loader=lambda lanes: LaneLoader(config.data, config.batch, tiling, tokenizer, lanes),
        sources=source_names(config.data),
        description=described,
        heldout=lambda lanes: heldout_stream(config, tokenizer, lanes),
        pretrained=pretrained_loader(config, say),
        monitoring=monitoring,
        source_figures=source_figures,
    )


def run_experiment(config: ExperimentConfig, workdir: pathlib.Path, monitoring: MonitorConfig) -> Outcome:
    """Trains to the end or to a preemption, watched as `monitoring` says; a finished run gets its release card.

    Raises:
        ConfigError: the configuration does not fit the devices.
        RecordError, SourceFailed, CheckpointError, TrainingStopped: as the rooms below say.
    """
    tokenizer, primary = load_tokenizer(config.tokenizer_path), jax.process_index() == 0
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save(saved)
        described = description(config, tokenizer, pathlib.Path(saved))
        trainer = make_trainer(config, workdir, tokenizer, described, monitoring)
        if primary:
            workdirs.claim(workdir, config)
            write_run_record(workdir, config_text(config), workdirs.last_step(workdir) or 0)
        try:
            outcome = trainer.run()
        finally:
            trainer.close()
    if primary and outcome.status == "complete":
        say(f"release card: {write_release(workdir, release_card(config, tokenizer, outcome))}")
    return outcome
