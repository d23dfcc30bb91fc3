"""`python -m tools.ablate_compressor`: what the compressor (VRC) saves and costs, against every simpler way to choose α.

    held-out questions ─► loss curves (labels) ─► oracle α*          ┐
    images ─► VRC at each ε, hand rules, one α for all ──────────────┴► answers by generation ─► tokens, score, latency

<output>/labels/           loss curves of the held-out images, as `tools.label_resolutions` writes them
<output>/records/          benchmark files as sources (only where --data holds NAME.tsv)
<output>/results.jsonl     every answer; a killed run goes on from here
<output>/ablation.json     all figures; ablation.md says them in tables; pareto.png and adaptivity.png
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float64
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments import storage
from hypervl_jax.architecture import BRANCHES, require
from hypervl_jax.evaluation import compression_study as study
from hypervl_jax.evaluation import failure_signs, study_plots
from hypervl_jax.evaluation.benchmark_files import BenchmarkFileError
from hypervl_jax.evaluation.benchmarks import (
    BATCH_ROWS,
    BLANK,
    IMAGE,
    Item,
    ItemResult,
    Measurement,
    ResultsFile,
    evaluate,
)
from hypervl_jax.evaluation.compression_study import Way
from hypervl_jax.evaluation.runs import RESULTS, model_identity, names
from hypervl_jax.evaluation.study_text import ablation_page
from hypervl_jax.inference.assistant import AUTO, Assistant, Options, Request, load_assistant
from hypervl_jax.inference.compression import VIEWS
from hypervl_jax.inference.generate import COMPILATION
from hypervl_jax.inference.latency import COMPRESSOR_STEP
from hypervl_jax.models.compressor import forward_flops
from hypervl_jax.models.compressor_io import DESCRIPTION, SavedCompressor, load_compressor, predict_log_areas
from hypervl_jax.training.checkpoint import checkpoint_home
from hypervl_jax.training.compression import (
    DEFAULT_FLOOR,
    RATIOS,
    at_alpha,
    loss_curves,
    optimal_ratio,
    relative_increase,
)
from hypervl_jax.training.telemetry.records import write_json
from hypervl_jax.vision.decoding import decode_image
from hypervl_jax.vision.density import edge_density, entropy
from hypervl_jax.vision.resolution import MAX_ALPHA, alpha_from_prediction, make_proxy
from tools.ablation_questions import Asked, ask
from tools.evaluate import EXPLAINED
from tools.label_files import LabelError

SUMMARY, PAGE = "ablation.json", "ablation.md"
SPLIT = "heldout"
USAGE_ERROR, RUN_ERROR, SUCCESS = 2, 1, 0

UNSURE_SPREAD = 0.5
"""Default of --unsure: views of a picture whose predicted areas differ by more than a factor e^0.5 = 1.65."""

_TIMED_ITEMS = 24
"""Items that are answered one by one, twice, for latency."""

_DESCRIPTION = """\
Answers the same held-out questions with every way to choose α and compares them: one α for all images, the VRC, the VRC where unsure
pictures stay whole, the oracle α* of each image's own loss curve, and two hand rules (entropy, edge density). Uniform scaling and the
rules get the same number of visual tokens as the VRC, or a little more. Differences are paired and have 95 % bootstrap intervals.

--data ROOT holds ROOT/SPLIT/TASK (our sources) or TASK.tsv (benchmark files in VLMEvalKit's format). Only questions on one image count.

Warns "over-compression" where the score falls on the quarter of the images with the most edges (dense small text), and "compressor
overhead" where the VRC takes as long as it saves.
"""

_EPILOG = """\
examples:
  python -m tools.ablate_compressor --checkpoint runs/demo/stage3 --compressor runs/demo/compressor --data runs/demo/data
  python -m experiments.sweep --config tiny --sweep vrc_epsilon --on local --labels DIR --data DIR --checkpoint DIR
  python -m tools.ablate_compressor --checkpoint runs/stage3 --compressor runs/sweeps/stage3/vrc_epsilon --data benchmarks \\
      --tasks ChartQA_TEST,DocVQA_VAL,OCRBench --epsilon 0.01,0.05,0.1

exit status:
  0  compared    1  a file cannot be read or written    2  it cannot be compared as asked
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "python -m tools.ablate_compressor",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a run's --workdir, or the checkpoints directory in it")
    add("--step", type=int, metavar="N", help="of the checkpoint (default: the newest)")
    add(
        "--compressor",
        required=True,
        action="append",
        metavar="DIR",
        help="what tools.train_compressor wrote, or a directory that holds several; may be repeated",
    )
    add("--epsilon", metavar="LIST", help="only compressors that were trained at these ε (default: all)")
    add("--data", required=True, metavar="ROOT", help="holds SPLIT/TASK or TASK.tsv of every task")
    add("--split", default=SPLIT, help=f"(default: {SPLIT})")
    add("--tasks", default="digits,documents,charts,scenes", metavar="LIST", help="(default: %(default)s)")
    add("--encoder", default="base", choices=BRANCHES, help="(default: base)")
    add("--floor", type=float, default=DEFAULT_FLOOR, help="of α* (default: %(default)s)")
    add("--unsure", type=float, default=UNSURE_SPREAD, metavar="NATS", help="spread above which α is 1 (default: 0.5)")
    add("--limit", type=int, default=0, metavar="N", help="items of each task, spread evenly over it (default: all)")
    add("--rows", type=int, default=BATCH_ROWS, metavar="N", help="items a batch (default: %(default)s)")
    add("--output", required=True, metavar="DIR", help="of answers, figures and plots")
    add("--json", action="store_true", help="print the figures as one JSON object on the last line")
    return made


def find_compressors(directories: Sequence[str], epsilons: str | None) -> dict[str, SavedCompressor]:
    """Compressors by the names of their directories, sorted by ε.

    Raises `ConfigError` when one has no ε, two have one name, or none was trained at an ε that was asked for.
    """
    homes = [pathlib.Path(directory) for directory in directories]
    found = [
        path
        for home in homes
        for path in (
            [home] if (home / DESCRIPTION).exists() else sorted(each.parent for each in home.glob(f"*/{DESCRIPTION}"))
        )
    ] or homes
    require(
        len({path.name for path in found}) == len(found), "two compressors have the same directory name; rename one"
    )
    saved = {path.name: load_compressor(path) for path in found}
    for name, each in saved.items():
        require("epsilon" in each.details, f"compressor {name} does not say at which ε it was trained; train it again")
    wanted = {float(text) for text in names(epsilons or "")} or {each.details["epsilon"] for each in saved.values()}
    missing = wanted - {each.details["epsilon"] for each in saved.values()}
    require(not missing, f"no compressor was trained at ε {', '.join(map(str, sorted(missing)))}")
    kept = {name: each for name, each in saved.items() if each.details["epsilon"] in wanted}
    return dict(sorted(kept.items(), key=lambda pair: (pair[1].details["epsilon"], pair[0])))


class Seen(NamedTuple):
    """What ways to choose α know of the images: the hand rules' figures, and each compressor's log areas of three views.

    `areas` are [compressors: n, 3]: as it is, mirrored, upside down.
    """

    entropy: Float64[np.ndarray, "n"]
    edges: Float64[np.ndarray, "n"]
    areas: Mapping[str, Float[np.ndarray, "n 3"]]


def look(asked: Asked, compressors: Mapping[str, SavedCompressor]) -> Seen:
    """Decodes every image once."""
    sizes = sorted({saved.config.proxy_size for saved in compressors.values()})
    proxies = {size: np.zeros((len(asked.labels), 3, size, size, 3), np.uint8) for size in sizes}
    detail = np.zeros((len(asked.labels), 2))
    for number, item in enumerate(asked.items):
        rgb = decode_image(item.images[0])
        detail[number] = entropy(rgb), edge_density(rgb)
        for size, made in proxies.items():
            made[number] = [make_proxy(view(rgb), size) for view in VIEWS]
    predict = lambda saved: np.stack(
        [predict_log_areas(saved.config, saved.params, proxies[saved.config.proxy_size][:, view]) for view in range(3)],
        axis=1,
    )
    return Seen(detail[:, 0], detail[:, 1], {name: predict(saved) for name, saved in compressors.items()})


def vrc_alphas(saved: SavedCompressor, areas: Float[np.ndarray, "n 3"], asked: Asked) -> Float64[np.ndarray, "n"]:
    """What `--alpha auto` gives each image."""
    sides = np.array([max(size) for size in asked.sizes], np.float32)
    return np.asarray(alpha_from_prediction(areas[:, 0], sides, saved.config.proxy_size), np.float64)


class Measurer:
    """Answers all questions with given α's; what the results file holds is not answered again."""

    def __init__(
        self, assistant: Assistant, asked: Asked, results: ResultsFile, encoder: str, rows: int, progress: Progress
    ) -> None:
        self._assistant, self._asked, self._results, self._encoder = assistant, asked, results, encoder
        self._rows, self._progress = rows, progress
        self._line = progress.add_task("", total=None)

    def measure(
        self, name: str, kind: str, compressor: str, alphas: Float[np.ndarray, "n"], condition: str = IMAGE
    ) -> Way:
        """All items at their α. Equal names must mean equal α's, which the results' subject sees to."""
        given = {item.identity: float(alpha) for item, alpha in zip(self._asked.items, alphas, strict=True)}
        measurement = Measurement(self._encoder, condition, name)
        self._progress.update(self._line, description=name, total=len(given), completed=0)
        advance = lambda items: self._progress.update(self._line, advance=items)
        rows: list[ItemResult] = []
        for task in self._asked.tasks:
            rows += evaluate(self._assistant, task, measurement, self._results, advance, self._rows, given).items
        column = lambda field, kind: np.array([getattr(row, field) for row in rows], kind)
        tokens, tiles = column("visual_tokens", np.int64), column("tiles", np.int64)
        return Way(name, kind, compressor, np.asarray(alphas, np.float64), column("score", np.float64), tokens, tiles)

    def uniform(self, alpha: float, condition: str = IMAGE) -> Way:
        """One α for all."""
        return self.measure(f"uniform {alpha:g}", study.UNIFORM, "", np.full(len(self._asked.labels), alpha), condition)


def oracle(grid: Sequence[Way], name: str, asked: Asked, epsilon: float, floor: float) -> Way:
    """Each item at its α*, from the answers of the uniform ways at `RATIOS`."""
    alphas = optimal_ratio(loss_curves(asked.labels), epsilon, floor)
    places, items = np.searchsorted(RATIOS, alphas), np.arange(len(alphas))
    pick = lambda field: np.stack([getattr(way, field) for way in grid])[places, items]
    return Way(f"oracle of {name}", study.ORACLE, name, alphas, pick("scores"), pick("tokens"), pick("tiles"))


def milliseconds(assistant: Assistant, items: Sequence[Item], options: Options) -> dict[str, float]:
    """Mean milliseconds of each step of an answer, one at a time; every program has run before time is taken."""
    chosen = [items[place * len(items) // _TIMED_ITEMS] for place in range(min(_TIMED_ITEMS, len(items)))]
    requests = [Request(item.turns, item.images) for item in chosen]
    for _ in range(2):
        answers = assistant.answer(requests, options, rows=1)
    steps = {step: None for answer in answers for step in answer.milliseconds if step != COMPILATION}
    return {step: float(np.mean([answer.milliseconds.get(step, 0.0) for answer in answers])) for step in steps}


class Ablation:
    """All measurements of one model on one set of questions."""

    def __init__(self, options: argparse.Namespace, assistant: Assistant, asked: Asked, measurer: Measurer) -> None:
        self.options, self.assistant, self.asked, self.measurer = options, assistant, asked, measurer
        self.tiling, self.items = assistant.config.tiling, study.Resampling(asked.task_names)
        self.grid = [measurer.uniform(alpha) for alpha in RATIOS]
        self.full, self.blank = self.grid[-1], measurer.uniform(MAX_ALPHA, BLANK)
        self.increases = relative_increase(loss_curves(asked.labels), options.floor)

    def curve(self) -> list[dict[str, Any]]:
        """Uniform scaling at `RATIOS`."""
        return [
            study.compare(way, self.full, [], self.items).to_json() | {"alpha": float(way.alphas[0])}
            for way in self.grid
        ]

    def compressor(self, name: str, saved: SavedCompressor, seen: Seen) -> dict[str, Any]:
        """One compressor beside everything that gets the same tokens."""
        epsilon, areas = saved.details["epsilon"], seen.areas[name]
        way = self.measurer.measure(name, study.VRC, name, vrc_alphas(saved, areas, self.asked))
        others = self.matched(name, way, seen)
        best = oracle(self.grid, name, self.asked, epsilon, self.options.floor)
        over = at_alpha(self.increases, way.alphas) > epsilon
        dense = study.dense_items(seen.edges)
        return {
            "name": name,
            "epsilon": epsilon,
            "left_out": list(saved.details.get("left_out", ())),
            "vrc": study.compare(way, self.full, others, self.items).to_json(),
            "same_tokens": [study.compare(other, self.full, [], self.items).to_json() for other in others],
            "oracle": study.compare(best, self.full, [], self.items).to_json(),
            "unsure": self.unsure(name, way, areas),
            "tasks": [row.to_json() for row in study.by_task(way, self.full, best, over, self.items)],
            "adaptivity": study.adaptivity(way, best, self.items),
            "over_compressed": float(over.mean()),
            "dense": {
                "items": int(dense.sum()),
                "change": study.change_on(dense, way, self.full)._asdict(),
                "rest": study.change_on(~dense, way, self.full)._asdict(),
                "over_compressed": float(over[dense].mean()),
                "mean_alpha": float(way.alphas[dense].mean()),
            },
            "latency": self.latency(saved, float(others[0].alphas[0])),
        }

    def matched(self, name: str, way: Way, seen: Seen) -> list[Way]:
        """Uniform scaling and the hand rules at the tokens of `way` or a little more."""
        sizes, budget = self.asked.sizes, int(way.tokens.sum())
        one = study.uniform_alpha(sizes, budget, self.tiling)
        alphas = {
            study.UNIFORM: np.full(len(sizes), one),
            study.ENTROPY: study.rule_alphas(seen.entropy, sizes, budget, self.tiling),
            study.EDGES: study.rule_alphas(seen.edges, sizes, budget, self.tiling),
        }
        return [
            self.measurer.measure(f"{kind} at the tokens of {name}", kind, name, values)
            for kind, values in alphas.items()
        ]

    def unsure(self, name: str, way: Way, areas: Float[np.ndarray, "n 3"]) -> dict[str, Any]:
        """The VRC with pictures left whole whose views it judges differently."""
        unsure = np.ptp(areas, axis=1) > self.options.unsure
        alphas = np.where(unsure, MAX_ALPHA, way.alphas)
        careful = self.measurer.measure(f"{name}, whole where unsure", study.UNSURE, name, alphas)
        found = study.compare(careful, self.full, [way], self.items).to_json()
        return {"spread": self.options.unsure, "share": float(unsure.mean()), **found}

    def latency(self, saved: SavedCompressor, uniform: float) -> dict[str, dict[str, float]]:
        """Mean milliseconds by step of answers at α = 1, with this compressor, and with one α that takes as many tokens."""
        whole = self.assistant
        config = dataclasses.replace(whole.config, compressor=saved.config)
        compressed = Assistant(config, whole.runtime, whole.params, whole.tokenizer, saved.params)
        most = max(task.max_new_tokens for task in self.asked.tasks)
        ways = {"full": (whole, MAX_ALPHA), "vrc": (compressed, AUTO), "uniform": (whole, uniform)}
        return {
            way: milliseconds(assistant, self.asked.items, Options(self.options.encoder, alpha, max_new_tokens=most))
            for way, (assistant, alpha) in ways.items()
        }


def warnings(rows: Sequence[Mapping[str, Any]], cost: Mapping[str, int]) -> list[str]:
    """The failure signs, with their measured values."""
    found = []
    for row in rows:
        dense, latency = row["dense"], row["latency"]
        change = study.Estimate(**dense["change"])
        found += failure_signs.over_compression(f"compressor {row['name']}", change, dense["items"])
        times = latency["full"], latency["vrc"]
        found += failure_signs.compressor_overhead(f"compressor {row['name']}", *times, COMPRESSOR_STEP)
    return found + failure_signs.compressor_share(cost["compressor"], cost["base_tile"])


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, as plain values.

    Raises:
        ConfigError, CheckpointError, TokenizerError, RecordError, ResultsError, UndecodableImage, LabelError, BenchmarkFileError: as
            their rooms say.
    """
    require(
        options.limit >= 0 and options.rows > 0 and options.unsure >= 0, "--limit, --rows and --unsure must be positive"
    )
    compressors = find_compressors(options.compressor, options.epsilon)
    assistant = load_assistant(checkpoint_home(options.checkpoint), options.step, branches=(options.encoder,))
    asked = ask(options, assistant)
    seen = look(asked, compressors)
    with (
        ResultsFile(pathlib.Path(options.output) / RESULTS, subject(options, asked, seen)) as results,
        bar() as progress,
    ):
        measurer = Measurer(assistant, asked, results, options.encoder, options.rows, progress)
        ablation = Ablation(options, assistant, asked, measurer)
        rows = [ablation.compressor(name, saved, seen) for name, saved in compressors.items()]
        curve = ablation.curve()
    config = next(iter(compressors.values())).config
    cost = {"compressor": forward_flops(config), "base_tile": assistant.config.vision_base.forward_flops()}
    return {
        "encoder": options.encoder,
        "tasks": {task.name: len(task.items) for task in asked.tasks},
        "left_out": asked.left_out,
        "floor": options.floor,
        "full_score": ablation.items.mean(ablation.full.scores)._asdict(),
        "reads": ablation.items.mean(ablation.full.scores - ablation.blank.scores)._asdict(),
        "uniform": curve,
        "compressors": rows,
        "flops": cost,
        "warnings": warnings(rows, cost),
    }


def subject(options: argparse.Namespace, asked: Asked, seen: Seen) -> dict[str, Any]:
    """Names the model, the questions and what the compressors predict, on which the α's of every name depend."""
    model = model_identity(argparse.Namespace(checkpoint=options.checkpoint, step=options.step, compressor=None))
    areas = {name: [float(values.sum()), float(np.ptp(values, axis=1).sum())] for name, values in seen.areas.items()}
    digest = hashlib.sha256("".join(item.identity for item in asked.items).encode()).hexdigest()
    return {**model, "items": digest, "areas": areas, "unsure": options.unsure}


@contextlib.contextmanager
def bar() -> Iterator[Progress]:
    """A progress bar on standard error."""
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        yield progress


def write(values: Mapping[str, Any], home: pathlib.Path) -> None:
    """Figures, tables and plots."""
    write_json(home / SUMMARY, values)
    study_plots.pareto(values, home / study_plots.PARETO)
    study_plots.adaptivity(values, home / study_plots.ADAPTIVITY)
    (home / PAGE).write_text(ablation_page(values), "utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parser().parse_args(arguments)
    home = pathlib.Path(options.output)
    try:
        with storage.explained():
            values = run(options)
            write(values, home)
    except (*EXPLAINED, LabelError, BenchmarkFileError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return RUN_ERROR
    print(ablation_page(values), file=sys.stderr if options.json else sys.stdout)
    failure_signs.tell(values["warnings"])
    if options.json:
        print(json.dumps(values))
    return SUCCESS


if __name__ == "__main__":
    sys.exit(main())
