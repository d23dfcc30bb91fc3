"""Hugging Face checkpoints of towers and decoders, read into our parameters and written from them (`models.key_table`)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Float

from hypervl_jax.architecture import ConfigError, DecoderConfig, VisionConfig
from hypervl_jax.models.key_table import (
    HEAD,
    POSITIONS,
    VISION_PREFIX,
    Entry,
    Index,
    decoder_table,
    vision_table,
)
from hypervl_jax.models.safetensors_files import (
    CheckpointError,
    PendingTensor,
    SafetensorsReader,
    read_directory,
    write_directory,
)
from hypervl_jax.models.siglip2 import resample_positions

VISION_LEFT_OUT = ("head.", "text_model.", "logit_scale", "logit_bias", "embeddings.position_ids")
"""Keys of a SigLIP2 checkpoint that HyperVL has no use for: pooling head, text tower, contrastive scalars, old buffers."""
TABLE_ROWS_AT_ONCE = 8192


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """Where the parameters of one part came from.

    `taken`, `resampled` and `initialised` are paths of our tree and together name every parameter once; `left_out` are the
    checkpoint's keys that were not used.
    """

    source: str
    taken: tuple[str, ...] = ()
    resampled: tuple[str, ...] = ()
    initialised: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @classmethod
    def random(cls, params: Mapping[str, Any]) -> LoadReport:
        """The report of a part that starts from random parameters."""
        return cls("random", initialised=tuple(sorted(traverse_util.flatten_dict(params, sep="/"))))

    def summary(self) -> str:
        """One line for the log."""
        parts = {name: getattr(self, name) for name in ("taken", "resampled", "initialised", "left_out")}
        counts = ", ".join(f"{len(paths)} {name.replace('_', ' ')}" for name, paths in parts.items() if paths)
        return f"{self.source}: {counts}"


def check_keys(reader: SafetensorsReader, table: Sequence[Entry], left_out: Callable[[str], bool]) -> tuple[str, ...]:
    """The keys that `left_out` lets go. Raises `CheckpointError` unless all others fit the table, one to one."""
    wanted = [key for entry in table for key in entry.keys]
    missing = [key for key in wanted if key not in reader.keys]
    if missing:
        raise CheckpointError(
            f"{reader.directory} lacks {len(missing)} keys that this architecture has, first {missing[0]!r}"
        )
    extra = sorted(set(reader.keys) - set(wanted))
    unknown = [key for key in extra if not left_out(key)]
    if unknown:
        raise CheckpointError(
            f"{reader.directory} has {len(unknown)} keys that this architecture has not, first {unknown[0]!r}"
        )
    return tuple(extra)


def check_shape(reader: SafetensorsReader, entry: Entry) -> None:
    """Raises `CheckpointError` naming the key whose shape is not the table's."""
    for key in entry.keys:
        found = reader.shape(key)
        if found != entry.key_shape:
            raise CheckpointError(
                f"{reader.directory}: {key!r} has shape {found}, this architecture needs {entry.key_shape}"
            )


def check_config(reader: SafetensorsReader, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` naming every value of the checkpoint's config that differs from ours."""
    wrong = [
        f"{name} is {found.get(name)!r}, not {value!r}" for name, value in expected.items() if found.get(name) != value
    ]
    if wrong:
        raise CheckpointError(f"{reader.directory}/config.json does not fit the architecture: {'; '.join(wrong)}")


def _fill(table: Sequence[Entry], read: Callable[[Entry, Index], np.ndarray], shardings: Any) -> dict[str, Any]:
    """A parameter tree with `read` called for every shard that this process holds."""
    flat = {} if shardings is None else traverse_util.flatten_dict(shardings, sep="/")
    default: Sharding = SingleDeviceSharding(jax.local_devices()[0])
    params = {}
    for entry in table:
        sharding = flat[entry.path] if flat else default
        params[entry.path] = jax.make_array_from_callback(entry.shape, sharding, functools.partial(read, entry))
    return traverse_util.unflatten_dict(params, sep="/")


def load_vision(
    directory: str | Path, config: VisionConfig, shardings: Any = None
) -> tuple[dict[str, Any], LoadReport]:
    """A vision tower's parameters from a SigLIP2 checkpoint (a whole `SiglipModel` or only its vision tower).

    Each shard is read from the file by itself, straight into its device; the position embedding is resampled when the
    checkpoint was made for another image size.

    Args:
        directory: `config.json` and safetensors.
        config: the tower; all but `image_size` must be the checkpoint's.
        shardings: tree of shardings like the parameters; the first local device when None.

    Raises:
        CheckpointError: a key is missing, unknown or of another shape, the architecture differs, or only pickles are there.
    """
    reader = read_directory(directory)
    found = reader.config.get("vision_config", reader.config)
    check_config(reader, {**vision_defaults(), **found}, vision_identity(config))
    prefix = VISION_PREFIX if any(key.startswith(VISION_PREFIX) for key in reader.keys) else ""
    table = vision_table(config, prefix)
    left_out = check_keys(reader, table, lambda key: key.removeprefix(prefix).startswith(VISION_LEFT_OUT))
    positions = next(entry for entry in table if entry.path == POSITIONS)
    resampled = reader.shape(positions.key) != positions.key_shape
    for entry in table:
        if entry is not positions or not resampled:
            check_shape(reader, entry)
    grid = resampled_positions(reader, positions) if resampled else None

    def read(entry: Entry, index: Index) -> np.ndarray:
        return grid[index] if entry is positions and resampled else entry.read(reader, index)

    taken = tuple(entry.path for entry in table if not (resampled and entry is positions))
    report = LoadReport(str(directory), taken, (POSITIONS,) if resampled else (), left_out=left_out)
    return _fill(table, read, shardings), report


def resampled_positions(reader: SafetensorsReader, entry: Entry) -> Float[np.ndarray, "p d"]:
    """The checkpoint's position embedding on the grid of `entry`."""
    count, width = entry.key_shape
    found = reader.shape(entry.key)
    if len(found) != 2 or found[1] != width or math.isqrt(found[0]) ** 2 != found[0]:
        raise CheckpointError(
            f"{reader.directory}: {entry.key!r} has shape {found}; it must be a square grid of vectors of width {width}"
        )
    weights = reader.read(entry.key, (slice(None), slice(None)))
    return np.asarray(resample_positions(weights, math.isqrt(count)))


def load_decoder(
    directory: str | Path, config: DecoderConfig, shardings: Any = None
) -> tuple[dict[str, Any], LoadReport]:
    """A decoder's parameters from a Qwen3 checkpoint; arguments and errors as for `load_vision`.

    A checkpoint with a tied head may repeat the embedding under `lm_head.weight` (Qwen3-1.7B does); it must be equal.
    """
    reader = read_directory(directory)
    found = {**DECODER_DEFAULTS, **reader.config, **rope_parameters(reader.config)}
    check_config(reader, found, decoder_identity(config))
    table = decoder_table(config)
    left_out = check_keys(reader, table, lambda key: config.tie_embeddings and key == HEAD)
    for entry in table:
        check_shape(reader, entry)
    if left_out:
        check_tied(reader, table[0].key)
    read = lambda entry, index: entry.read(reader, index)
    return _fill(table, read, shardings), LoadReport(
        str(directory), tuple(entry.path for entry in table), left_out=left_out
    )


def check_tied(reader: SafetensorsReader, embedding: str) -> None:
    """Raises `CheckpointError` when a repeated head is not the embedding it is tied to."""
    rows, _ = shape = reader.shape(embedding)
    equal = reader.shape(HEAD) == shape
    for start in range(0, rows if equal else 0, TABLE_ROWS_AT_ONCE):
        part = (slice(start, min(rows, start + TABLE_ROWS_AT_ONCE)), slice(None))
        equal = equal and np.array_equal(reader.read(embedding, part), reader.read(HEAD, part))
    if not equal:
        raise CheckpointError(f"{reader.directory}: tie_word_embeddings is set but {HEAD!r} differs from {embedding!r}")


def save_vision(params: Mapping[str, Any], config: VisionConfig, directory: str | Path, dtype: str = "float32") -> None:
    """Writes a tower's plain (unboxed) parameters as a `SiglipVisionModel` without pooling head; "float32" or "bfloat16"."""
    values = vision_identity(config) | {
        "architectures": ["SiglipVisionModel"],
        "image_size": config.image_size,
        "vision_use_head": False,
    }
    _save(params, vision_table(config), values, directory, dtype)


def save_decoder(
    params: Mapping[str, Any], config: DecoderConfig, directory: str | Path, dtype: str = "float32"
) -> None:
    """Writes a decoder's plain (unboxed) parameters as a `Qwen3ForCausalLM`; dtype as for `save_vision`."""
    values = decoder_identity(config) | {"architectures": ["Qwen3ForCausalLM"]}
    values["rope_parameters"] = {"rope_theta": config.rope_theta, "rope_type": values.pop("rope_type")}
    _save(params, decoder_table(config), values, directory, dtype)


def _save(
    params: Mapping[str, Any], table: Sequence[Entry], config: Mapping[str, Any], directory: str | Path, dtype: str
) -> None:
    write_directory(directory, {**config, "dtype": dtype, "torch_dtype": dtype}, pending_tensors(params, table), dtype)


def pending_tensors(params: Mapping[str, Any], table: Sequence[Entry]) -> list[PendingTensor]:
    """The tensors to write for a part's plain (unboxed) parameters. Raises `CheckpointError` unless the table has all of them."""
    flat = traverse_util.flatten_dict(params, sep="/")
    odd = sorted(set(flat) ^ {entry.path for entry in table})
    if odd:
        raise CheckpointError(f"parameters and key table disagree on {', '.join(odd)}")
    return [tensor for entry in table for tensor in entry.pending(flat[entry.path])]


def vision_identity(config: VisionConfig) -> dict[str, Any]:
    """What `config.json` must say of a tower, image size apart."""
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_channels": 3,
        "patch_size": config.patch_size,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_act": "gelu_pytorch_tanh",
    }


def vision_defaults() -> dict[str, Any]:
    """What a SigLIP `config.json` means where it is silent: published ones list only what differs from Base."""
    return vision_identity(VisionConfig())


def vision_config(directory: str | Path, image_size: int | None = None) -> VisionConfig:
    """The tower of a SigLIP2 directory, for pictures of `image_size` (its own when None).

    Raises:
        CheckpointError: no readable directory, another kind of model, or numbers that make no tower.
    """
    reader = read_directory(directory)
    found = {**vision_defaults(), "image_size": 224, **reader.config.get("vision_config", reader.config)}
    check_config(reader, found, {"model_type": vision_defaults()["model_type"]})
    return _from_config(
        reader,
        VisionConfig,
        hidden_size=found["hidden_size"],
        intermediate_size=found["intermediate_size"],
        num_layers=found["num_hidden_layers"],
        num_heads=found["num_attention_heads"],
        patch_size=found["patch_size"],
        image_size=image_size or found["image_size"],
        layer_norm_eps=found["layer_norm_eps"],
    )


def decoder_config(directory: str | Path) -> DecoderConfig:
    """The decoder of a Qwen3 directory. Raises as `vision_config`."""
    reader = read_directory(directory)
    found = {"tie_word_embeddings": False, **reader.config, **rope_parameters(reader.config)}
    check_config(reader, found, {"model_type": "qwen3"})
    names = {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "rope_theta": "rope_theta",
        "rms_norm_eps": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
    }
    missing = [theirs for theirs in names.values() if theirs not in found]
    if missing:
        raise CheckpointError(
            f"{reader.directory}/config.json says nothing of {', '.join(missing)}; give the directory of a Qwen3 checkpoint"
        )
    return _from_config(reader, DecoderConfig, **{ours: found[theirs] for ours, theirs in names.items()})


def _from_config(reader: SafetensorsReader, kind: Callable[..., Any], **values: Any) -> Any:
    """A config of ours from numbers of a file."""
    try:
        return kind(**values)
    except (ConfigError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{reader.directory}/config.json describes no model of ours: {error}") from error


DECODER_DEFAULTS = {
    "attention_bias": False,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "rope_type": "default",
}


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_type` of a Qwen3 config, written at its top level or, newer, under `rope_parameters`."""
    nested = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if "type" in nested:  # what `rope_type` was called before transformers 4.43
        nested.setdefault("rope_type", nested["type"])
    return {name: nested[name] for name in ("rope_theta", "rope_type") if name in nested}


def decoder_identity(config: DecoderConfig) -> dict[str, Any]:
    """What `config.json` must say of a decoder."""
    return {
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_type": "default",
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
    }
