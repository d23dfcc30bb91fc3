"""Artifacts: directories that leave this project, made whole by one rename, each with a manifest of what it is and how to check it.

    <artifact>/manifest.json       source checkpoint and code, shapes, dtype, preprocessing, versions, parity, SHA-256 of every file
    <artifact>/golden.safetensors  inputs and outputs computed by JAX, to check the artifact against on any machine
    <artifact>/report.json         the parity report, as the exporter printed it
    <parent>/artifacts.json        names of the artifacts that one command made together

`tools.verify_artifact` reads them back. Every exporter writes its directory through `writing` and ends it with `write_manifest`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from hypervl_jax import architecture
from hypervl_jax.models.safetensors_files import CheckpointError, check_room
from hypervl_jax.training.checkpoint import DESCRIPTION, Description
from hypervl_jax.training.telemetry.records import git_revision, write_json

FORMAT_VERSION = 1
MANIFEST, GOLDEN, REPORT, LIST = "manifest.json", "golden.safetensors", "report.json", "artifacts.json"
_READ_AT_ONCE = 1 << 24


class ArtifactError(ValueError):
    """An artifact that cannot be written, or is not what its manifest says; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What an artifact says of itself; all but `kind` and `files` is free JSON.

    Attributes:
        kind: which exporter made it, and so which runtime checks it: "torch", "tflite", "qnn".
        source: checkpoint, step, architecture, tokenizer and code it was made from.
        shapes: sizes of its inputs and outputs.
        dtype: of the stored weights, or how they are quantised.
        preprocessing: how pictures and text become inputs; the golden arrays are an example of it.
        versions: of everything that took part.
        parity: the report, in short.
        files: size and SHA-256 of every other file, by its path in the artifact.
        created: UTC time.
    """

    kind: str
    source: Mapping[str, Any]
    shapes: Mapping[str, Any]
    dtype: str
    preprocessing: Mapping[str, Any]
    versions: Mapping[str, str]
    parity: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    created: str = ""


def check_output(output: str | pathlib.Path) -> pathlib.Path:
    """The directory to write. Raises `ArtifactError` when something is there already."""
    path = pathlib.Path(output)
    if path.is_dir() and not any(path.iterdir()):
        return path
    if path.exists():
        raise ArtifactError(
            f"{path} is there already and is not an empty directory; remove it or choose another --output"
        )
    return path


@contextlib.contextmanager
def writing(output: str | pathlib.Path, needed: int = 0) -> Iterator[pathlib.Path]:
    """A temporary directory beside `output` that takes its name when the block ends well, and is removed when it does not.

    Args:
        output: must not exist, or be an empty directory.
        needed: bytes that will be written at least.

    Raises:
        ArtifactError: `output` is taken, the disk is too small, or the storage fails.
    """
    target = check_output(output)
    temporary = target.with_name(f".{target.name}.writing")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        with _alone(temporary):
            try:
                for left in temporary.iterdir():  # by a process that was killed
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
                check_room(temporary, needed)
                yield temporary
                if target.exists():
                    target.rmdir()
                temporary.rename(target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except CheckpointError as error:
        raise ArtifactError(str(error)) from error
    except OSError as error:
        raise ArtifactError(f"{target} could not be written: {error.strerror or error}") from error


@contextlib.contextmanager
def _alone(directory: pathlib.Path) -> Iterator[None]:
    """Holds a lock on a directory, which ends with the process. Raises `ArtifactError` when another process has it."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ArtifactError(
            f"another process is writing {directory}; wait for it, or choose another --output"
        ) from error
    finally:
        os.close(handle)


def source_of(checkpoint: epath.PathLike, step: int, description: Description) -> dict[str, Any]:
    """What an artifact was made from. The path is left out: it means nothing elsewhere."""
    text = (epath.Path(checkpoint) / DESCRIPTION / "description.json").read_bytes()
    return {
        "step": step,
        "description_sha256": hashlib.sha256(text).hexdigest(),
        "tokenizer": description.details.get("tokenizer"),
        "architecture": architecture.to_json(description.architecture),
        "code": git_revision(),
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of Python, the machine's kind and these packages; packages that are not installed are left out."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def write_golden(directory: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the golden inputs and outputs of an artifact."""
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    (directory / GOLDEN).write_bytes(safetensors.save(whole))


def read_golden(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """The golden arrays of an artifact. Raises `ArtifactError` when they cannot be read."""
    try:
        return safetensors.load((directory / GOLDEN).read_bytes())
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{directory / GOLDEN} cannot be read ({error}); export the checkpoint again") from error


def write_manifest(directory: pathlib.Path, manifest: Manifest) -> Manifest:
    """Writes the manifest as the artifact's last file, with the size and SHA-256 of all others; returns it complete."""
    files = {name: {"bytes": path.stat().st_size, "sha256": digest(path)} for name, path in files_in(directory).items()}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    complete = dataclasses.replace(manifest, files=files, created=now)
    write_json(directory / MANIFEST, {"format_version": FORMAT_VERSION, **dataclasses.asdict(complete)})
    return complete


def read_manifest(directory: pathlib.Path) -> Manifest:
    """An artifact's manifest. Raises `ArtifactError` when there is none, or one of another version."""
    path = directory / MANIFEST
    try:
        values = json.loads(path.read_text())
        version = values.pop("format_version")
        manifest = Manifest(**values)
    except FileNotFoundError as error:
        raise ArtifactError(f"{directory} has no {MANIFEST}: it is not an artifact of this project") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); export the checkpoint again") from error
    if version != FORMAT_VERSION:
        raise ArtifactError(f"{path} has format {version}, this code reads {FORMAT_VERSION}")
    return manifest


def write_list(parent: pathlib.Path, names: Sequence[str]) -> None:
    """Writes down the artifacts of a directory of several, so that one that is deleted whole is missed; a single one has its manifest."""
    if len(names) > 1:
        write_json(parent / LIST, {"artifacts": list(names)})


def read_list(parent: pathlib.Path) -> tuple[str, ...]:
    """The artifacts that were written into a directory; none where nothing says so. Raises `ArtifactError` when that cannot be read."""
    try:
        return tuple(map(str, json.loads((parent / LIST).read_text())["artifacts"]))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{parent / LIST} is damaged ({error}); export the checkpoint again") from error


def files_in(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """All files of an artifact but the manifest, by their path in it. Bytecode that a runtime left behind is no part of it."""
    found = (path for path in sorted(directory.rglob("*")) if path.is_file() and "__pycache__" not in path.parts)
    return {name: path for path in found if (name := path.relative_to(directory).as_posix()) != MANIFEST}


def damage(directory: pathlib.Path, manifest: Manifest) -> list[str]:
    """What differs between the files of an artifact and its manifest, a sentence each; empty when nothing does."""
    present = files_in(directory)
    problems = [f"{name} is missing" for name in sorted(manifest.files.keys() - present.keys())]
    problems += [f"{name} is not in the manifest" for name in sorted(present.keys() - manifest.files.keys())]
    for name in sorted(manifest.files.keys() & present.keys()):
        if digest(present[name]) != manifest.files[name].get("sha256"):
            problems.append(f"{name} has other content than when it was made")
    return problems


def digest(path: pathlib.Path) -> str:
    """SHA-256 of a file, read in pieces."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_AT_ONCE):
            sha.update(piece)
    return sha.hexdigest()
