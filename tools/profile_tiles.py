"""`python -m tools.profile_tiles`: what tiles cost in memory, time and tokens, against the whole picture in one pass."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from hypervl_jax.architecture import BRANCHES, ConfigError, require
from tools.profile_device import SIZES
from tools.tile_probe import BATCHED, FLASH, HERE, SERIAL, WAYS, WHOLE, Case, Probe, square_side

KINDS = {"document": (1754, 1240), "chart": (800, 1200), "photograph": (1512, 2016)}
"""(height, width) in pixels of three kinds of picture: an A4 page at 150 dpi, a chart of 3:2, half of a 12-megapixel photograph's sides."""

GROWTH_LIMIT = 1.05
"""How much more memory many tiles may take than one when they are encoded one after another."""

PAPER_MEMORY_RATIO = 6.8
"""The paper's peak memory of one pass over the whole picture over that of tiles (arXiv 2512.14052)."""

MIB, GIGA = 1 << 20, 1e9
_FILE_WIDTH = 120
"""Columns of a table that is written to a file."""

USAGE_ERROR, RUN_ERROR, SUCCESS = 2, 1, 0

_PROBE_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Makes the allocator of a measuring process give back every large block at once, so that its resident memory is what it uses."""

_DESCRIPTION = """\
Encodes pictures with one branch's tower and projector (random weights: speed and memory do not depend on what was learned), each
case in a process of its own. Peak memory is resident memory net of the program, the weights, the pixels and the visual tokens; time
is the median of a run, on the clock and of the processor; FLOPs are counted from the program. With --compile-for nothing is run:
the compiler says what memory a case needs and, for a TPU, what it moves over HBM.

ways:
  serial    one tile after another, as in inference and training
  batched   all tiles at once
  full      the whole picture in one pass, as a square of as many patches; the scores of all pairs of patches are in memory
  chunked   the same, the scores of 512 patches at a time
  flash     the same by the TPU's kernel, which holds no scores (with --compile-for only)

Warns when serial tiles do not keep memory constant: "memory spikes: tiling not triggered".
"""

_EPILOG = """\
examples:
  python -m tools.profile_tiles --config-size tiny --tiles 32,64 --images 256 --growth 9
  python -m tools.profile_tiles --config-size 2b --repeats 1 --output tiles.jsonl
  python -m tools.profile_tiles --config-size 2b --compile-for v5e-4 --json
  python -m tools.profile_tiles --config-size 2b --compile-for cpu
  python -m tools.profile_tiles --config-size 2b --images document,chart,photograph --tiles 512 --growth 0

exit status:
  0  measured    1  a measurement failed    2  it could not be measured as asked
"""


class ProbeFailed(RuntimeError):
    """A measuring process ended without a result; the message says what it said last."""


class Row(NamedTuple):
    """A case and what was found."""

    case: Case
    probe: Probe

    @property
    def memory(self) -> int | None:
        """Bytes that encoding needs: measured, or the compiler's where nothing was measured."""
        return self.probe.compiled_bytes if self.probe.net_bytes is None else self.probe.net_bytes


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Serial tiles against one pass over the same picture: how many times more the pass takes. None where one was not measured.

    `measured` says whether `memory` was measured on both sides or is the compiler's.
    """

    way: str
    tile: int
    picture: str
    memory: float | None
    milliseconds: float | None
    cpu_milliseconds: float | None
    flops: float
    traffic: float | None
    measured: bool


@dataclasses.dataclass(frozen=True)
class Growth:
    """Memory of many serial tiles over that of one."""

    tile: int
    tiles: int
    one: int
    many: int

    @property
    def ratio(self) -> float:
        """1 where memory stays constant."""
        return self.many / max(self.one, 1)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "python -m tools.profile_tiles",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--config-size", choices=sorted(SIZES), default="2b", help="a named architecture (default: 2b)")
    add("--encoder", choices=BRANCHES, default=BRANCHES[0], help="(default: %(default)s)")
    add("--tiles", default="128,256,512", metavar="LIST", help="sides of a tile in pixels (default: %(default)s)")
    add(
        "--images",
        default="1024,1536,2048,document,chart,photograph",
        metavar="LIST",
        help=f"sides of square pictures, WIDTHxHEIGHT, or {', '.join(KINDS)} (default: %(default)s)",
    )
    add("--ways", metavar="LIST", help="(default: all that the device has)")
    add("--growth", type=int, default=36, metavar="N", help="compare 1 serial tile with N; 0: do not (default: 36)")
    add("--tile-chunk", type=int, default=1, metavar="N", help="serial tiles that pass together; 0: all (default: 1)")
    add("--repeats", type=int, default=3, metavar="N", help="measured runs of each case (default: 3)")
    add(
        "--compile-for",
        default="",
        metavar="TOPOLOGY",
        help="run nothing; compile for one device of it, e.g. v5e-4, or cpu",
    )
    add("--output", metavar="FILE", help="JSON lines, one a case; the same command goes on where it was stopped")
    add("--json", action="store_true", help="print everything as one JSON object on the last line")
    return made


def parse_image(text: str) -> tuple[int, int]:
    """(height, width) of "1024", "1200x800" (width first) or the name of a kind. Raises `ConfigError`."""
    if text in KINDS:
        return KINDS[text]
    width, _, height = text.partition("x")
    require(
        width.isdecimal() and (height.isdecimal() if height else True) and int(width) > 0 and int(height or 1) > 0,
        f"--images {text!r} is neither a side, nor WIDTHxHEIGHT, nor one of {', '.join(KINDS)}",
    )
    return int(height or width), int(width)


def name_image(height: int, width: int) -> str:
    """A picture's kind where it has the size of one, else its size."""
    names = {size: kind for kind, size in KINDS.items()}
    return names.get((height, width), f"{height}²" if height == width else f"{width}x{height}")


def cases(options: argparse.Namespace) -> list[Case]:
    """Everything to measure, once each. Raises `ConfigError`."""
    names = lambda text: [part.strip() for part in text.split(",") if part.strip()]
    sides, images, ways = names(options.tiles), [*map(parse_image, names(options.images))], _ways(options)
    require(all(map(str.isdecimal, sides)), f"--tiles {options.tiles!r} is no list of sides in pixels")
    require(options.repeats >= 1, f"--repeats {options.repeats} must be at least 1")
    require(options.growth >= 0 and options.tile_chunk >= 0, "--growth and --tile-chunk must be 0 or more")
    shared = {"size": options.config_size, "branch": options.encoder, "repeats": options.repeats}
    shared |= {"chip": options.compile_for, "tile_chunk": options.tile_chunk}
    tiled = [
        Case(way=way, tile=int(side), height=height, width=width, **shared)
        for way in ways
        if way in (SERIAL, BATCHED)
        for side in sides
        for height, width in images
    ]
    cell = SIZES[options.config_size]().tiling.cell_size
    whole = [
        Case(way=way, tile=square_side(height, width, cell), height=height, width=width, **shared)
        for way in ways
        if way in WHOLE
        for height, width in images
    ]
    growing = [
        Case(way=SERIAL, tile=int(side), height=int(side), width=int(side) * count, **shared)
        for side in sides
        if options.growth and SERIAL in ways
        for count in (1, options.growth)
    ]
    found = list(dict.fromkeys([*growing, *tiled, *whole]))
    for case in found:
        case.config  # noqa: B018 (a tile that the tower cannot take is told now, not by a measuring process)
    return found


def _ways(options: argparse.Namespace) -> list[str]:
    """The ways that were asked for, or all that there are. Raises `ConfigError`."""
    if not options.ways:
        return [way for way in WAYS if way != FLASH or options.compile_for not in ("", HERE)]
    found = [part.strip() for part in options.ways.split(",") if part.strip()]
    for way in found:
        require(way in WAYS, f"--ways {way!r} is not one of {', '.join(WAYS)}")
    return found


def run_case(case: Case) -> Probe:
    """Measures a case in a process of its own. Raises `ProbeFailed`."""
    command = [sys.executable, "-m", "tools.tile_probe", json.dumps(dataclasses.asdict(case))]
    environment = {**os.environ, **_PROBE_ENVIRONMENT, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    try:
        return Probe(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        said = done.stderr.strip().splitlines()[-1:] or [f"no result, exit status {done.returncode}"]
        raise ProbeFailed(f"{case.way} {case.width}x{case.height} in tiles of {case.tile}: {said[0]}") from None


def measure_all(wanted: Sequence[Case], output: str | None, console: Console) -> list[Row]:
    """All cases in order; those that `output` holds already are not measured again."""
    known = read_rows(output) if output else {}
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows = []
    with Progress(*columns, console=console, transient=True) as progress:
        line = progress.add_task("", total=len(wanted))
        for case in wanted:
            progress.update(line, description=f"{case.way} {case.width}x{case.height} tile {case.tile}")
            rows.append(Row(case, known.get(case) or run_case(case)))
            if output and case not in known:
                _append(output, rows[-1])
            progress.update(line, advance=1)
    return rows


def read_rows(path: str) -> dict[Case, Probe]:
    """The rows of a file of JSON lines, whole lines only; empty where there is none. Raises `ConfigError`."""
    try:
        lines = pathlib.Path(path).read_text().splitlines(keepends=True)
        values = [json.loads(line) for line in lines if line.endswith("\n")]
        return {Case(**value["case"]): Probe(**value["probe"]) for value in values}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} holds no measurements of this tool ({error}); give another --output") from error


def _append(path: str, row: Row) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"case": dataclasses.asdict(row.case), "probe": dataclasses.asdict(row.probe)}) + "\n")


def growths(rows: Sequence[Row]) -> list[Growth]:
    """Of each tile size measured serially: the most tiles against one."""
    found = []
    for tile in dict.fromkeys(row.case.tile for row in rows if row.case.way == SERIAL):
        known = [row for row in rows if (row.case.way, row.case.tile) == (SERIAL, tile) and row.memory is not None]
        one = next((row for row in known if row.probe.tiles == 1), None)
        many = max(known, key=lambda row: row.probe.tiles, default=None)
        if one and many and many.probe.tiles > 1 and one.memory:
            found.append(Growth(tile, many.probe.tiles, one.memory, many.memory))
    return found


def comparisons(rows: Sequence[Row]) -> list[Comparison]:
    """Every picture measured in serial tiles and in one pass."""
    pairs = (
        (tiles, whole)
        for whole in rows
        if whole.case.way in WHOLE
        for tiles in rows
        if tiles.case.way == SERIAL and (tiles.case.height, tiles.case.width) == (whole.case.height, whole.case.width)
    )
    return [_compare(tiles, whole) for tiles, whole in pairs]


def _compare(tiles: Row, whole: Row) -> Comparison:
    measured = tiles.probe.net_bytes is not None and whole.probe.net_bytes is not None
    name = "net_bytes" if measured else "compiled_bytes"
    ratio = lambda field: _ratio(getattr(whole.probe, field), getattr(tiles.probe, field))
    return Comparison(
        way=whole.case.way,
        tile=tiles.case.tile,
        picture=name_image(whole.case.height, whole.case.width),
        memory=ratio(name),
        milliseconds=ratio("milliseconds"),
        cpu_milliseconds=ratio("cpu_milliseconds"),
        flops=whole.probe.flops / tiles.probe.flops,
        traffic=ratio("traffic_bytes"),
        measured=measured,
    )


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def warnings(rows: Sequence[Row]) -> list[str]:
    """The failure sign of tiling, with the measured values; empty where memory stays constant."""
    return [
        f"memory spikes: tiling not triggered: {found.tiles} tiles of {found.tile} pixels take {found.ratio:.2f} times the memory "
        f"of one ({found.many / MIB:.1f} MiB against {found.one / MIB:.1f} MiB), at most {GROWTH_LIMIT} is expected; "
        "encode one tile after another (runtime.tile_chunk=1)"
        for found in growths(rows)
        if found.ratio > GROWTH_LIMIT
    ]


def to_json(rows: Sequence[Row]) -> dict[str, Any]:
    """Everything as plain values."""
    return {
        "rows": [{**dataclasses.asdict(row.case), **dataclasses.asdict(row.probe)} for row in rows],
        "growth": [dataclasses.asdict(found) | {"ratio": found.ratio} for found in growths(rows)],
        "comparisons": [dataclasses.asdict(found) for found in comparisons(rows)],
        "warnings": warnings(rows),
    }


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """The measurements, then what they say."""
    yield _row_table(rows)
    if found := growths(rows):
        table = Table(
            "tile", "tiles", "memory of one, MiB", "of all, MiB", "ratio", title="serial tiles: memory as tiles grow"
        )
        for row in found:
            table.add_row(
                str(row.tile), str(row.tiles), f"{row.one / MIB:.1f}", f"{row.many / MIB:.1f}", f"{row.ratio:.3f}"
            )
        yield table
    if compared := comparisons(rows):
        title = f"one pass over serial tiles; the paper's memory ratio is {PAPER_MEMORY_RATIO}"
        table = Table(
            "picture", "one pass", "tile", "memory", "by", "time", "CPU time", "FLOPs", "HBM traffic", title=title
        )
        for row in compared:
            by = "measured" if row.measured else "compiler"
            times = [_times(value) for value in (row.milliseconds, row.cpu_milliseconds, row.flops, row.traffic)]
            table.add_row(row.picture, row.way, str(row.tile), _times(row.memory), by, *times)
        yield table


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}×"


def _row_table(rows: Sequence[Row]) -> Table:
    headings = (
        "picture",
        "way",
        "tile",
        "tiles",
        "tokens",
        "GFLOP",
        "net MiB",
        "compiler MiB",
        "HBM GiB",
        "ms",
        "CPU ms",
        "GFLOP/CPU-s",
    )
    table = Table(*headings, caption="net: without weights, pixels and visual tokens", title_justify="left")
    for column in table.columns[2:]:
        column.justify = "right"
    for case, probe in rows:
        known: Mapping[str, tuple[float | None, float]] = {
            "net": (probe.net_bytes, MIB),
            "compiled": (probe.compiled_bytes, MIB),
            "traffic": (probe.traffic_bytes, 1 << 30),
            "ms": (probe.milliseconds, 1),
            "cpu": (probe.cpu_milliseconds, 1),
            "speed": (probe.flops / (probe.cpu_milliseconds / 1000) if probe.cpu_milliseconds else None, GIGA),
        }
        cells = ["" if value is None else f"{value / unit:,.1f}" for value, unit in known.values()]
        left_out = [f"left out: {probe.left_out}"] if probe.left_out else cells[:1]
        sizes = (str(case.tile), str(probe.tiles), str(probe.tokens), f"{probe.flops / GIGA:,.1f}")
        table.add_row(name_image(case.height, case.width), case.way, *sizes, *left_out, *cells[1:])
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options, console = parser().parse_args(arguments), Console(stderr=True)
    try:
        rows = measure_all(cases(options), options.output, console)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except (ProbeFailed, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return RUN_ERROR
    shown = console if options.json else Console()
    if not shown.is_terminal:
        shown = Console(stderr=options.json, width=_FILE_WIDTH)
    for table in tables(rows):
        shown.print(table)
    for warning in warnings(rows):
        print(f"warning: {warning}", file=sys.stderr)
    if options.json:
        print(json.dumps(to_json(rows)))
    return SUCCESS


if __name__ == "__main__":
    sys.exit(main())
