"""Compressors (VRC) on disk, and one compressor over many images.

On disk: a directory of one safetensors file and `description.json`, made whole by one rename.

    <directory>/compressor.safetensors   float32 parameters, keys are the tree's paths joined by "/"
    <directory>/description.json         format version, architecture, and free JSON about how it was made

Nothing is ever unpickled. A directory with its name holds a complete compressor.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from jaxtyping import Float32, UInt8
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from hypervl_jax import partitioning
from hypervl_jax.architecture import CompressorConfig, ConfigError, compressor_from_json
from hypervl_jax.models.compressor import Compressor
from hypervl_jax.models.safetensors_files import CheckpointError

FORMAT_VERSION = 1
WEIGHTS = "compressor.safetensors"
DESCRIPTION = "description.json"
SEPARATOR = "/"


class SavedCompressor(NamedTuple):
    """A compressor read from disk; `params` lie on the default device, `details` are what its maker wrote."""

    config: CompressorConfig
    params: dict[str, Any]
    details: dict[str, Any]


def abstract_compressor(config: CompressorConfig) -> dict[str, Any]:
    """Shapes and dtypes of a compressor's parameters, without computing anything."""
    side = config.proxy_size
    proxy = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
    return partitioning.unbox(jax.eval_shape(Compressor(config).init, jax.random.key(0), proxy)["params"])[0]


def save_compressor(
    directory: epath.PathLike, config: CompressorConfig, params: Mapping[str, Any], details: Mapping[str, Any]
) -> None:
    """Writes a compressor; `directory` appears only when it is complete.

    Args:
        directory: must not exist yet.
        config: the architecture that `params` belong to.
        params: the tree of `models.compressor.Compressor`.
        details: JSON values about how it was made.

    Raises:
        CheckpointError: `directory` exists.
    """
    target = epath.Path(directory)
    check_unused(target)
    temporary = target.parent / f"{target.name}.writing"
    if temporary.exists():
        temporary.rmtree()
    temporary.mkdir(parents=True)
    flat = traverse_util.flatten_dict(dict(params), sep=SEPARATOR)
    tensors = {key: np.ascontiguousarray(value, np.float32) for key, value in flat.items()}
    (temporary / WEIGHTS).write_bytes(safetensors.save(tensors))
    values = {"format_version": FORMAT_VERSION, "compressor": dataclasses.asdict(config), "details": dict(details)}
    (temporary / DESCRIPTION).write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")
    temporary.rename(target)


def check_unused(directory: epath.PathLike) -> None:
    """Raises `CheckpointError` when there is something where a compressor is to be written."""
    if epath.Path(directory).exists():
        raise CheckpointError(f"{directory} already exists; remove it, or write the compressor elsewhere")


def load_compressor(directory: epath.PathLike) -> SavedCompressor:
    """Reads what `save_compressor` wrote.

    Raises:
        CheckpointError: no compressor, a damaged one, one of another version, or weights that do not fit its description.
    """
    directory = epath.Path(directory)
    config, details = _read_description(directory / DESCRIPTION)
    try:
        flat = safetensors.load((directory / WEIGHTS).read_bytes())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory / WEIGHTS} cannot be read ({error}); train the compressor again") from error
    _check_tensors(directory, flat, traverse_util.flatten_dict(abstract_compressor(config), sep=SEPARATOR))
    return SavedCompressor(config, jax.device_put(traverse_util.unflatten_dict(flat, sep=SEPARATOR)), details)


def _read_description(path: epath.Path) -> tuple[CompressorConfig, dict[str, Any]]:
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist, so {path.parent} is no compressor; `python -m tools.train_compressor` makes one"
        )
    try:
        values = json.loads(path.read_text())
        if values["format_version"] != FORMAT_VERSION:
            raise CheckpointError(f"{path} has format {values['format_version']}, this code reads {FORMAT_VERSION}")
        return compressor_from_json(values["compressor"]), dict(values["details"])
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path} does not describe a compressor of this version: {error}") from error


def _check_tensors(
    directory: epath.Path, flat: Mapping[str, np.ndarray], expected: Mapping[str, jax.ShapeDtypeStruct]
) -> None:
    """Raises `CheckpointError` naming the first tensor that is missing, unexpected or of another shape or dtype."""
    for key in sorted(flat.keys() ^ expected.keys()):
        raise CheckpointError(f"{directory / WEIGHTS}: {key!r} is {'unexpected' if key in flat else 'missing'}")
    for key, leaf in expected.items():
        have = flat[key]
        if (have.shape, have.dtype) != (leaf.shape, leaf.dtype):
            raise CheckpointError(
                f"{directory / WEIGHTS}: {key!r} is {have.dtype}{have.shape}, its description needs {leaf.dtype}{leaf.shape}"
            )


_apply = jax.jit(
    lambda params, proxies, config: Compressor(config).apply({"params": params}, proxies), static_argnames="config"
)


def predict_log_areas(
    config: CompressorConfig, params: Mapping[str, Any], proxies: UInt8[np.ndarray, "n s s 3"], batch_size: int = 64
) -> Float32[np.ndarray, "n"]:
    """The compressor's outputs, `batch_size` images at a time; one program whatever n is."""
    outputs = [np.zeros(0, np.float32)]
    for first in range(0, len(proxies), batch_size):
        chunk = proxies[first : first + batch_size]
        padding = np.zeros((batch_size - len(chunk), *chunk.shape[1:]), np.uint8)
        outputs.append(np.asarray(_apply(params, np.concatenate([chunk, padding]), config))[: len(chunk)])
    return np.concatenate(outputs)


def shift_output(params: Mapping[str, Any], bias: float) -> dict[str, Any]:
    """The compressor whose output is larger by `bias`."""
    output = dict(params["output"])
    output["bias"] = output["bias"] + jnp.float32(bias)
    return {**params, "output": output}
