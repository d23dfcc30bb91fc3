"""`python -m tools.compare_encoders`: what changes when the same pictures go through the other encoder.

record ─┬─► packed into rows like training data ─► both branches, the right answer given ─► KL, top-1, distances by sample
        └─► question ─► both branches answer by themselves ─► the same text or not
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32
from rich.console import Console
from rich.table import Table

from data_pipelines.packing import Budget, Sample, pack_row
from data_pipelines.sources import Source
from data_pipelines.transforms import fill_row
from experiments import storage
from hypervl_jax.architecture import BRANCHES, TilingConfig, require
from hypervl_jax.evaluation import failure_signs
from hypervl_jax.evaluation.analysis import percent
from hypervl_jax.evaluation.benchmarks import (
    BATCH_ROWS,
    IMAGE,
    Item,
    Measurement,
    ResultsFile,
    heldout_task,
)
from hypervl_jax.evaluation.consistency import ItemComparison, TaskComparison, compare_task, imbalance_warnings
from hypervl_jax.evaluation.consistency_page import build_page
from hypervl_jax.evaluation.runs import model_identity, names, parse_alphas, run_plan
from hypervl_jax.inference.assistant import Assistant, load_assistant
from hypervl_jax.models.hypervl import HyperVL
from hypervl_jax.models.qwen3 import head_weights
from hypervl_jax.training import losses
from hypervl_jax.training.batch import TEXT_POSITION, Batch, BatchShape, empty_batch
from hypervl_jax.training.checkpoint import checkpoint_home, read_description
from hypervl_jax.training.telemetry.records import write_json
from hypervl_jax.vision.anyres import alpha_to_milli
from tools.evaluate import EXPLAINED, read_items
from tools.label_files import LabelError
from tools.label_models import training_shape

RESULTS, SUMMARY, PAGE = "answers.jsonl", "comparison.json", "comparison.html"
USAGE_ERROR, RUN_ERROR, SUCCESS = 2, 1, 0

_WINDOW, _LOSS_CHUNK = 64, 512
"""Samples that packing chooses from, positions whose logits exist at one time."""

_DESCRIPTION = """\
Shows the same held-out pictures to both encoders. With the right answer given (teacher forcing), over its tokens: KL of the two
output distributions in both directions at T = 1, how often both find the same token likeliest, the cosine distance of the last hidden
states, and of the visual tokens. Without it: how often both generate the same answer. Means over items with 95 % intervals for each
task; the items with the largest KL are shown as pictures in DIR/comparison.html.

Warns "branch imbalance: outputs differ when switching encoders" where the share of same answers lies,
with its interval, below --least-agreement.
"""

_EPILOG = """\
example:
  python -m tools.compare_encoders --checkpoint runs/demo/stage3 --data runs/demo/data --tasks charts,documents --limit 200

exit status:
  0  compared    1  a file cannot be read or written    2  it cannot be compared as asked
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "python -m tools.compare_encoders",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a run's --workdir, or the checkpoints directory in it")
    add("--step", type=int, metavar="N", help="of the checkpoint (default: the newest)")
    add("--data", required=True, metavar="ROOT", help="holds SPLIT/TASK, sources with answers in their last turn")
    add("--split", default="heldout", help="(default: heldout)")
    add("--tasks", default="digits,documents,charts,scenes", metavar="LIST", help="sources (default: %(default)s)")
    add("--alpha", default="1.0", metavar="NUMBER", help="share of the area both encoders see (default: 1.0)")
    add("--limit", type=int, metavar="N", help="only the first N items of each task")
    add("--rows", type=int, default=8, metavar="N", help="packed rows a batch (default: %(default)s)")
    add(
        "--worst",
        type=int,
        default=6,
        metavar="N",
        help="items of each task that the page shows (default: %(default)s)",
    )
    least = failure_signs.LEAST_AGREEMENT
    add("--least-agreement", type=float, default=least, metavar="SHARE", help="warn below it (default: %(default)s)")
    add("--output", metavar="DIR", help="(default: comparison/ beside the checkpoints)")
    add("--json", action="store_true", help="print everything as one JSON object on the last line")
    return made


class Sums(NamedTuple):
    """Sums over each segment of each row; segment i is column i, column 0 is padding.

    `answer_tokens` and `visual_tokens` count what the others are summed over: the KLs and cross-entropies (nats), the agreement and
    the hidden states' distance over answer tokens, `visual_distance` over visual tokens.
    """

    answer_tokens: Float32[Array, "b n"]
    kl: Float32[Array, "b n"]
    reverse_kl: Float32[Array, "b n"]
    agreement: Float32[Array, "b n"]
    cross_entropy_base: Float32[Array, "b n"]
    cross_entropy_large: Float32[Array, "b n"]
    hidden_distance: Float32[Array, "b n"]
    visual_tokens: Float32[Array, "b n"]
    visual_distance: Float32[Array, "b n"]


def compare_rows(model: HyperVL, params: Mapping[str, Any], batch: Batch) -> Sums:
    """Both branches on the same packed rows, the right answers given.

    KL is KL(large ‖ base), what DCL minimises (`training.consistency`); `reverse_kl` is KL(base ‖ large).
    """
    visual = {
        branch: model.apply({"params": params}, batch.tiles, branch, method="encode_tiles") for branch in BRANCHES
    }
    hidden = {
        branch: model.apply({"params": params}, batch, visual[branch], method="hidden_from_visual")
        for branch in BRANCHES
    }
    terms = functools.partial(
        losses.token_terms, head=head_weights(params["decoder"]), targets=batch.targets, chunk=_LOSS_CHUNK
    )
    forward = terms(hidden["base"], teacher_hidden=hidden["large"])
    reverse = terms(hidden["large"], teacher_hidden=hidden["base"])
    answer, shown = batch.loss_weights > 0, batch.visual_index != TEXT_POSITION
    at = jnp.maximum(batch.visual_index, 0)[..., None]
    seen = [
        jnp.take_along_axis(tokens, at, axis=1) if tokens.shape[1] else hidden["base"] for tokens in visual.values()
    ]
    return Sums(
        answer_tokens=_by_segment(jnp.ones_like(forward.kl), answer, batch),
        kl=_by_segment(forward.kl, answer, batch),
        reverse_kl=_by_segment(reverse.kl, answer, batch),
        agreement=_by_segment(forward.agreement, answer, batch),
        cross_entropy_base=_by_segment(forward.cross_entropy, answer, batch),
        cross_entropy_large=_by_segment(reverse.cross_entropy, answer, batch),
        hidden_distance=_by_segment(cosine_distance(hidden["base"], hidden["large"]), answer, batch),
        visual_tokens=_by_segment(jnp.ones_like(forward.kl), shown, batch),
        visual_distance=_by_segment(cosine_distance(*seen), shown, batch),
    )


def _by_segment(values: Float[Array, "b l"], where: Bool[Array, "b l"], batch: Batch) -> Float32[Array, "b n"]:
    columns = batch.tokens.shape[1] + 1
    add = jax.vmap(lambda row, segments: jax.ops.segment_sum(row, segments, columns))
    return add(jnp.where(where, values, 0.0).astype(jnp.float32), batch.segments)


def cosine_distance(left: Float[Array, "b l d"], right: Float[Array, "b l d"]) -> Float32[Array, "b l"]:
    """1 minus the cosine of the angle between vectors; 0 for equal directions, 2 for opposite ones."""
    unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    return 1.0 - jnp.sum(unit(left.astype(jnp.float32)) * unit(right.astype(jnp.float32)), axis=-1)


class Comparer:
    """Compares the branches of an assistant's model on records; one program, compiled at the first batch.

    Args:
        assistant: holds both branches.
        shape: of a batch of packed rows.

    Raises:
        ConfigError: an image of the model's tile budget fits no row.
    """

    def __init__(self, assistant: Assistant, shape: BatchShape) -> None:
        self.tiling: TilingConfig = assistant.config.tiling
        shape.validate_with(self.tiling)
        self.shape, self.tokenizer, self.params = shape, assistant.tokenizer, assistant.params
        self._compare = jax.jit(functools.partial(compare_rows, HyperVL(assistant.config, assistant.runtime)))

    def compare(self, source: Source, records: int, milli: int) -> Iterator[tuple[int, dict[str, float]]]:
        """(record, its sums) of the first `records` records that can be read and fit a row; α is `milli` thousandths."""
        budget, pending = Budget(self.shape.length, self.shape.tiles), []
        samples = (Sample(0, 0, record, milli, *source.cost(record, milli, self.tiling)) for record in range(records))
        fitting = filter(budget.holds, samples)
        rows = iter(lambda: pack_row(pending, lambda: next(fitting, None), budget, _WINDOW), [])
        while chunk := list(itertools.islice(rows, self.shape.rows)):
            yield from self._batch(source, chunk)

    def _batch(self, source: Source, rows: Sequence[Sequence[Sample]]) -> Iterator[tuple[int, dict[str, float]]]:
        batch = empty_batch(self.shape, self.tiling.tile_size)
        for number, samples in enumerate(rows):
            # A sample that cannot be read leaves padding behind: it has no answer token below.
            fill_row(Batch(*(field[number] for field in batch)), samples, [source], self.tokenizer, self.tiling)
        sums = jax.device_get(self._compare(self.params, batch))._asdict()
        for number, samples in enumerate(rows):
            for segment, sample in enumerate(samples, start=1):
                found = {name: float(values[number, segment]) for name, values in sums.items()}
                if found["answer_tokens"] > 0:
                    yield sample.record, found


def item_comparison(item: Item, sums: Mapping[str, float], said: Mapping[str, str]) -> ItemComparison:
    """One item's means over its tokens, and what each branch (`said`) answered by itself."""
    tokens, shown = sums["answer_tokens"], sums["visual_tokens"]
    mean = lambda name: sums[name] / tokens
    return ItemComparison(
        identity=item.identity,
        task=item.task,
        answer_tokens=int(tokens),
        # Rounding can take a KL or a distance of nearly equal things just below 0.
        kl=max(0.0, mean("kl")),
        reverse_kl=max(0.0, mean("reverse_kl")),
        agreement=mean("agreement"),
        cross_entropy={branch: mean(f"cross_entropy_{branch}") for branch in BRANCHES},
        hidden_distance=max(0.0, mean("hidden_distance")),
        visual_distance=max(0.0, sums["visual_distance"] / shown) if shown else float("nan"),
        answers=dict(said),
    )


def run(options: argparse.Namespace) -> tuple[list[TaskComparison], dict[str, Item], TilingConfig]:
    """All comparisons, the items by identity, and the model's tiling.

    Raises:
        ConfigError, CheckpointError, TokenizerError, RecordError, ResultsError, UndecodableImage, LabelError: as their rooms say.
    """
    (alpha,) = parse_alphas(options.alpha) or (None,)
    require(
        isinstance(alpha, float), f"--alpha {options.alpha!r} must be one number: both encoders see the same pixels"
    )
    require(options.rows > 0 and options.worst >= 0, "--rows must be positive and --worst 0 or more")
    require(options.limit is None or options.limit > 0, f"--limit {options.limit} must be positive")
    require(bool(names(options.tasks)), "give at least one of --tasks")
    home = checkpoint_home(options.checkpoint)
    assistant = load_assistant(home, options.step)
    shape = dataclasses.replace(training_shape(read_description(home)), rows=options.rows)
    comparer, fingerprint = Comparer(assistant, shape), assistant.tokenizer.fingerprint
    items = {
        task: read_items(options.data, options.split, task, fingerprint, options.limit) for task in names(options.tasks)
    }
    said = generate(options, assistant, items, alpha)
    compared = []
    for task, asked in items.items():
        source = Source(pathlib.Path(options.data) / options.split / task, fingerprint)
        sums = dict(comparer.compare(source, len(asked), alpha_to_milli(alpha)))
        rows = [
            item_comparison(asked[record], found, said[asked[record].identity])
            for record, found in sorted(sums.items())
        ]
        require(bool(rows), f"no item of {task} fits a row of {shape.length} tokens and {shape.tiles} tiles")
        compared.append(compare_task(task, rows, left_out=len(asked) - len(rows)))
    return compared, {item.identity: item for asked in items.values() for item in asked}, assistant.config.tiling


def generate(
    options: argparse.Namespace, assistant: Assistant, items: Mapping[str, Sequence[Item]], alpha: float
) -> dict[str, dict[str, str]]:
    """What each branch answers to each item, by identity; answers that are there already are not made again."""
    tasks = [heldout_task(task, asked, assistant.tokenizer) for task, asked in items.items()]
    plan = [Measurement(branch, IMAGE, alpha) for branch in BRANCHES]
    subject = {**identity(options), "tokenizer": assistant.tokenizer.fingerprint}
    with ResultsFile(output_directory(options) / RESULTS, subject) as results:
        rows = run_plan(plan, tasks, assistant, results, BATCH_ROWS)
    said: dict[str, dict[str, str]] = {}
    for row in rows:
        said.setdefault(row.identity, {})[row.encoder] = row.prediction
    return said


def identity(options: argparse.Namespace) -> dict[str, Any]:
    """Names the model; items are told apart by their content."""
    return model_identity(argparse.Namespace(checkpoint=options.checkpoint, step=options.step, compressor=None))


def output_directory(options: argparse.Namespace) -> pathlib.Path:
    """Where the answers, the numbers and the page go."""
    return pathlib.Path(options.output or checkpoint_home(options.checkpoint).parent / "comparison")


def to_table(rows: Sequence[TaskComparison]) -> Table:
    """The comparison for a terminal."""
    table = Table(
        caption="means over items [95 % interval]; KL in nats, distances are 1 - cosine", title_justify="left"
    )
    for heading in ("task", "items", "KL(large ‖ base)", "same top token %", "same answer %", "hidden", "visual"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for row in rows:
        numbers = (f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]" for value in (row.kl, row.hidden_distance))
        kl, hidden = numbers
        visual = f"{row.visual_distance.mean:.3f}" if row.visual_distance else ""
        table.add_row(
            row.task, str(len(row.items)), kl, percent(row.agreement), percent(row.same_answer), hidden, visual
        )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parser().parse_args(arguments)
    try:
        with storage.explained():
            rows, items, tiling = run(options)
            warnings = imbalance_warnings(rows, options.least_agreement)
            values = {"tasks": [row.to_json() for row in rows], "warnings": warnings}
            home = output_directory(options)
            write_json(home / SUMMARY, values)
            (home / PAGE).write_text(build_page(rows, items, tiling, warnings, options.worst), "utf-8")
    except (*EXPLAINED, LabelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return RUN_ERROR
    console = Console(stderr=options.json)
    console.print(to_table(rows))
    console.print(f"page: {(home / PAGE).absolute()}", highlight=False, soft_wrap=True)
    failure_signs.tell(warnings)
    if options.json:
        print(json.dumps(values))
    return SUCCESS


if __name__ == "__main__":
    sys.exit(main())
