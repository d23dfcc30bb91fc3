"""Checkpoints: the only module that speaks to Orbax.

Checkpoint N means: N updates are done and batch N has not been read. It holds, as separate items, `params` (so that tools
and later stages read them alone), `optimizer` (moments, step, counters), `lanes` (int32 [rows, k], the data position of every
lane) and `progress` (JSON: what the host remembers). Orbax writes each step to a temporary directory and renames it, so a
killed process leaves the last whole checkpoint. Beside the steps lies `description/`: what the arrays mean.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from hypervl_jax import architecture
from hypervl_jax.architecture import PARTS, ConfigError, HyperVLConfig, require
from hypervl_jax.models.safetensors_files import CheckpointError
from hypervl_jax.training.state import TrainState

FORMAT_VERSION = 1
DESCRIPTION = "description"
_CHUNK_BYTES = 64 * 2**20
"""Largest piece of an array that is compressed and written at a time: whole embeddings would be held twice as they are saved."""

_READ_AT_ONCE_GB = 3
"""Of parameters read alone: what is under way is held once more beside what has been read."""

_SHARE = "Choose a --workdir on storage that all hosts share"


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """`every` steps a checkpoint is written; the last `keep` stay, and every multiple of `keep_period` steps (0: none).

    `asynchronous` lets training go on while the arrays are written.
    """

    every: int = 1000
    keep: int = 3
    keep_period: int = 0
    asynchronous: bool = True

    def __post_init__(self) -> None:
        require(
            self.every >= 1 and self.keep >= 1, f"checkpoint.every {self.every} and keep {self.keep} must be positive"
        )
        require(self.keep_period >= 0, f"checkpoint.keep_period {self.keep_period} must not be negative; 0 is never")


class Description(NamedTuple):
    """What a checkpoint says of itself. `details` is free JSON (configuration, template, sources, release card)."""

    architecture: HyperVLConfig
    details: dict[str, Any]
    tokenizer_directory: epath.Path | None


class Restored(NamedTuple):
    """A whole checkpoint, back in the target's shardings."""

    state: TrainState
    lanes: jax.Array
    progress: dict[str, Any]


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "moments": state.moments, "counters": state.counters}


def _in_chunks(tree: Any) -> ocp.args.StandardSave:
    """How to save arrays of any size."""
    return ocp.args.StandardSave(tree, jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree))


class Checkpoints:
    """The checkpoints of one run. With several processes all of them make it and call its methods, in the same order.

    Raises `CheckpointError` when the processes do not see the same directory.
    """

    def __init__(self, directory: epath.PathLike, config: CheckpointConfig):
        self.directory = absolute(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        check_shared(self.directory)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep,
            keep_period=config.keep_period or None,
            enable_async_checkpointing=config.asynchronous,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest(self) -> int | None:
        """Step of the newest whole checkpoint. Raises `CheckpointError` when the processes see different ones."""
        step = self._manager.latest_step()
        seen = from_all_processes(-1 if step is None else step)
        if len(set(seen)) > 1:
            raise CheckpointError(
                f"the processes see different newest checkpoints in {self.directory}: {', '.join(map(str, seen))} (-1: none). "
                f"{_SHARE}"
            )
        return step

    def save(self, state: TrainState, lanes: jax.Array, progress: Mapping[str, Any]) -> None:
        """Starts writing the checkpoint of `state.step`; a step that is already there is kept."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        check_space(self.directory, state)
        items = ocp.args.Composite(
            params=_in_chunks(state.params),
            optimizer=_in_chunks(_optimizer_item(state)),
            lanes=ocp.args.StandardSave({"states": lanes}),
            progress=ocp.args.JsonSave(dict(progress)),
        )
        with writing(self.directory):
            self._manager.save(step, args=items, force=True)

    def restore(self, target: TrainState, lanes: jax.ShapeDtypeStruct, step: int | None = None) -> Restored:
        """Reads a checkpoint into the shapes, dtypes and shardings of `target` and `lanes` (abstract arrays)."""
        step = self.latest() if step is None else step
        if step is None:
            raise CheckpointError(f"no checkpoint in {self.directory}")
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(target.params),
            optimizer=ocp.args.StandardRestore(_optimizer_item(target)),
            lanes=ocp.args.StandardRestore({"states": lanes}),
            progress=ocp.args.JsonRestore(),
        )
        try:
            found = self._manager.restore(step, args=items)
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise CheckpointError(
                f"checkpoint {step} in {self.directory} does not fit this configuration: {error}. Resume with the "
                "configuration that wrote it, or choose another --workdir"
            ) from error
        return Restored(
            TrainState(params=found["params"], **found["optimizer"]), found["lanes"]["states"], found["progress"]
        )

    def forget_after(self, step: int) -> None:
        """Deletes checkpoints later than `step`: a rewind leaves no way back to what it undid."""
        self.wait()
        for later in self._manager.all_steps():
            if later > step:
                self._manager.delete(later)

    def last_at_or_before(self, step: int) -> int | None:
        """Step of the newest whole checkpoint with at most `step` updates."""
        self.wait()
        return max((found for found in self._manager.all_steps() if found <= step), default=None)

    def wait(self) -> None:
        """Blocks until every started save is on disk. Raises `CheckpointError` when one could not be written."""
        with writing(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes pending saves and frees the manager's threads. Raises as `wait`."""
        with writing(self.directory):
            self._manager.close()


@contextlib.contextmanager
def writing(directory: epath.Path) -> Iterator[None]:
    """Raises as `CheckpointError` what Orbax raises in the block when storage fails: `OSError`, or `ValueError` from TensorStore."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"a checkpoint could not be written to {directory}: {reason}. Free space or repair the storage; the same command "
            "then goes on from the last whole checkpoint"
        ) from error


def check_space(directory: epath.Path, state: TrainState) -> None:
    """Raises `CheckpointError` when a local file system has less room than the arrays of `state` take."""
    if "://" in os.fspath(directory):
        return
    needed, free = sum(leaf.nbytes for leaf in jax.tree.leaves(state)), shutil.disk_usage(directory).free
    if free < needed:
        raise CheckpointError(
            f"checkpoint {int(state.step)} needs {needed / 1e6:,.0f} MB and {directory} has {free / 1e6:,.0f} MB left. Free space; "
            "the same command then goes on from the last whole checkpoint"
        )


def from_all_processes(number: int) -> list[int]:
    """The int32 that each process gives, in the order of the processes. All of them must call it."""
    if jax.process_count() == 1:
        return [number]
    return np.asarray(multihost_utils.process_allgather(np.int32(number))).tolist()


def check_shared(directory: epath.Path) -> None:
    """Raises `CheckpointError` naming the processes that do not see what process 0 writes into the directory."""
    if jax.process_count() == 1:
        return
    word = from_all_processes(secrets.randbits(31))[0]
    mark = directory / f".shared-{word}"
    if jax.process_index() == 0:
        mark.touch()
    multihost_utils.sync_global_devices("the mark is written")
    blind = [process for process, sees in enumerate(from_all_processes(int(mark.exists()))) if not sees]
    if jax.process_index() == 0:
        mark.unlink()
    if blind:
        raise CheckpointError(
            f"process {', '.join(map(str, blind))} of {jax.process_count()} does not see the {directory} of process 0. {_SHARE}"
        )


def abstract_like(tree: Any, shardings: Any) -> Any:
    """Abstract arrays with shardings: what Orbax restores into."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def absolute(path: epath.PathLike) -> epath.Path:
    """The path as Orbax wants it: absolute; a bucket's address is so already."""
    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(text))


def checkpoint_home(path: epath.PathLike) -> epath.Path:
    """The `checkpoints` directory of a workdir, or the directory itself."""
    inside = absolute(path) / "checkpoints"
    return inside if inside.is_dir() else absolute(path)


def steps_in(directory: epath.PathLike) -> list[int]:
    """Steps of the whole checkpoints in a directory, oldest first."""
    directory = absolute(directory)
    found = ocp.utils.checkpoint_steps(directory) if directory.exists() else []
    return sorted(found)


def find_step(directory: epath.PathLike, step: int | None = None) -> int:
    """The given step, or the newest. Raises `CheckpointError` when there is none."""
    steps = steps_in(directory)
    if not steps:
        raise CheckpointError(f"no checkpoint in {directory}; give the `checkpoints` directory of a run's --workdir")
    if step is not None and step not in steps:
        raise CheckpointError(f"no checkpoint of step {step} in {directory}; there are {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step


def load_params(
    directory: epath.PathLike, targets: Mapping[str, Any], step: int | None = None, parts: Iterable[str] = PARTS
) -> dict[str, Any]:
    """Parameters of `parts` alone, into the abstract arrays `targets` (with shardings); other parts are not read."""
    step = find_step(directory, step)
    wanted = {part: targets[part] for part in parts}
    restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(restore_concurrent_gb=_READ_AT_ONCE_GB))
    try:
        return reader.restore(absolute(directory) / str(step) / "params", args=args)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {step} in {directory} holds no parameters; give another --step") from error
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"the parameters of checkpoint {step} in {directory} do not fit: {error}") from error


def write_description(directory: epath.PathLike, description: Description) -> None:
    """Writes `description/` beside the checkpoints by rename; one that says the same already is left alone."""
    target = epath.Path(directory) / DESCRIPTION
    values = {
        "format_version": FORMAT_VERSION,
        "architecture": architecture.to_json(description.architecture),
        "details": description.details,
    }
    text = json.dumps(values, indent=1, sort_keys=True)
    if (target / "description.json").exists() and (target / "description.json").read_text() == text:
        return
    temporary = epath.Path(directory) / f"{DESCRIPTION}.writing"
    if temporary.exists():
        temporary.rmtree()
    temporary.mkdir(parents=True)
    (temporary / "description.json").write_text(text)
    if description.tokenizer_directory is not None:
        shutil.copytree(description.tokenizer_directory, temporary / "tokenizer")
    if target.exists():
        target.rmtree()
    temporary.rename(target)


def read_description(directory: epath.PathLike) -> Description:
    """What the checkpoints in `directory` say of themselves."""
    home = epath.Path(directory) / DESCRIPTION
    if not (home / "description.json").exists():
        raise CheckpointError(
            f"{directory} holds no {DESCRIPTION}/description.json: it is not a HyperVL checkpoint directory"
        )
    try:
        values = json.loads((home / "description.json").read_text())
        version, details = values["format_version"], dict(values["details"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{home}/description.json is damaged ({error}); restore it from a copy") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{directory} has checkpoint format {version}, this code reads {FORMAT_VERSION}")
    try:
        config = architecture.from_json(values["architecture"])
    except (ConfigError, KeyError) as error:
        raise CheckpointError(f"{directory}: {error}") from error
    tokenizer = home / "tokenizer"
    return Description(config, details, tokenizer if tokenizer.exists() else None)
