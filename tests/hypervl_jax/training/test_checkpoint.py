"""Checkpoints by themselves: every array back on another mesh, and which steps stay."""

import contextlib
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from hypervl_jax import partitioning
from hypervl_jax.architecture import hypervl_tiny
from hypervl_jax.partitioning import MeshConfig
from hypervl_jax.training.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    Checkpoints,
    Description,
    absolute,
    abstract_like,
    check_space,
    load_params,
    read_description,
    steps_in,
    write_description,
)
from hypervl_jax.training.feed import DeviceFeed, local_rows, to_global, to_local
from hypervl_jax.training.state import Counters, TrainState

ROWS = 8
MESHES = [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=4)]


def state_at(step: int) -> TrainState:
    """A state whose every array is its own."""
    values = iter(np.random.default_rng(step).normal(size=(8, 8, 8)).astype(np.float32))
    params = {"decoder": {"kernel": next(values), "bias": next(values)[0]}}
    moments = {"mu": next(values), "nu": next(values)}
    integers = jax.tree.map(lambda _: np.arange(4, dtype=np.int32) + step, Counters(*range(len(Counters._fields))))
    return TrainState(params=params, step=np.int32(step), moments=moments, counters=integers)


def shardings_on(config: MeshConfig, state: TrainState):
    mesh = partitioning.make_mesh(config, jax.devices()[:8])
    split = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    return mesh, jax.tree.map(lambda x: split if np.ndim(x) == 2 else partitioning.replicated(mesh), state)


def put(state: TrainState, config: MeshConfig) -> TrainState:
    return jax.device_put(jax.tree.map(jnp.asarray, state), shardings_on(config, state)[1])


def lane_states(step: int) -> np.ndarray:
    return np.arange(ROWS * 3, dtype=np.int32).reshape(ROWS, 3) + step


def save(checkpoints: Checkpoints, step: int, config: MeshConfig = MESHES[0]) -> None:
    rows = partitioning.row_sharding(partitioning.make_mesh(config, jax.devices()[:8]))
    lanes = to_global(lane_states(step), ROWS, tuple(range(ROWS)), rows)
    checkpoints.save(put(state_at(step), config), lanes, {"tokens": step})


def test_a_state_comes_back_on_other_meshes(tmp_path):
    writer = Checkpoints(tmp_path, CheckpointConfig())
    save(writer, 5)
    writer.close()
    for config in MESHES[1:]:
        checkpoints, expected = Checkpoints(tmp_path, CheckpointConfig()), state_at(5)
        mesh, shardings = shardings_on(config, expected)
        rows = partitioning.row_sharding(mesh)
        shape = jax.ShapeDtypeStruct((ROWS, 3), np.int32, sharding=rows)
        restored = checkpoints.restore(abstract_like(expected, shardings), shape)
        jax.tree.map(np.testing.assert_array_equal, restored.state, expected)
        assert jax.tree.all(
            jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), restored.state, shardings)
        )
        np.testing.assert_array_equal(to_local(restored.lanes, local_rows(ROWS, rows)), lane_states(5))
        assert restored.progress == {"tokens": 5}
        checkpoints.close()


def test_which_steps_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=2, keep_period=3))
    for step in (1, 2, 3, 4, 5):
        save(checkpoints, step)
    assert checkpoints.last_at_or_before(4) == 4
    assert steps_in(tmp_path) == [3, 4, 5]
    checkpoints.forget_after(3)
    assert checkpoints.latest() == 3
    checkpoints.close()


def test_a_directory_without_checkpoints_says_so(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        checkpoints.restore(state_at(0), jax.ShapeDtypeStruct((ROWS, 3), np.int32))
    checkpoints.close()


def save_now(checkpoints, step):
    save(checkpoints, step)
    checkpoints.wait()


# TensorStore reports further failures to an event loop that Orbax has closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_a_sentence_and_leaves_the_checkpoint_before(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    save_now(checkpoints, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(CheckpointError, match=r"could not be written to .* goes on from the last whole checkpoint"):
            save_now(checkpoints, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert steps_in(tmp_path) == [1]
    with contextlib.suppress(CheckpointError):
        checkpoints.close()


def test_a_checkpoint_that_cannot_fit_is_not_begun(tmp_path):
    huge = state_at(7)._replace(params={"decoder": np.broadcast_to(np.float32(0), (2**50,))})
    with pytest.raises(CheckpointError, match=r"checkpoint 7 needs 4,503,599,6\d\d MB and .* MB left"):
        check_space(absolute(tmp_path), huge)


def test_a_description_follows_what_is_saved(tmp_path):
    first, second = (Description(hypervl_tiny(), {"tokenizer": name}, None) for name in ("one", "two"))
    write_description(tmp_path, first)
    written = (tmp_path / "description").stat().st_ino
    write_description(tmp_path, first)
    assert (tmp_path / "description").stat().st_ino == written, "the same description stays"
    write_description(tmp_path, second)
    assert read_description(tmp_path) == second


@pytest.mark.parametrize("text", ['{"format_ver', "[]", "{}", '{"format_version": 1, "details": {}}'])
def test_a_damaged_description_is_a_sentence(tmp_path, text):
    (tmp_path / "description").mkdir()
    (tmp_path / "description" / "description.json").write_text(text)
    with pytest.raises(CheckpointError):
        read_description(tmp_path)


def test_a_checkpoint_without_parameters_is_a_sentence(tmp_path):
    (tmp_path / "3").mkdir()
    with pytest.raises(CheckpointError, match=r"checkpoint 3 in .* holds no parameters; give another --step"):
        load_params(tmp_path, {"decoder": jax.ShapeDtypeStruct((2,), np.float32)}, parts=("decoder",))


def test_a_feed_refuses_a_loader_of_other_rows():
    class EveryOtherRow:
        lanes = tuple(range(0, ROWS, 2))

    mesh = partitioning.make_mesh(MESHES[0], jax.devices()[:8])
    with pytest.raises(ValueError, match=r"this process feeds the rows \(0, 1, 2, 3, 4, 5, 6, 7\)"):
        DeviceFeed(EveryOtherRow(), lane_states(0), ROWS, mesh, depth=1)
