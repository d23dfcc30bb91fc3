"""Launches that start from checkpoints which `transformers` wrote, and the ones that are refused."""

import json
import pathlib
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from data_pipelines.rendered.build import VOCAB_SIZE
from experiments import launch, preflight
from hypervl_jax.architecture import VisionConfig, hypervl_tiny
from hypervl_jax.text.tokenizer import TEMPLATE_FILE, load_tokenizer
from tests.experiments import processes
from tests.references import qwen3_config, vision_values, whole_siglip

TINY = hypervl_tiny(VOCAB_SIZE)
STORED_GRID = 4
"""Patches along a side of the stored large tower: half of tiny's, so that its position embedding must be resampled."""

STEPS = {
    "optimizer.learning_rate": 0,
    "optimizer.warmup_steps": 0,
    "loop.steps": 2,
    "loop.log_every": 1,
    "checkpoint.every": 2,
    "heldout.batches": 0,
    "batch.rows": 4,
    "mesh.data": 1,
    "mesh.fsdp": 2,
    "mesh.tensor": 2,
}
"""Two steps of `tiny`, one for each branch, that move nothing."""

ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
TOWER = {
    "attention_norm": "layer_norm1",
    "mlp_norm": "layer_norm2",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
    "attention/output": "self_attn.out_proj",
    **{f"attention/{ours}": f"self_attn.{theirs}" for ours, theirs in ATTENTION.items()},
}
DECODER = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
    "attention/output": "self_attn.o_proj",
    **{f"attention/{ours}": f"self_attn.{theirs}" for ours, theirs in ATTENTION.items()},
}
"""Modules of a layer by our names and by those of `transformers`."""


def tower_alone(tower: VisionConfig) -> SiglipVisionModel:
    """A vision tower that was made for smaller pictures."""
    return SiglipVisionModel(SiglipVisionConfig(**vision_values(tower, STORED_GRID * tower.patch_size)))


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Directories by what `initialize_from` calls them; every parameter is random, norms and biases too."""
    torch.manual_seed(0)
    models = {
        "vision_base": whole_siglip(TINY.vision_base),
        "vision_large": tower_alone(TINY.vision_large),
        "llm": Qwen3ForCausalLM(qwen3_config(TINY.decoder)),
    }
    home = tmp_path_factory.mktemp("published")
    for name, model in models.items():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(home / name)
    return {name: home / name for name in models}


def tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """What `transformers` saved, keys of a tower without the prefix that whole models have."""
    return {
        key.removeprefix("vision_model."): value for key, value in load_file(directory / "model.safetensors").items()
    }


def ours(theirs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of PyTorch in our layout: convolutions by pixel, matrices as input times output, heads as an axis."""
    if theirs.ndim == 4:
        theirs = theirs.transpose(2, 3, 1, 0)
    elif theirs.ndim == 2:
        theirs = theirs.T
    return theirs.reshape(shape)


def assert_layers_are(
    found: dict[str, np.ndarray], stored: dict[str, np.ndarray], modules: dict[str, str], key: str
) -> int:
    """Compares the stacked parameters of all layers, one by one; returns how many there are."""
    compared = 0
    for path, value in found.items():
        module, _, leaf = path.removeprefix("layers/").rpartition("/")
        if path.startswith("layers/"):
            compared += 1
            name = f"{modules[module]}.{'bias' if leaf == 'bias' else 'weight'}"
            for number, layer in enumerate(value):
                np.testing.assert_array_equal(layer, ours(stored[f"{key}.{number}.{name}"], layer.shape), err_msg=path)
    return compared


def assert_tower_is(found: dict[str, np.ndarray], stored: dict[str, np.ndarray]) -> None:
    """Compares all of a tower but its position embedding."""
    compared = assert_layers_are(found, stored, TOWER, "encoder.layers")
    outer = {
        "patch_embedding/kernel": "embeddings.patch_embedding.weight",
        "patch_embedding/bias": "embeddings.patch_embedding.bias",
        "final_norm/scale": "post_layernorm.weight",
        "final_norm/bias": "post_layernorm.bias",
    }
    for path, key in outer.items():
        np.testing.assert_array_equal(found[path], ours(stored[key], found[path].shape), err_msg=path)
    assert compared + len(outer) + 1 == len(found)


def resampled(grid: np.ndarray, side: int) -> np.ndarray:
    """A position embedding on another grid, as NaFlex SigLIP2 resamples its own: bilinear with antialiasing."""
    square = torch.tensor(grid).reshape(1, STORED_GRID, STORED_GRID, -1).permute(0, 3, 1, 2)
    larger = torch.nn.functional.interpolate(
        square, size=(side, side), mode="bilinear", align_corners=False, antialias=True
    )
    return larger.permute(0, 2, 3, 1).reshape(side * side, -1).numpy()


def command(data: pathlib.Path, workdir: pathlib.Path, sources: dict[str, pathlib.Path]) -> list[str]:
    keys = {**STEPS, **{f"initialize_from.{name}": path for name, path in sources.items()}}
    overrides = [f"--config.{key}={value}" for key, value in keys.items()]
    return ["--config", "tiny", "--data", str(data), "--workdir", str(workdir), *overrides]


class Launched(NamedTuple):
    """A complete run: its directory, what it printed, and its parameters by part and path."""

    workdir: pathlib.Path
    printed: str
    parts: dict[str, dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def launched(data, published, tmp_path_factory) -> Launched:
    """A launch in a process of its own, sharded over four devices."""
    workdir = tmp_path_factory.mktemp("run")
    words = [sys.executable, "-m", "experiments.launch", *command(data, workdir, published)]
    printed = processes.finish(processes.start(words, devices=4))
    parts: dict[str, dict[str, np.ndarray]] = {}
    for path, value in processes.last_checkpoint(workdir).items():
        if path.startswith("params/"):
            _, part, name = path.split("/", 2)
            parts.setdefault(part, {})[name] = value
    return Launched(workdir, printed, parts)


def test_parameters_are_those_that_transformers_saved(launched, published):
    parts = launched.parts
    assert_tower_is(parts["vision_base"], base := tensors(published["vision_base"]))
    np.testing.assert_array_equal(
        parts["vision_base"]["position_embedding"], base["embeddings.position_embedding.weight"]
    )
    assert_tower_is(parts["vision_large"], tensors(published["vision_large"]))
    decoder, stored = parts["decoder"], tensors(published["llm"])
    compared = assert_layers_are(decoder, stored, DECODER, "model.layers")
    np.testing.assert_array_equal(decoder["embedding"], stored["model.embed_tokens.weight"])
    np.testing.assert_array_equal(decoder["final_norm/scale"], stored["model.norm.weight"])
    assert compared + 2 == len(decoder)


def test_a_position_embedding_of_another_size_is_resampled(launched, published):
    parts = launched.parts
    stored = tensors(published["vision_large"])["embeddings.position_embedding.weight"]
    side = TINY.tiling.tile_size // TINY.tiling.patch_size
    np.testing.assert_allclose(parts["vision_large"]["position_embedding"], resampled(stored, side), atol=1e-6)


def test_the_launch_lists_where_every_parameter_comes_from(launched, published):
    parts, lines = launched.parts, launched.printed.splitlines()
    for part, name, counts in (
        ("vision_base", "vision_base", f"{len(parts['vision_base'])} taken, "),
        ("vision_large", "vision_large", f"{len(parts['vision_large']) - 1} taken, 1 resampled, "),
        ("decoder", "llm", f"{len(parts['decoder'])} taken"),
    ):
        (place,) = (
            number for number, line in enumerate(lines) if line.startswith(f"{part}: {published[name]}: {counts}")
        )
        listed = dict(line.split(":") for line in lines[place + 1 : place + 3] if line.startswith("  "))
        assert {path for paths in listed.values() for path in paths.split()} == set(parts[part])
    assert "  resampled: position_embedding" in lines
    place = lines.index(f"projector_base: random: {len(parts['projector_base'])} initialised")
    assert set(lines[place + 1].removeprefix("  initialised: ").split()) == set(parts["projector_base"])


def test_a_directory_of_pickles_is_refused_before_anything_starts(data, published, tmp_path, capsys):
    pickles = tmp_path / "pickles"
    pickles.mkdir()
    (pickles / "config.json").write_bytes((published["llm"] / "config.json").read_bytes())
    torch.save({"model.norm.weight": torch.zeros(3)}, pickles / "pytorch_model.bin")
    assert launch.main(command(data, tmp_path / "run", {**published, "llm": pickles})) == 2
    error = capsys.readouterr().err
    assert f"--config.initialize_from.llm: {pickles} holds only pickled weights (pytorch_model.bin)" in error
    assert "convert them to model.safetensors first" in error
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_shape_is_refused_by_name(data, published, tmp_path, capsys):
    key, wrong = "model.layers.1.mlp.up_proj.weight", tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "config.json").write_bytes((published["llm"] / "config.json").read_bytes())
    stored = load_file(published["llm"] / "model.safetensors")
    save_file({**stored, key: stored[key][:-1]}, wrong / "model.safetensors")
    words = command(data, tmp_path / "run", {**published, "llm": wrong})
    assert launch.main([*words, "--config.mesh.data=2"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {wrong}: {key!r} has shape {(255, 128)}, this architecture needs {(256, 128)}"
    )


@pytest.fixture
def retaught(data, tmp_path) -> pathlib.Path:
    """The tokenizer of the data with another chat template."""
    directory = tmp_path / "tokenizer"
    load_tokenizer(data).save(directory)
    template = json.loads((directory / TEMPLATE_FILE).read_text())
    (directory / TEMPLATE_FILE).write_text(json.dumps({**template, "default_system": "Answer briefly."}))
    return directory


def test_a_hand_over_to_another_tokenizer_is_refused(data, launched, retaught, tmp_path, capsys):
    words = ["--config", "tiny_stage2", "--data", str(data), "--workdir", str(tmp_path / "run")]
    words += [f"--config.initialize_from.checkpoint={launched.workdir}"]
    assert preflight.find_problems(launch.resolve(*launch.parse(words)), resuming=False) == []
    assert launch.main([*words, f"--config.tokenizer={retaught}"]) == 2
    before, now = load_tokenizer(data).fingerprint, load_tokenizer(retaught).fingerprint
    error = capsys.readouterr().err
    assert f"was trained with tokenizer and chat template {before!r}, {retaught} is {now!r}" in error
    assert "Make this run's data with its tokenizer" in error
    assert not (tmp_path / "run").exists()
