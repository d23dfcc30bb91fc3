"""The VRC's ablation end to end, on a small random model: our sources and a benchmark file."""

from __future__ import annotations

import base64
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.records import Record
from hypervl_jax.architecture import CompressorConfig
from hypervl_jax.evaluation import study_plots
from hypervl_jax.evaluation.benchmark_files import read_task
from hypervl_jax.evaluation.registry import benchmark
from hypervl_jax.inference.assistant import Options, Request
from hypervl_jax.models.compressor_io import abstract_compressor, save_compressor
from hypervl_jax.text.conversation import IMAGE_SLOT, Turn
from hypervl_jax.training.compression import RATIOS
from hypervl_jax.vision.anyres import plan_image
from tests.data_pipelines import corpora
from tests.hypervl_jax.evaluation.examples import architecture, assistant, save_checkpoint
from tools import ablate_compressor
from tools.ablate_compressor import SUMMARY, main

SIZES = ((16, 16), (40, 24), (32, 32), (30, 50))
COMPRESSOR = CompressorConfig(
    proxy_size=16, stem_width=8, stages=((3, 8, 8, False, "relu", 2),), head_width=16, hidden_size=16
)


def record(number: int) -> Record:
    turns = (Turn("user", f"{IMAGE_SLOT}{number}?"), Turn("assistant", "red"))
    return Record((corpora.png(*SIZES[number % 4], number),), turns, "s")


def save(directory: pathlib.Path, log_area: float, epsilon: float) -> None:
    """A compressor that asks for nearly the same area whatever it sees."""
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), abstract_compressor(COMPRESSOR))
    params["output"]["bias"] = jnp.full_like(params["output"]["bias"], log_area)
    save_compressor(directory, COMPRESSOR, params, {"epsilon": epsilon})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    home = tmp_path_factory.mktemp("home")
    save_checkpoint(home)
    save(home / "vrc" / "epsilon=0.1", math.log(0.9), 0.1)
    save(home / "vrc" / "epsilon=0.01", math.log(2.0), 0.01)
    corpora.write(home / "data", "one", [record(number) for number in range(6)], split="heldout")
    corpora.write(home / "data", "two", [record(number) for number in range(10, 14)], split="heldout")
    return home


def arguments(home: pathlib.Path, *more: str) -> list[str]:
    given = {"checkpoint": home / "run", "compressor": home / "vrc", "data": home / "data", "output": home / "out"}
    return [*(part for name, value in given.items() for part in (f"--{name}", str(value))), *more]


@pytest.fixture(scope="module")
def figures(home: pathlib.Path) -> dict:
    assert main(arguments(home, "--tasks", "one,two")) == 0
    return json.loads((home / "out" / SUMMARY).read_text())


def test_every_way_is_measured_on_every_item(home: pathlib.Path, figures: dict) -> None:
    assert figures["tasks"] == {"one": 6, "two": 4}
    assert [row["alpha"] for row in figures["uniform"]] == list(RATIOS)
    assert [row["name"] for row in figures["compressors"]] == ["epsilon=0.01", "epsilon=0.1"], "sorted by ε"
    row = figures["compressors"][1]
    assert [other["kind"] for other in row["same_tokens"]] == ["uniform", "entropy", "edges"]
    assert set(row["vrc"]["against"]) == {other["name"] for other in row["same_tokens"]}
    for other in row["same_tokens"]:
        assert other["tokens_saved"] <= row["vrc"]["tokens_saved"] + 1e-9
    for name in (study_plots.PARETO, study_plots.ADAPTIVITY, "ablation.md"):
        assert (home / "out" / name).stat().st_size > 500


def test_alphas_and_tokens_are_those_of_auto(home: pathlib.Path, figures: dict) -> None:
    tiling = architecture().tiling
    sizes = [SIZES[number % 4] for number in (*range(6), *range(10, 14))]
    alphas = [min(1.0, 0.9 * (16 / max(size)) ** 2) for size in sizes]
    assert figures["compressors"][1]["vrc"]["mean_alpha"] == pytest.approx(np.mean(np.clip(alphas, 0.1, 1)), rel=0.1)
    whole = sum(plan_image(*size, 1.0, tiling).tokens for size in sizes)
    kept = sum(plan_image(*size, max(0.1, alpha), tiling).tokens for size, alpha in zip(sizes, alphas, strict=True))
    assert figures["compressors"][1]["vrc"]["tokens_saved"] == pytest.approx(1 - kept / whole, abs=0.1)


def test_times_are_measured_with_the_compressor_at_work(figures: dict) -> None:
    latency = figures["compressors"][0]["latency"]
    assert latency["vrc"]["compressor"] > 0
    assert "compressor" not in latency["full"]
    assert any("compressor overhead" in warning for warning in figures["warnings"]), (
        "a tiny tile costs less than any VRC"
    )


def test_nothing_is_answered_twice(home: pathlib.Path, figures: dict, monkeypatch, capsys) -> None:
    monkeypatch.setattr(ablate_compressor, "milliseconds", lambda *_: {"encoder": 1.0})
    before = (home / "out" / "results.jsonl").read_bytes()
    assert main(arguments(home, "--tasks", "one,two", "--json")) == 0
    assert (home / "out" / "results.jsonl").read_bytes() == before
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["uniform"] == figures["uniform"]


def test_a_benchmark_file_is_read_the_same_way(home: pathlib.Path, tmp_path: pathlib.Path, monkeypatch) -> None:
    monkeypatch.setattr(ablate_compressor, "milliseconds", lambda *_: {"encoder": 1.0})
    lines = ["index\timage\tquestion\tanswer"]
    lines += [f"{n}\t{base64.b64encode(corpora.png(*SIZES[n], n)).decode()}\t{n}?\tred" for n in range(4)]
    (tmp_path / "OCRBench.tsv").write_text("\n".join(lines) + "\n")
    words = ["--checkpoint", str(home / "run"), "--compressor", str(home / "vrc"), "--data", str(tmp_path)]
    words += ["--tasks", "OCRBench", "--epsilon", "0.1", "--output", str(tmp_path / "out")]
    assert main(words) == 0
    figures = json.loads((tmp_path / "out" / SUMMARY).read_text())
    assert figures["tasks"] == {"OCRBench": 4}
    assert [row["epsilon"] for row in figures["compressors"]] == [0.1]


def test_over_compression_is_told_when_answers_are_lost(
    home: pathlib.Path, tmp_path: pathlib.Path, monkeypatch
) -> None:
    """What the model itself answers at α = 1 is called right: it reads all pictures, and at α = 0.1 it sees other ones."""
    monkeypatch.setattr(ablate_compressor, "milliseconds", lambda *_: {"encoder": 1.0})
    pictures = [corpora.png(*SIZES[number % 4], number) for number in range(24)]
    lines = lambda answers: "".join(
        f"{number}\t{base64.b64encode(picture).decode()}\tWhich?\t{answer}\n"
        for number, (picture, answer) in enumerate(zip(pictures, answers, strict=True))
    )
    table = tmp_path / "OCRBench.tsv"
    table.write_text("index\timage\tquestion\tanswer\n" + lines(["?"] * 24))
    items = read_task(tmp_path, benchmark("OCRBench")).items
    requests = [Request(item.turns, item.images) for item in items]
    said = assistant().answer(requests, Options("base", 1.0, max_new_tokens=6))
    table.write_text("index\timage\tquestion\tanswer\n" + lines([answer.text.strip()[:4] for answer in said]))
    save(tmp_path / "vrc" / "tenth", -20.0, 0.05)
    save(tmp_path / "vrc" / "whole", 20.0, 0.1)
    words = ["--checkpoint", str(home / "run"), "--compressor", str(tmp_path / "vrc"), "--data", str(tmp_path)]
    assert main([*words, "--tasks", "OCRBench", "--output", str(tmp_path / "out")]) == 0
    figures = json.loads((tmp_path / "out" / SUMMARY).read_text())
    assert figures["full_score"]["mean"] > 0.9
    tenth, whole = figures["compressors"]
    assert whole["dense"]["change"]["mean"] == 0
    lost = [warning for warning in figures["warnings"] if "over-compression" in warning]
    (warning,) = lost
    assert f"compressor tenth changes the score on the {tenth['dense']['items']} images with the most edges" in warning
    assert f"{100 * tenth['dense']['change']['mean']:.1f} [".replace("-", "−") in warning


def test_what_cannot_be_compared_is_explained(home: pathlib.Path, tmp_path: pathlib.Path, capsys) -> None:
    for more, message in (
        (("--epsilon", "0.3"), "no compressor was trained at ε 0.3"),
        (("--tasks", "nowhere"), "nowhere"),
        (("--compressor", str(home / "vrc" / "epsilon=0.1")), "same directory name"),
        (("--rows", "0"), "must be positive"),
    ):
        assert main(arguments(home, "--output", str(tmp_path / "o"), *more)) == 2
        assert message in capsys.readouterr().err
