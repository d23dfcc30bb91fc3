"""Directories that `transformers` wrote become a checkpoint that launch and the tools take."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from experiments import preflight
from experiments.config import ExperimentConfig, InitializeConfig
from experiments.named import load_config
from experiments.overrides import from_config_dict
from hypervl_jax.architecture import HyperVLConfig, hypervl_tiny
from hypervl_jax.inference.assistant import Options, ask, load_assistant
from hypervl_jax.text.tokenizer import train_sentencepiece
from hypervl_jax.text.tokenizer_json import write_tokenizer_json
from tests.references import qwen3_config, vision_values, whole_siglip
from tests.tools.runs import TEXTS
from tools import from_huggingface

TINY = hypervl_tiny()
STORED_SIDE = 4 * TINY.tiling.patch_size
"""Pixels that the stored large tower was made for: its position embedding must be resampled."""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A whole SigLIP2, a vision tower alone for smaller pictures, and a Qwen3 in shards with its tokenizer."""
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("published")
    tower = SiglipVisionModel(SiglipVisionConfig(**vision_values(TINY.vision_large, STORED_SIDE)))
    models = {
        "base": whole_siglip(TINY.vision_base),
        "large": tower,
        "llm": Qwen3ForCausalLM(qwen3_config(TINY.decoder)),
    }
    for name, model in models.items():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(home / name, max_shard_size="500KB" if name == "llm" else "1GB")
    assert len(list((home / "llm").glob("*.safetensors"))) > 1
    write_tokenizer_json(train_sentencepiece(TEXTS, home / "tokenizer.model", vocab_size=310), home / "llm")
    return home


def arguments(published: pathlib.Path, output: pathlib.Path, **changed: pathlib.Path) -> list[str]:
    places = {name: published / name for name in ("base", "large", "llm")} | changed
    names = {"base": "--vision-base", "large": "--vision-large", "llm": "--llm"}
    words = [word for name, option in names.items() for word in (option, str(places[name]))]
    return [*words, "--output", str(output), "--max-tiles", "9"]


@pytest.fixture(scope="module")
def made(published: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The initial checkpoint."""
    output = tmp_path_factory.mktemp("made") / "run"
    assert from_huggingface.main(arguments(published, output)) == 0
    return output


def test_parameters_and_architecture_are_those_of_the_directories(made: pathlib.Path, published: pathlib.Path) -> None:
    assistant = load_assistant(made / "checkpoints")
    found = assistant.config
    for name in ("vision_base", "vision_large", "decoder", "projector", "tiling"):
        assert getattr(found, name) == getattr(TINY, name)
    stored = {
        key: value for path in (published / "llm").glob("*.safetensors") for key, value in load_file(path).items()
    }
    decoder = assistant.params["decoder"]
    np.testing.assert_array_equal(decoder["embedding"], stored["model.embed_tokens.weight"])
    query = stored["model.layers.2.self_attn.q_proj.weight"].T.reshape(128, 4, 32)
    np.testing.assert_array_equal(decoder["layers"]["attention"]["query"]["kernel"][2], query)
    grid = load_file(published / "large" / "model.safetensors")
    key = next(key for key in grid if key.endswith("position_embedding.weight"))
    square = torch.from_numpy(grid[key]).reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    larger = torch.nn.functional.interpolate(square, size=(8, 8), mode="bilinear", align_corners=False, antialias=True)
    expected = larger.permute(0, 2, 3, 1).reshape(64, -1)
    np.testing.assert_allclose(assistant.params["vision_large"]["position_embedding"], expected, atol=1e-6)
    assert assistant.answer([ask("How many?")], Options(max_new_tokens=2))[0].tokens


def test_launch_takes_the_checkpoint(made: pathlib.Path) -> None:
    config = from_config_dict(ExperimentConfig, load_config("tiny_stage1"))
    assistant = load_assistant(made / "checkpoints", branches=("base",))
    source = InitializeConfig(checkpoint=str(made))
    fitting = dataclasses.replace(
        config, architecture=assistant.config, tokenizer=str(made / "tokenizer"), initialize_from=source
    )
    assert preflight.checkpoint_problem(fitting) == ""
    deeper = dataclasses.replace(TINY.decoder, num_layers=4)
    other: HyperVLConfig = dataclasses.replace(TINY, decoder=deeper)
    assert "decoder differ" in preflight.checkpoint_problem(dataclasses.replace(fitting, architecture=other))


def test_where_every_parameter_comes_from_is_listed(published, tmp_path, capsys) -> None:
    assert from_huggingface.main([*arguments(published, tmp_path / "run"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    parts = printed["parts"]
    assert parts["vision_large"]["resampled"] == ["position_embedding"]
    assert parts["vision_base"]["resampled"] == []
    assert any(key.startswith("text_model.") for key in parts["vision_base"]["left_out"])
    assert len(parts["decoder"]["taken"]) == 13
    assert len(parts["projector_base"]["initialised"]) == 6
    assert printed["parameters"] == TINY.parameter_counts()


def test_projectors_follow_the_seed(made: pathlib.Path, published: pathlib.Path) -> None:
    config = from_huggingface.architecture_of(source_of(published), None, 9)
    one, other = (from_huggingface.parameters(config, source_of(published), seed)[0] for seed in (0, 1))
    assistant = load_assistant(made / "checkpoints")
    jax.tree.map(np.testing.assert_array_equal, one["projector_base"], assistant.params["projector_base"])
    assert not np.array_equal(one["projector_base"]["first"]["kernel"], other["projector_base"]["first"]["kernel"])


def source_of(published: pathlib.Path) -> InitializeConfig:
    towers = {f"vision_{name}": str(published / name) for name in ("base", "large")}
    return InitializeConfig(**towers, llm=str(published / "llm"))


def test_what_cannot_be_taken_is_one_sentence_and_leaves_nothing(published, tmp_path, capsys) -> None:
    pickles, quiet = tmp_path / "pickles", tmp_path / "quiet"
    for directory in (pickles, quiet):
        directory.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (pickles / name).write_bytes((published / "llm" / name).read_bytes())
    torch.save({"model.norm.weight": torch.zeros(3)}, pickles / "pytorch_model.bin")
    (quiet / "config.json").write_text('{"model_type": "qwen3"}')
    (quiet / "model.safetensors").write_bytes((published / "base" / "model.safetensors").read_bytes())
    cases = {
        "holds only pickled weights (pytorch_model.bin)": {"llm": pickles},
        "is neither a SentencePiece .model nor": {"llm": tmp_path / "nowhere"},
        "cannot read": {"base": tmp_path / "nowhere"},
        "says nothing of vocab_size": {"llm": quiet},
        "model_type is 'qwen3', not 'siglip_vision_model'": {"large": published / "llm"},
        "model_type is 'siglip', not 'qwen3'": {"llm": published / "base"},
    }
    tokenizer = ["--tokenizer", str(published / "llm")]
    for expected, changed in cases.items():
        extra = [] if "SentencePiece" in expected else tokenizer
        assert from_huggingface.main([*arguments(published, tmp_path / "run", **changed), *extra]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert expected in error
        assert error.count("\n") == 1
    assert from_huggingface.main([*arguments(published, published / "base")]) == 1
    assert "is not an empty directory" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"pickles", "quiet"}
