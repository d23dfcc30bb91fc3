"""Layers that several models share. Parameters are float32 and carry logical axis names (`partitioning.RULES`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

Initializer = Callable[..., jax.Array]


class Linear(nn.Module):
    """An affine map that contracts the last `inputs` axes of its argument with the first axes of the kernel.

    `shape` is the kernel's shape, input axes first; `axes` its logical axis names. The bias spans the output axes. Without a
    `kernel_init` the kernel is normal with a variance of 1 / inputs: a deviation of 0.022 at the width of Qwen3-1.7B, where
    Qwen3 itself takes 0.02 at every width, which small models learn slowly from.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: str
    inputs: int = 1
    use_bias: bool = True
    kernel_init: Initializer | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The result in the compute dtype; input axes are replaced by the output axes."""
        inputs = tuple(range(self.inputs))
        outputs = tuple(range(self.inputs, len(self.shape)))
        init = self.kernel_init or nn.initializers.variance_scaling(1.0, "fan_in", "normal", inputs, outputs)
        kernel = self.param("kernel", nn.with_logical_partitioning(init, self.axes), self.shape)
        contracted = (tuple(range(x.ndim - self.inputs, x.ndim)), inputs)
        y = jax.lax.dot_general(x.astype(self.dtype), kernel.astype(self.dtype), (contracted, ((), ())))
        if not self.use_bias:
            return y
        names = self.axes[self.inputs :]
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, names), self.shape[self.inputs :])
        return y + bias.astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, computed in float32 (arXiv 1607.06450)."""

    eps: float
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """Same shape as `x`, in the compute dtype."""
        scale, bias = scale_and_bias(self, x.shape[-1])
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        normalised = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        return (normalised * scale + bias).astype(self.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, computed in float32 (arXiv 1910.07467)."""

    eps: float
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """Same shape as `x`, in the compute dtype."""
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = self.param("scale", ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        normalised = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return (normalised * scale).astype(self.dtype)


def scale_and_bias(module: nn.Module, width: int) -> tuple[Float[Array, "d"], Float[Array, "d"]]:
    """The float32 parameters `scale` (ones) and `bias` (zeros) of a normalisation module."""
    ones = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))
    return module.param("scale", ones, (width,)), module.param("bias", zeros, (width,))


def scan_layers(layer: type[nn.Module], num_layers: int, in_axes: Any = nn.broadcast) -> Callable[..., nn.Module]:
    """A module of `num_layers` copies of `layer`, applied in turn; its parameters have a leading "layers" axis.

    `layer` maps (carry, *inputs) to (carry, outputs); `in_axes` says which inputs are sliced per layer (0) and which every
    layer sees whole (`nn.broadcast`).
    """
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
