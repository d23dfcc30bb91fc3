"""The programs of the studies' tools at the real model's size, traced by shape: nothing is computed and no weight exists."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest

from hypervl_jax.architecture import BRANCHES, branch_parts, hypervl_2b
from hypervl_jax.evaluation.failure_signs import compressor_share
from hypervl_jax.inference.assistant import encode, inference_dtypes, inference_runtime
from hypervl_jax.inference.generate import Prompts, decode_all, embed_prompts, start
from hypervl_jax.mobilenet import BACKBONES, mobilenet_config
from hypervl_jax.models.compressor import Compressor, forward_flops
from hypervl_jax.models.compressor_io import abstract_compressor
from hypervl_jax.models.hypervl import HyperVL
from hypervl_jax.models.qwen3 import Decoder
from hypervl_jax.training.batch import Batch, BatchShape
from hypervl_jax.training.compressor_training import CompressorTrainConfig, Lesson, Trainer
from hypervl_jax.training.state import abstract_parameters
from tools.compare_encoders import Sums, compare_rows
from tools.label_models import answer_losses
from tools.tile_probe import FULL, SERIAL, Case

CONFIG, RUNTIME = hypervl_2b(), inference_runtime(1)
SHAPE = BatchShape(rows=8, length=8192, tiles=24)
"""Rows as stages 2 and 3 pack them."""


def like(size: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(size, dtype)


@functools.cache
def parameters() -> dict:
    return inference_dtypes(abstract_parameters(CONFIG, RUNTIME)[0], RUNTIME.dtype)


def rows() -> Batch:
    return Batch(*(like(*field) for field in SHAPE.array_shapes(CONFIG.tiling.tile_size)))


@pytest.mark.parametrize("branch", BRANCHES)
def test_the_label_maker(branch: str) -> None:
    found = jax.eval_shape(
        functools.partial(answer_losses, HyperVL(CONFIG, RUNTIME), branch),
        {part: parameters()[part] for part in branch_parts(branch)},
        rows(),
    )
    assert [leaf.shape for leaf in found] == [(SHAPE.rows, SHAPE.length + 1)] * 2


def test_the_comparison_of_the_encoders() -> None:
    found = jax.eval_shape(functools.partial(compare_rows, HyperVL(CONFIG, RUNTIME)), parameters(), rows())
    assert {leaf.shape for leaf in found} == {(SHAPE.rows, SHAPE.length + 1)}
    assert len(found) == len(Sums._fields)


@pytest.mark.parametrize("branch", BRANCHES)
def test_answers_of_evaluation_and_ablation(branch: str) -> None:
    batch, length, slots, tiles = 32, 4096, 6144, 12
    params, decoder = parameters(), Decoder(CONFIG.decoder, RUNTIME)
    parts = {part: params[part] for part in branch_parts(branch) if part != "decoder"}
    pixels = like((tiles, 512, 512, 3), np.uint8)
    visual = jax.eval_shape(functools.partial(encode, model=HyperVL(CONFIG, RUNTIME), branch=branch), parts, pixels)
    assert visual.shape == (tiles * 256, CONFIG.decoder.hidden_size)
    prompts = Prompts(*(like((batch, length), np.int32) for _ in Prompts._fields))
    embeddings = jax.eval_shape(functools.partial(embed_prompts, decoder=decoder), params["decoder"], prompts, visual)
    first, state = jax.eval_shape(
        functools.partial(start, decoder=decoder, slots=slots), params["decoder"], embeddings, prompts, None
    )
    ends = like((batch,), bool), like((2,), np.int32), like((), np.int32)
    decode = functools.partial(decode_all, decoder=decoder, width=64)
    answers = jax.eval_shape(decode, params["decoder"], first, state, None, *ends)
    assert answers.tokens.shape == (batch, 64)


@pytest.mark.parametrize("backbone", ["small", "v4-small"])
def test_the_compressor_and_its_training(backbone: str) -> None:
    config, images = mobilenet_config(CONFIG.compressor, backbone), 64
    side = config.proxy_size
    proxies = np.zeros((images, side, side, 3), np.uint8)
    ones = np.ones(images, np.float32)
    lesson = Lesson(proxies, ones, ones * side, np.ones((images, 10), np.float32))

    def update() -> Any:
        trainer = Trainer(config, CompressorTrainConfig(), lesson, {})
        return trainer.update(trainer.params, trainer.state, lesson, np.arange(64))

    params, _, loss = jax.eval_shape(update)
    assert loss.shape == ()
    assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(
        lambda leaf: leaf.shape, abstract_compressor(config)
    )
    applied = jax.eval_shape(Compressor(config).apply, {"params": params}, like(proxies.shape, np.uint8))
    assert applied.shape == (images,)


def test_all_backbones_but_the_largest_cost_under_two_percent_of_a_base_tile() -> None:
    tile = CONFIG.vision_base.forward_flops()
    shares = {name: forward_flops(mobilenet_config(CONFIG.compressor, name)) / tile for name in BACKBONES}
    assert {name for name, share in shares.items() if share > 0.02} == {"v4-large"}
    assert {name for name in BACKBONES if compressor_share(int(shares[name] * tile), tile)} == {"v4-large"}


@pytest.mark.parametrize(("way", "tile"), [(SERIAL, 128), (SERIAL, 256), (SERIAL, 512), (FULL, 2048)])
def test_pictures_in_tiles_and_in_one_pass(way: str, tile: int) -> None:
    side = 2048
    case = Case("2b", "base", way, tile, side, side)
    config, runtime, plan = case.config, case.runtime(), case.plan
    parts = {part: leaf for part, leaf in abstract_parameters(config, runtime)[0].items() if part.endswith("_base")}
    pixels = like((plan.tiles, case.tile, case.tile, 3), np.uint8)
    found = jax.eval_shape(functools.partial(encode, model=HyperVL(config, runtime), branch="base"), parts, pixels)
    assert found.shape == ((side // 32) ** 2, config.decoder.hidden_size)
