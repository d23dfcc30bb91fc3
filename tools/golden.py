"""What JAX computes for a few fixed prompts: the reference that every exported artifact is compared with, and carries beside it.

Three prompts, made from the model's own tile size: text alone, a picture of one tile, and one of several tiles. Both pictures end in
padding, so that the visual tokens left out are part of what is compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from hypervl_jax.architecture import DECODER, HyperVLConfig, TilingConfig, projector_part, vision_part
from hypervl_jax.inference.assistant import Request, ask, encode
from hypervl_jax.inference.generate import (
    LENGTH_BUCKET,
    PROGRAMS,
    Generator,
    Prompts,
    bucket,
    embed_prompts,
    pad_prompts,
)
from hypervl_jax.models.hypervl import HyperVL
from hypervl_jax.models.qwen3 import Decoder, head_weights, logits
from hypervl_jax.models.runtime import RuntimeConfig
from hypervl_jax.text.conversation import encode_prompt
from hypervl_jax.text.tokenizer import Tokenizer
from hypervl_jax.vision.anyres import plan_image, tile_image

NEW_TOKENS = 64
LAST_POSITIONS = 8
"""Logits are compared at the last positions of a prompt: all of them would be gigabytes at the real vocabulary."""

RUNTIME = RuntimeConfig(dtype="float32", attention="xla", decoder_remat="none", tower_remat="none")
"""Float32, one tile after another."""

Rgb = UInt8[np.ndarray, "h w 3"]


@dataclasses.dataclass(frozen=True)
class Case:
    """A prompt to compare on."""

    name: str
    question: str
    images: tuple[Rgb, ...] = ()

    @property
    def request(self) -> Request:
        """The same for an assistant."""
        return ask(self.question, *self.images)


class Golden(NamedTuple):
    """What JAX makes of a prompt.

    Attributes:
        tiles: of all pictures, in order.
        visual: visual tokens of every tile, padding's included.
        tokens: ids of the prompt, without visual tokens of padding.
        logits: at the last positions of the prompt.
        generated: greedy ids after the prompt; stop tokens do not stop.
    """

    tiles: UInt8[np.ndarray, "t s s 3"]
    visual: Float[np.ndarray, "v d"]
    tokens: Int32[np.ndarray, "l"]
    logits: Float[np.ndarray, "k n"]
    generated: Int32[np.ndarray, "m"]


PROMPTS = ("text", "one_image", "many_tiles")


def cases(tiling: TilingConfig) -> tuple[Case, ...]:
    """The prompts; the last one is left out where one tile is all an image may take."""
    side = tiling.tile_size
    one = Case("one_image", "What is in the picture?", (picture(side * 3 // 4, side, 0),))
    many = Case("many_tiles", "What is written here, and where?", (picture(side * 5 // 4, side * 3 // 2, 1),))
    text = Case("text", "Name a colour and a number.")
    return (text, one, many) if tiling.max_tiles >= 4 else (text, one)


def picture(height: int, width: int, seed: int) -> Rgb:
    """Smooth colours, a few filled rectangles and a little noise: low and high frequencies, the same on every machine."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width] / max(height, width)
    image = np.stack([255 * rows, 255 * columns, 255 * (1 - rows) * columns], axis=-1)
    for _ in range(12):
        top, left = rng.integers(0, height * 3 // 4), rng.integers(0, width * 3 // 4)
        image[top : top + height // 5, left : left + width // 7] = rng.integers(0, 256, 3)
    return np.clip(image + rng.integers(-8, 9, image.shape), 0, 255).astype(np.uint8)


def compute(
    case: Case,
    config: HyperVLConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    branch: str,
    new_tokens: int = NEW_TOKENS,
) -> Golden:
    """Runs a prompt through one branch in float32; `params` hold its tower, its projector and the decoder."""
    plans = [plan_image(*image.shape[:2], 1.0, config.tiling) for image in case.images]
    prompt = encode_prompt(case.request.turns, tokenizer, plans, config.tiling)
    tiles = tile_all(case.images, config.tiling)
    with jax.default_matmul_precision("highest"):
        visual = encode_tiles(tiles, config, params, branch)
        length = bucket(len(prompt.tokens), LENGTH_BUCKET)
        prompts = pad_prompts([prompt], [0], 1, length)
        decoder = Decoder(config.decoder, RUNTIME)
        last = np.arange(len(prompt.tokens) - LAST_POSITIONS, len(prompt.tokens))
        found = PROGRAMS.run(prompt_logits, params[DECODER], prompts, visual, last, decoder=decoder)
        generator = Generator(decoder, params[DECODER], (), PROGRAMS)
        generated = generator.finish(generator.start(prompts, visual, None, new_tokens), None, new_tokens)
    return Golden(tiles, np.asarray(visual), prompt.tokens, np.asarray(found), generated.tokens[0, :new_tokens])


def tile_all(images: tuple[Rgb, ...], tiling: TilingConfig) -> UInt8[np.ndarray, "t s s 3"]:
    """Tiles of all pictures, in order."""
    tiles = [tile_image(image, plan_image(*image.shape[:2], 1.0, tiling), tiling) for image in images]
    return np.concatenate([np.zeros((0, tiling.tile_size, tiling.tile_size, 3), np.uint8), *tiles])


def encode_tiles(
    tiles: UInt8[np.ndarray, "t s s 3"], config: HyperVLConfig, params: Mapping[str, Any], branch: str
) -> Float[Array, "v d"]:
    """Visual tokens of every tile."""
    if len(tiles) == 0:
        return jnp.zeros((0, config.decoder.hidden_size), RUNTIME.dtype)
    read = {part(branch): params[part(branch)] for part in (vision_part, projector_part)}
    return PROGRAMS.run(encode, read, tiles, model=HyperVL(config, RUNTIME), branch=branch)


def prompt_logits(
    params: dict[str, Any], prompts: Prompts, visual: Float[Array, "v d"], last: Int32[Array, "k"], *, decoder: Decoder
) -> Float[Array, "k n"]:
    """Logits at the positions `last` of the first row."""
    embeddings = embed_prompts(params, prompts, visual, decoder=decoder)
    hidden = decoder.apply({"params": params}, embeddings, prompts.segments, prompts.positions)
    return logits(hidden[0, last], head_weights(params))


def arrays(golden: Mapping[str, Golden], made: Sequence[Case]) -> dict[str, np.ndarray]:
    """All of it by name, for `artifacts.write_golden`; the visual tokens are left out, being as large as the model's inputs."""
    named = {}
    for case in made:
        values = golden[case.name]._asdict()
        values.pop("visual")
        named |= {f"{case.name}/{name}": value for name, value in values.items() if value.size}
        named |= {f"{case.name}/image_{number}": image for number, image in enumerate(case.images)}
    return named
