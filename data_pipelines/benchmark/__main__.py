"""`python -m data_pipelines.benchmark`: samples and megabytes a second that one core decodes, tiles, tokenises and packs."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from data_pipelines.benchmark import corpus, peers, steps
from data_pipelines.config import DataConfig, SourceShare
from data_pipelines.lanes import MissingData, open_loader
from data_pipelines.records import MANIFEST, RecordError
from hypervl_jax.architecture import ConfigError, TilingConfig
from hypervl_jax.text.tokenizer import TokenizerError
from hypervl_jax.training.batch import BatchShape
from hypervl_jax.vision.decoding import keep_memory

SHAPE = BatchShape(rows=1, length=8192, tiles=24)
"""A row of stages 2 and 3; on a pod a worker makes one row of a batch."""

TILING = TilingConfig()
ALPHA_JITTER = 0.1
"""As in stage 1."""

_DESCRIPTION = """\
Times the data path of one core, step by step: pack, read, decode, resize, tile, tokenise. Beside it run, on the same samples, loops
that only decode and resize, other JPEG decoders (also scaled to a half and a quarter), and Hugging Face `datasets` with
LLaVA-NeXT's processor of `transformers`. All take turns; a figure is the median of the rounds. Times are processor time of all
threads, so another program on the machine disturbs them little. Without --data it makes photographs (scikit-image's, 640 x 480 to
2000 x 1500, JPEG) and pages of text (JPEG and PNG) first, in a temporary directory. About two minutes.
"""

_EPILOG = """\
needs: pip install hypervl-jax[benchmark]; PyTurboJPEG also needs the system's libturbojpeg. What is missing is left out and named.

examples:
  python -m data_pipelines.benchmark
  python -m data_pipelines.benchmark --data data/stage2 --rounds 9 --json
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    keep_memory()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            report = run(options, pathlib.Path(scratch))
    except (ConfigError, MissingData, RecordError, TokenizerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"error: {error}; pip install 'hypervl-jax[benchmark]'", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(report))
    else:
        print_report(report)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m data_pipelines.benchmark",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=pathlib.Path, metavar="ROOT", help="the sources of ROOT/train in equal shares of the tokens")
    add(
        "--pages",
        type=_share,
        default=0.3,
        metavar="SHARE",
        help="without --data: share of the tokens that are pages and their text, the rest photographs with captions (default: %(default)s)",
    )
    add("--rows", type=_positive, default=16, metavar="N", help="packed rows that a round makes (default: %(default)s)")
    add("--rounds", type=_positive, default=7, metavar="N", help="rounds to take medians of (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def run(options: argparse.Namespace, scratch: pathlib.Path) -> dict[str, Any]:
    """Makes the data if need be, takes all times in turns, and gives the figures.

    Raises:
        MissingData, RecordError, TokenizerError, ConfigError: the sources cannot be used.
        ImportError: scikit-image is needed and not installed.
    """
    root = options.data or _made_corpus(scratch / "corpus")
    mixture = _present(root) if options.data else _pages_and_photographs(options.pages)
    stage = plan_work(root, mixture, options.rows, TILING, ALPHA_JITTER)
    equal = plan_work(root, mixture, options.rows, TilingConfig(thumbnail=True), 0.0)
    decoders, files = peers.jpeg_decoders(), peers.jpeg_files(stage)
    missing = peers.missing_for_transformers(root)
    path = None if missing else peers.TransformersPath(equal, scratch / "arrow", root)
    measured: dict[str, Callable[[], Mapping[Any, float]]] = {
        "steps": lambda: steps.step_seconds(stage),
        "bare": lambda: steps.bare_seconds(stage),
        "whole": lambda: steps.whole_seconds(stage),
        "decoders": lambda: peers.decoder_seconds(decoders, files),
        "equal work": lambda: steps.whole_seconds(equal) | (path.seconds() if path else {}),
    }
    medians = _medians(measured, options.rounds)
    return {
        "machine": machine(),
        "rounds": options.rounds,
        "stage": _contents(stage),
        "steps": _rates(stage, medians["steps"] | medians["bare"] | medians["whole"]),
        "share_of_bare": medians["bare"][steps.BARE] / medians["whole"][steps.WHOLE],
        "transformers": _comparison(equal, medians["equal work"], path) if path else {"missing": missing},
        "decoders": _decoder_rates(stage, files, medians["decoders"]),
        "decoders_left_out": peers.missing_decoders(decoders),
    }


def _made_corpus(root: pathlib.Path) -> pathlib.Path:
    root.mkdir()
    with Console(stderr=True).status("writing photographs and pages"):
        corpus.write_corpus(root)
    return root


def _pages_and_photographs(pages: float) -> tuple[SourceShare, ...]:
    return SourceShare(corpus.PHOTOGRAPHS, 1 - pages), SourceShare(corpus.PAGES, pages)


def _present(root: pathlib.Path) -> tuple[SourceShare, ...]:
    """All training sources under `root`, in equal shares."""
    return tuple(SourceShare(path.parent.name, 1.0) for path in sorted((root / "train").glob(f"*/{MANIFEST}")))


def plan_work(
    root: pathlib.Path, mixture: tuple[SourceShare, ...], rows: int, tiling: TilingConfig, alpha_jitter: float
) -> steps.Work:
    """The first `rows` rows of a mixture."""
    config = DataConfig(str(root), mixture, seed=0, alpha_jitter=alpha_jitter)
    return steps.plan_work(open_loader(config, SHAPE, tiling, root), rows)


def _medians(measured: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, dict[Any, float]]:
    """Median seconds by name; each is measured once before, unseen, and then in turns with the others."""
    found: dict[str, list[Mapping[Any, float]]] = {name: [] for name in measured}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for number in progress.track(range(rounds + 1), description="rounds"):
            for name, measure in measured.items():
                seconds = measure()
                if number:
                    found[name].append(seconds)
    return {name: _median_of_each(taken) for name, taken in found.items()}


def _median_of_each(taken: Sequence[Mapping[Any, float]]) -> dict[Any, float]:
    return {key: statistics.median(seconds[key] for seconds in taken) for key in taken[0]}


def machine() -> str:
    """Processor, cores and Python of this machine."""
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = named[0] if named else model
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}"


def _contents(work: steps.Work) -> dict[str, float]:
    return {
        "samples": len(work.samples),
        "rows": work.batches,
        "megapixels": work.megapixels,
        "encoded_megabytes": work.encoded_bytes / 1e6,
        "tiles": work.tiles,
        "text_tokens": sum(sample.tokens for sample in work.samples)
        - sum(p.tokens for plans in work.plans for p in plans),
    }


def _rates(work: steps.Work, seconds: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Rates of one core: of samples, of encoded image bytes and of decoded pixels."""
    return {
        name: {
            "milliseconds_per_sample": 1e3 * taken / len(work.samples),
            "samples_per_second": len(work.samples) / taken,
            "megabytes_per_second": work.encoded_bytes / 1e6 / taken,
            "megapixels_per_second": work.megapixels / taken,
        }
        for name, taken in seconds.items()
    }


def _comparison(work: steps.Work, seconds: Mapping[str, float], path: peers.TransformersPath) -> dict[str, Any]:
    return {
        **_contents(work),
        "tiles_of_transformers": path.tiles(),
        "backend": peers.image_backend(),
        "steps": _rates(work, seconds),
        "times_faster": seconds[peers.TRANSFORMERS] / seconds[steps.WHOLE],
    }


def _decoder_rates(
    work: steps.Work, files: Sequence[bytes], seconds: Mapping[tuple[str, int], float]
) -> dict[str, dict[str, float]]:
    """Megapixels a second, counted before scaling, by decoder and scale."""
    pixels = {image: plan.source_height * plan.source_width for image, plan in work.pictures()}
    megapixels = sum(pixels[file] for file in files) / 1e6
    rates: dict[str, dict[str, float]] = {}
    for (name, scale), taken in seconds.items():
        rates.setdefault(name, {})[f"1/{scale}"] = megapixels / taken if taken else 0.0
    return rates


def print_report(report: Mapping[str, Any]) -> None:
    """Three tables and the two ratios."""
    console = Console()
    stage, other = report["stage"], report["transformers"]
    console.print(f"{report['machine']}; medians of {report['rounds']} rounds; processor time of one core")
    console.print(
        _step_table(_described(stage, f"rows of {SHAPE.length} tokens and {SHAPE.tiles} tiles"), report["steps"])
    )
    console.print(f"whole pipeline at {report['share_of_bare']:.2f} of the bare decode + resize rate\n")
    if "missing" in other:
        console.print(f"{peers.TRANSFORMERS}: left out, {other['missing']}\n")
    else:
        title = _described(
            other,
            f"rows, with a thumbnail for each image ({other['tiles_of_transformers']} tiles by {other['backend']})",
        )
        console.print(_step_table(title, other["steps"]))
        console.print(f"whole pipeline {other['times_faster']:.1f} times as fast as {peers.TRANSFORMERS}\n")
    console.print(_decoder_table(report["decoders"]))
    if report["decoders_left_out"]:
        console.print(f"not installed here: {', '.join(report['decoders_left_out'])}")


def _described(contents: Mapping[str, float], kind: str) -> str:
    return (
        f"{contents['samples']} samples in {contents['rows']} {kind}: {contents['megapixels']:.1f} MP, "
        f"{contents['encoded_megabytes']:.1f} MB, {contents['tiles']} tiles, {contents['text_tokens']} text tokens"
    )


def _step_table(title: str, rates: Mapping[str, Mapping[str, float]]) -> Table:
    rows = ([name, *(f"{value:.1f}" for value in columns.values())] for name, columns in rates.items())
    return _table(title, ("", "ms/sample", "samples/s", "MB/s", "MP/s"), rows)


def _decoder_table(rates: Mapping[str, Mapping[str, float]]) -> Table:
    rows = ([name, *(f"{value:.0f}" for value in scales.values())] for name, scales in rates.items())
    headings = ("JPEG decoder", *(f"at 1/{scale}" if scale > 1 else "full size" for scale in peers.SCALES))
    return _table("MP/s of the file, decoded at a scale", headings, rows)


def _table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


if __name__ == "__main__":
    sys.exit(main())
