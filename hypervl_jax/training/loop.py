"""The training loop. Its order is fixed, and the tests hold it:

    save (state, data state) when due ─► evaluate when due ─► next batch ─► step

Checkpoint N means: N updates are done and batch N has not been read. The host runs ahead of the devices and reads metrics one
step late and in groups, so the devices never wait for it; decisions (stop, rewind) are taken at log boundaries from the lines of
the steps before, hence are the same in an uninterrupted and in a resumed run. What is only watched lies in `telemetry`.

Start-up order: eval_shape -> shardings -> restore, or load pretrained -> check tree, shapes, dtypes -> initialise what is missing.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from hypervl_jax import partitioning
from hypervl_jax.architecture import PARTS, HyperVLConfig, require
from hypervl_jax.models.runtime import RuntimeConfig
from hypervl_jax.partitioning import MeshConfig
from hypervl_jax.training import state as training_state
from hypervl_jax.training.batch import Batch, BatchLoader, BatchShape
from hypervl_jax.training.checkpoint import CheckpointConfig, Checkpoints, Description, abstract_like, write_description
from hypervl_jax.training.consistency import ConsistencyConfig, make_control
from hypervl_jax.training.feed import DeviceFeed, local_rows, to_global, to_local
from hypervl_jax.training.heldout import HeldoutEvaluation
from hypervl_jax.training.host_metrics import HostMetrics, PendingMetrics, Progress, boundary_metrics
from hypervl_jax.training.optimizer import OptimizerConfig
from hypervl_jax.training.preemption import PreemptionGuard
from hypervl_jax.training.program import build_step
from hypervl_jax.training.spikes import first_spike
from hypervl_jax.training.state import TrainState
from hypervl_jax.training.step import ObjectiveConfig
from hypervl_jax.training.telemetry.goodput import CHECKPOINT, EVALUATION, ActivityClock
from hypervl_jax.training.telemetry.monitor import Monitor, MonitorConfig
from hypervl_jax.training.telemetry.profiling import missed
from hypervl_jax.training.telemetry.progress import ProgressLine
from hypervl_jax.training.telemetry.step_times import StepTime
from hypervl_jax.training.telemetry.utilization import Utilization, arms_flops
from hypervl_jax.training.telemetry.watchdog import Watchdog

MOST_SPIKE_WINDOW = 10_000


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long and how watched.

    Attributes:
        steps: horizon of the schedules, and the last step when `token_budget` is 0.
        token_budget: the run ends at the first log boundary at which this many LLM positions (padding left out) were seen, before
            or after `steps`; the progress line says when the two lie apart.
        log_every: steps between log boundaries.
        evaluate_every: steps between held-out evaluations; 0: only at the end.
        nonfinite_limit: stop after this many steps in a row with a non-finite loss or gradient (each is skipped and counted).
        spike_factor: rewind when a loss exceeds this times the median of the `spike_window` losses before it of the same arm; 0: never.
        spike_window: see `spike_factor`.
        spike_skip: batches skipped beyond the one that spiked, after going back to the last checkpoint before it.
        spike_limit: rewinds of the whole run, all its starts together, after which it stops.
        prefetch: batches prepared on the devices ahead of the step.
    """

    steps: int = 1000
    token_budget: int = 0
    log_every: int = 10
    evaluate_every: int = 0
    nonfinite_limit: int = 10
    spike_factor: float = 0.0
    spike_window: int = 32
    spike_skip: int = 8
    spike_limit: int = 3
    prefetch: int = 2

    def __post_init__(self) -> None:
        require(
            self.steps >= 1 and self.log_every >= 1,
            f"loop.steps {self.steps} and log_every {self.log_every} must be positive",
        )
        require(
            self.token_budget >= 0 and self.evaluate_every >= 0,
            "loop.token_budget and evaluate_every must not be negative",
        )
        require(
            self.spike_factor == 0 or self.spike_factor > 1,
            f"loop.spike_factor {self.spike_factor} must be above 1, or 0 for never",
        )
        require(
            2 <= self.spike_window <= MOST_SPIKE_WINDOW,
            f"loop.spike_window {self.spike_window} must lie in 2..{MOST_SPIKE_WINDOW}: its losses are saved with every checkpoint",
        )
        require(
            self.spike_skip >= 0 and self.spike_limit >= 0,
            f"loop.spike_skip {self.spike_skip} and spike_limit {self.spike_limit} must not be negative",
        )
        require(self.prefetch >= 1, f"loop.prefetch {self.prefetch} must be at least 1 batch")
        require(self.nonfinite_limit >= 1, f"loop.nonfinite_limit {self.nonfinite_limit} must be positive")


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """All that decides what a run computes, apart from its data."""

    architecture: HyperVLConfig
    runtime: RuntimeConfig
    mesh: MeshConfig
    batch: BatchShape
    optimizer: OptimizerConfig
    consistency: ConsistencyConfig
    objective: ObjectiveConfig
    loop: LoopConfig
    checkpoint: CheckpointConfig
    seed: int = 0


class Outcome(NamedTuple):
    """How a call of `train` ended: "complete" or "preempted", at which step, with how many tokens of each source."""

    status: str
    step: int
    tokens: dict[str, int]
    branch_steps: dict[str, int]
    heldout: dict[str, float]


class TrainingStopped(RuntimeError):
    """The run stopped itself; the message says why and what to look at. Its last checkpoint stays."""


PretrainedLoader = Callable[[Mapping[str, Any]], dict[str, Any]]
"""From abstract parameters with shardings, by part, to the parts it supplies; parts it leaves out are initialised."""

SourceFigures = Callable[[BatchLoader, np.ndarray], Mapping[str, float]]
"""From a loader and its lane states to figures of its sources so far, by their names in `performance.jsonl`, as in `epochs/kale`."""


STEPS_UNDER_WAY = 2
"""Steps the host gives to the devices ahead: one runs, one waits. More would not be faster, and a preemption would have to wait
for all of them within its grace time."""


class Trainer:
    """One run on one mesh: `start` makes or restores the state, `run` trains until the end or a preemption."""

    def __init__(
        self,
        run: TrainingRun,
        workdir: epath.PathLike,
        make_loader: Callable[[tuple[int, ...]], BatchLoader],
        sources: Sequence[str],
        description: Description,
        heldout: Callable[[tuple[int, ...]], Iterable[Batch]] | None = None,
        pretrained: PretrainedLoader | None = None,
        devices: Sequence[jax.Device] | None = None,
        monitoring: MonitorConfig | None = None,
        source_figures: SourceFigures | None = None,
    ):
        self.monitoring = monitoring or MonitorConfig()
        self.clock = ActivityClock(self.monitoring.started)
        self.workdir = epath.Path(workdir)
        self.sources = tuple(sources)
        self.description = description
        self.mesh: Mesh = partitioning.make_mesh(run.mesh, devices)
        program = build_step(run, len(self.sources), self.mesh)
        self.config, self.functions, self.rows = program.run, program.functions, program.rows
        self.abstract, self.shardings, self.step_function = program.abstract, program.shardings, program.step
        self.lanes = local_rows(run.batch.rows, self.rows)
        self.loader = make_loader(self.lanes)
        self.make_heldout = heldout
        self.pretrained = pretrained
        self.source_figures = source_figures
        self.utilization = Utilization(
            arms_flops(run.architecture, run.batch, run.consistency, run.optimizer.trainable_parts),
            self.mesh.devices.flatten().tolist(),
        )
        self.checkpoints = Checkpoints(self.workdir / "checkpoints", run.checkpoint)
        self.boundary_function = jax.jit(boundary_metrics, out_shardings=partitioning.replicated(self.mesh))
        self.control = jax.device_put(make_control(run.consistency, run.seed), partitioning.replicated(self.mesh))
        self.progress = Progress()

    # ---------------------------------------------------------------- start-up

    def start(self) -> tuple[TrainState, np.ndarray]:
        """The state and this host's lane states: restored from the last checkpoint, or fresh."""
        target = abstract_like(self.abstract, self.shardings)
        if self.checkpoints.latest() is not None:
            return self.restore(target, None)
        supplied = self.pretrained(target.params) if self.pretrained else {}
        missing = tuple(part for part in PARTS if part not in supplied)
        run = self.config
        made = training_state.initialise_parts(run.architecture, run.runtime, missing, run.seed, self.shardings.params)
        params = {part: supplied.get(part, made.get(part)) for part in PARTS}
        training_state.check_parameters(params, self.abstract.params)
        fresh = jax.jit(
            lambda p: training_state.fresh_state(run.optimizer, p, len(self.sources)),
            donate_argnums=0,
            out_shardings=self.shardings,
        )
        return fresh(params), self.loader.initial_states()

    def restore(self, target: TrainState, step: int | None) -> tuple[TrainState, np.ndarray]:
        """A checkpoint back into this mesh; this host takes the lane states of the rows it feeds."""
        shape = (self.config.batch.rows, self.loader.state_size)
        lanes = jax.ShapeDtypeStruct(shape, np.int32, sharding=self.rows)
        restored = self.checkpoints.restore(target, lanes, step)
        training_state.check_parameters(restored.state.params, self.abstract.params)
        self.progress = Progress.from_json(restored.progress)
        return restored.state, to_local(restored.lanes, self.lanes)

    # ---------------------------------------------------------------- the loop

    def run(self) -> Outcome:
        """Trains to the end of the budget, or to a preemption."""
        directory, seconds = pathlib.Path(self.workdir), self.monitoring.hang_seconds
        watchdog = Watchdog(directory, self.clock, seconds, jax.process_index())
        with jax.set_mesh(self.mesh), PreemptionGuard() as preemption, watchdog:
            state, lane_states = self.start()
            self.describe()
            begin = int(state.step)
            with self.monitor(begin, watchdog.beat) as monitor:
                if notice := missed(self.monitoring.profile_steps, begin, self.config.loop.steps):
                    monitor.line.message(notice)
                return _Loop(self, preemption, monitor, state, lane_states).run()

    def describe(self) -> None:
        """Says what the checkpoints to come are, once it is known that the run can begin."""
        if jax.process_index() == 0:
            write_description(self.workdir / "checkpoints", self.description)

    def monitor(self, step: int, on_step_end: Callable[[], None]) -> Monitor:
        """The watchers of a start that goes on at `step`."""
        loop, primary = self.config.loop, jax.process_index() == 0
        line = ProgressLine(loop.steps, step, loop.token_budget, enabled=primary)
        return Monitor(
            self.monitoring,
            pathlib.Path(self.workdir),
            step,
            line,
            self.utilization,
            self.config.batch,
            self.clock,
            on_step_end,
        )

    def read_so_far(self, lane_states: np.ndarray) -> Mapping[str, float]:
        """Figures of the sources so far, by this host's lanes; empty when nobody can tell."""
        return self.source_figures(self.loader, lane_states) if self.source_figures else {}

    def feed(self, lane_states: np.ndarray) -> DeviceFeed:
        """Device batches from the given lane states on."""
        return DeviceFeed(self.loader, lane_states, self.config.batch.rows, self.mesh, self.config.loop.prefetch)

    def heldout_batches(self) -> list[Batch]:
        """The held-out batches on the devices; they are few and read once."""
        if self.make_heldout is None:
            return []
        rows = self.config.batch.rows
        load = lambda x: to_global(np.asarray(x), rows, self.lanes, self.rows)
        return [jax.tree.map(load, batch) for batch in self.make_heldout(self.lanes)]

    def close(self) -> None:
        """Finishes pending saves."""
        self.checkpoints.close()


class _Rewind(Exception):
    """Raised at a log boundary when a spike asks for going back."""

    def __init__(self, spike: int):
        super().__init__(spike)
        self.spike = spike


class _Loop:
    """The state of one pass through the loop."""

    def __init__(
        self,
        trainer: Trainer,
        preemption: PreemptionGuard,
        monitor: Monitor,
        state: TrainState,
        lane_states: np.ndarray,
    ):
        self.trainer = trainer
        self.config = trainer.config.loop
        self.preemption = preemption
        self.monitor = monitor
        self.state, self.lane_states = state, lane_states
        self.step = int(state.step)
        self.pending = PendingMetrics(trainer.sources)
        self.under_way: deque[Future[StepTime]] = deque()
        self.heldout: dict[str, float] = {}
        self.evaluation = HeldoutEvaluation(trainer.functions, trainer.sources, trainer.shardings.params, trainer.rows)
        self.heldout_batches: list[Batch] | None = None

    def run(self) -> Outcome:
        """Goes on after rewinds until the end or a preemption."""
        while True:
            try:
                return self.run_until_rewind()
            except _Rewind as rewind:
                self.rewind(rewind.spike)

    def run_until_rewind(self) -> Outcome:
        """The loop itself; see the module's docstring for its order."""
        feed = self.trainer.feed(self.lane_states)
        try:
            while not self.finished():
                if self.preemption.reached(self.step):
                    self.save()
                    return self.outcome("preempted")
                if self.step % self.trainer.config.checkpoint.every == 0 and self.step > 0:
                    self.save()
                if self.config.evaluate_every and self.step % self.config.evaluate_every == 0 and self.step > 0:
                    self.evaluate()
                self.train_step(feed)
                if self.step % self.config.log_every == 0:
                    self.at_log_boundary()
        finally:
            feed.close()
        self.save()
        self.evaluate()
        return self.outcome("complete")

    def train_step(self, feed: DeviceFeed) -> None:
        """Takes the next batch and gives the step to the devices; waits only for the step before the last one to end."""
        if len(self.under_way) == STEPS_UNDER_WAY:
            self.under_way.popleft().result()
        with jax.transfer_guard("disallow"):
            fed = self.monitor.next_batch(feed)
            with self.monitor.step(self.step):
                self.state, values = self.trainer.step_function(self.state, fed.batch, self.trainer.control)
        self.lane_states = fed.lane_states
        self.under_way.append(self.monitor.dispatched(values.values))
        self.pending.add(self.step, values, self.under_way[-1])
        self.step += 1

    def finished(self) -> bool:
        """Whether the budget is used up; with a token budget this is decided at log boundaries only."""
        if not self.config.token_budget:
            return self.step >= self.config.steps
        return (
            self.step % self.config.log_every == 0 and self.trainer.progress.boundary_tokens >= self.config.token_budget
        )

    # ---------------------------------------------------------------- metrics

    def at_log_boundary(self) -> None:
        """Reads the metrics of all steps but the newest, which is still running, and takes the decisions they call for."""
        self.pending.add_to_newest(self.trainer.boundary_function(self.state))
        self.drain(keep=1)
        self.monitor.write_performance(self.trainer.read_so_far(self.lane_states))
        progress = self.trainer.progress
        progress.boundary_tokens = progress.tokens
        if self.config.spike_factor:
            seen = self.step - 1 - self.config.log_every
            spike = first_spike(progress.history, self.config.spike_window, self.config.spike_factor, seen)
            if spike is not None:
                raise _Rewind(spike)

    def drain(self, keep: int = 0) -> None:
        """Reads and writes pending metrics, all but the last `keep` steps; nothing happens when there are none."""
        lines = self.pending.read(keep)
        for line in lines:
            self.record(line)
        if lines:
            self.monitor.metrics.flush()

    def record(self, line: HostMetrics) -> None:
        """Writes one step's line; stops the run when too many steps in a row were not finite."""
        step, values, progress = line.step, line.values, self.trainer.progress
        progress.update(step, values, keep=self.config.spike_window + 2 * self.config.log_every)
        self.monitor.record(line, progress.tokens)
        if values["skipped_in_a_row"] >= self.config.nonfinite_limit:
            self.monitor.metrics.flush()
            raise TrainingStopped(
                f"{self.config.nonfinite_limit} steps in a row up to step {step} had a non-finite loss or gradient; each was "
                "skipped. Look at the last lines of metrics.jsonl, lower optimizer.learning_rate or check the data"
            )

    # ---------------------------------------------------------------- save, evaluate, rewind

    def save(self) -> None:
        """Writes checkpoint `step`, after every metric line before it is on disk."""
        self.drain()
        trainer = self.trainer
        with self.monitor.pause(CHECKPOINT):
            lanes = to_global(self.lane_states, trainer.config.batch.rows, trainer.lanes, trainer.rows)
            trainer.checkpoints.save(self.state, lanes, trainer.progress.to_json())
        self.monitor.goodput.mark(self.step)

    def evaluate(self) -> None:
        """Held-out losses of the current parameters."""
        self.drain()
        with self.monitor.pause(EVALUATION):
            if self.heldout_batches is None:
                self.heldout_batches = self.trainer.heldout_batches()
            if not self.heldout_batches:
                return
            self.heldout = self.evaluation(self.state.params, self.heldout_batches)
        self.monitor.evaluations.write(self.step, self.heldout)
        self.monitor.evaluations.flush()
        shown = ", ".join(
            f"{name} {self.heldout[name]:.3f}" for name in ("cross_entropy/base", "cross_entropy/large", "kl")
        )
        self.monitor.line.message(f"held-out at step {self.step}: {shown}")

    def rewind(self, spike: int) -> None:
        """Back to the last checkpoint before the spike, then past the batches up to and beyond it."""
        trainer, progress = self.trainer, self.trainer.progress
        rewinds = progress.rewinds + 1
        target = trainer.checkpoints.last_at_or_before(spike)
        if target is None or rewinds > self.config.spike_limit:
            reason = (
                "there is no checkpoint before it"
                if target is None
                else f"this is rewind {rewinds} of {self.config.spike_limit}"
            )
            raise TrainingStopped(
                f"the loss spiked at step {spike} and {reason}; look at metrics.jsonl around that step"
            )
        self.monitor.rewind(target)
        trainer.checkpoints.forget_after(target)
        self.state, self.lane_states = trainer.restore(abstract_like(trainer.abstract, trainer.shardings), target)
        trainer.progress.rewinds = rewinds
        self.step = target
        self.pending.forget()
        self.skip_batches(spike - target + 1 + self.config.spike_skip)
        self.monitor.line.message(
            f"loss spike at step {spike}: back to step {target}, batches up to the spike and {self.config.spike_skip} more skipped"
        )

    def skip_batches(self, count: int) -> None:
        """Moves the data `count` batches on without training on them."""
        batches = self.trainer.loader.iterate(self.lane_states)
        for _ in range(count):
            self.lane_states = next(batches).lane_states
        close = getattr(batches, "close", None)
        if close is not None:
            close()

    def outcome(self, status: str) -> Outcome:
        """The result of this call, once every save is on disk."""
        with self.monitor.pause(CHECKPOINT):
            self.trainer.checkpoints.wait()
        self.monitor.write_performance(self.trainer.read_so_far(self.lane_states))
        counters = jax.device_get(self.state.counters)
        tokens = dict(zip(self.trainer.sources, training_state.token_totals(counters.tokens), strict=True))
        branch_steps = {"base": int(counters.branch_steps[0]), "large": int(counters.branch_steps[1])}
        return Outcome(status, self.step, tokens, branch_steps, self.heldout)
