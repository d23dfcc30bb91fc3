"""`python -m tools.plan_topology --config stage1 --topology v5e-256`: does a stage fit a TPU slice, how fast can it be, what does it cost.

Compiles the step that `experiments.launch --hardware v5e-256` runs with the TPU compiler, on this machine, without a TPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from experiments import launch, plan_process, plan_report, plan_search, plan_tables
from experiments.config import ExperimentConfig
from experiments.planning import Compiled, CompilerFailed, Plan, replan, runs_the_same_program
from hypervl_jax.architecture import ConfigError
from hypervl_jax.planning.chips import CompilerMissing, Topology, topology

USAGE_ERROR, COMPILER_FAILED, SUCCESS = 2, 1, 0

_DESCRIPTION = """\
Compiles the training step of a configuration for a TPU topology, on this machine, and prints whether it fits, FLOPs, collectives, the
floors of a step, and days, chip-hours and cost of the stage. The layout (mesh, accumulation, rematerialisation) is that of
experiments/hardware.py, the same that `experiments.launch --hardware` takes; --config.PATH=VALUE changes it as there.
"""

_EPILOG = """\
topologies:
  v5e-256, v6e-256        number of chips             v5p-512, v4-512, tpu7x-128   number of TensorCores, two a chip
  2xv5e-256               two slices                  v5p:16x16x16                 a shape, in chips

examples:
  python -m tools.plan_topology --config stage1 --topology v5e-256
  python -m tools.plan_topology --config stage2 --topology v5p-512 --rows-per-chip 2 --mfu 0.45 --price-per-chip-hour 4.2
  python -m tools.plan_topology --config stage3 --topology v6e-256 --search
  python -m tools.plan_topology --table --config stage1,stage2,stage3 --topology v5e-256,v6e-256,v5p-512,2xv5e-256,v5p-4096,v5p-8192

exit status:
  0  planned, also when it does not fit (see "fits" with --json)    1  the TPU compiler failed    2  it cannot be planned as asked
"""


def parser() -> argparse.ArgumentParser:
    """The command line without the overrides."""
    made = argparse.ArgumentParser(
        "python -m tools.plan_topology",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--config", required=True, metavar="NAME[,NAME…]", help="named configurations")
    add("--topology", required=True, metavar="NAME[,NAME…]", help="TPU topologies")
    add("--debug", action="store_true", help="the built-in small size, to see the command work in a minute")
    layout = made.add_mutually_exclusive_group()
    layout.add_argument(
        "--rows-per-chip",
        type=launch.positive_count,
        metavar="N",
        help="rows that a chip (or those that share a row) computes at a time",
    )
    layout.add_argument(
        "--search", action="store_true", help="find rows, rematerialisation and loss chunk with the best bound that fit"
    )
    add("--remat", metavar="DECODER/TOWER", help="rematerialisation, e.g. attention/tile")
    add("--mfu", type=_share, default=0.4, help="stated MFU for time and cost (default: 0.4)")
    add("--price-per-chip-hour", type=_price, metavar="P", help="for the cost, in any currency")
    add("--save", metavar="DIR", help="write the plan, the HLO and the serialized executable there")
    shown = made.add_mutually_exclusive_group()
    shown.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object instead of tables: the plan, or {plans: [...]} of several",
    )
    shown.add_argument("--table", action="store_true", help="print the Markdown tables of docs/scale.md")
    return made


def _share(text: str) -> float:
    return _number(text, lambda value: 0 < value <= 1, "a number above 0 and at most 1")


def _price(text: str) -> float:
    return _number(text, lambda value: 0 <= value < math.inf, "a number of 0 or more")


def _number(text: str, allowed: Callable[[float], bool], wanted: str) -> float:
    """Refused here, before minutes of compilation."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not allowed(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


def configured(
    options: argparse.Namespace, overrides: Sequence[tuple[str, str]], name: str, wanted: Topology
) -> ExperimentConfig:
    """The configuration as `launch --hardware` resolves it, with --remat and --rows-per-chip on top."""
    changes = list(overrides)
    if options.remat:
        decoder, _, tower = options.remat.partition("/")
        changes += [("runtime.decoder_remat", decoder)] + [("runtime.tower_remat", tower)] * bool(tower)
    asked = argparse.Namespace(config=name, debug=options.debug, data=None, hardware=wanted.name)
    config = launch.resolve(asked, changes)
    return plan_search.with_rows(config, wanted, options.rows_per_chip) if options.rows_per_chip else config


def make_plan(
    options: argparse.Namespace,
    config: ExperimentConfig,
    wanted: Topology,
    directory: pathlib.Path | None,
    console: Console,
) -> Plan:
    """One plan, or the best one of a search, saved to `directory`; says on `console` what is being waited for."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"{config.name} on {wanted.name}: compiling for the TPU (minutes at full size)")

        def compiled(candidate: ExperimentConfig, kept: pathlib.Path | None = None) -> Plan:
            return plan_process.plan_apart(candidate, wanted, options.mfu, options.price_per_chip_hour, kept)

        def tried(candidate: ExperimentConfig) -> Plan | None:
            progress.update(task, description=f"{config.name} on {wanted.name}: compiling {layout_of(candidate)}")
            try:
                made = compiled(candidate)
            except CompilerFailed as error:
                progress.console.print(
                    f"{layout_of(candidate)}: left out, for the TPU compiler fails at it ({error})", markup=False
                )
                return None
            progress.console.print(f"{layout_of(candidate)}: {plan_report.planned(made)}", markup=False)
            return made

        if not options.search:
            return compiled(config, directory)
        best, plans = plan_search.search(config, wanted, tried)
        table = plan_tables.overview(map(plan_report.to_json, plans))
        console.print(table, highlight=False, markup=False, soft_wrap=True)
        return compiled(best.config, directory) if directory else best


def layout_of(config: ExperimentConfig) -> str:
    """What a search changes, in a few words."""
    runtime, objective = config.runtime, config.objective
    return (
        f"remat {runtime.decoder_remat}/{runtime.tower_remat}, {objective.accumulation} micro-batches, "
        f"loss chunk {objective.loss_chunk_tokens}"
    )


def show(options: argparse.Namespace, made: Plan) -> None:
    """One plan on standard output; JSON and the common table are printed at the end."""
    if not options.json and not options.table:
        Console().print(plan_report.tables(made))


def run(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> list[Plan]:
    """Plans every configuration on every topology, shows and saves each; a program that was compiled before is not compiled again."""
    plans: list[Plan] = []
    errors = Console(stderr=True)
    pairs = itertools.product(options.config.split(","), options.topology.split(","))
    # A mistake in the last pair is told before the first is compiled.
    asked = [(name, place, configured(options, overrides, name, topology(place))) for name, place in pairs]
    for name, place, config in asked:
        wanted = topology(place)
        several = [f"{name}-{place.replace(':', '-')}"] * ("," in options.config + options.topology)
        directory = pathlib.Path(options.save, *several) if options.save else None
        known = None if options.search else find_compiled(plans, config, wanted)
        if known is None:
            made = make_plan(options, config, wanted, directory, errors)
        else:
            errors.print(f"{name} runs the program of {known.config.name} on {wanted.name}: not compiled again")
            made = replan(known, config, options.mfu, options.price_per_chip_hour)
            if directory:
                plan_process.save(directory, Compiled(made, None, None))
        show(options, made)
        plans.append(made)
    return plans


def find_compiled(plans: Sequence[Plan], config: ExperimentConfig, wanted: Topology) -> Plan | None:
    """A plan whose program is that of a configuration on a topology, if there is one."""
    same = (plan for plan in plans if plan.topology == wanted and runs_the_same_program(plan.config, config))
    return next(same, None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options, overrides = launch.parse(sys.argv[1:] if arguments is None else arguments, parser())
    try:
        plans = run(options, overrides)
    except (ConfigError, CompilerMissing) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except CompilerFailed as error:
        print(
            f"error: the TPU compiler (libtpu {version('libtpu')}) fails at this step: {error}; another --remat, --rows-per-chip or mesh may "
            "compile, and --search leaves out what does not",
            file=sys.stderr,
        )
        return COMPILER_FAILED
    described = [plan_report.to_json(made) for made in plans]
    if options.table:
        print(plan_tables.tables(described))
    if options.json:
        print(json.dumps({"plans": described} if len(described) > 1 else described[0]))
    else:
        print(plan_report.CONVENTIONS)
    return SUCCESS


if __name__ == "__main__":
    sys.exit(main())
