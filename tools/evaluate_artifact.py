"""`python -m tools.evaluate_artifact DIR … --data ROOT`: exported artifacts answer held-out questions in their own runtimes, scored as JAX is.

    --checkpoint (JAX) ─┐
    torch, TFLite, …  ──┴─► the same items, greedy, α = 1 ─► score of each, and its paired difference to the first

Items, metrics and answer lengths are those of `tools.evaluate`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from data_pipelines.records import RecordError
from experiments import storage
from hypervl_jax.architecture import BRANCHES, ConfigError, require
from hypervl_jax.evaluation.analysis import percent
from hypervl_jax.evaluation.benchmarks import Item, heldout_task
from hypervl_jax.evaluation.metrics import score
from hypervl_jax.evaluation.statistics import Estimate, mean_interval, paired_difference
from hypervl_jax.inference.assistant import Options, Request, load_assistant
from hypervl_jax.text.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from hypervl_jax.training.checkpoint import CheckpointError, checkpoint_home, find_step, read_description
from hypervl_jax.vision.decoding import UndecodableImage, decode_image
from tools import edge_runtime
from tools.artifacts import ArtifactError, read_manifest, source_of
from tools.evaluate import read_items
from tools.golden import RUNTIME
from tools.label_resolutions import ReportProgress, progress_line
from tools.qnn_chips import EXTRA
from tools.qnn_chips import KIND as QNN

FAILURE, SUCCESS = 1, 0
TORCH = "torch"
TILINGS = ("ours", "transformers")
ALL = "all"

_EPILOG = """\
examples:
  python -m tools.evaluate_artifact exports/base --data runs/demo/data --limit 200 --tiling ours,transformers
  python -m tools.evaluate_artifact exports/tflite/float32 exports/tflite/int8 exports/tflite/int4 --checkpoint runs/demo/stage3 \\
      --data runs/demo/data --encoder large

exit status:
  0  scored    1  an artifact or the data cannot be read    2  wrong usage
"""

Answer = Callable[[Item, int], str]
"""The text that a system says to an item, of so many tokens at most."""

Scores = dict[str, dict[str, list[float]]]
"""Every item's score, by task and system, in the same order."""


class System(NamedTuple):
    """Something that answers; it is opened when its turn comes. `source` is what it was made from (`artifacts.source_of`)."""

    name: str
    source: Mapping[str, Any]
    tokenizer: Tokenizer
    open: Callable[[], Answer]


def of_checkpoint(checkpoint: str, branch: str) -> System:
    """The checkpoint itself, in JAX and float32."""
    home = checkpoint_home(checkpoint)
    step = find_step(home, None)
    assistant = load_assistant(home, step, branches=(branch,), runtime=RUNTIME)

    def answer(item: Item, new_tokens: int) -> str:
        options = Options(branch, max_new_tokens=new_tokens)
        return assistant.answer([Request(item.turns, item.images)], options)[0].text

    return System("jax", source_of(home, step, read_description(home)), assistant.tokenizer, lambda: answer)


def systems_of(directory: pathlib.Path, branch: str, tilings: Sequence[str]) -> list[System]:
    """What an artifact answers as: a torch directory once for each tiling. Raises `ArtifactError` for kinds that cannot."""
    manifest = read_manifest(directory)
    kind, source = manifest.kind, manifest.source
    if kind == TORCH:
        tokenizer = load_tokenizer(directory)
        name = lambda tiling: directory.name if tiling == TILINGS[0] else f"{directory.name}, tiles of {tiling}"
        opened = {each: lambda each=each: _torch(directory, each) for each in tilings}
        return [System(name(each), source, tokenizer, opened[each]) for each in tilings]
    if kind in (edge_runtime.KIND, QNN):
        tokenizer = load_tokenizer(directory / edge_runtime.TOKENIZER)
        return [System(f"{kind} {directory.name}", source, tokenizer, lambda: _edge(directory, kind, branch))]
    raise ArtifactError(f"{directory} is an artifact for {kind}, which cannot be asked questions on this machine")


def _torch(directory: pathlib.Path, tiling: str) -> Answer:
    try:
        from tools import torch_answers
    except ImportError as error:
        raise ArtifactError(f"{directory} needs PyTorch and transformers ({error})") from error
    return torch_answers.open_answers(directory, tiling)


def _edge(directory: pathlib.Path, kind: str, branch: str) -> Answer:
    """TFLite by ai-edge-litert; QNN on the simulator of onnxruntime-qnn."""
    model = edge_runtime.open_model(directory) if kind == edge_runtime.KIND else _open_qnn(directory)

    def answer(item: Item, new_tokens: int) -> str:
        images = [decode_image(image) for image in item.images]
        return model.answer(item.turns, images, branch, 1.0, new_tokens)[0]

    return answer


def _open_qnn(directory: pathlib.Path) -> edge_runtime.EdgeModel:
    try:
        from tools import qnn_artifact
    except ImportError as error:
        raise ArtifactError(EXTRA) from error
    return qnn_artifact.open_model(directory)


def evaluate(
    systems: Sequence[System],
    data: str,
    tasks: Sequence[str],
    *,
    split: str = "heldout",
    limit: int | None = None,
    progress: ReportProgress = lambda what, done, total: None,
) -> Scores:
    """Scores of every item.

    Raises:
        ArtifactError, RecordError, TokenizerError, UndecodableImage, ConfigError: an artifact or the data cannot be read.
    """
    first = systems[0]
    for system in systems:
        same = all(system.source[key] == first.source[key] for key in ("description_sha256", "step"))
        require(same, f"{system.name} and {first.name} are not of one checkpoint: only what is can be compared")
    items = lambda task: read_items(data, split, task, first.source["tokenizer"], limit)
    found = [heldout_task(task, items(task), first.tokenizer) for task in tasks]
    total, done = len(systems) * sum(len(task.items) for task in found), 0
    scores: Scores = {task.name: {system.name: [] for system in systems} for task in found}
    for system in systems:
        answer = system.open()
        for task in found:
            for item in task.items:
                said = answer(item, task.max_new_tokens)
                scores[task.name][system.name].append(score(item.metric or task.metric, said, item.answers))
                done += 1
                progress(f"{task.name} · {system.name}", done, total)
    return scores


def summary(scores: Scores) -> dict[str, dict[str, dict[str, Any]]]:
    """Means with intervals by task and system, `ALL` items together last; "difference" is that to the first system."""
    names = list(next(iter(scores.values())))
    together = {name: [value for task in scores.values() for value in task[name]] for name in names}
    return {task: _row(row, names) for task, row in {**scores, ALL: together}.items()}


def _row(row: Mapping[str, list[float]], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        found[name] = {"items": len(row[name]), "score": mean_interval(row[name])._asdict()}
        if name != names[0]:
            found[name]["difference"] = paired_difference(row[name], row[names[0]])._asdict()
    return found


def table_of(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """A summary as a table, a line for each task and system."""
    first = next(iter(next(iter(found.values()))))
    table = Table(caption=f"percent [95 % interval]; differences to {first}, item by item", title_justify="left")
    for heading in ("task", "items", "model", "score", "difference"):
        table.add_column(heading, justify="left" if heading in ("task", "model") else "right", no_wrap=True)
    for task, row in found.items():
        for name, cell in row.items():
            difference = percent(Estimate(**cell["difference"]), signed=True) if "difference" in cell else ""
            shown = (task, str(cell["items"])) if name == first else ("", "")
            table.add_row(*shown, name, percent(Estimate(**cell["score"])), difference)
    return table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options. Ends the program with status 2 on anything else."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.evaluate_artifact",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "directories",
        metavar="DIR",
        nargs="+",
        type=pathlib.Path,
        help="what to_torch, export_tflite or export_qnn wrote",
    )
    add("--data", required=True, metavar="ROOT", help="holds SPLIT/TASK, as for tools.evaluate")
    add("--split", default="heldout", help="default: %(default)s")
    add("--tasks", default="digits,documents,charts,scenes", metavar="LIST", help="default: %(default)s")
    add(
        "--checkpoint", metavar="DIR", help="a run's workdir: JAX answers too, and is what the others are compared with"
    )
    add("--encoder", choices=BRANCHES, default=BRANCHES[0], help="of JAX and of edge artifacts (default: %(default)s)")
    add("--tiling", default=TILINGS[0], metavar="LIST", help=f"of {','.join(TILINGS)}, in torch (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="only the first N items of each task")
    add("--json", action="store_true", help="print the mean scores as one JSON object")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parse(arguments)
    tasks, tilings = options.tasks.split(","), options.tiling.split(",")
    try:
        for tiling in tilings:
            require(tiling in TILINGS, f"--tiling {tiling!r} is not one of {', '.join(TILINGS)}")
        with storage.explained(), progress_line() as progress:
            systems = [of_checkpoint(options.checkpoint, options.encoder)] if options.checkpoint else []
            systems += [one for each in options.directories for one in systems_of(each, options.encoder, tilings)]
            scores = evaluate(systems, options.data, tasks, split=options.split, limit=options.limit, progress=progress)
    except (
        ArtifactError,
        CheckpointError,
        ConfigError,
        RecordError,
        TokenizerError,
        UndecodableImage,
        storage.StorageError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILURE
    if options.json:
        print(json.dumps(summary(scores)))
    else:
        Console().print(table_of(summary(scores)))
    return SUCCESS


if __name__ == "__main__":
    sys.exit(main())
