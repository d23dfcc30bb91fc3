"""The Visual Resolution Compressor (VRC): how much of an image's resolution must be kept.

A MobileNetV3 backbone (arXiv 1905.02244), weighted pooling and an MLP with one output: the natural log of the area to keep
in proxy units, unbounded. `vision.resolution` makes the proxy image and maps the output to α. No mutable state: the norm is
GroupNorm (arXiv 1803.08494) from scratch, or a per-channel affine map, which is what a loaded BatchNorm folds to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, UInt8

from hypervl_jax.architecture import CompressorConfig, require
from hypervl_jax.models.layers import Linear, scale_and_bias
from hypervl_jax.vision.pixels import normalise_pixels

SQUEEZE_RATIO = 4
WIDTH_MULTIPLE = 8
GROUP_NORM_EPS = 1e-5
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"relu": jax.nn.relu, "hard_swish": jax.nn.hard_swish}

fan_out_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Block(NamedTuple):
    """One inverted residual bottleneck with every size spelled out; `side` is the input's height and width."""

    kernel: int
    inputs: int
    expanded: int
    width: int
    squeeze_excite: bool
    activation: str
    stride: int
    side: int

    @property
    def output_side(self) -> int:
        """Height and width of the block's output."""
        return -(-self.side // self.stride)

    @property
    def squeezed(self) -> int:
        """Width between the two layers of squeeze-and-excite: a quarter of the expanded width, as a multiple of 8."""
        return round_width(self.expanded / SQUEEZE_RATIO)

    @property
    def residual(self) -> bool:
        """Whether the input is added to the output."""
        return self.stride == 1 and self.inputs == self.width


def round_width(width: float) -> int:
    """The multiple of 8 nearest to `width` that is not below 90 % of it (MobileNet's rule)."""
    rounded = max(WIDTH_MULTIPLE, int(width + WIDTH_MULTIPLE / 2) // WIDTH_MULTIPLE * WIDTH_MULTIPLE)
    return rounded + WIDTH_MULTIPLE if rounded < 0.9 * width else rounded


def blocks(config: CompressorConfig) -> Iterator[Block]:
    """The bottlenecks of a compressor in order."""
    inputs, side = config.stem_width, -(-config.proxy_size // 2)
    for kernel, expanded, width, squeeze_excite, activation, stride in config.stages:
        block = Block(kernel, inputs, expanded, width, squeeze_excite, activation, stride, side)
        yield block
        inputs, side = width, block.output_side


def final_features(config: CompressorConfig) -> tuple[int, int]:
    """Width and side of the last bottleneck's output."""
    width, side = config.stem_width, -(-config.proxy_size // 2)
    for block in blocks(config):
        width, side = block.width, block.output_side
    return width, side


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
    """Convolution without bias, padded by (kernel - 1) // 2 on every side, then norm and activation."""

    width: int
    kernel: int
    config: CompressorConfig
    dtype: str
    stride: int = 1
    groups: int = 1
    activation: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b r q c"]) -> Float[Array, "b r q e"]:
        """Output height and width are the input's divided by the stride, rounded up."""
        margin = (self.kernel - 1) // 2
        x = nn.Conv(
            self.width,
            (self.kernel, self.kernel),
            self.stride,
            padding=((margin, margin), (margin, margin)),
            feature_group_count=self.groups,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.with_logical_partitioning(fan_out_normal, (None, None, "channels", "channels")),
            name="convolution",
        )(x)
        x = Norm(self.config.norm, self.config.group_size, name="norm")(x)
        return x if self.activation is None else ACTIVATIONS[self.activation](x)


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
    """MobileNetV3's inverted residual: expand, depthwise convolution, squeeze-and-excite, project."""

    block: Block
    config: CompressorConfig
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b r q c"]) -> Float[Array, "b r q e"]:
        """Output height and width are the input's divided by the stride, rounded up."""
        block, inputs = self.block, x
        common = {"config": self.config, "dtype": self.dtype}
        if block.expanded != block.inputs:
            x = ConvNorm(block.expanded, 1, activation=block.activation, name="expand", **common)(x)
        depthwise = {"stride": block.stride, "groups": block.expanded, "activation": block.activation}
        x = ConvNorm(block.expanded, block.kernel, name="depthwise", **depthwise, **common)(x)
        if block.squeeze_excite:
            x = SqueezeExcite(block.squeezed, self.dtype, name="squeeze_excite")(x)
        x = ConvNorm(block.width, 1, name="project", **common)(x)
        return inputs + x if block.residual else x


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
        common = {"config": config, "dtype": self.dtype, "activation": "hard_swish"}
        x = ConvNorm(config.stem_width, 3, stride=2, name="stem", **common)(
            normalise_pixels(proxies).astype(self.dtype)
        )
        for number, block in enumerate(blocks(config)):
            x = Bottleneck(block, config, self.dtype, name=f"bottleneck_{number}")(x)
        x = ConvNorm(config.head_width, 1, name="head", **common)(x)
        x = WeightedPooling(self.dtype, name="pooling")(x)
        init = nn.initializers.lecun_normal()
        axes = ("channels", "channels")
        x = Linear((config.head_width, config.hidden_size), axes, self.dtype, kernel_init=init, name="hidden")(x)
        output = Linear((config.hidden_size, 1), ("channels", None), "float32", kernel_init=init, name="output")
        return output(jax.nn.hard_swish(x).astype(jnp.float32))[:, 0]


def parameter_count(config: CompressorConfig) -> int:
    """Parameters of a compressor; every convolution has a norm's scale and bias, every linear layer a bias."""
    width, _ = final_features(config)
    total = 27 * config.stem_width + 2 * config.stem_width
    for block in blocks(config):
        if block.expanded != block.inputs:
            total += (block.inputs + 2) * block.expanded
        total += (block.kernel**2 + 2) * block.expanded + (block.expanded + 2) * block.width
        if block.squeeze_excite:
            total += 2 * block.expanded * block.squeezed + block.squeezed + block.expanded
    head = (width + 2) * config.head_width + config.head_width + 1
    return total + head + (config.head_width + 1) * config.hidden_size + config.hidden_size + 1


def forward_flops(config: CompressorConfig) -> int:
    """Multiply-add FLOPs (2 per multiply-add, convolutions and matrix products only) of one forward pass over one proxy."""
    width, side = final_features(config)
    total = 27 * config.stem_width * (-(-config.proxy_size // 2)) ** 2
    for block in blocks(config):
        before, after = block.side**2, block.output_side**2
        if block.expanded != block.inputs:
            total += before * block.inputs * block.expanded
        total += after * block.expanded * (block.kernel**2 + block.width)
        if block.squeeze_excite:
            total += 2 * block.expanded * block.squeezed
    total += side**2 * (width + 1) * config.head_width + (config.head_width + 1) * config.hidden_size
    return 2 * total
