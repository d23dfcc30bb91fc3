"""Label files: the question a directory of labels answers, its files of whole loss curves, and the labels of all of them.

    <directory>/question.json               what was asked for; a run with another question is refused
    <directory>/charts-00000.array_record   labels of the first records of `charts`, in their order; written whole by a rename
    <directory>/labels.json                 the question and how many images were left out; written last: the labels are complete

A label file is an ArrayRecord: first a header with the number of labels (a truncated file opens without an error), then one JSON
object a label. Which process wrote which file leaves no trace.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from array_record.python import array_record_module

from data_pipelines.records import write_json
from hypervl_jax.training.compression import RATIOS, ResolutionLabel

FORMAT_VERSION = 2
QUESTION, MANIFEST = "question.json", "labels.json"
SUFFIX = ".array_record"

_WRITER_OPTIONS = "group_size:1"
_READER_OPTIONS = "readahead_buffer_size:0"


class LabelError(ValueError):
    """Labels that cannot be made or read; the message says why and what to do."""


def claim(directory: pathlib.Path, question: Mapping[str, Any]) -> pathlib.Path:
    """Makes the directory, or checks that it was made for the same question."""
    path = directory / QUESTION
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_json(path, question)
        return directory
    before = read_question(path)
    changed = [key for key in {**before, **question} if before.get(key) != question.get(key)]
    if changed:
        raise LabelError(
            f"{directory} holds labels that differ in {', '.join(changed)}; write elsewhere, or remove it to label again"
        )
    return directory


def read_question(path: pathlib.Path) -> dict[str, Any]:
    """What a directory of labels answers. Raises `LabelError` when it cannot be read, or is of another version."""
    try:
        question = json.loads(path.read_text("utf-8"))
        version, files = question["format_version"], question["files"]
        plain = all(isinstance(file, str) and pathlib.Path(file).name == file for file in files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabelError(
            f"{path} cannot be read ({error}); run `python -m tools.label_resolutions` to its end"
        ) from error
    if version != FORMAT_VERSION or not plain:
        raise LabelError(f"{path} has format version {version}, this code reads {FORMAT_VERSION}; label again")
    return question


def write_labels(path: pathlib.Path, labels: Sequence[ResolutionLabel]) -> None:
    """Writes a label file; it appears whole under its name."""
    temporary = path.with_name(f"{path.name}.tmp")
    header = {"format_version": FORMAT_VERSION, "labels": len(labels)}
    with contextlib.closing(array_record_module.ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)) as writer:
        for values in (header, *map(dataclasses.asdict, labels)):
            writer.write(json.dumps(values).encode())
    os.replace(temporary, path)


def read_file(path: pathlib.Path) -> list[ResolutionLabel]:
    """The labels of one file. Raises `LabelError` when it is missing, damaged or of another version."""
    try:
        reader = array_record_module.ArrayRecordReader(str(path), options=_READER_OPTIONS)
        header, *rows = map(json.loads, reader.read_all()) if reader.num_records() else [{}]
        if (header.get("format_version"), header.get("labels")) != (FORMAT_VERSION, len(rows)):
            raise ValueError(f"its header is {header}, with {len(rows)} labels of version {FORMAT_VERSION} behind it")
        return [_label(row) for row in rows]
    except (RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
        raise LabelError(f"{path} cannot be read ({error}); remove it and run label_resolutions again") from error


def _label(row: Mapping[str, Any]) -> ResolutionLabel:
    columns = {name: tuple(row[name]) for name in ("losses", "tokens", "paraphrase_losses")}
    if len(columns["losses"]) != len(RATIOS) or len(columns["tokens"]) != len(RATIOS):
        raise ValueError(f"a label without {len(RATIOS)} losses and tokens")
    return ResolutionLabel(**{**row, **columns})


def read_labels(directory: str | os.PathLike[str]) -> tuple[list[ResolutionLabel], dict[str, Any]]:
    """All labels of a complete directory, and the question they answer with the images left out (`labels.json`).

    Raises `LabelError` when labelling was not finished, or files are missing, damaged or of another version.
    """
    directory = pathlib.Path(directory)
    question = read_question(directory / MANIFEST)
    return [found for file in question["files"] for found in read_file(directory / file)], question
