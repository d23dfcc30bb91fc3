"""The SigLIP2 vision tower of fixed resolution (arXiv 2502.14786), without its pooling head.

Computes what `SiglipVisionModel(...).last_hidden_state` of `transformers` computes.
"""

from __future__ import annotations

import math

import jax
from flax import linen as nn
from jaxtyping import Array, Float, UInt8

from hypervl_jax.architecture import VisionConfig, require
from hypervl_jax.models.attention import attention
from hypervl_jax.models.layers import LayerNorm, Linear, scan_layers
from hypervl_jax.models.runtime import RuntimeConfig
from hypervl_jax.partitioning import constrain
from hypervl_jax.vision.pixels import normalise_pixels


def xavier_uniform(in_axis: int | tuple[int, ...], out_axis: int | tuple[int, ...]) -> nn.initializers.Initializer:
    """Glorot's uniform initialisation for a kernel whose inputs or outputs span several axes, as SigLIP uses it."""
    return nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis, out_axis)


def patchify(tiles: Float[Array, "n s s 3"], patch_size: int) -> Float[Array, "n p c"]:
    """Cuts tiles into patches, row by row; a patch is flattened in the order (row, column, channel)."""
    n, side = tiles.shape[:2]
    grid = side // patch_size
    patches = tiles.reshape(n, grid, patch_size, grid, patch_size, 3).swapaxes(2, 3)
    return patches.reshape(n, grid * grid, patch_size * patch_size * 3)


def resample_positions(weights: Float[Array, "p d"], side: int) -> Float[Array, "q d"]:
    """Position embeddings of a square grid resampled to `side` × `side` patches.

    Bilinear with antialiasing, because that is how SigLIP2's own variable-resolution training (NaFlex) resampled its
    embeddings. The same size is the identity. Raises `ConfigError` when p is not a square.
    """
    old = math.isqrt(weights.shape[0])
    require(old * old == weights.shape[0], f"{weights.shape[0]} position embeddings do not form a square grid")
    if old == side:
        return weights
    grid = weights.reshape(old, old, -1)
    return jax.image.resize(grid, (side, side, grid.shape[-1]), "linear", antialias=True).reshape(side * side, -1)


class VisionAttention(nn.Module):
    """Multi-head attention among all patches of a tile, with biases."""

    config: VisionConfig
    runtime: RuntimeConfig

    @nn.compact
    def __call__(self, x: Float[Array, "n p d"]) -> Float[Array, "n p d"]:
        """Same shape as `x`."""
        d, heads, head_dim = self.config.hidden_size, self.config.num_heads, self.config.head_dim
        query, key, value = (
            Linear(
                (d, heads, head_dim),
                ("embed", "heads", "head_dim"),
                self.runtime.dtype,
                kernel_init=xavier_uniform(0, (1, 2)),
                name=name,
            )(x)
            for name in ("query", "key", "value")
        )
        kernel = "xla" if self.is_initializing() else self.runtime.attention
        mixed = attention(query, key, value, causal=False, kernel=kernel, axes=("tiles", None))
        return Linear(
            (heads, head_dim, d),
            ("heads", "head_dim", "embed"),
            self.runtime.dtype,
            inputs=2,
            kernel_init=xavier_uniform((0, 1), 2),
            name="output",
        )(constrain(mixed, "tiles", None, "activation_heads", None))


class VisionMLP(nn.Module):
    """Two linear layers with tanh-approximated GELU between them."""

    config: VisionConfig
    runtime: RuntimeConfig

    @nn.compact
    def __call__(self, x: Float[Array, "n p d"]) -> Float[Array, "n p d"]:
        """Same shape as `x`."""
        d, inner = self.config.hidden_size, self.config.intermediate_size
        init = xavier_uniform(0, 1)
        x = Linear((d, inner), ("embed", "mlp"), self.runtime.dtype, kernel_init=init, name="up")(x)
        x = constrain(jax.nn.gelu(x, approximate=True), "tiles", None, "activation_mlp")
        return Linear((inner, d), ("mlp", "embed"), self.runtime.dtype, kernel_init=init, name="down")(x)


class VisionLayer(nn.Module):
    """A pre-norm transformer encoder layer."""

    config: VisionConfig
    runtime: RuntimeConfig

    @nn.compact
    def __call__(self, x: Float[Array, "n p d"], _: None = None) -> tuple[Float[Array, "n p d"], None]:
        """The layer's output, in the form that a scan over layers asks for."""
        eps, dtype = self.config.layer_norm_eps, self.runtime.dtype
        attended = LayerNorm(eps, dtype, name="attention_norm")(x)
        x = x + VisionAttention(self.config, self.runtime, name="attention")(attended)
        x = x + VisionMLP(self.config, self.runtime, name="mlp")(LayerNorm(eps, dtype, name="mlp_norm")(x))
        return constrain(x, "tiles", None, "activation_embed"), None


class VisionTower(nn.Module):
    """Tiles of bytes to patch features after the final LayerNorm."""

    config: VisionConfig
    runtime: RuntimeConfig

    @nn.compact
    def __call__(self, tiles: UInt8[Array, "n s s 3"]) -> Float[Array, "n p d"]:
        """Features in the compute dtype; `s` must be `config.image_size`."""
        config, dtype = self.config, self.runtime.dtype
        require(
            tiles.shape[1:] == (config.image_size, config.image_size, 3),
            f"the tower takes uint8 tiles [n, {config.image_size}, {config.image_size}, 3], not {tiles.shape}",
        )
        patches = patchify(normalise_pixels(tiles), config.patch_size)
        shape = (config.patch_size**2 * 3, config.hidden_size)
        embed = Linear(
            shape, ("patch_pixels", "embed"), dtype, kernel_init=nn.initializers.lecun_normal(), name="patch_embedding"
        )
        init = nn.with_logical_partitioning(nn.initializers.normal(config.hidden_size**-0.5), ("patches", "embed"))
        positions = self.param("position_embedding", init, (config.num_patches, config.hidden_size))
        x = constrain(embed(patches) + positions.astype(dtype), "tiles", None, "activation_embed")
        remat = self.runtime.tower_remat in ("layer", "nested")
        layer = nn.remat(VisionLayer, prevent_cse=False) if remat else VisionLayer
        x, _ = scan_layers(layer, config.num_layers)(config, self.runtime, name="layers")(x, None)
        return LayerNorm(config.layer_norm_eps, dtype, name="final_norm")(x)
