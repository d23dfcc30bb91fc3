"""HyperVL (arXiv 2512.14052): two vision branches, one decoder."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, UInt8

from hypervl_jax.architecture import BRANCHES, HyperVLConfig, projector_part, vision_part
from hypervl_jax.models.projector import Projector
from hypervl_jax.models.qwen3 import Decoder, head_weights, logits
from hypervl_jax.models.runtime import RuntimeConfig
from hypervl_jax.models.siglip2 import VisionTower
from hypervl_jax.partitioning import constrain
from hypervl_jax.training.batch import TEXT_POSITION, Batch


def merge(
    embeddings: Float[Array, "b l d"], visual: Float[Array, "b v d"], visual_index: Int[Array, "b l"]
) -> Float[Array, "b l d"]:
    """Embeddings with visual token `visual_index` of the same row at each position where it is not -1."""
    if visual.shape[1] == 0:
        return embeddings
    # Batched over rows, so that a row's tokens are gathered on the device that holds the row.
    gathered = jax.vmap(lambda tokens, index: tokens[index])(visual, jnp.maximum(visual_index, 0))
    return jnp.where((visual_index == TEXT_POSITION)[..., None], embeddings, gathered.astype(embeddings.dtype))


@jax.custom_vjp
def gathered(sharded: Float[Array, "..."], whole: Float[Array, "..."]) -> Float[Array, "..."]:
    """`whole`, the same weights on every device, whose gradient belongs to `sharded`.

    A loop that reads `whole` gathers nothing, and what it adds up for the backward pass is as small as `sharded`.
    """
    return whole


gathered.defvjp(lambda sharded, whole: (whole, None), lambda _, gradient: (gradient, None))


class HyperVL(nn.Module):
    """The whole model; its parameter tree has exactly the top-level keys `architecture.PARTS`.

    Every method reads only the parts it needs: `model.apply({"params": parts}, ..., method="encode_tiles")` works with
    `parts` holding one branch's tower and projector.
    """

    config: HyperVLConfig
    runtime: RuntimeConfig

    def setup(self) -> None:
        """Declares the five parts."""
        self.vision_base, self.projector_base = self._branch("base")
        self.vision_large, self.projector_large = self._branch("large")
        self.decoder = Decoder(self.config.decoder, self.runtime)

    def _branch(self, branch: str) -> tuple[VisionTower, Projector]:
        vision, config = self.config.vision(branch), self.config
        projector = Projector(config.projector, vision, config.decoder, config.tiling.shuffle, self.runtime)
        return VisionTower(vision, self.runtime), projector

    def encode_chunk(self, tiles: UInt8[Array, "b t s s 3"], branch: str) -> Float[Array, "b v d"]:
        """Visual tokens of a few tiles of each row, all encoded at once; v counts the tokens of the t tiles."""
        flat = tiles.reshape(-1, *tiles.shape[2:])
        features = getattr(self, vision_part(branch))(constrain(flat, "tiles", None, None, None))
        visual = getattr(self, projector_part(branch))(features)
        return visual.reshape(tiles.shape[0], -1, visual.shape[-1])

    def encode_tiles(self, tiles: UInt8[Array, "b t s s 3"], branch: str) -> Float[Array, "b v d"]:
        """Visual tokens of every tile, t · tokens_per_tile a row, in tile order.

        Tiles pass through the tower one chunk after another (`runtime.tile_chunk` tiles of every row at a time), so peak
        activation memory does not grow with t under "tile" or "nested" rematerialisation. On a mesh the weights are gathered once
        for all chunks (`gathered`).
        """
        rows, num_tiles = tiles.shape[:2]
        if num_tiles == 0:
            return jnp.zeros((rows, 0, self.config.decoder.hidden_size), self.runtime.dtype)
        chunk = min(self.runtime.tile_chunk, num_tiles)
        padded = jnp.pad(tiles, ((0, 0), (0, -num_tiles % chunk), (0, 0), (0, 0), (0, 0)))
        chunks = padded.reshape(rows, -1, chunk, *tiles.shape[2:]).swapaxes(0, 1)
        model, parts = HyperVL(self.config, self.runtime, parent=None), (vision_part(branch), projector_part(branch))
        sharded = {part: self.variables["params"][part] for part in parts}
        whole = jax.tree.map(constrain, jax.lax.stop_gradient(sharded))

        def encode(chunk_tiles: UInt8[Array, "b t s s 3"]) -> Float[Array, "b v d"]:
            params = jax.tree.map(gathered, sharded, whole)
            return model.apply({"params": params}, chunk_tiles, branch, method="encode_chunk")

        remat = self.runtime.tower_remat in ("tile", "nested")
        visual = jax.lax.map(jax.checkpoint(encode, prevent_cse=False) if remat else encode, chunks)
        visual = visual.swapaxes(0, 1).reshape(rows, -1, visual.shape[-1])
        return visual[:, : num_tiles * self.config.tiling.tokens_per_tile]

    def hidden_from_visual(self, batch: Batch, visual: Float[Array, "b v d"]) -> Float[Array, "b l d"]:
        """Hidden states after the decoder's final norm, given the rows' visual tokens."""
        embeddings = merge(self.decoder.embed(batch.tokens), visual, batch.visual_index)
        return self.decoder(embeddings, batch.segments, batch.positions)

    def hidden_states(self, batch: Batch, branch: str) -> Float[Array, "b l d"]:
        """Hidden states after the decoder's final norm, images seen through `branch`."""
        return self.hidden_from_visual(batch, self.encode_tiles(batch.tiles, branch))

    def __call__(self, batch: Batch, branch: str) -> Float[Array, "b l n"]:
        """Logits of every position in float32; for small sizes (training forms them in chunks)."""
        return logits(self.hidden_states(batch, branch), head_weights(self.decoder.variables["params"]))

    def visit_parts(self) -> None:
        """Runs every part on the smallest input it takes, so that `init` creates all parameters."""
        side = self.config.tiling.tile_size
        for branch in BRANCHES:
            self.encode_chunk(jnp.zeros((1, 1, side, side, 3), jnp.uint8), branch)
        one = jnp.zeros((1, 1), jnp.int32)
        self.decoder(self.decoder.embed(one), one, one)


def init_parameters(config: HyperVLConfig, runtime: RuntimeConfig, rng: jax.Array) -> dict[str, Any]:
    """Parameters of all parts, float32, boxed with their logical axis names (see `partitioning.unbox`).

    Works under `jax.eval_shape` and under `jax.jit` with output shardings. Under jit the forward pass that `init` needs for
    its shapes is dead code, so nothing but the parameters is ever computed; called eagerly, this function jits itself.
    """
    model = HyperVL(config, runtime)
    return jax.jit(lambda key: model.init(key, method="visit_parts")["params"])(rng)
