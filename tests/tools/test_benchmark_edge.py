"""`tools.benchmark_edge`: every runtime computes the model that JAX computes, in a process of its own, or says why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tools.runs import write_run
from tools import artifacts, benchmark_edge

PACKAGES = ("litert-converter", "ai-edge-litert", "onnx", "onnxruntime", "torch", "transformers")
pytestmark = pytest.mark.skipif(
    set(PACKAGES) - artifacts.versions(PACKAGES).keys() != set(), reason="extras 'export', 'qnn' and 'torch' are needed"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    write_run(workdir)
    return workdir


def measured(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict]:
    sizes = ("--slots", "32", "--prefill", "8", "--repeats", "1", "--json")
    assert benchmark_edge.main([*words, *sizes]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]


def test_runtimes_agree_with_jax(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--checkpoint", str(run), "--runtimes", "tflite,onnx,torch", "--precisions", "float32")
    rows = measured(capsys, *words)
    assert [(row["part"], row["runtime"]) for row in rows] == [
        *(("compressor", runtime) for runtime in ("tflite", "onnx")),
        *((part, runtime) for part in ("encoder", "prefill", "decode") for runtime in ("tflite", "onnx", "torch")),
    ]
    for row in rows:
        assert row["snr_db"] > 100, row
        assert 0 < row["probe"]["milliseconds"] <= row["probe"]["slowest"]
        assert row["probe"]["peak_bytes"] > 0


@pytest.mark.slow
def test_rounded_and_compiled_models_are_near_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = measured(capsys, "--checkpoint", str(run))
    ratios = {(row["part"], row["runtime"], row["precision"]): row["snr_db"] for row in rows}
    assert len(ratios) == 3 * 4 * 2 + 2 * 2
    assert all(ratio > (100 if precision == "float32" else 15) for (_, _, precision), ratio in ratios.items()), ratios


def test_a_picture_is_measured_in_tiles_and_whole(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--checkpoint", str(run), "--parts", "encoder", "--runtimes", "tflite", "--precisions", "float32")
    rows = measured(capsys, *words, "--images", "128")
    assert [row["part"] for row in rows] == ["encoder", "128² in 4 tiles", "128² in one pass"]
    assert all(row["snr_db"] > 100 for row in rows)


def test_a_runtime_that_fails_does_not_end_the_others(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process of its own finds an ONNX Runtime that raises without words, as TFLite does where memory ends."""
    (tmp_path / "onnxruntime.py").write_text("raise RuntimeError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = ["--checkpoint", str(run), "--parts", "encoder", "--runtimes", "onnx,tflite", "--precisions", "float32"]
    assert benchmark_edge.main([*words, "--repeats", "1", "--json"]) == 1
    captured = capsys.readouterr()
    found = json.loads(captured.out.splitlines()[-1])
    assert [row["runtime"] for row in found["rows"]] == ["tflite"]
    assert captured.err.splitlines()[-1] == f"error: {found['failed'][0]}"
    assert found["failed"][0].startswith("encoder in onnx, float32: RuntimeError without a reason")


def test_what_cannot_be_measured_is_one_sentence(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (("--checkpoint", "nowhere"), "nowhere"),
        (("--checkpoint", str(run), "--images", "100"), "--images 100 is not a whole number of tiles of 64 pixels"),
        (
            ("--checkpoint", str(run), "--slots", "8", "--prefill", "8"),
            "--prefill 8 must be 2 or more, and below --slots",
        ),
    ):
        assert benchmark_edge.main([*words]) == 1
        assert message in capsys.readouterr().err
