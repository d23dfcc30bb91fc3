"""`python -m tools.plan_data --config stage1 --data DIR`: how far the data of a stage reaches, and what it asks of the hosts."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from rich.console import Console, Group, RenderableType
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from data_pipelines.config import SPLIT, STOP
from data_pipelines.errors import RecordError
from data_pipelines.lane_state import SourceFailed
from data_pipelines.lanes import source_directories
from data_pipelines.manifest import read_manifest
from data_pipelines.mixture_plan import SIMULATED_ROWS
from experiments import data_planning, launch
from experiments.config import ExperimentConfig
from experiments.data_planning import DataPlan, MissingInput
from hypervl_jax.architecture import ConfigError
from hypervl_jax.planning.chips import topology

USAGE_ERROR, DATA_ERROR, SUCCESS = 2, 1, 0
UNITS = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3))

_DESCRIPTION = """\
Prints, from the manifests of a configuration's sources: records, tokens and tiles, the odds that turn shares of tokens into samples,
epochs of each source, whether the stage's token budget is reachable, bytes stored, what no row can hold, how full rows get for each
tile budget T and which T is the cheapest, and the MB/s and decode cores that a host needs to keep up with the step.
--config.PATH=VALUE changes the configuration as in experiments.launch.
"""

_EPILOG = """\
examples:
  python -m tools.plan_data --config stage1 --data /mnt/data/stage1
  python -m tools.plan_data --config stage2 --data /mnt/data/stage2 --topology v5p-512 --mfu 0.45 --json
  python -m tools.plan_data --config tiny --data data/embedded --step-seconds 0.5 --hosts 1

exit status:
  0  planned, also when the budget is not reachable (see "reachable" with --json)
  1  data is missing or cannot be used    2  it cannot be planned as asked
"""

CONVENTIONS = (
    "Tokens: LLM positions at α = 1, visual tokens included. Fills: {rows} simulated rows with the shares of the first step; "
    "at most: what the mixture's tiles for a token leave, where the other budget runs out first. Work: useful FLOPs of a "
    "step over its used positions. Cores: of this machine, as many as reading, decoding, tiling, tokenising and packing keep busy."
)


def parser() -> argparse.ArgumentParser:
    """The command line without the overrides."""
    made = argparse.ArgumentParser(
        "python -m tools.plan_data",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--config", required=True, metavar="NAME", help="a named configuration")
    add("--data", metavar="DIR", help="short for --config.data.root=DIR")
    add("--topology", default="v5e-256", metavar="NAME", help="TPU topology that the stage runs on (default: v5e-256)")
    add("--mfu", type=_share, default=0.4, help="stated MFU, from which the time of a step follows (default: 0.4)")
    add("--step-seconds", type=_positive, metavar="S", help="time of a step, where it is known, instead of --mfu")
    add("--hosts", type=launch.positive_count, metavar="N", help="hosts that feed the step (default: one for 4 chips)")
    add("--no-timing", action="store_true", help="decode no sample: no shard is read, and no cores are planned")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    return made


def _positive(text: str) -> float:
    return _number(text, math.inf, "a number above 0")


def _share(text: str) -> float:
    return _number(text, 1.0, "a number above 0 and at most 1")


def _number(text: str, most: float, wanted: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= most or math.isinf(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


def make_plan(options: argparse.Namespace, config: ExperimentConfig, console: Console) -> DataPlan:
    """The plan; says on `console` what is being waited for."""
    place = topology(options.topology)
    seconds = options.step_seconds or data_planning.step_time(config, place, options.mfu)
    hosts = options.hosts or data_planning.host_count(place)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(config.name)
        say = lambda text: progress.update(task, description=f"{config.name}: {text}")
        return data_planning.plan(config, seconds, hosts, not options.no_timing, say)


def to_json(plan: DataPlan) -> dict[str, Any]:
    """All of a plan in plain values.

    `tokens`, `steps` and `rows` are what the stage asks for; `reached_tokens`, `reached_tiles` and the sources' `stage_tokens` and
    `epochs` what it reads, which is less when the data gives out; other counts of a source are of one pass over it.
    """
    batch, host, recommended = plan.config.batch, plan.host, plan.recommended
    return {
        "config": plan.config.name,
        "tokens": plan.token_budget,
        "reachable": plan.reachable,
        "reached_tokens": plan.reading.reached,
        "reached_tiles": _reached_tiles(plan),
        "exhausted": [source._asdict() for source in plan.reading.exhausted],
        "step_tokens": plan.step_tokens,
        "steps": plan.steps,
        "configured_steps": plan.config.loop.steps,
        "rows": plan.steps * batch.rows,
        "batch": {"rows": batch.rows, "length": batch.length, "tiles": batch.tiles},
        "token_fill": plan.fill.token_fill,
        "tile_fill": plan.fill.tile_fill,
        "token_bound": plan.fill.token_bound,
        "tile_bound": plan.fill.tile_bound,
        "samples_per_row": plan.fill.samples,
        "recommended_tiles": recommended.tiles,
        "tile_budgets": [
            {**fill._asdict(), "flops_per_token": cost} for fill, cost in zip(plan.fills, plan.costs, strict=True)
        ],
        "stored_bytes": sum(source.stored_bytes for source in plan.facts),
        "host": {
            "hosts": plan.hosts,
            "step_seconds": plan.step_seconds,
            "rows": host.rows,
            "samples_per_second": host.samples_per_second,
            "megabytes_per_second": host.megabytes_per_second,
            "cores": host.cores,
        },
        "packing_share_of_decode": _packing_share(plan),
        "sources": {source["name"]: source for source in _sources(plan)},
    }


def _reached_tiles(plan: DataPlan) -> float:
    """Tiles that the stage reads before it ends or the data does."""
    return math.fsum(epochs * source.tiles for epochs, source in zip(plan.epochs, plan.facts, strict=True))


def _packing_share(plan: DataPlan) -> float | None:
    """Packing time of a sample over its decode time."""
    if plan.timing is None:
        return None
    return plan.timing.packing / plan.decode_seconds


def _sources(plan: DataPlan) -> Iterable[dict[str, Any]]:
    directories = source_directories(plan.config.data)
    total = math.fsum(source.share for source in plan.config.data.mixture)
    for number, facts in enumerate(plan.facts):
        yield {
            "name": facts.name,
            "licence": read_manifest(directories[facts.name]).licence,
            "share": plan.config.data.mixture[number].share / total,
            "odds": plan.odds[number],
            "records": facts.records,
            "tokens": facts.tokens,
            "tiles": facts.tiles,
            "mean_tokens": facts.mean_tokens,
            "stored_bytes": facts.stored_bytes,
            "pixels": facts.pixels,
            "too_long": facts.too_long,
            "too_many_tiles": facts.too_many_tiles,
            "stage_tokens": plan.reading.tokens[number],
            "epochs": plan.epochs[number],
            "epoch_limit": _finite(plan.config.data.epochs_allowed()[number]),
            "decode_seconds": plan.timing and plan.timing.decode[number],
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def scaled(value: float) -> str:
    """Three digits with a decimal unit: 82.8 B, 3.05 M, 441."""
    unit, size = next(((unit, size) for unit, size in UNITS if value >= size), ("", 1.0))
    digits = 2 if value < 10 * size else 1 if value < 100 * size else 0
    return f"{value / size:.{digits}f} {unit}".strip()


def tables(plan: DataPlan) -> RenderableType:
    """A plan for a terminal."""
    return Group(_source_table(plan), _fill_table(plan), _stage_table(plan))


def _source_table(plan: DataPlan) -> Table:
    rule = "split" if plan.config.data.oversize == SPLIT else "dropped"
    names = (
        "source",
        "licence",
        "share",
        "samples",
        "records",
        "tokens each",
        "bytes",
        "tokens an epoch",
        "epochs",
        "of at most",
    )
    table = Table(*names, f"{rule}: no row holds it", title=f"Sources of {plan.config.name}", title_justify="left")
    for source, facts in zip(_sources(plan), plan.facts, strict=True):
        table.add_row(
            facts.name,
            source["licence"],
            f"{source['share']:.2%}",
            f"{source['odds']:.2%}",
            f"{facts.records:,}",
            f"{facts.mean_tokens:,.0f}",
            scaled(facts.stored_bytes),
            scaled(facts.tokens),
            f"{source['epochs']:,.2f}",
            "no limit" if source["epoch_limit"] is None else f"{source['epoch_limit']:g}",
            f"{facts.oversize_share:.2%}",
        )
    return table


def _fill_table(plan: DataPlan) -> Table:
    length, least = plan.config.batch.length, min(plan.costs)
    names = ("tiles a row", "token fill", "at most", "tile fill", "at most", "samples a row", "work a token", "")
    table = Table(*names, title=f"Rows of {length} positions", title_justify="left")
    for fill, cost in zip(plan.fills, plan.costs, strict=True):
        marks = {"configured": fill == plan.fill, "recommended": fill == plan.recommended}
        table.add_row(
            str(fill.tiles),
            f"{fill.token_fill:.1%}",
            f"{fill.token_bound:.1%}",
            f"{fill.tile_fill:.1%}",
            f"{fill.tile_bound:.1%}",
            f"{fill.samples:.1f}",
            f"{cost / least:.1%}",
            ", ".join(mark for mark, holds in marks.items() if holds),
        )
    return table


def _stage_table(plan: DataPlan) -> Table:
    host, batch = plan.host, plan.config.batch
    table = Table(title=f"{plan.config.name}, hosts: {plan.hosts}", title_justify="left", show_header=False)
    stored = scaled(sum(source.stored_bytes for source in plan.facts))
    cores = "not timed" if host.cores is None else f"{host.cores:,.2f} cores"
    rows = [
        ("stage: tokens", f"{scaled(plan.token_budget)}; {verdict(plan)}"),
        ("stage: steps", f"{plan.steps:,} of {plan.step_tokens:,.0f} tokens; loop.steps is {plan.config.loop.steps:,}"),
        ("stage: rows", f"{plan.steps * batch.rows:,} of {batch.length} positions and {batch.tiles} tiles"),
        ("what it reads", _what_it_reads(plan)),
        ("all sources", f"{stored} bytes stored"),
        (
            "a host",
            f"{host.rows} rows every {plan.step_seconds:.3f} s: {host.samples_per_second:,.1f} samples/s, {host.megabytes_per_second:,.2f} MB/s, {cores}",
        ),
    ]
    share = _packing_share(plan)
    if share is not None:
        rows.append(("packing", f"{plan.timing.packing * 1e6:,.0f} µs a sample, {share:.2%} of decoding it"))
    for row in rows:
        table.add_row(*row)
    return table


def _what_it_reads(plan: DataPlan) -> str:
    reached = plan.reading.reached
    extent = (
        "the whole stage"
        if plan.reachable
        else f"{reached / plan.token_budget:.1%} of the stage, then the data gives out"
    )
    return f"{scaled(reached)} tokens with {scaled(_reached_tiles(plan))} tiles: {extent}"


def verdict(plan: DataPlan) -> str:
    """Whether the data suffices, and which sources give out, in one sentence."""
    data, gone = plan.config.data, plan.reading.exhausted
    ends = ", ".join(f"{source.name} after {scaled(source.tokens)} tokens" for source in gone)
    if plan.reachable and not gone:
        return "reachable"
    if plan.reachable:
        return f"reachable, though these give out and the others get their shares: {ends}"
    if data.over_limit == STOP:
        return f"NOT reachable, the run stops where a source gives out: {ends}; bring more of it, lower its share or raise its limit"
    return f"NOT reachable, all the data ends after {scaled(plan.reading.reached)} tokens: {ends}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options, overrides = launch.parse(sys.argv[1:] if arguments is None else arguments, parser())
    jax.config.update("jax_platforms", "cpu")
    asked = argparse.Namespace(config=options.config, debug=False, data=options.data, hardware=None)
    try:
        made = make_plan(options, launch.resolve(asked, overrides), Console(stderr=True))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except (MissingInput, RecordError, SourceFailed, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return DATA_ERROR
    if options.json:
        print(json.dumps(to_json(made)))
    else:
        console = Console(width=None if sys.stdout.isatty() else 180)
        console.print(tables(made))
        console.print(CONVENTIONS.format(rows=SIMULATED_ROWS), highlight=False)
    return SUCCESS


if __name__ == "__main__":
    sys.exit(main())
