"""`python -m tools.benchmark_loop`: what the training loop costs beyond its jitted step.

Compares the bare step, called again and again on one batch that lies on the device, with the whole loop around the same step: reading
ahead, moving batches to the device, metrics, progress, watchdog, goodput and an asynchronous checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int32

from data_pipelines.lanes import LaneLoader, source_names
from experiments.config import ExperimentConfig
from experiments.named import load_config
from experiments.overrides import apply_override, from_config_dict
from hypervl_jax.architecture import ConfigError
from hypervl_jax.text.tokenizer import load_tokenizer
from hypervl_jax.training.batch import Batch, BatchLoader, LoadedBatch, empty_batch
from hypervl_jax.training.checkpoint import Description
from hypervl_jax.training.consistency import Control
from hypervl_jax.training.loop import Trainer
from hypervl_jax.training.state import TrainState

WINDOW = 40
"""Steps of a window; bare windows and windows of the loop take turns."""

LOG_EVERY = 20
TRIAL_ROWS = 4
READY_BATCHES = 4
USAGE_ERROR = 2

_DESCRIPTION = """\
Trains the configuration `tiny` on one device with as many rows as make a step take --step-ms. Every 40 steps the run is held and the
bare step is called 40 times on one batch that lies on the device: both meet the same machine, however busy. The loop logs every 20
steps and saves one checkpoint in the middle (of 480 steps; `tiny` itself saves every 500); start-up, the first 40 steps and the final save are not counted. Batches are made
beforehand and copied to the device by the loop's own feed. With --data the real loader makes them instead: on a CPU it then competes
with the step for the same cores, which it does not on an accelerator."""


class Round(NamedTuple):
    """Milliseconds of a step, bare and in the loop."""

    bare_ms: float
    loop_ms: float

    @property
    def ratio(self) -> float:
        """How much longer the loop takes."""
        return self.loop_ms / self.bare_ms


class ReadyLoader:
    """A `BatchLoader` of random batches that were made beforehand; its state counts them."""

    state_size = 1

    def __init__(self, config: ExperimentConfig, lanes: Sequence[int]) -> None:
        self.lanes = tuple(lanes)
        self._batches = [random_batch(config, seed) for seed in range(READY_BATCHES)]

    def initial_states(self) -> Int32[np.ndarray, "b k"]:
        """No batch read."""
        return np.zeros((len(self.lanes), 1), np.int32)

    def iterate(self, lane_states: Int32[np.ndarray, "b k"]) -> Iterator[LoadedBatch]:
        """The same batches over and over."""
        while True:
            batch = self._batches[int(lane_states[0, 0]) % READY_BATCHES]
            lane_states = lane_states + 1
            yield LoadedBatch(batch, lane_states)


def random_batch(config: ExperimentConfig, seed: int) -> Batch:
    """Full rows: one sample each, all tile slots taken, loss on the second half."""
    shape, tiling, rng = config.batch, config.architecture.tiling, np.random.default_rng(seed)
    batch = empty_batch(shape, tiling.tile_size)
    batch.tokens[:] = rng.integers(0, config.architecture.decoder.vocab_size, batch.tokens.shape)
    batch.targets[:] = np.roll(batch.tokens, -1, axis=1)
    batch.loss_weights[:, shape.length // 2 : -1] = 1.0
    batch.segments[:], batch.tile_segments[:] = 1, 1
    batch.positions[:] = np.arange(shape.length)
    batch.tiles[:] = rng.integers(0, 256, batch.tiles.shape)
    visual = shape.tiles * tiling.tokens_per_tile
    batch.visual_index[:, :visual] = np.arange(visual)
    return batch


def with_rows(config: ExperimentConfig, rows: int, windows: int, window: int = WINDOW) -> ExperimentConfig:
    """The configuration with that many rows, for a first window and `windows` more, with one checkpoint within the middle one."""
    loop = dataclasses.replace(
        config.loop, steps=window * (windows + 1) + 1, log_every=min(LOG_EVERY, window), evaluate_every=0
    )
    return dataclasses.replace(
        config,
        batch=dataclasses.replace(config.batch, rows=rows),
        loop=loop,
        checkpoint=dataclasses.replace(config.checkpoint, every=window * (1 + windows // 2) + 1),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=1),
    )


def make_trainer(config: ExperimentConfig, workdir: pathlib.Path, real_data: bool) -> Trainer:
    """A trainer of the configuration in an empty workdir, on one device."""

    def loader(lanes: tuple[int, ...]) -> BatchLoader:
        if not real_data:
            return ReadyLoader(config, lanes)
        tokenizer = load_tokenizer(config.tokenizer_path)
        return LaneLoader(config.data, config.batch, config.architecture.tiling, tokenizer, lanes)

    description = Description(config.architecture, {}, None)
    sources = source_names(config.data)
    return Trainer(config.training_run(), workdir, loader, sources, description, devices=jax.devices()[:1])


class Alternation:
    """Stands in for a trainer's step: after each window of the loop it calls the bare step as often, on a state of its own.

    Args:
        trainer: whose step it is, not yet running.
        window: steps of a window.

    Attributes:
        loop: seconds of each window of the loop but the first.
        bare: seconds of the bare windows between them.
    """

    def __init__(self, trainer: Trainer, window: int) -> None:
        self.loop: list[float] = []
        self.bare: list[float] = []
        self._step, self._control, self._window = trainer.step_function, trainer.control, window
        with jax.set_mesh(trainer.mesh):
            self._state, lane_states = trainer.start()
            feed = trainer.feed(lane_states)
            self._batch = next(feed).batch
            feed.close()
        self._calls, self._began = 0, 0.0
        self._result: Any = None

    def __call__(self, state: TrainState, batch: Batch, control: Control) -> tuple[TrainState, Any]:
        """The step itself."""
        if self._calls % self._window == 0:
            self.take_turns(self._calls // self._window)
        self._calls += 1
        state, self._result = self._step(state, batch, control)
        return state, self._result

    def take_turns(self, windows: int) -> None:
        """Ends a window of the loop, and runs a bare one; `windows` of the loop are done, of which the first does not count."""
        jax.block_until_ready(self._result)
        if windows >= 2:
            self.loop.append(time.perf_counter() - self._began)
        seconds = self.run_bare()
        if windows >= 1:
            self.bare.append(seconds)
        self._began = time.perf_counter()

    def run_bare(self) -> float:
        """Seconds of one bare window."""
        began = time.perf_counter()
        for _ in range(self._window):
            self._state, values = self._step(self._state, self._batch, self._control)
        jax.block_until_ready(values)
        return time.perf_counter() - began


def measure(config: ExperimentConfig, window: int = WINDOW, real_data: bool = False) -> Round:
    """One run of the loop in turns with the bare step. Each window of the loop has a bare one before and after it."""
    with tempfile.TemporaryDirectory() as workdir:
        trainer = make_trainer(config, pathlib.Path(workdir), real_data)
        turns = Alternation(trainer, window)
        trainer.step_function = turns
        trainer.run()
        trainer.close()
    return Round(1e3 * statistics.mean(turns.bare) / window, 1e3 * statistics.mean(turns.loop) / window)


def rows_for(config: ExperimentConfig, step_ms: float) -> int:
    """Rows with which a bare step takes about `step_ms`, from a trial with few."""
    with tempfile.TemporaryDirectory() as workdir:
        trainer = make_trainer(with_rows(config, TRIAL_ROWS, 1), pathlib.Path(workdir), real_data=False)
        turns = Alternation(trainer, WINDOW)
        with jax.set_mesh(trainer.mesh):
            turns.run_bare()
            each = 1e3 * turns.run_bare() / WINDOW / TRIAL_ROWS
        trainer.close()
    return max(round(step_ms / each), 1)


def summary(rounds: Sequence[Round], rows: int, steps: int) -> dict[str, Any]:
    """Medians over the rounds. `ratio` is the median of the rounds' own ratios, since a machine may change its speed between rounds."""
    return {
        "rows": rows,
        "steps": steps,
        "bare_ms": statistics.median(each.bare_ms for each in rounds),
        "loop_ms": statistics.median(each.loop_ms for each in rounds),
        "ratio": statistics.median(each.ratio for each in rounds),
        "rounds": [each._asdict() | {"ratio": each.ratio} for each in rounds],
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("python -m tools.benchmark_loop", description=_DESCRIPTION)
    add = made.add_argument
    add("--step-ms", type=float, default=100.0, metavar="MS", help="wanted time of a bare step (default: %(default)g)")
    add("--rows", type=int, metavar="N", help="rows of the batch, instead of --step-ms")
    add("--windows", type=int, default=12, metavar="N", help=f"of {WINDOW} steps in each round (default: %(default)s)")
    add("--rounds", type=int, default=3, metavar="N", help="runs (default: %(default)s)")
    add("--data", metavar="ROOT", help="embedded data to read with the real loader (default: batches made beforehand)")
    add("--json", action="store_true", help="print one JSON object")
    return made


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Runs all rounds, with progress on standard error; see `summary`."""
    values = load_config("tiny")
    if options.data:
        apply_override(values, ExperimentConfig, "data.root", options.data)
    config = from_config_dict(ExperimentConfig, values)
    rows = options.rows or rows_for(config, options.step_ms)
    config, rounds = with_rows(config, rows, options.windows), []
    for number in range(options.rounds):
        rounds.append(measure(config, real_data=bool(options.data)))
        last = rounds[-1]
        shown = f"bare {last.bare_ms:.2f} ms, loop {last.loop_ms:.2f} ms, ratio {last.ratio:.4f}"
        print(f"round {number + 1} of {options.rounds}, {rows} rows: {shown}", file=sys.stderr)
    return summary(rounds, rows, options.windows * WINDOW)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as compiled:
        if jax.config.jax_compilation_cache_dir is None:
            jax.config.update("jax_compilation_cache_dir", compiled)
        try:
            found = benchmark(options)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return USAGE_ERROR
    if options.json:
        print(json.dumps(found))
    else:
        print(f"{found['rows']} rows, medians of {len(found['rounds'])} rounds of {found['steps']} steps")
        print(
            f"bare step {found['bare_ms']:.2f} ms   whole loop {found['loop_ms']:.2f} ms   ratio {found['ratio']:.4f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
