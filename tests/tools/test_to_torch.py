"""An exported directory, read by `transformers` and by the code that lies in it; what cannot be exported leaves nothing behind."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.utils import is_torchvision_available

from hypervl_jax.architecture import MOBILENET_TINY, MOBILENET_V3_SMALL, TilingConfig
from hypervl_jax.inference.assistant import Options, ask, load_assistant
from hypervl_jax.models.compressor_io import abstract_compressor, predict_log_areas, save_compressor
from hypervl_jax.text.conversation import Turn, encode_conversation, encode_prompt
from hypervl_jax.text.tokenizer import ChatTemplate, load_tokenizer
from hypervl_jax.training.checkpoint import Description, read_description, write_description
from hypervl_jax.vision.anyres import plan_image
from tests.references import qwen3_config, vision_values
from tests.small import MOBILENET_V4_FORMS
from tests.tools.runs import CONFIG, random_like, write_run
from tools import golden, huggingface_files, to_torch, torch_parity
from tools.artifacts import ArtifactError, read_golden, read_manifest
from tools.shipped import hypervl_torch
from tools.shipped.hypervl_torch import HyperVLInputs


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and a compressor, all parameters random."""
    home = tmp_path_factory.mktemp("home")
    write_run(home / "run")
    vrc = CONFIG.compressor
    save_compressor(home / "compressor", vrc, random_like(abstract_compressor(vrc)), {})
    return home


@pytest.fixture(scope="module")
def exported(home: Path) -> Path:
    """The base encoder's directory, with a compressor."""
    to_torch.export(str(home / "run"), str(home / "base"), compressor=str(home / "compressor"))
    return home / "base"


@pytest.fixture(scope="module")
def eagle(home: Path) -> Path:
    """The large encoder's directory in the names of vLLM and SGLang, in bfloat16."""
    to_torch.export(str(home / "run"), str(home / "eagle"), encoder="large", layout="eagle", dtype="bfloat16")
    return home / "eagle"


def test_the_report_says_that_pytorch_equals_jax(exported: Path) -> None:
    report = json.loads((exported / "report.json").read_text())
    prompts = report["torch"]["prompts"]
    assert list(prompts) == ["text", "one_image", "many_tiles"]
    assert [row["tiles"] for row in prompts.values()] == [0, 1, 4]
    for row in prompts.values():
        assert row["ids_equal"]
        assert row["tiles_equal"]
        assert row["tokens_equal"] == row["tokens_compared"] == 64
        assert row["logits_relative_difference"] < 1e-5
    assert prompts["many_tiles"]["hidden_padding_tokens"] > 0
    assert report["compressor"]["difference"] < 1e-5
    assert report["round_trip"]["passed"]
    assert report["round_trip"]["keys"] == len(load_file(exported / "model.safetensors"))


def test_golden_outputs_depend_on_the_picture_and_its_last_tile(exported: Path) -> None:
    arrays = read_golden(exported)
    model = transformers.AutoModelForImageTextToText.from_pretrained(exported)
    inputs = HyperVLInputs.from_pretrained(exported)
    prompt = read_manifest(exported).preprocessing["prompts"][2]
    image = arrays["many_tiles/image_0"].copy()
    image[-8:, -8:] = 0
    changed = inputs(torch_parity.messages_of(prompt), [image])
    report = torch_parity.compare_prompt(model, changed, torch_parity.select(arrays, "many_tiles"))
    assert report["ids_equal"]
    assert not torch_parity.prompt_passed(report)


def test_transformers_finds_every_weight_and_no_other(exported: Path) -> None:
    model, loading = transformers.AutoModelForImageTextToText.from_pretrained(exported, output_loading_info=True)
    assert type(model).__name__ == "Lfm2VlForConditionalGeneration"
    assert not any(loading.values()), loading
    stops = load_tokenizer(exported)
    assert model.generation_config.eos_token_id == [stops.end_of_turn, stops.end_of_text]


def test_the_tokenizer_of_the_directory_has_the_ids_of_the_checkpoint(exported: Path, home: Path) -> None:
    ours = load_tokenizer(home / "run" / "tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    texts = ["What is the number in the picture?", "  two  spaces\n", "user assistant system", "é中😀", "1234 circles"]
    for text in texts:
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text


CONVERSATIONS = (
    [Turn("user", "How many circles?")],
    [Turn("system", "Be brief."), Turn("user", "How many?"), Turn("assistant", "Two."), Turn("user", "Red?")],
    [Turn("user", "How many?"), Turn("assistant", "\nTwo.")],
    [Turn("user", "<tool_response>2</tool_response>"), Turn("assistant", "Two.")],
)


@pytest.mark.parametrize("template", [ChatTemplate(False), ChatTemplate(True), ChatTemplate(True, 'Say "no".\nTwice.')])
def test_the_chat_template_writes_the_ids_that_the_model_was_trained_on(
    home: Path, tmp_path: Path, template: ChatTemplate
) -> None:
    ours = load_tokenizer(home / "run" / "tokenizer.model", template)
    huggingface_files.write_tokenizer(tmp_path, ours, {}, 100)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for turns in CONVERSATIONS:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        asked = turns[-1].role == "user"
        encode = encode_prompt if asked else encode_conversation
        expected = encode(turns, ours, [], CONFIG.tiling).tokens.tolist()
        found = theirs.apply_chat_template(messages, add_generation_prompt=asked)["input_ids"]
        assert found == expected, turns


@pytest.mark.parametrize("tiling", [CONFIG.tiling, dataclasses.replace(CONFIG.tiling, thumbnail=True)])
def test_inputs_hold_the_ids_and_tiles_of_training_at_any_size(
    exported: Path, home: Path, tiling: TilingConfig
) -> None:
    ours = load_tokenizer(home / "run" / "tokenizer")
    inputs = dataclasses.replace(HyperVLInputs.from_pretrained(exported), tiling=tiling)
    for height, width, alpha in (
        (1, 1, 1.0),
        (64, 64, 1.0),
        (65, 64, 1.0),
        (200, 30, 0.3),
        (500, 700, 0.61),
        (17, 900, 1),
    ):
        images = [np.full((*size, 3), 7, np.uint8) for size in ((height, width), (width, height))]
        plans = [plan_image(*image.shape[:2], alpha, tiling) for image in images]
        expected = encode_prompt([Turn("user", "<image>a<image>b")], ours, plans, tiling)
        parts = [{"type": "image"}, {"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
        found = inputs([{"role": "user", "content": parts}], images, [alpha, alpha])
        kept = found["input_ids"][found["attention_mask"] == 1]
        assert kept.tolist() == expected.tokens.tolist()
        assert len(found["pixel_values"]) == sum(plan.tiles for plan in plans)
        slots = torch.cumsum(found["input_ids"] == ours.image, dim=1) - 1
        visual = slots[(found["attention_mask"] == 1) & (found["input_ids"] == ours.image)]
        assert visual.tolist() == expected.visual_index[expected.visual_index >= 0].tolist()


def test_pictures_and_messages_must_agree(exported: Path) -> None:
    with pytest.raises(ValueError, match="the messages hold 0 pictures and 1 were given"):
        HyperVLInputs.from_pretrained(exported)([{"role": "user", "content": "a"}], [golden.picture(9, 9, 0)])


@pytest.mark.skipif(not is_torchvision_available(), reason="the processor of transformers needs torchvision")
def test_the_processor_of_transformers_passes_our_tiles_unchanged(exported: Path) -> None:
    found = json.loads((exported / "report.json").read_text())["torch"]["processor"]
    assert {name: all(equal.values()) for name, equal in found.items()} == {"one_image": True, "many_tiles": True}


@pytest.mark.parametrize(
    ("norm", "stages"), [("group", MOBILENET_V3_SMALL), ("affine", MOBILENET_TINY), ("group", MOBILENET_V4_FORMS)]
)
def test_the_compressor_in_pytorch_is_the_one_in_flax(tmp_path: Path, norm: str, stages: tuple) -> None:
    config = dataclasses.replace(CONFIG.compressor, stages=stages, norm=norm)
    params = random_like(abstract_compressor(config))
    save_compressor(tmp_path / "compressor", config, params, {})
    proxies = np.random.default_rng(0).integers(0, 256, (2, config.proxy_size, config.proxy_size, 3), dtype=np.uint8)
    expected = predict_log_areas(config, params, proxies, batch_size=2)
    found = hypervl_torch.load_compressor(tmp_path)(torch.from_numpy(proxies)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_alpha_is_the_assistants(exported: Path, home: Path) -> None:
    assistant = load_assistant(home / "run" / "checkpoints", compressor=home / "compressor", branches=("base",))
    compressor = hypervl_torch.load_compressor(exported)
    for number, size in enumerate(((40, 60), (300, 200))):
        image = golden.picture(*size, number)
        expected = assistant.answer([ask("?", image)], Options(alpha="auto", max_new_tokens=1))[0].alphas[0]
        assert hypervl_torch.predict_alpha(compressor, image) == pytest.approx(expected, abs=1e-5)


class Eagle(torch.nn.Module):
    """The modules of vLLM's `Eagle2_5_VLForConditionalGeneration` by its names, from public classes."""

    def __init__(self) -> None:
        super().__init__()
        tower, width = CONFIG.vision_large, CONFIG.decoder.hidden_size
        values = vision_values(tower) | {"vision_use_head": False}
        self.vision_model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**values))
        joined = 4 * tower.hidden_size
        linear = torch.nn.Linear
        self.mlp1 = torch.nn.Sequential(
            torch.nn.LayerNorm(joined), linear(joined, width), torch.nn.GELU(), linear(width, width)
        )
        self.language_model = transformers.Qwen3ForCausalLM(qwen3_config(CONFIG.decoder))


def test_the_names_of_vllm_hold_the_same_model(eagle: Path, home: Path) -> None:
    stored = load_file(eagle / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    model = Eagle().eval()
    named = {key.replace("vision_model.vision_model.", "vision_model."): value for key, value in stored.items()}
    own = {key.replace("vision_model.vision_model.", "vision_model."): key for key in model.state_dict()}
    missing = model.load_state_dict({own[key]: value for key, value in named.items()}, strict=False)
    assert missing.missing_keys == ["language_model.lm_head.weight"]
    source = to_torch.open_source(str(home / "run"), None)
    export = to_torch.Export(source, "large", huggingface_files.FORMATS["eagle"], "bfloat16", None, eagle)
    case = golden.cases(CONFIG.tiling)[1]
    expected = golden.compute(case, CONFIG, export._parameters(), source.tokenizer, "large")
    pixels = torch.from_numpy(expected.tiles).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        features = model.vision_model(pixels).last_hidden_state
        grid = features.reshape(1, 4, 2, 4, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(1, 16, -1)
        visual = model.mlp1(grid)[0].numpy()
    np.testing.assert_allclose(visual, expected.visual, atol=1e-4 * np.abs(expected.visual).max())
    tokens = json.loads((eagle / "tokenizer.json").read_text())["model"]["vocab"]
    assert {name: tokens[name] for name in ("<IMG_CONTEXT>", "<img>", "</img>")} == {
        "<IMG_CONTEXT>": source.tokenizer.image,
        "<img>": source.tokenizer.vision_start,
        "</img>": source.tokenizer.vision_end,
    }


def test_what_cannot_be_exported_is_one_sentence_and_leaves_nothing(
    home: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, output = str(home / "run"), str(tmp_path / "out")
    cases: dict[tuple[str, ...], str] = {
        (str(tmp_path), "--output", output): "it is not a HyperVL checkpoint directory",
        (run, "--output", output, "--step", "9"): "no checkpoint of step 9",
        (run, "--output", str(exported)): "is there already and is not an empty directory",
        (run, "--output", output, "--compressor", str(home / "run")): "is no compressor",
    }
    for arguments, expected in cases.items():
        assert to_torch.main(["--checkpoint", *arguments]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert expected in error
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert to_torch.main(["--checkpoint", run, "--output", output]) == 1
    assert "has 0 MB left; free space there" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_differs_from_jax_is_not_written(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden, "cases", lambda tiling: (golden.Case("text", "How many?"),))
    monkeypatch.setattr(torch_parity, "TOLERANCE", 0.0)
    with pytest.raises(ArtifactError, match="the exported model differs from JAX in torch"):
        to_torch.export(str(home / "run"), str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_projector_that_the_class_cannot_hold_is_refused(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "run", tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    found = read_description(checkpoints)
    projector = dataclasses.replace(CONFIG.projector, layer_norm_eps=1e-6)
    write_description(
        checkpoints,
        Description(dataclasses.replace(CONFIG, projector=projector), found.details, tmp_path / "run" / "tokenizer"),
    )
    assert to_torch.main(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


def test_rounding_leaves_no_bit_of_the_mantissa_that_bfloat16_has_not() -> None:
    params: dict[str, Any] = {"a": {"b": jnp.asarray([1.00390625, 3.0])}}
    to_torch.round_in_place(params, "bfloat16")
    assert params["a"]["b"].tolist() == [1.0, 3.0]
