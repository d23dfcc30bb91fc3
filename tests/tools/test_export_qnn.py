"""Contexts for a Snapdragon's NPU: near JAX on the simulator, all operations on the NPU, whole or not there at all."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from hypervl_jax.training.state import abstract_parameters
from tests.small import small_architecture
from tests.tools.runs import random_like, write_run
from tools import artifacts, edge_graphs, export_qnn, qnn_litert, verify_artifact
from tools.artifacts import ArtifactError
from tools.edge_parity import snr
from tools.golden import RUNTIME
from tools.qnn_chips import SOCS, find_soc
from tools.quantisation import PRECISIONS

NEEDS_QNN = pytest.mark.skipif(
    not {"onnx", "onnxruntime-qnn"} <= set(artifacts.versions(("onnx", "onnxruntime-qnn"))),
    reason="onnxruntime-qnn is not installed (extra 'qnn')",
)
SMALL = small_architecture()


@NEEDS_QNN
@pytest.mark.parametrize(("precision", "least"), [("float32", 40), ("w8a16", 30)])
def test_a_context_on_the_simulator_is_near_jax(tmp_path: Path, precision: str, least: float) -> None:
    from tools import onnx_files, qnn_contexts
    from tools.onnx_graphs import onnx_graph
    from tools.onnx_quantise import quantise_graph

    params = random_like(abstract_parameters(SMALL, RUNTIME)[0])
    graph = edge_graphs.encoder_graph(SMALL, "base", params)
    side = SMALL.tiling.tile_size
    tile = np.random.default_rng(0).random((1, side, side, 3), np.float32)
    written = onnx_graph(graph)
    if precision != "float32":
        written = quantise_graph(written, PRECISIONS[precision], [{"tile": tile}])
    onnx_files.save(written, tmp_path / "graph.onnx")
    made = qnn_contexts.compile_context(tmp_path / "graph.onnx", tmp_path / "context.onnx", SOCS["sm8750"])
    assert made.operations == len(written.nodes)
    assert (made.spill, made.fill) == (0, 0)
    assert made.bytes == sum(path.stat().st_size for path in tmp_path.glob("context*"))
    assert made.read > tile.nbytes / 2
    found = qnn_contexts.open_signature(tmp_path / "context.onnx")(tile=tile)["features"]
    assert least < snr(graph(tile)["features"], found) < 120


@NEEDS_QNN
@pytest.mark.parametrize(
    ("operation", "attributes", "said"),
    [
        ("LayerNormalization", {"axis": 1}, "cannot compile g: the NPU does not run LayerNormalization"),
        ("Acosh", {}, "cannot compile g: the NPU does not run Acosh"),
    ],
)
def test_what_the_npu_does_not_run_is_refused(tmp_path: Path, operation: str, attributes: dict, said: str) -> None:
    from onnx import helper

    from tools import onnx_files, qnn_contexts
    from tools.onnx_graphs import OnnxGraph

    kind = jax.ShapeDtypeStruct((1, 4, 4), np.float32)
    constants = {"scale": np.ones((4, 4), np.float32)} if attributes else {}
    nodes = (
        helper.make_node("Add", ["x", "x"], ["twice"], name="a"),
        helper.make_node(operation, ["twice", *constants], ["out_y"], name="n", **attributes),
    )
    graph = OnnxGraph("g", nodes, constants, {"x": kind}, {"out_y": kind}, {"twice": kind, "out_y": kind})
    onnx_files.save(graph, tmp_path / "g.onnx")
    with pytest.raises(ArtifactError, match=said):
        qnn_contexts.compile_context(tmp_path / "g.onnx", tmp_path / "c.onnx", SOCS["sm8750"])


@NEEDS_QNN
@pytest.mark.slow
def test_a_checkpoint_becomes_an_artifact_that_is_checked(tmp_path: Path) -> None:
    write_run(tmp_path)
    output = tmp_path / "qnn"
    reports = export_qnn_command(tmp_path, output)
    assert reports == 0
    report = artifacts.read_manifest(output)
    assert (report.kind, report.dtype, report.shapes["soc"]) == ("qnn", "float16", "sm8650")
    assert report.parity["decoder"]["top1"] >= report.parity["decoder"]["of"] - 4
    assert report.parity["encoder_base"]["snr_db"] > 35
    assert set(report.shapes["npu"]) == {"encoder_base", "prefill_64", "decode"}
    assert {"qairt", "onnxruntime-qnn"} <= set(report.versions)
    checked = verify_artifact.verify(output)
    assert checked["passed"]
    assert checked["ran"]["answer_base"]["of"] == 3 * 64


def export_qnn_command(run: Path, output: Path) -> int:
    sizes = ["--prefill", "64", "--slots", "192"]
    return export_qnn.main(["--checkpoint", str(run), "--output", str(output), "--soc", "SM8650", *sizes])


def test_unknown_chips_are_answered_with_the_known_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_soc("SM8750").arch == 79
    call = ["--checkpoint", "nowhere", "--output", str(tmp_path / "out"), "--soc", "sm9999"]
    assert export_qnn.main(call) == 1
    said = capsys.readouterr().err
    assert "'sm9999' is no chip" in said
    assert all(name in said for name in SOCS)
    assert list(tmp_path.iterdir()) == []


@NEEDS_QNN
def test_wrong_checkpoints_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["--output", str(tmp_path / "out"), "--soc", "sm8750"]
    assert export_qnn.main(["--checkpoint", str(tmp_path / "nowhere"), *call]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_sdk_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(qnn_litert.SDK_VARIABLE, raising=False)
    call = ["--checkpoint", "x", "--output", str(tmp_path / "out"), "--soc", "sm8750", "--route", "litert"]
    assert export_qnn.main(call) == 1
    assert "give --sdk DIR or set QAIRT_SDK_ROOT" in capsys.readouterr().err
    assert export_qnn.main([*call, "--sdk", str(tmp_path)]) == 1
    assert "is no QAIRT SDK" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tools.qnn_artifact", None)
    monkeypatch.delattr("tools.qnn_artifact", raising=False)
    assert export_qnn.main(["--checkpoint", "x", "--output", str(tmp_path / "out"), "--soc", "sm8750"]) == 1
    assert "pip install 'hypervl-jax[qnn]'" in capsys.readouterr().err


def test_unknown_precisions_are_wrong_usage() -> None:
    with pytest.raises(SystemExit) as ended:
        export_qnn.main(["--checkpoint", "x", "--output", "y", "--soc", "sm8750", "--precision", "int3"])
    assert ended.value.code == 2
