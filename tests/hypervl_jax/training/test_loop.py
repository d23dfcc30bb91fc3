"""The loop's order, stops, rewinds and hand-over, on a loader whose batches are a pure function of their number."""

import json
import time

import jax
import numpy as np
import optax
import pytest
from etils import epath

from hypervl_jax.architecture import PARTS
from hypervl_jax.partitioning import MeshConfig
from hypervl_jax.training import checkpoint, spikes
from hypervl_jax.training.batch import LoadedBatch
from hypervl_jax.training.checkpoint import CheckpointConfig, CheckpointError, Description
from hypervl_jax.training.consistency import ConsistencyConfig
from hypervl_jax.training.host_metrics import Progress
from hypervl_jax.training.loop import LoopConfig, Trainer, TrainingRun, TrainingStopped
from hypervl_jax.training.optimizer import OptimizerConfig
from hypervl_jax.training.state import abstract_parameters
from hypervl_jax.training.step import ObjectiveConfig
from hypervl_jax.training.telemetry.goodput import read_goodput
from hypervl_jax.training.telemetry.monitor import MonitorConfig
from hypervl_jax.training.telemetry.profiling import StepRange
from tests.experiments.processes import read_arrays
from tests.isolated import in_own_process
from tests.small import RUNTIME, SHAPE, SOURCES, random_batch, small_architecture


class NumberedLoader:
    """Batch n is `random_batch(n)`; a lane's state is n.

    `broken` batches have infinite loss weights. `delays` are the seconds that batches take. With `spiked` given, every target is word 1, soon learned, but in those batches.
    """

    state_size = 1

    def __init__(self, lanes, broken=(), spiked=None, delays=()):
        self.lanes = lanes
        self.broken, self.spiked, self.delays = broken, spiked, dict(delays)
        self.read = []

    def initial_states(self):
        return np.zeros((len(self.lanes), 1), np.int32)

    def iterate(self, lane_states):
        number = int(lane_states[0, 0])
        while True:
            batch = random_batch(number)
            if number in self.broken:
                batch = batch._replace(loss_weights=np.full_like(batch.loss_weights, np.inf))
            if self.spiked is not None:
                batch = batch._replace(targets=np.full_like(batch.targets, 2 if number in self.spiked else 1))
            time.sleep(self.delays.get(number, 0.0))
            self.read.append(number)
            number += 1
            yield LoadedBatch(batch, np.full((len(self.lanes), 1), number, np.int32))


def make_trainer(
    workdir, loop: dict | None = None, every=4, pretrained=None, rate=1e-3, monitoring=None, **loader_options
) -> Trainer:
    run = TrainingRun(
        small_architecture(),
        RUNTIME,
        MeshConfig(),
        SHAPE,
        OptimizerConfig(learning_rate=rate, warmup_steps=0, schedule="constant"),
        ConsistencyConfig(alternation="base", kl_weight=0.0),
        ObjectiveConfig(loss_chunk_tokens=16),
        LoopConfig(**{"steps": 12, "log_every": 2, "prefetch": 2, **(loop or {})}),
        CheckpointConfig(every=every, keep=4),
    )
    return Trainer(
        run,
        workdir,
        make_loader=lambda lanes: NumberedLoader(lanes, **loader_options),
        sources=[f"source{number}" for number in range(SOURCES)],
        description=Description(run.architecture, {"note": "test"}, None),
        pretrained=pretrained,
        devices=jax.devices()[:1],
        monitoring=monitoring,
        source_figures=lambda loader, lane_states: {"epochs/source0": float(lane_states[0, 0]) / 10},
    )


def finish(trainer: Trainer):
    try:
        return trainer.run()
    finally:
        trainer.close()


def lines(workdir, name="metrics"):
    return [json.loads(line) for line in (epath.Path(workdir) / f"{name}.jsonl").read_text().splitlines()]


def lane_states(workdir, step):
    return read_arrays(epath.Path(workdir) / "checkpoints" / str(step) / "lanes")["states"]


def test_checkpoint_n_has_n_updates_and_batch_n_unread(tmp_path):
    trainer = make_trainer(tmp_path)
    outcome = finish(trainer)
    assert (outcome.status, outcome.step) == ("complete", 12)
    assert checkpoint.steps_in(tmp_path / "checkpoints") == [4, 8, 12]
    for step in (4, 8, 12):
        assert np.all(lane_states(tmp_path, step) == step)
    assert [line["step"] for line in lines(tmp_path)] == list(range(12))
    assert outcome.branch_steps == {"base": 12, "large": 0}


def test_a_relative_workdir_saves_and_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finish(make_trainer("run", {"steps": 2}))
    abstract, _ = abstract_parameters(small_architecture(), RUNTIME)
    assert set(checkpoint.load_params("run/checkpoints", abstract)) == set(PARTS)


def test_a_token_budget_ends_at_a_log_boundary(tmp_path):
    plain = lines_of_plain_run(tmp_path / "plain")
    budget = int(sum(line["tokens"] for line in plain[:3]))
    outcome = finish(make_trainer(tmp_path / "budget", {"token_budget": budget, "steps": 50}))
    # Steps 0-2 reach the budget; at boundary 4 the metrics of steps 0-2 have been read.
    assert outcome.step == 4
    assert sum(outcome.tokens.values()) == sum(line["tokens"] for line in plain[:4])


def test_a_token_budget_ends_at_the_same_step_after_a_resume(tmp_path):
    """A run that resumes at a boundary knows one step more than it did when it came there, and must not decide on it."""
    budget = int(sum(line["tokens"] for line in lines_of_plain_run(tmp_path / "plain")[:4]))
    loop = {"token_budget": budget, "steps": 50}
    assert finish(make_trainer(tmp_path / "budget", loop, every=2)).step == 6
    resumed = make_trainer(tmp_path / "budget", loop, every=2)
    resumed.checkpoints.forget_after(4)
    assert finish(resumed).step == 6


def lines_of_plain_run(workdir):
    finish(make_trainer(workdir, {"steps": 6}))
    return lines(workdir)


def test_nonfinite_steps_are_skipped_and_too_many_in_a_row_stop_the_run(tmp_path):
    trainer = make_trainer(tmp_path / "few", {"nonfinite_limit": 3}, broken=(5, 6))
    assert finish(trainer).status == "complete"
    finite = [line["finite"] for line in lines(tmp_path / "few")]
    assert [step for step, value in enumerate(finite) if not value] == [5, 6]
    with pytest.raises(TrainingStopped, match="3 steps in a row up to step 7"):
        finish(make_trainer(tmp_path / "many", {"nonfinite_limit": 3}, broken=(5, 6, 7)))


def test_a_loss_spike_goes_back_and_skips_the_batches(tmp_path):
    loop = {"spike_factor": 1.05, "spike_window": 2, "spike_skip": 1, "steps": 12, "log_every": 2}
    calm = make_trainer(tmp_path / "calm", loop, rate=1e-2, spiked=())
    assert finish(calm).status == "complete"
    assert calm.progress.rewinds == 0
    trainer = make_trainer(tmp_path / "spiked", loop, rate=1e-2, spiked=(6,))
    assert finish(trainer).status == "complete"
    assert trainer.progress.rewinds == 1
    # Back to checkpoint 4; batches 4-6 and one more are skipped, so step 4 trains on batch 8.
    assert np.all(lane_states(tmp_path / "spiked", 12) == 12 + 4)
    assert [line["step"] for line in lines(tmp_path / "spiked")] == list(range(12))


def test_spike_rule():
    history = [(step, 1.0) for step in range(10)]
    assert spikes.find_spike(history, 4, 2.0, 0) is None
    history[7] = (7, 2.5)
    assert spikes.find_spike(history, 4, 2.0, 0) == 7
    assert spikes.find_spike(history, 4, 2.0, 8) is None
    assert spikes.find_spike(history[5:], 4, 2.0, 0) is None


def test_each_arm_is_judged_by_its_own_losses():
    """Base steps carry a KL term: at 1 base to 3 large their losses are no spikes, and a large arm's spike is not hidden by them."""
    arms = [0, 1, 1, 1] * 10
    progress = Progress()
    for step, arm in enumerate(arms):
        progress.update(step, {"tokens": 1, "arm": arm, "loss": 1.1 if arm else 2.4}, keep=20)
    find = lambda: spikes.first_spike(Progress.from_json(json.loads(json.dumps(progress.to_json()))).history, 4, 2.0, 0)
    assert find() is None
    progress.update(40, {"tokens": 1, "arm": 1.0, "loss": 3.4}, keep=20)
    assert find() == 40
    assert {arm: len(history) for arm, history in progress.history.items()} == {0: 10, 1: 20}


def test_a_start_that_fails_says_nothing_of_checkpoints_to_come(tmp_path):
    def refuse(targets):
        raise CheckpointError("a pickle")

    with pytest.raises(CheckpointError, match="a pickle"):
        finish(make_trainer(tmp_path, pretrained=refuse))
    with pytest.raises(CheckpointError, match="it is not a HyperVL checkpoint directory"):
        checkpoint.read_description(tmp_path / "checkpoints")


def test_a_stage_starts_from_anothers_parameters_with_a_fresh_optimizer(tmp_path):
    finish(make_trainer(tmp_path / "one"))

    def from_stage_one(targets):
        return checkpoint.load_params(tmp_path / "one" / "checkpoints", targets)

    trainer = make_trainer(tmp_path / "two", pretrained=from_stage_one)
    with jax.set_mesh(trainer.mesh):
        state, lanes = trainer.start()
    trainer.close()
    abstract, _ = abstract_parameters(small_architecture(), RUNTIME)
    expected = checkpoint.load_params(tmp_path / "one" / "checkpoints", abstract)
    jax.tree.map(np.testing.assert_array_equal, state.params, expected)
    assert int(state.step) == 0
    assert not np.any(lanes)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(state.moments))


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    finish(make_trainer(tmp_path))
    trainer = make_trainer(tmp_path)
    narrow = jax.ShapeDtypeStruct((64, 32), np.float32)
    trainer.abstract.params["decoder"]["embedding"] = narrow
    with jax.set_mesh(trainer.mesh), pytest.raises(CheckpointError, match="does not fit this configuration"):
        trainer.start()
    trainer.close()


def test_description_round_trip(tmp_path):
    finish(make_trainer(tmp_path, {"steps": 2}))
    described = checkpoint.read_description(tmp_path / "checkpoints")
    assert described.architecture == small_architecture()
    assert described.details == {"note": "test"}
    with pytest.raises(CheckpointError, match="it is not a HyperVL checkpoint directory"):
        checkpoint.read_description(tmp_path)


def test_the_loop_makes_one_transfer_for_each_log_window(tmp_path, monkeypatch):
    """Metrics leave the devices in groups at log boundaries, saves and the end: never once a step."""
    calls = []
    fetch = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: calls.append(tree) or fetch(tree))
    finish(make_trainer(tmp_path, {"steps": 20, "log_every": 10}, every=1000))
    # Two boundaries, the final save's drain, the final counters.
    assert len(calls) == 4


@in_own_process
def test_what_a_run_writes_about_itself(tmp_path):
    trainer = make_trainer(
        tmp_path, {"steps": 8, "log_every": 4}, monitoring=MonitorConfig(profile_steps=StepRange(2, 4))
    )
    began = time.monotonic()
    outcome = finish(trainer)
    seconds = time.monotonic() - began
    metrics, performance = lines(tmp_path), lines(tmp_path, "performance")

    at_boundaries = [line["step"] for line in metrics if "parameter_norm/decoder" in line]
    assert at_boundaries == [3, 7], "the last step before each log boundary"
    assert {f"gradient_norm/{part}" for part in PARTS} <= metrics[0].keys() | {
        "gradient_norm/vision_large",
        "gradient_norm/projector_large",
    }
    saved = read_arrays(tmp_path / "checkpoints" / "8" / "params")
    for part in PARTS:
        assert metrics[7][f"parameter_norm/{part}"] == pytest.approx(float(optax.global_norm(saved[part])), rel=1e-6)
    assert {name: metrics[7][f"tokens/{name}"] for name in outcome.tokens} == outcome.tokens

    # At boundary 4 step 3 was still running; the save at 4 read it, and boundary 8 and the end wrote the rest.
    assert [(line["step"], line["steps"]) for line in performance] == [(2, 3), (6, 4), (7, 1)]
    assert [line["epochs/source0"] for line in performance] == [0.4, 0.8, 0.8]
    window = metrics[3:7]
    chips_seconds = sum(line["seconds"] for line in window)
    assert performance[1]["tokens_per_second_per_chip"] == pytest.approx(
        sum(line["tokens"] for line in window) / chips_seconds
    )
    assert performance[1]["tiles_per_second_per_chip"] == pytest.approx(
        sum(line["tiles"] for line in window) / chips_seconds
    )
    assert performance[1]["token_fill"] == pytest.approx(
        sum(line["tokens"] for line in window) / (4 * SHAPE.rows * SHAPE.length)
    )
    assert "mfu" not in performance[1], "no peak is known for a CPU"
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1

    account = read_goodput(tmp_path / "goodput.json")["seconds"]
    assert min(account.values()) >= 0
    assert sum(account.values()) == pytest.approx(seconds, abs=1.0 + 0.1 * seconds)
    assert account["compile"] > 0
    assert account["lost"] == 0


def test_a_start_that_hangs_is_written_down(tmp_path):
    def pretrained_that_never_comes(targets):
        time.sleep(1.5)
        raise OSError("storage is gone")

    trainer = make_trainer(
        tmp_path, pretrained=pretrained_that_never_comes, monitoring=MonitorConfig(hang_seconds=0.05)
    )
    with pytest.raises(OSError, match="storage is gone"):
        finish(trainer)
    text = (tmp_path / "stacks-0.txt").read_text()
    assert "the loop is in: start" in text
    assert "pretrained_that_never_comes" in text


def test_slow_data_is_noticed_and_a_hang_is_written_down(tmp_path, capfd):
    monitoring = MonitorConfig(hang_seconds=0.7, stall_share=0.3, stall_steps=3)
    delays = {number: 0.25 for number in range(2, 12)} | {8: 1.5}
    finish(make_trainer(tmp_path, monitoring=monitoring, delays=delays, every=1000))
    waits = [line["data_wait"] for line in lines(tmp_path)]
    assert waits[0] < 0.1, "the first batch belongs to the start"
    assert waits[8] > 1.0
    assert sum(waits) == pytest.approx(
        read_goodput(tmp_path / "goodput.json")["seconds"]["data_wait"], rel=1e-3, abs=0.02
    )
    assert "the loop is in: data wait" in (tmp_path / "stacks-0.txt").read_text()
    assert (
        capfd.readouterr().err.count("the devices wait for data: over 30% of the step time for 3 steps in a row") == 1
    )
