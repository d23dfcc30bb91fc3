"""`python -m tools.inspect_data --config stage2 --rows 8`: one HTML page of what training gets: packed rows, tiles, text, shares."""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import math
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from data_pipelines.lane_state import SourceFailed
from data_pipelines.lanes import LaneLoader, MissingData
from data_pipelines.mixture_plan import bounds_of
from data_pipelines.packing import Budget, Sample
from data_pipelines.records import RecordError
from data_pipelines.splitting import sample_part
from data_pipelines.streams import Lane, Mixture
from data_pipelines.transforms import fill_row
from experiments import launch, preflight
from experiments.config import ExperimentConfig
from hypervl_jax.architecture import ConfigError
from hypervl_jax.evaluation import batch_page
from hypervl_jax.evaluation.batch_page import Segment
from hypervl_jax.evaluation.page import escape, page, paragraph, section, table
from hypervl_jax.text.tokenizer import load_tokenizer
from hypervl_jax.training.batch import Batch, BatchShape, unfilled_batch
from hypervl_jax.vision.anyres import ALPHA_UNIT, ImagePlan

USAGE_ERROR = 2

_HOW_TO_READ = (
    "The wide bar is the token budget: faint where a visual token stands, darker for text that is only read, full colour where the loss "
    "counts the token. The narrow bars are tile slots; every other sample's are paler. Grey is padding. In the text, marked tokens are "
    "those that the loss counts; faint cells of a tile have no visual token."
)

_SHORTEST, _LENGTH_RATIO = 8, 1.25
"""Of the length histograms: the first edge in tokens, and from one edge to the next."""

_DESCRIPTION = """\
Packs the first rows of a configuration as training would and writes one HTML page that needs no other file: the token and the tile
budget of each row as coloured segments, tiles as they are laid out (from the batch's own bytes), the text decoded from its ids with
what the loss counts marked, and, over more rows that are planned without decoding a pixel, each source's share and lengths."""

_EPILOG = """\
examples:
  python -m data_pipelines.rendered --output data/embedded && python -m tools.inspect_data --config tiny
  python -m tools.inspect_data --config stage2 --rows 8 --data data/stage2 --output stage2.html
  python -m tools.inspect_data --config stage2 --config.data.alpha_jitter=1

exit status:
  0  written    1  data or tokenizer are missing or damaged    2  it cannot be shown as asked
"""


class PlannedRow(NamedTuple):
    """What lane `row` packs into row `row` of batch `batch`."""

    batch: int
    row: int
    samples: list[Sample]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options, overrides = launch.parse(sys.argv[1:] if arguments is None else arguments, parser())
    options.hardware = None
    try:
        config = launch.resolve(options, overrides)
        loader = open_data(config, options.rows)
        planned = list(itertools.islice(plan_rows(loader), max(options.rows, options.planned)))
        document, summary = build_page(config, loader, planned, options.rows)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except (DataError, RecordError, SourceFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    output = pathlib.Path(options.output or f"{config.name}-data.html")
    output.write_text(document, encoding="utf-8")
    print(json.dumps(summary | {"output": str(output)}) if options.json else output)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line without the overrides."""
    made = argparse.ArgumentParser(
        "python -m tools.inspect_data",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--config", required=True, metavar="NAME", help="a named configuration")
    add("--rows", type=launch.positive_count, default=8, metavar="N", help="rows to show (default: %(default)s)")
    add(
        "--planned",
        type=launch.positive_count,
        default=256,
        metavar="N",
        help="rows to plan for shares and lengths, without decoding (default: %(default)s)",
    )
    add("--data", metavar="ROOT", help="where the sources are (default: the configuration's data.root)")
    add("--debug", action="store_true", help="the built-in small size of the configuration")
    add("--output", metavar="FILE", help="the page (default: NAME-data.html here)")
    add("--json", action="store_true", help="print what the page says as one JSON object instead of its name")
    return made


class DataError(Exception):
    """Tokenizer or sources are not there; the message lists all of it."""


def open_data(config: ExperimentConfig, rows: int) -> LaneLoader:
    """The loader of the first `rows` lanes at most, in this process.

    Raises:
        DataError: tokenizer or training sources are missing.
        RecordError: a source is damaged or was counted with another tokenizer.
    """
    without_tokenizer = preflight.tokenizer_problem(config)
    if without_tokenizer:
        raise DataError("\n".join(filter(None, [preflight.data_problem(config), without_tokenizer])))
    lanes = range(min(rows, config.batch.rows))
    tokenizer = load_tokenizer(config.tokenizer_path)
    try:
        return LaneLoader(config.data, config.batch, config.architecture.tiling, tokenizer, lanes)
    except MissingData as error:
        raise DataError(preflight.data_problem(config) or str(error)) from error


def plan_rows(loader: LaneLoader) -> Iterator[PlannedRow]:
    """Rows as training packs them, batch after batch; no pixel is decoded."""
    pairs = zip(loader.lanes, loader.initial_states(), strict=True)
    lanes = [(lane, Lane(loader.mixture, lane, state)) for lane, state in pairs]
    for batch in itertools.count():
        for number, lane in lanes:
            yield PlannedRow(batch, number, lane.plan())


def build_page(
    config: ExperimentConfig, loader: LaneLoader, planned: Sequence[PlannedRow], shown: int
) -> tuple[str, dict[str, Any]]:
    """The page, and what it says in figures. The first `shown` of the planned rows are decoded and drawn."""
    names = [source.name for source in loader.mixture.sources]
    summary = overview(config, planned) | {"sources": source_figures(config, planned, names)}
    panels = [row_panel(loader, row, names) for row in planned[:shown]]
    body = [
        batch_page.STYLE,
        f"<h1>{escape(config.name)}: the data</h1>",
        paragraph(lead(config, len(panels)), "lead"),
        batch_page.numbers(headline(summary)),
        section("rows", "Packed rows", paragraph(_HOW_TO_READ, "note"), batch_page.key(names), *panels),
        section("sources", "Sources", *source_parts(config, planned, summary["sources"], names)),
    ]
    return page(f"{config.name}: the data", body), summary


def lead(config: ExperimentConfig, shown: int) -> str:
    """What is shown, in a sentence."""
    batch, tile, data = config.batch, config.architecture.tiling.tile_size, config.data
    return (
        f"{batch_page.plural(shown, 'row')} as training gets them, of batches of {batch.rows} rows with {batch.length} tokens and "
        f"{batch.tiles} tiles of {tile} × {tile} pixels each; data in {data.root}, split {data.split}, seed {data.seed}."
    )


def row_panel(loader: LaneLoader, planned: PlannedRow, names: Sequence[str]) -> str:
    """One row, decoded and drawn."""
    row, segments = decoded_row(loader, planned)
    title = f"batch {planned.batch}, row {planned.row}"
    return batch_page.row_panel(title, row, segments, names, loader.mixture.tokenizer, loader.mixture.tiling)


def decoded_row(loader: LaneLoader, planned: PlannedRow) -> tuple[Batch, list[Segment]]:
    """A row's arrays, and what stands where in it."""
    mixture, budget = loader.mixture, loader.mixture.budget
    batch = unfilled_batch(BatchShape(1, budget.tokens, budget.tiles), mixture.tiling.tile_size)
    row = Batch(*(field[0] for field in batch))
    failures = iter(fill_row(row, planned.samples, mixture.sources, mixture.tokenizer, mixture.tiling))
    present = set(row.segments.tolist())
    segments, token, tile = [], 0, 0
    for number, sample in enumerate(planned.samples, start=1):
        place, tiles = slice(token, token + sample.tokens), slice(tile, tile + sample.tiles)
        failure = "" if number in present else next(failures).message
        plans = () if failure else sample_plans(mixture, sample)
        about = described(number, sample, row, place)
        segments.append(Segment(sample.source, place, tiles, plans, about, failure))
        token, tile = place.stop, tiles.stop
    return row, segments


def sample_plans(mixture: Mixture, sample: Sample) -> tuple[ImagePlan, ...]:
    """Plans of a sample's images: all of its record's, or those of its part."""
    source = mixture.sources[sample.source]
    plans = source.plans(sample.record, sample.alpha, mixture.tiling)
    if sample.part:
        part = sample_part(sample, source, mixture.tokenizer, mixture.tiling, mixture.budget)
        return tuple(plans[image] for image in part.images)
    return tuple(plans)


def described(number: int, sample: Sample, row: Batch, place: slice) -> str:
    """One line about a sample."""
    found = collections.Counter(batch_page.kinds(row)[place])
    part = f", part {sample.part}" if sample.part else ""
    alpha = f", α {sample.alpha / ALPHA_UNIT:.2f}" if sample.tiles and sample.alpha != ALPHA_UNIT else ""
    return (
        f"sample {number}: {sample.tokens} tokens ({found['visual']} visual, {found['weighted']} with loss), "
        f"{batch_page.plural(sample.tiles, 'tile')}; record {sample.record}{part}{alpha}"
    )


def overview(config: ExperimentConfig, planned: Sequence[PlannedRow]) -> dict[str, Any]:
    """Fill of both budgets over the planned rows, and the most that their samples allow."""
    samples = [sample for row in planned for sample in row.samples]
    pictured, batch = [sample for sample in samples if sample.tiles], config.batch
    tokens, tiles = (sum(getattr(sample, name) for sample in samples) for name in ("tokens", "tiles"))
    token_bound, tile_bound = bounds_of(tiles / max(tokens, 1), Budget(batch.length, batch.tiles))
    return {
        "config": config.name,
        "rows": len(planned),
        "samples": len(samples),
        "token_fill": tokens / (len(planned) * batch.length),
        "tile_fill": tiles / max(len(planned) * batch.tiles, 1),
        "token_bound": token_bound,
        "tile_bound": tile_bound,
        "scaled_share": sum(sample.alpha != ALPHA_UNIT for sample in pictured) / max(len(pictured), 1),
    }


def headline(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The page's large figures."""
    return [
        (
            f"{summary['token_fill']:.1%}",
            f"of the token budget filled, of {summary['token_bound']:.1%} that the samples allow, over {summary['rows']} rows",
        ),
        (f"{summary['tile_fill']:.1%}", f"of the tile budget filled, of {summary['tile_bound']:.1%}"),
        (f"{summary['samples'] / summary['rows']:.1f}", "samples in a row"),
        (f"{summary['scaled_share']:.0%}", "of the samples with images scaled by an α below 1"),
    ]


def source_figures(
    config: ExperimentConfig, planned: Sequence[PlannedRow], names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Of each source: its wanted and its present share of the tokens, and its mean sample."""
    taken = samples_by_source(planned)
    total = sum(sample.tokens for samples in taken.values() for sample in samples)
    wanted = dict(zip(names, config.data.shares_by_step()[0], strict=True))
    figures = {}
    for number, name in enumerate(names):
        samples = taken.get(number, [])
        tokens, tiles = sum(sample.tokens for sample in samples), sum(sample.tiles for sample in samples)
        figures[name] = {
            "wanted_share": wanted[name] / sum(wanted.values()),
            "token_share": tokens / max(total, 1),
            "samples": len(samples),
            "mean_tokens": tokens / max(len(samples), 1),
            "mean_tiles": tiles / max(len(samples), 1),
        }
    return figures


def samples_by_source(planned: Sequence[PlannedRow]) -> dict[int, list[Sample]]:
    """All samples by the number of their source, in the order of the numbers."""
    taken: dict[int, list[Sample]] = collections.defaultdict(list)
    for sample in sorted(sample for row in planned for sample in row.samples):
        taken[sample.source].append(sample)
    return taken


def source_parts(
    config: ExperimentConfig,
    planned: Sequence[PlannedRow],
    figures: Mapping[str, Mapping[str, float]],
    names: Sequence[str],
) -> list[str]:
    """Shares and length histograms, as HTML."""
    taken = samples_by_source(planned)
    tokens = {number: [sample.tokens for sample in samples] for number, samples in taken.items()}
    tiles = {number: [sample.tiles for sample in samples] for number, samples in taken.items()}
    rows = [
        [
            f"{batch_page.dot(number)}{escape(name)}",
            f"{found['wanted_share']:.1%}",
            f"{found['token_share']:.1%}",
            f"{found['samples']:.0f}",
            f"{found['mean_tokens']:.0f}",
            f"{found['mean_tiles']:.1f}",
        ]
        for number, (name, found) in enumerate(figures.items())
    ]
    return [
        paragraph(f"Over {len(planned)} rows; no pixel was decoded for them.", "note"),
        table(("source", "share of tokens, wanted", "here", "samples", "tokens a sample", "tiles a sample"), rows),
        batch_page.histograms("Tokens of a sample", tokens, names, length_edges(config.batch.length)),
        batch_page.histograms("Tiles of a sample", tiles, names, range(config.batch.tiles + 2)),
    ]


def length_edges(limit: int) -> list[int]:
    """Edges between lengths of a few tokens and `limit`, each about a quarter above the one before."""
    steps = math.ceil(math.log(limit / _SHORTEST, _LENGTH_RATIO))
    return sorted({round(_SHORTEST * (limit / _SHORTEST) ** (step / steps)) for step in range(steps + 1)})


if __name__ == "__main__":
    sys.exit(main())
