"""TFLite files: equal to JAX at float32, near to it in whole numbers, whole or not there at all, and run from image to text."""

import dataclasses
import json
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hypervl_jax.inference.assistant import Options, ask, load_assistant
from hypervl_jax.models.compressor_io import abstract_compressor, save_compressor
from hypervl_jax.vision.pixels import normalise_pixels
from tests.tools import runs
from tests.tools.runs import CONFIG, random_like, write_run
from tools import artifacts, edge_runtime, export_tflite, run_tflite, verify_artifact
from tools.edge_calibration import MOST_FEEDS, Recorder
from tools.edge_graphs import HEAD_GROUP, decoder_weights
from tools.edge_parity import snr
from tools.edge_runtime import EdgeSettings, open_signatures
from tools.edge_sources import Exported, Request, part_graphs, read
from tools.golden import picture
from tools.quantisation import PRECISIONS, QuantisedMatrix, quantise
from tools.to_torch import open_source

NEEDS_CONVERTER = pytest.mark.skipif(
    not all(map(artifacts.versions(export_tflite.PACKAGES).__contains__, ("litert-converter", "ai-edge-litert"))),
    reason="litert-converter and ai-edge-litert are not installed (extra 'export')",
)
QUESTION = "What is the number in the picture?"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    write_run(workdir)
    return workdir


@pytest.fixture(scope="module")
def exported(run: Path) -> tuple[Path, dict]:
    output = run / "tflite"
    save_compressor(run / "compressor", CONFIG.compressor, random_like(abstract_compressor(CONFIG.compressor)), {})
    sizes = {"prefill": (16, 64), "slots": 256, "compressor": str(run / "compressor")}
    return output, export_tflite.export(str(run), str(output), precisions=("float32", "int8", "int4"), **sizes)


@NEEDS_CONVERTER
def test_float32_is_jax_and_fewer_bits_are_further_from_it(exported: tuple[Path, dict]) -> None:
    _, reports = exported
    parts = {name: report["parts"] for name, report in reports.items()}
    assert parts["float32"]["decoder"]["top1"] == parts["float32"]["decoder"]["of"] == 3 * 64
    assert parts["float32"]["answer_base"]["whole_answers"] == 3
    for part in ("encoder_base", "decoder"):
        ratios = [parts[name][part]["snr_db"] for name in ("float32", "int8", "int4")]
        assert ratios[0] > 100
        assert 22 < ratios[1] < 60
        assert 4 < ratios[2] < ratios[1] - 10


@NEEDS_CONVERTER
def test_weights_are_stored_once_and_in_as_many_bits_as_they_say(exported: tuple[Path, dict]) -> None:
    _, reports = exported
    size = {name: report["bytes"]["decoder.tflite"] for name, report in reports.items()}
    head = CONFIG.decoder.vocab_size * CONFIG.decoder.hidden_size
    layers = CONFIG.parameter_counts()["decoder"] - head
    # Scales and operators of three signatures besides; a second copy of the weights would be more.
    assert 0 < size["float32"] - 4 * (layers + head) < 300_000
    assert 0 < size["int8"] - (layers + head) < 300_000
    assert 0 < size["int4"] - (layers // 2 + head) < 300_000


@NEEDS_CONVERTER
def test_no_more_heads_of_a_tower_attend_at_once_than_a_group(exported: tuple[Path, dict]) -> None:
    """The converter makes one product of those that are joined one after another, and holds the weights of all heads for it."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(exported[0] / "float32" / "encoder_base.tflite"))
    patches = CONFIG.vision_base.num_patches
    attention = [
        tuple(map(int, found["shape"]))
        for found in interpreter.get_tensor_details()
        if tuple(found["shape"][-2:]) == (patches, patches) and len(found["shape"]) > 2
    ]
    assert {shape[0] for shape in attention} == {HEAD_GROUP}
    assert CONFIG.vision_base.num_heads > HEAD_GROUP


@NEEDS_CONVERTER
def test_each_precision_is_an_artifact_whose_files_are_as_its_manifest_says(exported: tuple[Path, dict]) -> None:
    output, _ = exported
    for name in ("float32", "int8", "int4"):
        manifest = artifacts.read_manifest(output / name)
        assert artifacts.damage(output / name, manifest) == []
        assert (manifest.kind, manifest.dtype, manifest.shapes["prefill"]) == ("tflite", name, [16, 64])
        assert "base/one_image/generated" in artifacts.read_golden(output / name)
        assert {"litert-converter", "ai-edge-litert"} <= set(manifest.versions)


@NEEDS_CONVERTER
def test_the_runner_answers_as_the_assistant_does(
    run: Path, exported: tuple[Path, dict], capsys: pytest.CaptureFixture[str]
) -> None:
    image = picture(100, 150, 3)
    Image.fromarray(image).save(run / "picture.png")
    call = [str(exported[0] / "float32"), "--image", str(run / "picture.png"), "--question", QUESTION, "--json"]
    assert run_tflite.main([*call, "--alpha", "1", "--max-new-tokens", "12"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    (expected,) = load_assistant(run / "checkpoints").answer([ask(QUESTION, image)], Options(max_new_tokens=12))
    assert found["answer"] == expected.text
    assert (
        (found["tiles"], found["prompt_tokens"])
        == (expected.tiles, expected.prompt_tokens)
        == (6, found["prompt_tokens"])
    )
    assert run_tflite.main([*call, "--max-new-tokens", "300"]) == 1
    assert "the artifact has 256" in capsys.readouterr().err
    assert run_tflite.main([*call, "--encoder", "large"]) == 1
    assert "has the encoder base, not large" in capsys.readouterr().err


@NEEDS_CONVERTER
@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--checkpoint", "nowhere"], 1, "nowhere"),
        (["--checkpoint", ".", "--prefill", "64", "--slots", "64"], 1, "does not hold a prefill of 64"),
    ],
)
def test_wrong_inputs_are_one_sentence_and_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    assert export_tflite.main([*arguments, "--output", str(tmp_path / "out")]) == status
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@NEEDS_CONVERTER
def test_a_prompt_that_does_not_fit_the_cache_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ["--checkpoint", str(run), "--prefill", "16", "--slots", "64", "--output", str(output)]
    assert export_tflite.main(arguments) == 1
    assert "slots of the cache; give --slots" in capsys.readouterr().err
    assert not output.exists()


@NEEDS_CONVERTER
def test_each_part_is_run_again_on_its_golden_inputs(exported: tuple[Path, dict]) -> None:
    """The graphs of one precision, checked against what the manifest of another says, are other graphs."""
    float32, int4 = exported[0] / "float32", exported[0] / "int4"
    ran = verify_artifact.verify(float32)["ran"]
    assert set(ran) == {"encoder_base", "compressor", "answer_base"}
    assert all(part["passed"] for part in ran.values())
    manifest, golden = artifacts.read_manifest(float32), artifacts.read_golden(float32)
    other = verify_artifact.run_edge(edge_runtime.open_model(int4), manifest, golden)
    assert not other["encoder_base"]["passed"]
    assert not other["compressor"]["passed"]


@NEEDS_CONVERTER
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda values: values.update(kind="foo"), "no artifacts of kind 'foo'"),
        (lambda values: values.update(shapes={}), "shapes are damaged"),
        (lambda values: values["parity"].pop("answer_base"), "lack 'answer_base'"),
        (lambda values: values["preprocessing"].update(prompts=[]), "no golden prompts"),
    ],
)
def test_a_manifest_that_says_something_else_does_not_pass(
    exported: tuple[Path, dict], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable, said: str
) -> None:
    copy = shutil.copytree(exported[0] / "int8", tmp_path / "int8")
    values = json.loads((copy / "manifest.json").read_text())
    change(values)
    (copy / "manifest.json").write_text(json.dumps(values))
    assert verify_artifact.main([str(copy)]) == 1
    captured = capsys.readouterr()
    assert said in captured.out + captured.err


@NEEDS_CONVERTER
def test_a_lost_manifest_and_a_lost_file_are_named(
    exported: tuple[Path, dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(exported[0], tmp_path / "all")
    (copy / "int4" / "manifest.json").unlink()
    assert verify_artifact.main([str(copy), "--hashes-only"]) == 1
    assert "int4 with no manifest.json" in capsys.readouterr().err
    (copy / "int8" / "decoder.tflite").unlink()
    assert run_tflite.main([str(copy / "int8"), "--question", "Why?"]) == 1
    assert "no file of this artifact holds decode, prefill_16, prefill_64" in capsys.readouterr().err


@NEEDS_CONVERTER
def test_a_file_that_cannot_grow_is_an_error_of_the_system(run: Path, tmp_path: Path) -> None:
    """The converter's own writer would end the process."""
    made = read(Request(str(run), None, ("encoder",), "base", None, (16,), 256, None, 0, 0, ()))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            export_tflite.converter().convert(
                part_graphs(made, PRECISIONS["float32"])["encoder_base"], tmp_path / "x.tflite"
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_two_exports_to_one_place_are_kept_apart(tmp_path: Path) -> None:
    with artifacts.writing(tmp_path / "out") as first:
        (first / "file").write_text("")
        with (
            pytest.raises(artifacts.ArtifactError, match="another process is writing"),
            artifacts.writing(tmp_path / "out"),
        ):
            pass
        assert (first / "file").exists()
    assert (tmp_path / "out" / "file").exists()


@NEEDS_CONVERTER
def test_a_decoder_alone_is_compared_on_text_and_checked_again(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    sizes = {"prefill": (16,), "slots": 128}
    report = export_tflite.export(str(run), str(output), parts=("decoder",), **sizes)["float32"]
    assert set(report["parts"]) == {"decoder"}
    assert report["parts"]["decoder"]["top1"] == report["parts"]["decoder"]["of"] == 64
    assert verify_artifact.verify(output)["ran"]["decoder"] == {"top1": 64, "of": 64, "passed": True}


def test_ranges_come_from_all_calls_alike() -> None:
    recorder = Recorder({"decode": lambda **inputs: inputs})
    for number in range(1000):
        recorder.signatures["decode"](position=np.array(number))
    kept = sorted(int(feed["position"]) for feed in recorder.feeds["decode"])
    assert len(set(kept)) == MOST_FEEDS
    assert all(any(start <= number < start + 250 for number in kept) for start in range(0, 1000, 250))


@pytest.mark.parametrize("tied", [True, False])
def test_decoder_weights_are_those_of_the_whole_read_leaf_by_leaf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    config = dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, tie_embeddings=tied))
    monkeypatch.setattr(runs, "CONFIG", config)
    write_run(tmp_path)
    made = Exported(open_source(str(tmp_path), None), EdgeSettings(config, None, (), (16,), 32), None, (), {}, ())
    whole = decoder_weights(made.read_decoder())
    rounded = made.read_decoder_weights(PRECISIONS["int4"])
    assert rounded.keys() == whole.keys()
    assert {value.bits for value in rounded.values() if isinstance(value, QuantisedMatrix)} == {4, 8}
    for name, value in rounded.items():
        found = value.values * value.scale[:, None] if isinstance(value, QuantisedMatrix) else value
        assert snr(whole[name], found) > (15 if name.endswith("kernel") else 199), name


@NEEDS_CONVERTER
def test_an_encoder_keeps_its_precision_where_a_tile_is_padding(run: Path) -> None:
    """Gray is almost 0 after normalisation; a patch embedding with the normalisation folded in subtracts two large numbers there."""
    made = read(Request(str(run), None, ("encoder",), "base", None, (16,), 256, None, 0, 0, ()))
    graph = part_graphs(made, PRECISIONS["float32"])["encoder_base"]()[0]
    path = run / "padding.tflite"
    export_tflite.converter().convert(lambda: [graph.rounded(PRECISIONS["int8"])], path)
    side = made.source.config.tiling.tile_size
    tile = normalise_pixels(np.full((1, side, side, 3), 128, np.uint8))
    found = open_signatures(run)["encoder_base"](tile=tile)["features"]
    assert snr(graph(tile)["features"], found) > 29


def test_usage_and_a_missing_converter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as ended:
        export_tflite.main(["--checkpoint", ".", "--output", "out", "--precision", "int3"])
    assert ended.value.code == 2
    monkeypatch.setitem(sys.modules, "tools.tflite_convert", None)
    monkeypatch.delattr("tools.tflite_convert", raising=False)
    assert export_tflite.main(["--checkpoint", ".", "--output", str(tmp_path / "out")]) == 1
    assert "pip install 'hypervl-jax[export]'" in capsys.readouterr().err


def test_four_bits_take_the_range_with_the_least_error() -> None:
    matrix = np.random.default_rng(0).normal(size=(6, 512)).astype(np.float32)
    matrix[:, 0] = 8
    found = quantise(matrix, 4)
    assert np.abs(found.values).max() <= 7
    plain = np.abs(matrix).max(1, keepdims=True) / 7
    errors = [
        np.square(m - matrix).sum() for m in (found.values * found.scale[:, None], np.rint(matrix / plain) * plain)
    ]
    assert errors[0] < 0.8 * errors[1]
    whole = np.arange(-127, 128, dtype=np.float32)[None] * np.float32(0.25)
    np.testing.assert_array_equal(quantise(whole, 8).values * np.float32(0.25), whole)


def test_which_weights_stay_float() -> None:
    int4 = PRECISIONS["int4"]
    names = ("tower/layers_03/mlp/up/kernel", "projector/first/kernel", "head/kernel", "layers_00/mlp/up/bias")
    assert [int4.bits(name) for name in (*names, "stem/convolution/kernel")] == [4, 8, 8, None, None]
    assert dataclasses.astuple(PRECISIONS["float32"]) == (None, None, None)


def test_the_ratio_is_in_decibels() -> None:
    assert snr(np.ones(4), np.full(4, 0.9)) == pytest.approx(20)
    assert snr(np.ones(4), np.ones(4)) == 200
