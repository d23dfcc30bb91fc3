"""`python -m tools.evaluate_torch DIR --data ROOT`: an exported directory answers held-out questions in PyTorch and is scored as JAX is.

The items, metrics and answer lengths are those of `tools.evaluate`. Pictures go in cut as in training (`ours`, the code that lies in the
directory), or as the processor of `transformers` cuts them by itself (`transformers`): it stretches a picture onto a grid of
tiles, and leaves small ones at sizes that the tower was not trained on. The difference is what that costs.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from data_pipelines.records import RecordError
from experiments import storage
from hypervl_jax.architecture import ConfigError, require
from hypervl_jax.evaluation.analysis import percent
from hypervl_jax.evaluation.benchmarks import Item, heldout_task
from hypervl_jax.evaluation.metrics import score
from hypervl_jax.evaluation.statistics import mean_interval, paired_difference
from hypervl_jax.text.conversation import IMAGE_SLOT, Turn
from hypervl_jax.text.tokenizer import TokenizerError, load_tokenizer
from hypervl_jax.vision.decoding import UndecodableImage, decode_image
from tools.artifacts import ArtifactError, read_manifest
from tools.evaluate import read_items
from tools.label_resolutions import ReportProgress, progress_line
from tools.torch_parity import shipped_module

FAILURE, SUCCESS = 1, 0
OURS, THEIRS = "ours", "transformers"

_EPILOG = """\
example:
  python -m tools.evaluate_torch exports/base --data runs/demo/data --limit 200 --tiling ours,transformers

exit status:
  0  scored    1  the directory or the data cannot be read    2  wrong usage
"""

Prepare = Callable[[Item], dict[str, torch.Tensor]]


def messages_of(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as messages; each image slot becomes a content part."""
    return [{"role": turn.role, "content": parts_of(turn)} for turn in turns]


def parts_of(turn: Turn) -> list[dict[str, str]]:
    """A turn's texts with its images between them."""
    first, *others = turn.text.split(IMAGE_SLOT) if turn.role == "user" else [turn.text]
    parts = [{"type": "text", "text": first}]
    for text in others:
        parts += [{"type": "image"}, {"type": "text", "text": text}]
    return parts


def prepare_ours(directory: pathlib.Path) -> Prepare:
    """Inputs by the code that lies in the artifact."""
    inputs = shipped_module(directory).HyperVLInputs.from_pretrained(directory)
    return lambda item: inputs(messages_of(item.turns), [decode_image(image) for image in item.images])


def prepare_theirs(directory: pathlib.Path) -> Prepare:
    """Inputs by the artifact's processor alone. Raises `ArtifactError` where it cannot be loaded."""
    try:
        processor = transformers.AutoProcessor.from_pretrained(directory)
    except ImportError as error:
        raise ArtifactError("the processor of transformers needs torchvision, which is not installed") from error

    def prepare(item: Item) -> dict[str, torch.Tensor]:
        text = processor.apply_chat_template(messages_of(item.turns), tokenize=False, add_generation_prompt=True)
        images = [[decode_image(image) for image in item.images]] if item.images else None
        return processor(images=images, text=[text], use_image_special_tokens=False, return_tensors="pt")

    return prepare


PREPARE = {OURS: prepare_ours, THEIRS: prepare_theirs}


def answer(model: torch.nn.Module, inputs: dict[str, torch.Tensor], new_tokens: int) -> list[int]:
    """Greedy ids up to the first stop token."""
    generated = model.generate(**inputs, max_new_tokens=new_tokens)[0, inputs["input_ids"].shape[1] :].tolist()
    stops = set(model.generation_config.eos_token_id)
    return generated[: next((place for place, token in enumerate(generated) if token in stops), len(generated))]


def evaluate(
    directory: pathlib.Path,
    data: str,
    tasks: Sequence[str],
    tilings: Sequence[str],
    *,
    split: str = "heldout",
    limit: int | None = None,
    progress: ReportProgress = lambda what, done, total: None,
) -> dict[str, dict[str, list[float]]]:
    """Scores of every item by task and tiling.

    Raises:
        ArtifactError, RecordError, TokenizerError, UndecodableImage, ConfigError: the directory or the data cannot be read.
    """
    fingerprint = read_manifest(directory).source["tokenizer"]
    tokenizer = load_tokenizer(directory)
    found = [heldout_task(task, read_items(data, split, task, fingerprint, limit), tokenizer) for task in tasks]
    model = transformers.AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    total, done = len(tilings) * sum(len(task.items) for task in found), 0
    scores: dict[str, dict[str, list[float]]] = {task.name: {tiling: [] for tiling in tilings} for task in found}
    for tiling in tilings:
        prepare = PREPARE[tiling](directory)
        for task in found:
            for item in task.items:
                said = tokenizer.decode(answer(model, prepare(item), task.max_new_tokens))
                scores[task.name][tiling].append(score(task.metric, said, item.answers))
                done += 1
                progress(f"{task.name} · {tiling}", done, total)
    return scores


def table_of(scores: dict[str, dict[str, list[float]]], tilings: Sequence[str]) -> Table:
    """Scores with intervals, a line for each task, and the paired difference of two tilings."""
    table = Table(caption="score in % [95 % interval]", title_justify="left")
    headings = ["task", "items", *tilings, *(["difference"] if len(tilings) == 2 else [])]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "task" else "right")
    together = {tiling: [value for task in scores.values() for value in task[tiling]] for tiling in tilings}
    for name, row in {**scores, "all": together}.items():
        cells = [percent(mean_interval(row[tiling])) for tiling in tilings]
        if len(tilings) == 2:
            cells.append(percent(paired_difference(row[tilings[1]], row[tilings[0]]), signed=True))
        table.add_row(name, str(len(row[tilings[0]])), *cells)
    return table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options. Ends the program with status 2 on anything else."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.evaluate_torch",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("directory", metavar="DIR", type=pathlib.Path, help="what tools.to_torch wrote (format lfm2)")
    add("--data", required=True, metavar="ROOT", help="holds SPLIT/TASK, as for tools.evaluate")
    add("--split", default="heldout", help="default: %(default)s")
    add("--tasks", default="digits,documents,charts,scenes", metavar="LIST", help="default: %(default)s")
    add("--tiling", default=OURS, metavar="LIST", help=f"of {OURS},{THEIRS} (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="only the first N items of each task")
    add("--json", action="store_true", help="print the mean scores as one JSON object")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parse(arguments)
    tasks, tilings = options.tasks.split(","), options.tiling.split(",")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        for tiling in tilings:
            require(tiling in PREPARE, f"--tiling {tiling!r} is not one of {', '.join(PREPARE)}")
        with storage.explained(), torch.no_grad(), progress_line() as progress:
            scores = evaluate(
                options.directory,
                options.data,
                tasks,
                tilings,
                split=options.split,
                limit=options.limit,
                progress=progress,
            )
    except (ArtifactError, ConfigError, RecordError, TokenizerError, UndecodableImage, storage.StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILURE
    if options.json:
        means = {
            task: {tiling: mean_interval(values)._asdict() for tiling, values in row.items()}
            for task, row in scores.items()
        }
        print(json.dumps(means))
    else:
        Console().print(table_of(scores, tilings))
    return SUCCESS


if __name__ == "__main__":
    sys.exit(main())
