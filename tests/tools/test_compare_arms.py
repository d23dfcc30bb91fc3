"""Runs of a sweep compared end to end on a small random model: measured once, paired by seed, with the noise of both."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest

from data_pipelines.records import Record
from hypervl_jax.architecture import PARTS
from hypervl_jax.planning.useful import step_flops
from hypervl_jax.text.conversation import IMAGE_SLOT, Turn
from hypervl_jax.training.batch import BatchShape
from tests.data_pipelines import corpora
from tests.hypervl_jax.evaluation.examples import architecture, save_checkpoint
from tools import compare_arms, compare_encoders
from tools.compare_arms import MEASURED, SUMMARY, find_runs, main, teraflops

SHAPE = {"batch.rows": 4, "batch.length": 128, "batch.tiles": 16}


def card(alternation: str, weight: float, base: int, large: int) -> dict:
    """What a release card says of a run, as far as it is read here."""
    config = {**SHAPE, "optimizer.frozen": [], "consistency.alternation": alternation, "consistency.kl_weight": weight}
    steps = {"base": base, "large": large}
    return {"time": "t", "step": 7, "branch_steps": steps, "parameters": dict.fromkeys(PARTS, 1), "config": config}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    home = tmp_path_factory.mktemp("home")
    save_checkpoint(home)
    for name, values in (("dcl.seed=0", card("ratio", 1.0, 9, 9)), ("base.seed=0", card("base", 0.0, 9, 0))):
        shutil.copytree(home / "run", home / "sweep" / name)
        (home / "sweep" / name / "checkpoints" / "release.json").write_text(json.dumps(values))
    (home / "sweep" / "begun.seed=0").mkdir()
    records = []
    for number in range(4):
        turns = (Turn("user", f"{IMAGE_SLOT}{number}?"), Turn("assistant", "red"))
        records.append(Record((corpora.png(16, 20 + number, number),), turns, "one"))
    corpora.write(home / "data", "one", records, split="heldout")
    return home


def arguments(home: pathlib.Path) -> list[str]:
    given = {"sweep": home / "sweep", "data": home / "data", "tasks": "one", "output": home / "out"}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def test_arms_are_measured_once_and_compared(home: pathlib.Path, monkeypatch, capsys) -> None:
    assert main([*arguments(home), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures == json.loads((home / "out" / SUMMARY).read_text())
    assert [arm["name"] for arm in figures["arms"]] == ["base", "dcl"]
    first = next(row for row in figures["contrasts"] if row["baseline"] == "base")
    assert first["difference"] == {"mean": 0, "low": 0, "high": 0}, "the same weights stand in both directories"
    measured = json.loads((home / "sweep" / "dcl.seed=0" / "comparison" / MEASURED).read_text())
    assert {len(column) for column in measured["values"].values()} == {4}
    monkeypatch.setattr(compare_encoders, "run", lambda options: pytest.fail("measured twice"))
    assert main(arguments(home)) == 0


def test_flops_count_the_teacher_and_both_branches_of_a_joint_step(home: pathlib.Path) -> None:
    config, shape = architecture(), BatchShape(4, 128, 16)
    flops = lambda arm, teacher: step_flops(config, shape, arm, PARTS, teacher).total() / 1e12
    run = home / "sweep" / "dcl.seed=0"
    alternating = 9 * flops(("base",), True) + 9 * flops(("large",), True)
    assert teraflops(run, card("ratio", 1.0, 9, 9)) == pytest.approx(alternating)
    assert teraflops(run, card("base", 1.0, 9, 0)) == pytest.approx(9 * flops(("base",), False))
    assert teraflops(run, card("joint", 1.0, 9, 9)) == pytest.approx(9 * flops(("base", "large"), True))


def test_only_complete_runs_count(home: pathlib.Path, tmp_path: pathlib.Path, capsys) -> None:
    assert [path.name for path in find_runs([str(home / "sweep")])] == ["base.seed=0", "dcl.seed=0"]
    words = arguments(home)
    words[1] = str(tmp_path)
    assert compare_arms.main(words) == 2
    assert "no complete run" in capsys.readouterr().err
