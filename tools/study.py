"""`python -m tools.study`: the studies of the paper's two ideas, VRC and DCL, from nothing to one page.

    embedded data at three resolutions ─► stage 1 ┬► reference model ─► labels ─► compressors at three ε ─► ablation  ┐
                                                  └► arms of DCL, three seeds each ─► both encoders compared          ┴► study.md

Every step is a command of its own, as in `tools.demo`, whose bookkeeping this uses: a stopped study goes on, and a step is made again
when its command, the code that defines it or a step before it changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from experiments.stopping import terminate_as_interrupt
from experiments.sweeps import DCL_SEEDS
from tools.demo import FAILED, INTERRUPTED, Demo, DemoError, Step, command_line, time_table

ARM_ROWS = 2
"""Rows of a batch of DCL's arms, half of `tiny`'s: eighteen runs, and in a fixed time many small steps get further than few large ones."""

TASKS = ("digits", "documents", "charts", "scenes")
UNSEEN = "documents"
"""The task that one compressor never sees: the densest, and the one with the most to save."""

EPSILONS = (0.01, 0.05, 0.1)

FLOOR = "1.0"
"""Nats below which L(1) is no scale to compare with. A tiny model is certain of what it reads, and at the default floor ε = 0.05 would
ask that 5 thousandths of a nat are not lost, less than L(α) changes by where the grid of patches falls. With 1, Δ is the loss increase itself."""

_COMPRESSION = (
    "hypervl_jax/training/compress*.py",
    "hypervl_jax/models/compressor*.py",
    "hypervl_jax/mobilenet.py",
    "hypervl_jax/vision/*.py",
)
_EVALUATION = ("hypervl_jax/evaluation/metrics.py", "hypervl_jax/evaluation/benchmarks.py", "tools/evaluate.py")

_DESCRIPTION = """\
Runs the studies of the compressor (VRC) and of dual consistency learning (DCL) at the tiny size, each step a command of its own, and
writes one page with claims, tables and plots. Stop it with Ctrl-C at any time; the same command goes on from there.

scales:
  smoke  every step at its least size, for a look at the commands; its figures mean nothing
  study  the main arms: at most 3 hours on 2 cores
  full   the exploratory arms too: at most 12 hours
"""


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large a study is.

    Attributes:
        data: size of the embedded data (`data_pipelines.rendered`).
        stage1, reference, arms: steps of the trainings; of `arms`, those of both branches by turns.
        labels: labelled images of each task.
        compressor: steps of the compressors' training.
        seeds: of the main arms.
        items: held-out items of each task; None for all.
        exploratory: whether the settings of DCL are varied too.
    """

    data: str
    stage1: int
    reference: int
    arms: int
    labels: int
    compressor: int
    seeds: tuple[int, ...] = DCL_SEEDS
    items: int | None = None
    exploratory: bool = False


STUDY = Scale("study", stage1=1500, reference=4500, arms=700, labels=1000, compressor=400)
SCALES = {
    "smoke": Scale("study_test", 60, 60, 60, labels=20, compressor=40, seeds=(0,), items=8),
    "study": STUDY,
    "full": dataclasses.replace(STUDY, exploratory=True),
}


def steps(workdir: pathlib.Path, scale: Scale) -> list[Step]:
    """The steps of a study, in order."""
    found = [_data(workdir, scale), _stage1(workdir, scale), _reference(workdir, scale)]
    found += [_labels(workdir, scale), _compressors(workdir, scale), _unseen(workdir, scale), _ablation(workdir, scale)]
    found += [_sweep(workdir, scale, "dcl_arms"), _comparison(workdir, scale, "dcl_arms", "arms")]
    if scale.exploratory:
        found += [_sweep(workdir, scale, "dcl_settings"), _comparison(workdir, scale, "dcl_settings", "settings")]
    return [*found, _page(workdir, scale)]


def _data(workdir: pathlib.Path, scale: Scale) -> Step:
    return Step(
        "data",
        "embedded data at three resolutions",
        ("data_pipelines.rendered", "--size", scale.data, "--output", str(workdir / "data")),
        workdir / "data",
        workdir / "data" / "rendered.json",
        ("data_pipelines/rendered/*.py", "data_pipelines/records.py"),
        inputs=(),
    )


def _launch(workdir: pathlib.Path, name: str, title: str, config: str, overrides: dict[str, Any], after: str) -> Step:
    settings = tuple(f"--config.{path}={value}" for path, value in overrides.items())
    return Step(
        name,
        title,
        (
            *(
                "experiments.launch",
                "--config",
                config,
                "--workdir",
                str(workdir / name),
                "--data",
                str(workdir / "data"),
                "--compilation-cache",
                str(workdir / "compiled"),
            ),
            *settings,
        ),
        workdir / name,
        workdir / name / "checkpoints" / "release.json",
        ("experiments/configs/tiny*.py", "hypervl_jax/architecture.py"),
        inputs=(after,),
    )


def _stage1(workdir: pathlib.Path, scale: Scale) -> Step:
    overrides = {"loop.steps": scale.stage1, "optimizer.warmup_steps": min(50, scale.stage1 // 4)}
    return _launch(workdir, "stage1", "stage 1: captions, shared by all that follows", "tiny_stage1", overrides, "data")


def _reference(workdir: pathlib.Path, scale: Scale) -> Step:
    overrides = {
        "initialize_from.checkpoint": workdir / "stage1",
        "loop.steps": scale.reference,
        "loop.evaluate_every": max(1, scale.reference // 3),
        "optimizer.warmup_steps": min(50, scale.reference // 4),
        "optimizer.final_fraction": 0.0,
        "data.alpha_jitter": 0.5,
    }
    title = "the model that the VRC is studied with: all tasks, every second picture scaled at random"
    return _launch(workdir, "reference", title, "tiny_stage2", overrides, "stage1")


def _labels(workdir: pathlib.Path, scale: Scale) -> Step:
    return Step(
        "labels",
        "loss curves of training pictures",
        (
            *("tools.label_resolutions", "--checkpoint", str(workdir / "reference"), "--data", str(workdir / "data")),
            *("--sources", ",".join(TASKS), "--limit", str(scale.labels), "--floor", FLOOR),
            *("--output", str(workdir / "labels")),
        ),
        workdir / "labels",
        workdir / "labels" / "labels.json",
        ("tools/label_*.py", *_COMPRESSION),
        inputs=("reference",),
    )


def _training(workdir: pathlib.Path, scale: Scale) -> tuple[str, ...]:
    """Words that every compressor's training gets."""
    inputs = ("--labels", str(workdir / "labels"), "--data", str(workdir / "data"))
    return *inputs, "--checkpoint", str(workdir / "reference"), "--floor", FLOOR, "--steps", str(scale.compressor)


def _compressors(workdir: pathlib.Path, scale: Scale) -> Step:
    home = workdir / "sweeps" / "tiny" / "vrc_epsilon"
    only = tuple(word for epsilon in EPSILONS for word in ("--only", f"epsilon={epsilon}"))
    return Step(
        "compressors",
        "a compressor at each ε",
        (
            *("experiments.sweep", "--config", "tiny", "--sweep", "vrc_epsilon", "--on", "local"),
            *("--workdir", str(workdir / "sweeps"), *only, *_training(workdir, scale)),
        ),
        home,
        home / f"epsilon={EPSILONS[-1]}" / "description.json",
        ("tools/train_compressor.py", *_COMPRESSION),
        inputs=("labels",),
    )


def _unseen(workdir: pathlib.Path, scale: Scale) -> Step:
    home = workdir / f"without_{UNSEEN}"
    return Step(
        "unseen",
        f"a compressor that never saw {UNSEEN}",
        ("tools.train_compressor", "--leave-out", UNSEEN, "--output", str(home), *_training(workdir, scale)),
        home,
        home / "description.json",
        ("tools/train_compressor.py", *_COMPRESSION),
        inputs=("labels",),
    )


def _ablation(workdir: pathlib.Path, scale: Scale) -> Step:
    limit = ("--limit", str(scale.items)) if scale.items else ()
    homes = (workdir / "sweeps" / "tiny" / "vrc_epsilon", workdir / f"without_{UNSEEN}")
    compressors = tuple(word for home in homes for word in ("--compressor", str(home)))
    return Step(
        "vrc",
        "the compressors against every simpler way to choose α",
        (
            *("tools.ablate_compressor", "--checkpoint", str(workdir / "reference"), "--data", str(workdir / "data")),
            *(*compressors, "--tasks", ",".join(TASKS), *limit, "--floor", FLOOR, "--output", str(workdir / "vrc")),
        ),
        workdir / "vrc",
        workdir / "vrc" / "ablation.md",
        ("tools/ablat*.py", "hypervl_jax/evaluation/compression_study.py", *_EVALUATION, *_COMPRESSION),
        inputs=("compressors", "unseen"),
    )


def _sweep(workdir: pathlib.Path, scale: Scale, name: str) -> Step:
    home = workdir / "sweeps" / "tiny_stage2" / name
    only = tuple(word for run in _runs(scale) for word in ("--only", run)) if name == "dcl_arms" else ()
    last = _runs(scale)[-1] if name == "dcl_arms" else "random=1-1"
    return Step(
        name,
        "the arms of DCL" if name == "dcl_arms" else "settings of DCL, one run each",
        (
            *("experiments.sweep", "--config", "tiny_stage2", "--sweep", name, "--on", "local", *only),
            *("--workdir", str(workdir / "sweeps"), "--data", str(workdir / "data")),
            *("--compilation-cache", str(workdir / "compiled")),
            f"--config.initialize_from.checkpoint={workdir / 'stage1'}",
            f"--config.batch.rows={ARM_ROWS}",
            f"--config.loop.steps={scale.arms}",
            f"--config.optimizer.warmup_steps={min(50, scale.arms // 8)}",
            "--config.optimizer.final_fraction=0.0",
            f"--config.loop.evaluate_every={4 * scale.arms}",
        ),
        home,
        home / last / "checkpoints" / "release.json",
        (
            "experiments/sweeps.py",
            "experiments/configs/tiny*.py",
            "hypervl_jax/training/consistency.py",
            "hypervl_jax/training/step.py",
        ),
        inputs=("stage1",),
    )


def _runs(scale: Scale) -> list[str]:
    """Names of the main arms' runs, as `experiments.sweeps.dcl_arms` gives them."""
    arms = ("base", "base_longer", "large", "alternating", "dcl", "joint")
    return [f"{arm}.seed={seed}" for seed in scale.seeds for arm in arms]


def _comparison(workdir: pathlib.Path, scale: Scale, sweep: str, name: str) -> Step:
    limit = ("--limit", str(scale.items)) if scale.items else ()
    return Step(
        name,
        f"runs of {sweep} on the same questions",
        (
            *("tools.compare_arms", "--sweep", str(workdir / "sweeps" / "tiny_stage2" / sweep)),
            *("--data", str(workdir / "data"), "--tasks", ",".join(TASKS), *limit, "--output", str(workdir / name)),
        ),
        workdir / name,
        workdir / name / "arms.png",
        ("tools/compare_arms.py", "tools/compare_encoders.py", "hypervl_jax/evaluation/arm_study.py", *_EVALUATION),
        inputs=(sweep,),
    )


def _page(workdir: pathlib.Path, scale: Scale) -> Step:
    command = next(
        (f"make study{'-full' if name == 'full' else ''}" for name in ("study", "full") if SCALES[name] == scale),
        "a smoke run",
    )
    return Step(
        "page",
        "the page",
        ("tools.study_page", "--workdir", str(workdir), "--command", command),
        workdir / "study.md",
        workdir / "study.md",
        ("tools/study_page.py", "hypervl_jax/evaluation/claims.py", "hypervl_jax/evaluation/study_*.py"),
        inputs=("vrc", "arms", *(("settings",) if scale.exploratory else ())),
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "python -m tools.study", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--workdir", default="runs/study", metavar="DIR", help="for everything (default: %(default)s)")
    made.add_argument("--scale", default="study", choices=tuple(SCALES), help="(default: %(default)s)")
    made.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    made.add_argument("--json", action="store_true", help="print the outcome as one JSON object on the last line")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parser().parse_args(arguments)
    workdir, plan = pathlib.Path(options.workdir), functools.partial(steps, scale=SCALES[options.scale])
    if options.dry_run:
        print("\n".join(map(command_line, plan(workdir))))
        return 0
    try:
        with terminate_as_interrupt():
            study = Demo(workdir, plan, Console(stderr=True))
            ran = study.run()
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    page = str((workdir / "study.md").absolute())
    Console(stderr=True).print(time_table(study.record, study.steps))
    print(f"{'complete' if ran else 'already complete; nothing had to be done'}\npage: {page}")
    if options.json:
        print(
            json.dumps({"page": page, "seconds": {step.name: study.record[step.name].seconds for step in study.steps}})
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
