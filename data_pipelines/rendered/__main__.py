"""`python -m data_pipelines.rendered --output DIR`: makes the embedded data set and prints what is in it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from data_pipelines.rendered.build import SIZES, BuildError, Report, SourceReport, build

_DESCRIPTION = """\
Makes the embedded data set: handwritten digits, documents, charts and scenes to read, captions, and some text; a training and
a held-out split with no picture, digit scan, passage or seed in common. It needs no network. The demo size takes well under a
minute on two cores and 200 MB. A directory that is complete is kept; one that was left half-written is built again."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        report = _build_with_progress(options)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        _print_report(report)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m data_pipelines.rendered", description=_DESCRIPTION)
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="where the data set goes: new, empty, or made by this command"
    )
    parser.add_argument(
        "--size",
        choices=tuple(SIZES),
        default="demo",
        help="demo trains the tiny model; study has pictures at 1, 2 and 3 pixels a unit, for the study of the VRC; the tests are a fortieth of each (default: demo)",
    )
    parser.add_argument(
        "--workers",
        type=_natural,
        metavar="N",
        help="processes that draw, 0 for none beside this one (default: one a core for demo, 0 for test)",
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON on standard output")
    return parser


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def _build_with_progress(options: argparse.Namespace) -> Report:
    """Builds, with a progress line on standard error."""
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        line = progress.add_task("starting", total=None)
        return build(
            options.output,
            options.size,
            options.workers,
            lambda stage, done, total: progress.update(line, description=stage, completed=done, total=total),
        )


def _print_report(report: Report) -> None:
    table = Table(
        title=f"{report.directory}, size {report.size}",
        caption="≥3 tiles: of 64 pixels · blind: best guess without the picture",
        title_justify="left",
    )
    table.add_column("source", no_wrap=True)
    for heading in ("records", "MB", "level 1", "2", "3", "≥3 tiles", "blind"):
        table.add_column(heading, justify="right", no_wrap=True)
    for source in report.sources:
        table.add_row(*_cells(source))
    Console().print(table)
    print("already complete" if report.already_complete else "complete")


def _cells(source: SourceReport) -> tuple[str, ...]:
    shares = (*source.level_shares, source.many_tiles_share)
    blind = "" if source.blind_accuracy is None else f"{source.blind_accuracy:.0%}"
    percentages = (f"{share:.0%}" for share in shares)
    return (f"{source.split}/{source.source}", f"{source.records:,}", f"{source.bytes / 1e6:.1f}", *percentages, blind)


if __name__ == "__main__":
    sys.exit(main())
