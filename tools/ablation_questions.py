"""The questions of the VRC's ablation: from our sources or from benchmark files, each with the loss curve of the model itself."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from typing import NamedTuple

from data_pipelines.records import Record, content_hash, write_source
from data_pipelines.sources import Source
from hypervl_jax.architecture import require
from hypervl_jax.evaluation.benchmark_files import read_task
from hypervl_jax.evaluation.benchmarks import HeldoutTask, Item, heldout_task
from hypervl_jax.evaluation.registry import benchmark, file_name
from hypervl_jax.evaluation.runs import names
from hypervl_jax.inference.assistant import Assistant
from hypervl_jax.text.conversation import Turn
from hypervl_jax.training.compression import ResolutionLabel
from tools.evaluate import read_items
from tools.label_resolutions import label, progress_line, single_image_records


class Asked(NamedTuple):
    """The questions, and the loss curve of each, in one order; `left_out` items have no single image or fit no row."""

    tasks: list[HeldoutTask]
    labels: list[ResolutionLabel]
    left_out: int

    @property
    def items(self) -> list[Item]:
        """The items of all tasks."""
        return [item for task in self.tasks for item in task.items]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each item's image."""
        return [(found.height, found.width) for found in self.labels]

    @property
    def task_names(self) -> list[str]:
        """The task of each item."""
        return [item.task for item in self.items]


def read_questions(options: argparse.Namespace, assistant: Assistant) -> tuple[pathlib.Path, dict[str, HeldoutTask]]:
    """Where the sources lie, and each task with the items that were asked for. Benchmark files become sources first."""
    root, output = pathlib.Path(options.data), pathlib.Path(options.output)
    chosen = names(options.tasks)
    require(bool(chosen), "give at least one of --tasks")
    files = [file for file in map(file_name, chosen) if (root / f"{file}.tsv").exists()]
    require(
        len(files) in (0, len(chosen)),
        f"{root} holds benchmark files of {', '.join(files)} only; ask for one kind of task",
    )
    if files:
        root, tasks = output / "records", {name: read_task(root, benchmark(name)) for name in files}
        return root, {name: _write_records(root, options.split, task, assistant) for name, task in tasks.items()}
    fingerprint = assistant.tokenizer.fingerprint
    items = {name: read_items(root, options.split, name, fingerprint) for name in chosen}
    return root, {name: heldout_task(name, found, assistant.tokenizer) for name, found in items.items()}


def _write_records(root: pathlib.Path, split: str, task: HeldoutTask, assistant: Assistant) -> HeldoutTask:
    """Writes a benchmark's questions with their first right answer as a source; the items get the records' hashes."""
    records = [
        Record(item.images, (*item.turns, Turn("assistant", item.answers[0])), task.name, task=task.name)
        for item in task.items
        if item.answers
    ]
    require(bool(records), f"{task.name} keeps its answers secret, so nothing can be scored; choose other --tasks")
    write_source(
        root / split / task.name,
        records,
        name=task.name,
        licence="as the benchmark's",
        description=f"{task.name} as the VRC's ablation read it.",
        tokenizer=assistant.tokenizer,
        tiling=assistant.config.tiling,
    )
    answered = [item for item in task.items if item.answers]
    pairs = zip(answered, records, strict=True)
    items = tuple(dataclasses.replace(item, identity=content_hash(record)) for item, record in pairs)
    return dataclasses.replace(task, items=items)


def ask(options: argparse.Namespace, assistant: Assistant) -> Asked:
    """The questions that are asked, with their loss curves from the model itself."""
    root, tasks = read_questions(options, assistant)
    with progress_line() as progress:
        run = label(
            options.checkpoint,
            root,
            pathlib.Path(options.output) / "labels",
            sources=list(tasks),
            split=options.split,
            encoder=options.encoder,
            limit=options.limit,
            step=options.step,
            progress=progress,
        )
    curves = {(found.source, found.content_hash): found for found in run.labels}
    kept, labels, asked = [], [], 0
    for name, task in tasks.items():
        source = Source(root / options.split / name, assistant.tokenizer.fingerprint)
        chosen = [task.items[record] for record in single_image_records(source, options.limit)]
        asked += len(chosen) if options.limit else len(task.items)
        members = tuple(item for item in chosen if (name, item.identity) in curves)
        require(bool(members), f"no item of {name} has one image that fits a row; choose other --tasks")
        kept.append(dataclasses.replace(task, items=members))
        labels += [curves[name, item.identity] for item in members]
    return Asked(kept, labels, asked - len(labels))
