"""From patch features to visual tokens: pixel shuffle and a two-layer MLP.

The form that `Lfm2VlForConditionalGeneration` of `transformers` holds.
"""

from __future__ import annotations

import math

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from hypervl_jax.architecture import DecoderConfig, ProjectorConfig, VisionConfig
from hypervl_jax.models.layers import LayerNorm, Linear
from hypervl_jax.models.runtime import RuntimeConfig
from hypervl_jax.partitioning import constrain


def pixel_shuffle(features: Float[Array, "n p c"], factor: int) -> Float[Array, "n v e"]:
    """Joins each `factor` × `factor` square of patches into one token.

    Patches and tokens are in row-major order of their square grids. A token's channels are in the order
    (row offset, column offset, c), so e = factor² · c. Factor 2, patch (row, column) of a 4 × 4 grid: token 1 is
    [(0,2), (0,3), (1,2), (1,3)].
    """
    n, p, c = features.shape
    cells = math.isqrt(p) // factor
    grid = features.reshape(n, cells, factor, cells, factor, c).swapaxes(2, 3)
    return grid.reshape(n, cells * cells, factor * factor * c)


class Projector(nn.Module):
    """Pixel shuffle -> LayerNorm (optional) -> Linear -> exact GELU -> Linear, on the patches of whole tiles."""

    config: ProjectorConfig
    vision: VisionConfig
    decoder: DecoderConfig
    shuffle: int
    runtime: RuntimeConfig

    @nn.compact
    def __call__(self, features: Float[Array, "n p c"]) -> Float[Array, "n v d"]:
        """Visual tokens of each tile in the decoder's width, in row-major order."""
        dtype, width = self.runtime.dtype, self.decoder.hidden_size
        inner = self.vision.hidden_size * self.shuffle**2
        # libtpu 0.0.52 aborts where it fuses the tower's final norm with the shuffle ("split of a padded window dim").
        x = pixel_shuffle(jax.lax.optimization_barrier(features), self.shuffle)
        if self.config.layer_norm:
            x = LayerNorm(self.config.layer_norm_eps, dtype, name="norm")(x)
        init = nn.initializers.lecun_normal()
        x = Linear((inner, width), ("shuffled", "projected"), dtype, kernel_init=init, name="first")(x)
        x = constrain(jax.nn.gelu(x, approximate=False), "tiles", None, "activation_mlp")
        return Linear((width, width), ("projected", "embed"), dtype, kernel_init=init, name="second")(x)
