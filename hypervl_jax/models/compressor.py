"""The Visual Resolution Compressor (VRC): how much of an image's resolution must be kept.

A MobileNet backbone (`hypervl_jax.mobilenet`), weighted pooling and an MLP with one output: the natural log of the area to keep
in proxy units, unbounded. `vision.resolution` makes the proxy image and maps the output to α. No mutable state: the norm is
GroupNorm (arXiv 1803.08494) from scratch, or a per-channel affine map, which is what a loaded BatchNorm folds to.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, UInt8

from hypervl_jax.architecture import CompressorConfig, require
from hypervl_jax.mobilenet import Block, Convolution, blocks, convolutions, head, stem
from hypervl_jax.models.layers import Linear, scale_and_bias
from hypervl_jax.vision.pixels import normalise_pixels

GROUP_NORM_EPS = 1e-5
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"relu": jax.nn.relu, "hard_swish": jax.nn.hard_swish}

fan_out_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Norm(nn.Module):
    """GroupNorm over groups of `group_size` channels, or a per-channel affine map."""

    kind: str
    group_size: int

    @nn.compact
    def __call__(self, x: Float[Array, "b r q c"]) -> Float[Array, "b r q c"]:
        """Normalises in float32 and returns the dtype of `x`."""
        channels = x.shape[-1]
        scale, bias = scale_and_bias(self, channels)
        wide = x.astype(jnp.float32)
        if self.kind == "group":
            require(
                channels % self.group_size == 0,
                f"compressor width {channels} is not divisible by group_size {self.group_size}",
            )
            grouped = wide.reshape(*x.shape[:-1], channels // self.group_size, self.group_size)
            centred = grouped - grouped.mean((1, 2, 4), keepdims=True)
            variance = jnp.square(centred).mean((1, 2, 4), keepdims=True)
            wide = (centred * jax.lax.rsqrt(variance + GROUP_NORM_EPS)).reshape(x.shape)
        return (wide * scale + bias).astype(x.dtype)


class ConvNorm(nn.Module):
    """A convolution, its norm and its activation."""

    sizes: Convolution
    config: CompressorConfig
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b r q c"]) -> Float[Array, "b r q e"]:
        """Output height and width are the input's divided by the stride, rounded up."""
        found, margin = self.sizes, (self.sizes.kernel - 1) // 2
        x = nn.Conv(
            found.width,
            (found.kernel, found.kernel),
            found.stride,
            padding=((margin, margin), (margin, margin)),
            feature_group_count=found.groups,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.with_logical_partitioning(fan_out_normal, (None, None, "channels", "channels")),
            name="convolution",
        )(x)
        x = Norm(self.config.norm, self.config.group_size, name="norm")(x)
        return ACTIVATIONS[found.activation](x) if found.activation else x


class SqueezeExcite(nn.Module):
    """Scales each channel by a hard sigmoid of an MLP over the spatial mean (arXiv 1709.01507)."""

    squeezed: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b r q c"]) -> Float[Array, "b r q c"]:
        """Same shape as `x`."""
        channels = x.shape[-1]
        axes = ("channels", "channels")
        init = nn.initializers.lecun_normal()
        mean = x.mean((1, 2))
        squeezed = Linear((channels, self.squeezed), axes, self.dtype, kernel_init=init, name="squeeze")(mean)
        excited = Linear((self.squeezed, channels), axes, self.dtype, kernel_init=init, name="excite")(
            jax.nn.relu(squeezed)
        )
        return x * jax.nn.hard_sigmoid(excited)[:, None, None]


class Bottleneck(nn.Module):
    """The convolutions of a bottleneck, squeeze-and-excite before the last where it has one, and its input where it is added."""

    block: Block
    config: CompressorConfig
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b r q c"]) -> Float[Array, "b r q e"]:
        """Output height and width are the input's divided by the strides, rounded up."""
        inputs, (*before, last) = x, self.block.convolutions
        for found in before:
            x = ConvNorm(found, self.config, self.dtype, name=found.name)(x)
        if self.block.squeezed:
            x = SqueezeExcite(self.block.squeezed, self.dtype, name="squeeze_excite")(x)
        x = ConvNorm(last, self.config, self.dtype, name=last.name)(x)
        return inputs + x if self.block.residual else x


class WeightedPooling(nn.Module):
    """Mean over positions, weighted by the softmax of a learned 1 × 1 score map."""

    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b r q c"]) -> Float[Array, "b c"]:
        """One vector an image."""
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        score = Linear(
            (x.shape[-1], 1), ("channels", None), self.dtype, kernel_init=nn.initializers.zeros, name="score"
        )
        weights = jax.nn.softmax(score(flat).astype(jnp.float32), axis=1)
        return (flat.astype(jnp.float32) * weights).sum(1).astype(self.dtype)


class Compressor(nn.Module):
    """Proxy images to the log of the area to keep in proxy units."""

    config: CompressorConfig
    dtype: str = "float32"

    @nn.compact
    def __call__(self, proxies: UInt8[Array, "b s s 3"]) -> Float[Array, "b"]:
        """One float32 number an image, natural log, unbounded; `s` must be `config.proxy_size`."""
        config, side = self.config, self.config.proxy_size
        require(
            proxies.shape[1:] == (side, side, 3),
            f"the compressor takes uint8 proxies [b, {side}, {side}, 3], not {proxies.shape}",
        )
        pixels = normalise_pixels(proxies).astype(self.dtype)
        x = ConvNorm(stem(config), config, self.dtype, name="stem")(pixels)
        for number, block in enumerate(blocks(config)):
            x = Bottleneck(block, config, self.dtype, name=f"bottleneck_{number}")(x)
        x = ConvNorm(head(config), config, self.dtype, name="head")(x)
        x = WeightedPooling(self.dtype, name="pooling")(x)
        init = nn.initializers.lecun_normal()
        axes = ("channels", "channels")
        x = Linear((config.head_width, config.hidden_size), axes, self.dtype, kernel_init=init, name="hidden")(x)
        output = Linear((config.hidden_size, 1), ("channels", None), "float32", kernel_init=init, name="output")
        return output(jax.nn.hard_swish(x).astype(jnp.float32))[:, 0]


def parameter_count(config: CompressorConfig) -> int:
    """Parameters of a compressor; every convolution has a norm's scale and bias, every linear layer a bias."""
    total = sum(found.weights + 2 * found.width for found in convolutions(config))
    for block in blocks(config):
        total += 2 * block.excited * block.squeezed + (block.squeezed + block.excited) * bool(block.squeezed)
    return total + config.head_width + 1 + (config.head_width + 1) * config.hidden_size + config.hidden_size + 1


def forward_flops(config: CompressorConfig) -> int:
    """Multiply-add FLOPs (2 per multiply-add, convolutions and matrix products only) of one forward pass over one proxy."""
    total = sum(found.output_side**2 * found.weights for found in convolutions(config))
    total += sum(2 * block.excited * block.squeezed for block in blocks(config))
    total += head(config).output_side ** 2 * config.head_width + (config.head_width + 1) * config.hidden_size
    return 2 * total
