"""`python -m experiments.sweep --config NAME --sweep NAME --on local|slurm|gke`: a named sweep over a configuration.

    sweep ─► variants ─► runs with stable directories ─ complete: skipped, begun: resumed ─► engine ─► table, plot

<workdir>/CONFIG/SWEEP/VARIANT/            one run, as `experiments.launch` writes it
<workdir>/CONFIG/SWEEP/VARIANT.output.log  what it printed (local)
<workdir>/CONFIG/SWEEP/table.{md,csv,json} all runs; plot.png beside them
"""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from experiments.sweeps import SWEEPS, command, question

if TYPE_CHECKING:
    from experiments.sweep_runs import Run

ENGINES = ("local", "slurm", "gke")
USAGE_ERROR, RUN_ERROR, SUCCESS, INTERRUPTED = 2, 1, 0, 130

_DESCRIPTION = """\
Runs a named sweep over a configuration, or goes on with it: complete runs are skipped, others resume. Ends with one table of all
runs, and a plot.

sweeps:
{sweeps}
"""

_EPILOG = """\
Words that are not options above go to every run: --data DIR, --debug, --hardware NAME, --config.PATH=VALUE.

examples:
  python -m experiments.sweep --config tiny --sweep dcl_weight --on local --data data/embedded
  python -m experiments.sweep --config stage2 --sweep dcl_weight --on local --dry-run
  python -m experiments.sweep --config stage2 --sweep learning_rate --on slurm --workdir /shared/sweeps --data /shared/stage2 \\
      --set nodes=8 --set tasks_per_node=1 --set timeout_min=2880 --set slurm_partition=tpu
  python -m experiments.sweep --config stage2 --sweep dcl_weight --on gke --workdir /gcs/sweeps --data /gcs/stage2 \\
      --set image=REGION-docker.pkg.dev/PROJECT/hypervl/train:TAG --set topology=v5e-256 --set bucket=BUCKET
  python -m experiments.sweep --config stage2 --sweep vrc_epsilon --on local --labels DIR --data DIR --checkpoint DIR

exit status:
  0  every run is complete or submitted    1  a run failed; the others went on    2  it could not start as asked    130  stopped
"""


def parser() -> argparse.ArgumentParser:
    """The command line without what is passed on."""
    width = max(map(len, SWEEPS))
    made = argparse.ArgumentParser(
        "python -m experiments.sweep",
        description=_DESCRIPTION.format(sweeps="\n".join(f"  {name:<{width}}  {question(name)}" for name in SWEEPS)),
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--config", required=True, metavar="NAME", help="a configuration of `python -m experiments.launch --help`")
    add("--sweep", required=True, choices=tuple(SWEEPS), metavar="NAME", help="a sweep of the list above")
    add("--on", required=True, choices=ENGINES, help="where the runs are executed")
    add(
        "--workdir",
        default="runs/sweeps",
        metavar="DIR",
        help="home of all sweeps, as the runs see it (default: runs/sweeps)",
    )
    add("--only", action="append", default=[], metavar="RUN", help="only this run of the sweep; may be repeated")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="an option of the engine; may be repeated")
    add("--dry-run", action="store_true", help="print the runs that would start, as commands or manifests, and stop")
    add("--collect", action="store_true", help="start nothing; write table and plot of what is there")
    add("--json", action="store_true", help="print the table as JSON on standard output")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options, extra = parser().parse_known_args(arguments)
    from experiments.sweep_runs import choose, expand
    from hypervl_jax.architecture import ConfigError

    home = pathlib.Path(options.workdir) / options.config / options.sweep
    try:
        every = expand(options.config, options.sweep, home, extra)
        runs = choose(every, options.only)
        if options.dry_run:
            return dry_run(runs, options)
        failures = {} if options.collect else execute(runs, options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    if visible(options):
        report(every, failures, home, options)
    else:
        print(f"no table: {home} lies in the bucket; mount it here and give --collect", file=sys.stderr)
    return RUN_ERROR if failures else SUCCESS


def engine_options(given: Sequence[str]) -> dict[str, str]:
    """`KEY=VALUE` words as a dictionary. Raises `ConfigError` for a word without a value."""
    from hypervl_jax.architecture import require

    pairs = [word.partition("=") for word in given]
    require(all(equals and key for key, equals, _ in pairs), "--set takes KEY=VALUE")
    return {key: value for key, _, value in pairs}


def visible(options: argparse.Namespace) -> bool:
    """Whether the runs' directories can be looked at from here: pods may see a bucket that this machine does not."""
    engine = importlib.import_module(f"experiments.engines.{options.on}")
    return not hasattr(engine, "mounted") or engine.mounted(engine_options(options.set))


def pending(runs: Sequence[Run], options: argparse.Namespace) -> list[Run]:
    """Runs that are not complete; says which are skipped and which resume.

    Raises `ConfigError` when a directory holds a run with other settings.
    """
    from experiments.sweep_runs import BEGUN, COMPLETE

    if not visible(options):
        print("which runs are complete is not known here: the pods of those end at once", file=sys.stderr)
        return list(runs)
    for run in runs:
        run.check()
    states = {run.name: run.state() for run in runs}
    for state, what in ((COMPLETE, "complete, skipped"), (BEGUN, "begun, resumed")):
        names = [name for name, found in states.items() if found == state]
        if names:
            print(f"{what}: {', '.join(names)}", file=sys.stderr)
    return [run for run in runs if states[run.name] != COMPLETE]


def dry_run(runs: Sequence[Run], options: argparse.Namespace) -> int:
    """Prints what would be started."""
    engine = importlib.import_module(f"experiments.engines.{options.on}")
    print(engine.describe(pending(runs, options), engine_options(options.set)))
    return SUCCESS


def execute(runs: Sequence[Run], options: argparse.Namespace) -> dict[str, str]:
    """Starts what is not complete; why runs failed, by name."""
    engine = importlib.import_module(f"experiments.engines.{options.on}")
    waiting = pending(runs, options)
    for run in waiting if visible(options) else ():
        run.claim()
    return engine.execute(waiting, engine_options(options.set))


def report(runs: Sequence[Run], failures: Mapping[str, str], home: pathlib.Path, options: argparse.Namespace) -> None:
    """Writes table and plot of the whole sweep, and prints the table."""
    from experiments import sweep_table

    rows = sweep_table.collect(runs, failures)
    paths = sweep_table.write(rows, home, f"{options.sweep} of {options.config}: {question(options.sweep)}")
    if options.json:
        print(json.dumps([row.to_json() for row in rows], indent=1))
    else:
        print(sweep_table.markdown(rows), end="")
    print(f"written: {', '.join(map(str, paths))} ({command(options.sweep)})", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
