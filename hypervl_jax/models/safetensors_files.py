"""Hugging Face checkpoint directories: `config.json` and safetensors, read lazily and written one tensor at a time.

Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
READABLE = ("F32", "F16", "BF16")
WRITABLE = {"float32": ("F32", np.dtype(np.float32)), "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16))}


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or of another kind; the message says which file or key, and what to do."""


class StoredTensor(NamedTuple):
    """Where a tensor lies, and what its file's header says of it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class SafetensorsReader:
    """The tensors of one checkpoint directory by key. Bytes are read only by `read`, and only those asked for.

    Files are memory-mapped for the time of a read, so that a checkpoint does not fill the process's memory as it is read.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any], files: Sequence[Path]) -> None:
        self.directory = directory
        self.config = config
        self._stored: dict[str, StoredTensor] = {}
        for file in files:
            with _open(file) as handle:
                for key in handle.keys():  # noqa: SIM118 (the handle is no mapping)
                    if key in self._stored:
                        raise CheckpointError(f"{directory}: key {key!r} is in more than one file")
                    tensor = handle.get_slice(key)
                    self._stored[key] = StoredTensor(file, tensor.get_dtype(), tuple(tensor.get_shape()))

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys of the checkpoint, sorted."""
        return tuple(sorted(self._stored))

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor. Raises `CheckpointError` when the key is missing or not floating point."""
        if key not in self._stored:
            raise CheckpointError(f"{self.directory}: key {key!r} is missing")
        tensor = self._stored[key]
        if tensor.dtype not in READABLE:
            raise CheckpointError(
                f"{self.directory}: {key!r} has dtype {tensor.dtype}; quantised checkpoints cannot be trained, use one of {', '.join(READABLE)}"
            )
        return tensor.shape

    def read(self, key: str, index: tuple[slice, ...]) -> Float[np.ndarray, "..."]:
        """The part of a tensor that `index` selects, one slice an axis, as float32."""
        with _open(self._stored[key].file) as handle:
            return handle.get_slice(key)[index].astype(np.float32, copy=False)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file ({error}); download it again") from error


def read_directory(directory: str | Path) -> SafetensorsReader:
    """Opens a Hugging Face checkpoint directory: `config.json` and one safetensors file, or shards with an index.

    Raises `CheckpointError` when a file is missing or damaged, a key is listed twice or in vain, or only pickles are there.
    """
    directory = Path(directory)
    config = _read_json(directory / CONFIG_FILE)
    if (directory / INDEX_FILE).exists():
        weight_map = _read_json(directory / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{directory / INDEX_FILE} has no weight_map")
        reader = SafetensorsReader(
            directory, config, [_shard(directory, name) for name in sorted(set(weight_map.values()))]
        )
        if set(weight_map) != set(reader.keys):
            odd = sorted(set(weight_map) ^ set(reader.keys))
            raise CheckpointError(
                f"{directory}: index and shards disagree on {len(odd)} keys, first {odd[0]!r}; download it again"
            )
        return reader
    if (directory / WEIGHTS_FILE).exists():
        return SafetensorsReader(directory, config, [directory / WEIGHTS_FILE])
    pickles = sorted(file.name for file in directory.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{directory} holds only pickled weights ({', '.join(pickles)}), which can run code when read; convert them to {WEIGHTS_FILE} first"
        )
    raise CheckpointError(f"{directory} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}")


def _shard(directory: Path, name: Any) -> Path:
    """A shard named by an index, which may not point outside of its directory."""
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise CheckpointError(
            f"{directory / INDEX_FILE} names the shard {name!r}; only safetensors files beside it are read"
        )
    return directory / name


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return values


class PendingTensor(NamedTuple):
    """A tensor to write: `value` makes it when its turn comes."""

    key: str
    shape: tuple[int, ...]
    value: Callable[[], np.ndarray]


def write_directory(
    directory: str | Path,
    config: Mapping[str, Any],
    tensors: Sequence[PendingTensor],
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `config.json` and `model.safetensors`, holding one tensor at a time in host memory.

    More than `shard_bytes` are split into shards with an index; a tensor is never split. Every file appears under its name
    only when it is complete. Layout: https://github.com/huggingface/safetensors#format.

    Raises:
        CheckpointError: the file system has less room than the tensors take, or refuses to write.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        check_room(directory, sum(_bytes(tensor, dtype) for tensor in tensors))
        (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shards = _shards(tensors, dtype, shard_bytes)
        names = shard_names(len(shards))
        for name, shard in zip(names, shards, strict=True):
            _write_file(directory / name, shard, dtype)
        if len(shards) > 1:
            (directory / INDEX_FILE).write_text(json.dumps(_index(names, shards, dtype), indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"{directory} could not be written: {error.strerror or error}; free space there"
        ) from error


def check_room(directory: Path, needed: int) -> None:
    """Raises `CheckpointError` when the file system of a directory has fewer than `needed` bytes left."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise CheckpointError(
            f"{needed / 1e6:,.0f} MB are to be written and {directory} has {free / 1e6:,.0f} MB left; free space there, "
            "or write elsewhere"
        )


def shard_names(count: int) -> list[str]:
    """Names of the files of a checkpoint in `count` shards."""
    if count == 1:
        return [WEIGHTS_FILE]
    stem = WEIGHTS_FILE.removesuffix(".safetensors")
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _bytes(tensor: PendingTensor, dtype: str) -> int:
    return math.prod(tensor.shape) * WRITABLE[dtype][1].itemsize


def _shards(tensors: Sequence[PendingTensor], dtype: str, shard_bytes: int) -> list[list[PendingTensor]]:
    """The tensors in order, in as few runs as hold `shard_bytes` each (or one larger tensor)."""
    shards: list[list[PendingTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = _bytes(tensor, dtype)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards


def _index(names: Sequence[str], shards: Sequence[Sequence[PendingTensor]], dtype: str) -> dict[str, Any]:
    placed = {tensor.key: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    if len(placed) != sum(map(len, shards)):
        raise CheckpointError("a key would be written twice")
    return {
        "metadata": {"total_size": sum(_bytes(tensor, dtype) for shard in shards for tensor in shard)},
        "weight_map": dict(sorted(placed.items())),
    }


def _write_file(path: Path, tensors: Sequence[PendingTensor], dtype: str) -> None:
    _, kind = WRITABLE[dtype]
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(_header(tensors, dtype))
        for tensor in tensors:
            value = np.ascontiguousarray(tensor.value(), kind)
            if value.shape != tensor.shape:
                raise CheckpointError(f"{tensor.key!r} has shape {value.shape} instead of {tensor.shape}")
            file.write(memoryview(value.view(np.uint8)))
    os.replace(partial, path)


def _header(tensors: Sequence[PendingTensor], dtype: str) -> bytes:
    """Length (8 bytes, little-endian) and JSON of a safetensors header, padded so that data is 8-byte aligned."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        if tensor.key in header:
            raise CheckpointError(f"key {tensor.key!r} would be written twice")
        stop = start + _bytes(tensor, dtype)
        header[tensor.key] = {"dtype": WRITABLE[dtype][0], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
