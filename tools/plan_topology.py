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

import jax
from jax.experimental import serialize_executable
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from experiments import launch, plan_report, plan_search, plan_tables
from experiments.config import ExperimentConfig
from experiments.planning import Compiled, Plan, plan, replan, runs_the_same_program
from hypervl_jax.architecture import ConfigError
from hypervl_jax.planning.chips import CompilerMissing, Topology, topology

USAGE_ERROR, SUCCESS = 2, 0

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
  python -m tools.plan_topology --table --config stage1,stage2,stage3 --topology v5e-256,v6e-256,v5p-512,2xv5e-256,v5p-8192

exit status:
  0  planned, also when it does not fit (see "fits" with --json)    2  it cannot be planned as asked
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


def make_plan(options: argparse.Namespace, config: ExperimentConfig, wanted: Topology, console: Console) -> Compiled:
    """One plan, or the best one of a search; says on `console` what is being waited for."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    asked = (options.mfu, options.price_per_chip_hour)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"{config.name} on {wanted.name}")

        def say(text: str) -> None:
            progress.update(task, description=f"{config.name} on {wanted.name}: {text}")

        def apart(candidate: ExperimentConfig) -> Plan | None:
            say(f"compiling {layout_of(candidate)}")
            made = plan_search.plan_apart(candidate, wanted, *asked)
            if made is None:
                progress.console.print(f"left out, for the TPU compiler fails at it: {layout_of(candidate)}")
            return made

        if not options.search:
            return plan(config, wanted, *asked, say)
        best, tried = plan_search.search(config, wanted, apart)
        console.print(plan_tables.overview(map(plan_report.to_json, tried)), highlight=False, markup=False)
        return plan(best.config, wanted, *asked, say) if options.save else Compiled(best, None)


def layout_of(config: ExperimentConfig) -> str:
    """What a search changes, in a few words."""
    runtime, objective = config.runtime, config.objective
    return (
        f"remat {runtime.decoder_remat}/{runtime.tower_remat}, {objective.accumulation} micro-batches, "
        f"loss chunk {objective.loss_chunk_tokens}"
    )


def save(directory: pathlib.Path, made: Compiled) -> None:
    """Writes plan.json and, when the step was compiled for it and fits, the optimised HLO and the executable as `jax` serializes it.

    The executable is for people who trust its origin: reading it back (`serialize_executable.deserialize_and_load`) unpickles.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "plan.json").write_text(json.dumps(plan_report.to_json(made.plan), indent=1))
    if made.executable is not None:
        (directory / "step.hlo.txt").write_text(made.executable.as_text())
        (directory / "step.executable").write_bytes(serialize_executable.serialize(made.executable)[0])


def show(options: argparse.Namespace, made: Plan) -> None:
    """One plan on standard output; JSON and the common table are printed at the end."""
    if not options.json and not options.table:
        Console().print(plan_report.tables(made))


def run(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> list[Plan]:
    """Plans every configuration on every topology, shows and saves each; a program that was compiled before is not compiled again."""
    plans: list[Plan] = []
    errors = Console(stderr=True)
    for name, place in itertools.product(options.config.split(","), options.topology.split(",")):
        wanted = topology(place)
        config = configured(options, overrides, name, wanted)
        known = None if options.search else find_compiled(plans, config, wanted)
        if known is None:
            made = make_plan(options, config, wanted, errors)
        else:
            errors.print(f"{name} runs the program of {known.config.name} on {wanted.name}: not compiled again")
            made = Compiled(replan(known, config, options.mfu, options.price_per_chip_hour), None)
        if options.save:
            several = "," in options.config + options.topology
            save(pathlib.Path(options.save, *([f"{name}-{place.replace(':', '-')}"] * several)), made)
        show(options, made.plan)
        plans.append(made.plan)
    return plans


def find_compiled(plans: Sequence[Plan], config: ExperimentConfig, wanted: Topology) -> Plan | None:
    """A plan whose program is that of a configuration on a topology, if there is one."""
    same = (plan for plan in plans if plan.topology == wanted and runs_the_same_program(plan.config, config))
    return next(same, None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options, overrides = launch.parse(sys.argv[1:] if arguments is None else arguments, parser())
    # The TPU compiler needs no TPU, and a TPU of this machine is none of the planner's business.
    jax.config.update("jax_platforms", "cpu")
    try:
        plans = run(options, overrides)
    except (ConfigError, CompilerMissing) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
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
