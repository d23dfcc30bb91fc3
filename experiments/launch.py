"""`python -m experiments.launch --config NAME`: the one way a run starts."""

from __future__ import annotations

import argparse
import difflib
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments.named import COMPRESSOR, config_names, config_summary

if TYPE_CHECKING:
    from experiments.config import ExperimentConfig
    from hypervl_jax.planning.chips import Topology
    from hypervl_jax.training.telemetry.monitor import MonitorConfig

OVERRIDE = "--config."
COMPILATION_CACHE, NO_CACHE = "compilation_cache", "off"
HANG_SECONDS = 600.0
USAGE_ERROR, RUN_ERROR, SUCCESS = 2, 1, 0

_DESCRIPTION = """\
Trains HyperVL as a named configuration says, or resumes the run that already lives in the workdir.

configurations:
{configurations}

overrides:
  --config.PATH=VALUE changes one value; its type is that of the field. --print shows all paths and values.
    --config.optimizer.learning_rate=1e-4           a number
    --config.loop.token_budget=2e9                  whole numbers may be written so
    --config.optimizer.frozen=decoder,vision_base   a list; an empty value is an empty list
    --config.data.mixture=captions:3,text:1         sources and their shares of the tokens
    --config.architecture.decoder=qwen3-0.6b        a named size; single fields can follow it
    --config.mesh=fsdp:64,tensor:4                  a mesh by its sizes, or by name (tensor4); also single fields
"""

_COMPRESSOR_SUMMARY = (
    "the compressor (VRC), from labels of `python -m tools.label_resolutions`; its own keys, see --print."
)

_EPILOG = """\
examples:
  python -m data_pipelines.rendered --output data/embedded
  python -m experiments.launch --config tiny
  python -m experiments.launch --config stage1 --debug
  python -m experiments.launch --config stage1 --workdir /mnt/runs/s1 --data /mnt/data/stage1 \\
      --config.initialize_from.vision_base=/mnt/siglip2-base-patch16-512 \\
      --config.initialize_from.vision_large=/mnt/siglip2-large-patch16-512 --config.initialize_from.llm=/mnt/Qwen3-1.7B
  python -m experiments.launch --config stage2 --workdir /mnt/runs/s2 --data /mnt/data/stage2 \\
      --config.initialize_from.checkpoint=/mnt/runs/s1
  python -m experiments.launch --config compressor --workdir /mnt/runs/vrc --data /mnt/data/stage3 --config.labels=/mnt/labels \\
      --config.checkpoint=/mnt/runs/s3 --config.backbone=v4-small --config.pretrained=/mnt/mobilenetv4_conv_small.e2400_r224_in1k

resuming:
  Start the same command again. Keys that do not change what a step computes (mesh, runtime, checkpoint, heldout, accumulation,
  workers, token_budget) may differ; others, another tokenizer and other data are refused unless --accept-changes is given.
  SIGTERM saves and ends the run.

watching (files in the workdir; nothing of it changes what the run computes):
  metrics.jsonl       each step: losses by branch, gradient norms by part; at log boundaries parameter norms and tokens by source
  performance.jsonl   each log window: tokens and tiles per second and chip, MFU, data wait, device memory, goodput, epochs by source
  goodput.json        seconds of start, compile, data wait, step, checkpoint, evaluation and lost work, over all starts
  stacks-N.txt        what all threads of process N did when it hung;  profile/  XProf traces;  tensorboard/

environment:
  JAX_PLATFORMS=cpu        run on the CPU
  JAX_COMPILATION_CACHE_DIR=DIR   where compiled programs are kept, if --compilation-cache does not say
  On Cloud TPU, GKE (JobSet, xpk) and under Slurm (srun) every process is started with the same command and finds the others.
  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID   elsewhere, instead of the three flags
  HYPERVL_HEARTBEAT_TIMEOUT=100   seconds after which a silent process counts as lost and the others end
  HYPERVL_START_TIMEOUT=600       seconds in which all processes must have come

exit status:
  0  complete, or saved after a preemption    1  the run stopped with an error    2  it could not start as asked
  134 (SIGABRT)  another process of the run was lost; the last line says which
"""


class LaunchError(Exception):
    """What was asked for cannot be started; the message says why and what to do."""


def positive_count(text: str) -> int:
    """A whole number of 1 or more, for `argparse`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 1 or more")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line without the overrides."""
    summaries = {name: config_summary(name) for name in config_names()} | {COMPRESSOR: _COMPRESSOR_SUMMARY}
    width = max(map(len, summaries))
    listed = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in summaries.items())
    made = argparse.ArgumentParser(
        "python -m experiments.launch",
        description=_DESCRIPTION.format(configurations=listed),
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--config", required=True, metavar="NAME", help="a configuration of the list above")
    add("--workdir", metavar="DIR", help="checkpoints, metrics, records; on a file system (default: runs/NAME)")
    add("--data", metavar="DIR", help="short for --config.data.root=DIR: sources in DIR/train/NAME, tokenizer in DIR")
    add(
        "--debug",
        action="store_true",
        help="a built-in small size on embedded data (made if missing), a few dozen steps",
    )
    add(
        "--hardware",
        metavar="NAME",
        help="mesh, accumulation, rematerialisation for v5e-256, 2xv5e-256, ... (default: for the TPUs found; none: as configured)",
    )
    add("--print", action="store_true", help="print the configuration with all overrides and stop")
    add(
        "--accept-changes",
        action="store_true",
        help="resume although keys or data changed that change what a step computes",
    )
    add("--profile-steps", metavar="FIRST:END", help="trace the steps FIRST to END-1 for XProf into WORKDIR/profile")
    add(
        "--compilation-cache",
        metavar="DIR",
        help=f"keep compiled programs here, so that the next start need not compile; {NO_CACHE}: keep none "
        f"(default: $JAX_COMPILATION_CACHE_DIR, else WORKDIR/{COMPILATION_CACHE})",
    )
    add(
        "--hang-seconds",
        type=float,
        default=HANG_SECONDS,
        metavar="N",
        help="write down the stacks of all threads when a step takes longer than this, or anything else (compilation, "
        "checkpoint, evaluation) ten times as long; 0: never (default: %(default)g)",
    )
    add(
        "--devices",
        type=positive_count,
        metavar="N",
        help="split the CPU into N devices, to try a mesh without accelerators",
    )
    add(
        "--coordinator",
        metavar="HOST:PORT",
        help="several processes elsewhere than on Cloud TPU or Slurm: address of process 0",
    )
    add("--process-id", type=int, metavar="I", help="number of this process")
    add("--num-processes", type=int, metavar="N", help="processes in all")
    return made


def parse(
    arguments: Sequence[str], command_line: argparse.ArgumentParser | None = None
) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """Options of `command_line` (`parser()` when None), and overrides as (path, text) in their order.

    Ends the program with status 2 on anything else.
    """
    command_line = command_line or parser()
    options, rest = command_line.parse_known_args(arguments)
    overrides, words = [], iter(rest)
    for word in words:
        path, equals, text = word.removeprefix(OVERRIDE).partition("=")
        if not word.startswith(OVERRIDE):
            near = difflib.get_close_matches(word, command_line._option_string_actions, n=1)
            command_line.error(f"unknown argument {word}" + (f"; did you mean {near[0]}?" if near else ""))
        value = text if equals else next(words, None)
        if value is None:
            command_line.error(f"{word} has no value; write {word}=VALUE")
        overrides.append((path, value))
    return options, overrides


def resolve(
    options: argparse.Namespace, overrides: Sequence[tuple[str, str]], found: Topology | None = None
) -> ExperimentConfig:
    """The typed configuration: named, then made small by --debug, then laid out for --hardware or else for the topology that
    was found, then --data, then overrides in their order.

    Raises:
        ConfigError: an unknown name or key, a value of the wrong type, or a combination that cannot work.
    """
    from experiments import hardware
    from experiments import overrides as typed
    from experiments.config import ExperimentConfig
    from experiments.debug import fit_warmup, shrink
    from experiments.named import load_config

    config = load_config(options.config)
    if options.debug:
        config = typed.to_config_dict(shrink(typed.from_config_dict(ExperimentConfig, config)))
    given = [("data.root", options.data)] * bool(options.data) + list(overrides)
    for path, text in given:
        typed.apply_override(config, ExperimentConfig, path, text)
    if options.debug:
        fit_warmup(config, given)
    topology = hardware.chosen(options.hardware, found)
    if topology is not None:
        hardware.modify(config, topology, given)
    hardware.fit_tile_chunk(config, given)
    return typed.from_config_dict(ExperimentConfig, config)


def prepare(config: ExperimentConfig, workdir: pathlib.Path, options: argparse.Namespace) -> bool:
    """Checks all that can be checked before a device is touched; False when the run is already complete.

    Raises:
        ConfigError: the workdir belongs to a run with another configuration.
        BuildError: --debug could not make its data.
        LaunchError: something that the run needs is missing, or is not what its checkpoints were trained with.
        OSError: the workdir cannot be written.
    """
    from experiments import debug, preflight, storage
    from experiments import workdir as workdirs

    if not options.accept_changes:
        workdirs.check_same_run(workdir, config)
    if workdirs.is_complete(workdir, config):
        return False
    if options.debug and debug.make_data(config):
        print(f"made the embedded data in {config.data.root}", file=sys.stderr)
    resuming = workdirs.last_step(workdir) is not None
    problems = preflight.find_problems(config, resuming)
    if resuming and not problems and not options.accept_changes:
        problems = preflight.changed_inputs(config, workdir)
    if problems:
        raise LaunchError("\n".join([f"{config.name} cannot start:", *problems]))
    storage.make_writable(workdir)
    return True


def monitoring(options: argparse.Namespace, started: float) -> MonitorConfig:
    """How the run is watched. Raises `ConfigError` on steps that are no range and on a negative time."""
    from hypervl_jax.training.telemetry.monitor import MonitorConfig
    from hypervl_jax.training.telemetry.profiling import parse_steps

    steps = parse_steps(options.profile_steps) if options.profile_steps else None
    return MonitorConfig(started, steps, options.hang_seconds)


def keep_compiled(choice: str | None, workdir: pathlib.Path) -> None:
    """Sets JAX's cache of compiled programs: `choice`, else what the environment says, else a directory in the workdir."""
    import jax

    directory = choice or jax.config.jax_compilation_cache_dir or os.fspath(workdir.absolute() / COMPILATION_CACHE)
    jax.config.update("jax_compilation_cache_dir", None if choice == NO_CACHE else directory)


def start(
    workdir: pathlib.Path,
    options: argparse.Namespace,
    overrides: Sequence[tuple[str, str]],
    watched: MonitorConfig,
) -> int:
    """Joins the processes, lays the configuration out on the devices, trains, says how it ended; returns the exit status."""
    import jax

    from experiments import hardware, storage
    from experiments import workdir as workdirs
    from experiments.distributed import start_processes
    from experiments.run import run_experiment, say, shown_log

    if options.devices is not None:
        jax.config.update("jax_num_cpu_devices", options.devices)
    # JAX decides on its cache at the first program, and joining the processes compiles one.
    keep_compiled(options.compilation_cache, workdir)
    start_processes(options.coordinator, options.process_id, options.num_processes)
    if jax.process_index() == 0:
        with storage.explained():
            workdirs.lock(workdir)
    found = hardware.live_topology(jax.devices())
    config, topology = resolve(options, overrides, found), hardware.chosen(options.hardware, found)
    if topology is not None:
        say(hardware.describe(config, topology))
    with shown_log():
        outcome = run_experiment(config, workdir, watched)
    tokens = sum(outcome.tokens.values())
    say(f"{outcome.status} at step {outcome.step} with {tokens:,} tokens: {workdir}")
    return SUCCESS


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    started = time.monotonic()
    options, overrides = parse(sys.argv[1:] if arguments is None else arguments)
    from data_pipelines.errors import RecordError
    from data_pipelines.rendered.build import BuildError
    from experiments import storage
    from experiments.overrides import config_text
    from hypervl_jax.architecture import ConfigError

    try:
        if options.config == COMPRESSOR:
            from experiments import compressor

            return compressor.launch(options, overrides)
        config = resolve(options, overrides)
        workdir = pathlib.Path(options.workdir or pathlib.Path("runs") / config.name)
        if options.print:
            print(config_text(config), end="")
            return SUCCESS
        watched = monitoring(options, started)
        with storage.explained():
            unfinished = prepare(config, workdir, options)
        if not unfinished:
            print(f"{config.name} is complete: {os.fspath(workdir)}", file=sys.stderr)
            return SUCCESS
    except (ConfigError, BuildError, LaunchError, RecordError, storage.StorageError) as error:
        return _fail(error, USAGE_ERROR)
    return _guarded_start(workdir, options, overrides, watched)


def _guarded_start(
    workdir: pathlib.Path,
    options: argparse.Namespace,
    overrides: Sequence[tuple[str, str]],
    watched: MonitorConfig,
) -> int:
    """`start`, with the errors that explain themselves printed without a stack. Among other processes a failed one exits here."""
    from data_pipelines.lane_state import SourceFailed
    from data_pipelines.records import RecordError
    from data_pipelines.workers import WorkerDied
    from experiments import distributed, storage
    from hypervl_jax.architecture import ConfigError
    from hypervl_jax.training.checkpoint import CheckpointError
    from hypervl_jax.training.loop import TrainingStopped

    explained = (
        SourceFailed,
        RecordError,
        WorkerDied,
        CheckpointError,
        TrainingStopped,
        storage.StorageError,
    )
    try:
        with storage.explained():
            return start(workdir, options, overrides, watched)
    except ConfigError as error:
        return distributed.leave(_fail(error, USAGE_ERROR))
    except explained as error:
        return distributed.leave(_fail(error, RUN_ERROR))
    except Exception as error:
        if not distributed.among_others():
            raise
        traceback.print_exc()
        distributed.await_verdict(error)
        return distributed.leave(RUN_ERROR)


def _fail(error: Exception, status: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
