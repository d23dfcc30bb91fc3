"""The key table and checkpoint directories; parity of the loaded models is tested beside each model."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from flax import traverse_util
from safetensors.numpy import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from hypervl_jax.architecture import (
    BRANCHES,
    DecoderConfig,
    ProjectorConfig,
    VisionConfig,
    hypervl_tiny,
    qwen3,
    siglip2,
)
from hypervl_jax.models import huggingface, key_table
from hypervl_jax.models.runtime import RuntimeConfig
from hypervl_jax.models.safetensors_files import CheckpointError, read_directory, write_directory
from hypervl_jax.models.siglip2 import resample_positions
from hypervl_jax.training.state import abstract_parameters
from tests.references import whole_siglip

VISION = VisionConfig(16, 24, 2, 2, patch_size=4, image_size=16)
DECODER = DecoderConfig(40, 24, 32, 3, 4, 2, 6, rope_theta=1e4)


def random_tree(table: tuple[key_table.Entry, ...]) -> dict:
    rng = np.random.default_rng(0)
    return traverse_util.unflatten_dict({e.path: rng.normal(size=e.shape).astype(np.float32) for e in table}, sep="/")


@pytest.fixture
def decoder_directory(tmp_path):
    huggingface.save_decoder(random_tree(key_table.decoder_table(DECODER)), DECODER, tmp_path)
    return tmp_path


@pytest.fixture
def vision_directory(tmp_path):
    huggingface.save_vision(random_tree(key_table.vision_table(VISION)), VISION, tmp_path)
    return tmp_path


def rewrite(directory, change) -> None:
    """Applies `change` to the dictionary of tensors in a directory."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def reconfigure(directory, **values) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize("table", [key_table.vision_table(VISION), key_table.decoder_table(DECODER)])
def test_layouts_are_inverse_and_parts_equal_parts_of_the_whole(table):
    rng = np.random.default_rng(0)
    for entry in table:
        layout = entry.layout
        theirs = rng.normal(size=entry.key_shape).astype(np.float32)
        everything = layout.ranges(tuple(slice(None) for _ in layout.ours))
        ours = layout.to_ours(theirs, everything)
        np.testing.assert_array_equal(layout.to_theirs(ours), theirs)
        part = tuple(slice(0, 1) if len(group) == 1 and group != ("k",) else slice(None) for group in layout.ours)
        ranges = layout.ranges(part)
        np.testing.assert_array_equal(layout.to_ours(theirs[layout.their_index(ranges)], ranges), ours[part])


def test_tables_use_each_key_and_fill_each_parameter_once():
    for table in (
        key_table.vision_table(siglip2("siglip2-base-patch16-512")),
        key_table.decoder_table(qwen3("qwen3-8b")),
    ):
        keys = [key for entry in table for key in entry.keys]
        paths = [entry.path for entry in table]
        assert len(set(keys)) == len(keys)
        assert len(set(paths)) == len(paths)


@pytest.mark.parametrize("naming", [key_table.LFM2, key_table.EAGLE])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_a_whole_model_s_tables_name_every_parameter_once(naming: key_table.Naming, layer_norm: bool) -> None:
    untied = dataclasses.replace(hypervl_tiny().decoder, tie_embeddings=False)
    config = dataclasses.replace(hypervl_tiny(), decoder=untied, projector=ProjectorConfig(layer_norm=layer_norm))
    abstract, _ = abstract_parameters(config, RuntimeConfig())
    for branch in BRANCHES:
        tables = key_table.model_tables(config, branch, naming)
        keys = [key for table in tables.values() for entry in table for key in entry.keys]
        assert len(set(keys)) == len(keys)
        for part, table in tables.items():
            shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(abstract[part], sep="/").items()}
            assert {entry.path: entry.shape for entry in table} == shapes


def test_shards_are_read_back_whole(tmp_path):
    table = key_table.decoder_table(DECODER)
    tree = random_tree(table)
    tensors = huggingface.pending_tensors(tree, table)
    config = {**huggingface.decoder_identity(DECODER), "architectures": ["Qwen3ForCausalLM"]}
    write_directory(tmp_path, config, tensors, "float32", shard_bytes=4000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    sizes = [sum(value.nbytes for value in load_file(tmp_path / name).values()) for name in files]
    assert max(size for size in sizes if size != max(sizes)) <= 4000
    params, _ = huggingface.load_decoder(tmp_path, DECODER)
    jax.tree.map(np.testing.assert_array_equal, params, tree)
    assert Qwen3ForCausalLM.from_pretrained(tmp_path).config.num_hidden_layers == DECODER.num_layers


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(CheckpointError, match="0 MB left; free space there"):
        huggingface.save_decoder(random_tree(key_table.decoder_table(DECODER)), DECODER, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_architectures_are_read_from_the_directories(vision_directory, tmp_path_factory):
    assert huggingface.vision_config(vision_directory) == VISION
    assert huggingface.vision_config(vision_directory, 32).num_patches == 64
    home = tmp_path_factory.mktemp("decoder")
    huggingface.save_decoder(random_tree(key_table.decoder_table(DECODER)), DECODER, home)
    assert huggingface.decoder_config(home) == DECODER
    with pytest.raises(CheckpointError, match="model_type is 'qwen3', not 'siglip_vision_model'"):
        huggingface.vision_config(home)
    reconfigure(vision_directory, hidden_size=0)
    with pytest.raises(CheckpointError, match="describes no model of ours: vision hidden_size 0"):
        huggingface.vision_config(vision_directory)


def test_decoder_round_trip_is_exact(decoder_directory):
    params, report = huggingface.load_decoder(decoder_directory, DECODER)
    jax.tree.map(np.testing.assert_array_equal, params, random_tree(key_table.decoder_table(DECODER)))
    assert (report.resampled, report.initialised, report.left_out) == ((), (), ())
    assert report.summary().endswith("13 taken")


def test_whole_siglip_model_leaves_out_text_tower_and_pooling_head(tmp_path):
    model = whole_siglip(VISION)
    model.save_pretrained(tmp_path)
    params, report = huggingface.load_vision(tmp_path, VISION)
    assert sum(x.size for x in jax.tree.leaves(params)) == VISION.parameter_count()
    assert {key.split(".")[0] for key in report.left_out} == {"vision_model", "text_model", "logit_scale", "logit_bias"}
    assert all(key.startswith("vision_model.head.") for key in report.left_out if key.startswith("vision_model"))


def test_position_embedding_is_resampled_to_another_tile_size(vision_directory):
    larger = VisionConfig(16, 24, 2, 2, patch_size=4, image_size=24)
    params, report = huggingface.load_vision(vision_directory, larger)
    assert report.resampled == ("position_embedding",)
    assert "position_embedding" not in report.taken
    original = random_tree(key_table.vision_table(VISION))["position_embedding"]
    np.testing.assert_allclose(params["position_embedding"], resample_positions(original, 6), atol=1e-6)


def test_sharded_bfloat16_checkpoint_of_transformers_is_read(tmp_path):
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=40,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            rope_parameters={"rope_theta": 1e4, "rope_type": "default"},
            tie_word_embeddings=True,
        )
    ).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    params, _ = huggingface.load_decoder(tmp_path, DECODER)
    expected = model.model.layers[2].mlp.gate_proj.weight.detach().float().numpy().T
    np.testing.assert_array_equal(params["layers"]["mlp"]["gate"]["kernel"][2], expected)


def test_bfloat16_is_written(tmp_path):
    params = random_tree(key_table.decoder_table(DECODER))
    huggingface.save_decoder(params, DECODER, tmp_path, dtype="bfloat16")
    model = Qwen3ForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    expected = torch.tensor(params["embedding"]).to(torch.bfloat16)
    assert torch.equal(model.model.embed_tokens.weight.data, expected)


SHARDED_LOAD = """
import sys, jax, numpy as np
from hypervl_jax import partitioning
from hypervl_jax.architecture import DecoderConfig
from hypervl_jax.models import huggingface, key_table
from hypervl_jax.models.qwen3 import Decoder
from hypervl_jax.models.runtime import RuntimeConfig

config = DecoderConfig(40, 24, 32, 3, 4, 2, 6, rope_theta=1e4)
ids, embeddings = np.zeros((1, 1), np.int32), np.zeros((1, 1, 24), np.float32)
boxed = jax.eval_shape(Decoder(config, RuntimeConfig()).init, jax.random.key(0), embeddings, ids, ids)
abstract, axes = partitioning.unbox(boxed["params"])
mesh = partitioning.make_mesh(partitioning.MeshConfig(fsdp=4, tensor=2))
shardings = partitioning.shardings(abstract, axes, mesh)
whole, _ = huggingface.load_decoder(sys.argv[1], config)
split, _ = huggingface.load_decoder(sys.argv[1], config, shardings)
jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), whole, split)
assert jax.tree.map(lambda x: x.sharding, split) == shardings
assert split["layers"]["attention"]["query"]["kernel"].addressable_shards[0].data.shape == (3, 6, 2, 6)
"""


def test_loading_into_a_sharding_reads_the_same_numbers(decoder_directory):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", SHARDED_LOAD, str(decoder_directory)], check=True, env=environment)


def test_repeated_tied_head_is_left_out_when_equal_and_refused_when_not(decoder_directory):
    rewrite(
        decoder_directory,
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}),
    )
    _, report = huggingface.load_decoder(decoder_directory, DECODER)
    assert report.left_out == ("lm_head.weight",)
    rewrite(decoder_directory, lambda tensors: tensors["lm_head.weight"].__setitem__((39, 0), 5.0))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        huggingface.load_decoder(decoder_directory, DECODER)


def test_missing_key_is_named(decoder_directory):
    rewrite(decoder_directory, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks 1 keys.*model\.layers\.1\.mlp\.up_proj\.weight"):
        huggingface.load_decoder(decoder_directory, DECODER)


def test_unknown_key_is_named(decoder_directory):
    rewrite(decoder_directory, lambda tensors: tensors.update({"model.layers.3.extra": np.zeros(3, np.float32)}))
    with pytest.raises(CheckpointError, match=r"has 1 keys.*model\.layers\.3\.extra"):
        huggingface.load_decoder(decoder_directory, DECODER)


def test_wrong_shape_is_named(decoder_directory):
    rewrite(decoder_directory, lambda tensors: tensors.update({"model.norm.weight": np.zeros(25, np.float32)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*\(25,\).*\(24,\)"):
        huggingface.load_decoder(decoder_directory, DECODER)


def test_quantised_tensor_is_refused(decoder_directory):
    rewrite(decoder_directory, lambda tensors: tensors.update({"model.norm.weight": np.zeros(24, np.int8)}))
    with pytest.raises(CheckpointError, match="I8"):
        huggingface.load_decoder(decoder_directory, DECODER)


@pytest.mark.parametrize(
    "values",
    [
        {"num_attention_heads": 8},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}},
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"attention_bias": True},
        {"model_type": "qwen2"},
    ],
)
def test_another_architecture_of_the_same_shapes_is_refused(decoder_directory, values):
    reconfigure(decoder_directory, **values)
    with pytest.raises(CheckpointError, match=r"config\.json does not fit"):
        huggingface.load_decoder(decoder_directory, DECODER)


def test_a_config_of_older_transformers_is_read(decoder_directory):
    reconfigure(decoder_directory, rope_parameters=None, rope_scaling=None, rope_theta=10_000)
    huggingface.load_decoder(decoder_directory, DECODER)


def test_pickles_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        read_directory(tmp_path)


def test_an_index_cannot_point_elsewhere(decoder_directory):
    index = {"weight_map": {"model.norm.weight": "../other/model.safetensors"}}
    (decoder_directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="only safetensors files beside it"):
        read_directory(decoder_directory)


def test_a_key_in_two_shards_is_refused(decoder_directory):
    one = {"model.norm.weight": np.zeros(24, np.float32)}
    save_file(one, decoder_directory / "a.safetensors")
    save_file(one, decoder_directory / "b.safetensors")
    index = {"weight_map": {"model.norm.weight": "a.safetensors", "other": "b.safetensors"}}
    (decoder_directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="more than one file"):
        read_directory(decoder_directory)


def test_a_damaged_file_is_refused(decoder_directory):
    file = decoder_directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        read_directory(decoder_directory)
