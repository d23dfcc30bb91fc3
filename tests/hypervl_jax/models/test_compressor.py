"""The VRC network: sizes, and each piece against torch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from hypervl_jax import partitioning
from hypervl_jax.architecture import ConfigError, hypervl_2b, hypervl_tiny
from hypervl_jax.mobilenet import mobilenet_config, round_width
from hypervl_jax.models.compressor import Compressor, Norm, forward_flops, parameter_count

TINY, FULL = hypervl_tiny().compressor, hypervl_2b().compressor


def init(config) -> tuple[Compressor, dict]:
    module = Compressor(config)
    proxies = jnp.zeros((1, config.proxy_size, config.proxy_size, 3), jnp.uint8)
    boxed = jax.eval_shape(module.init, jax.random.key(0), proxies)
    return module, partitioning.unbox(boxed["params"])[0]


def random_params(config) -> tuple[Compressor, dict]:
    module, abstract = init(config)
    rng = np.random.default_rng(0)

    def draw(path, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        centre = 1.0 if path[-1].key == "scale" else 0.0
        spread = np.sqrt(2 / np.prod(leaf.shape[:-1])) if path[-1].key == "kernel" else 0.2
        return rng.normal(centre, spread, leaf.shape).astype(np.float32)

    return module, jax.tree_util.tree_map_with_path(draw, abstract)


V4 = [mobilenet_config(FULL, name) for name in ("v4-small", "v4-medium")]


@pytest.mark.parametrize("config", [TINY, FULL, dataclasses.replace(FULL, norm="affine"), *V4])
def test_parameter_count(config):
    _, params = init(config)
    assert sum(x.size for x in jax.tree.leaves(params)) == parameter_count(config)


@pytest.mark.parametrize("config", [TINY, FULL, dataclasses.replace(FULL, proxy_size=225), *V4])
def test_flops_are_those_of_all_convolutions_and_products(config):
    module, params = init(config)
    proxies = jax.ShapeDtypeStruct((1, config.proxy_size, config.proxy_size, 3), jnp.uint8)
    equations = jax.make_jaxpr(lambda params, x: module.apply({"params": params}, x))(params, proxies).jaxpr.eqns
    assert sum(map(equation_flops, equations)) == forward_flops(config)


def equation_flops(equation) -> int:
    """2 · outputs · (inputs of one output) of a convolution or a matrix product."""
    outputs, kernel = equation.outvars[0].aval.size, equation.invars[-1].aval.shape
    if equation.primitive.name == "conv_general_dilated":
        return 2 * outputs * int(np.prod(kernel[:-1]))
    return 2 * outputs * kernel[0] if equation.primitive.name == "dot_general" else 0


def test_flops_are_near_the_compilers_count():
    module, params = init(dataclasses.replace(FULL, norm="affine"))
    proxies = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.uint8)
    counted = jax.jit(lambda params, x: module.apply({"params": params}, x)).lower(params, proxies).compile()
    # The compiler also counts elementwise work, which is not small beside depthwise convolutions.
    assert 0.85 < forward_flops(FULL) / counted.cost_analysis()["flops"] <= 1.0


def test_tiny_network_equals_torch():
    config = dataclasses.replace(TINY, norm="affine")
    module, params = random_params(config)
    proxies = np.random.default_rng(1).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = torch_compressor(config, params, proxies).numpy()
    np.testing.assert_allclose(module.apply({"params": params}, proxies), expected, rtol=1e-4, atol=1e-4)
    assert np.ptp(expected) > 1e-2


def torch_compressor(config, params: dict, proxies: np.ndarray) -> torch.Tensor:
    """The network with affine norms, written from the MobileNetV3 paper with torch's functions."""
    functional = torch.nn.functional
    activations = {"relu": functional.relu, "hard_swish": functional.hardswish, None: lambda x: x}

    def convolve(x, weights, activation, stride=1, groups=1):
        kernel = torch.tensor(weights["convolution"]["kernel"]).permute(3, 2, 0, 1)
        x = functional.conv2d(x, kernel, stride=stride, padding=(kernel.shape[-1] - 1) // 2, groups=groups)
        scale, bias = (torch.tensor(weights["norm"][name])[None, :, None, None] for name in ("scale", "bias"))
        return activations[activation](x * scale + bias)

    def linear(x, weights):
        return x @ torch.tensor(weights["kernel"]) + torch.tensor(weights["bias"])

    x = torch.tensor(proxies).permute(0, 3, 1, 2).float() / 127.5 - 1
    x = convolve(x, params["stem"], "hard_swish", stride=2)
    for number, (_, expanded, width, squeeze, activation, stride) in enumerate(config.stages):
        weights, inputs = params[f"bottleneck_{number}"], x
        if expanded != x.shape[1]:
            x = convolve(x, weights["expand"], activation)
        x = convolve(x, weights["depthwise"], activation, stride, expanded)
        if squeeze:
            gate = functional.relu(linear(x.mean((2, 3)), weights["squeeze_excite"]["squeeze"]))
            x = x * functional.hardsigmoid(linear(gate, weights["squeeze_excite"]["excite"]))[:, :, None, None]
        x = convolve(x, weights["project"], None)
        x = x + inputs if stride == 1 and width == inputs.shape[1] else x
    x = convolve(x, params["head"], "hard_swish").flatten(2).transpose(1, 2)
    pooled = (x * linear(x, params["pooling"]["score"]).softmax(1)).sum(1)
    return linear(functional.hardswish(linear(pooled, params["hidden"])), params["output"])[:, 0]


def test_group_norm_equals_torch():
    x = np.random.default_rng(0).normal(2, 3, (2, 5, 7, 24)).astype(np.float32)
    params = {"scale": np.linspace(0.5, 2, 24, dtype=np.float32), "bias": np.linspace(-1, 1, 24, dtype=np.float32)}
    expected = torch.nn.functional.group_norm(
        torch.tensor(x).permute(0, 3, 1, 2), 3, torch.tensor(params["scale"]), torch.tensor(params["bias"])
    )
    ours = Norm("group", 8).apply({"params": params}, x)
    np.testing.assert_allclose(ours, expected.permute(0, 2, 3, 1), atol=1e-5)


def test_images_of_a_batch_do_not_mix():
    module, params = random_params(TINY)
    proxies = np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    run = jax.jit(module.apply)
    together = run({"params": params}, proxies)
    changed = proxies.copy()
    changed[1] = 0
    again = run({"params": params}, changed)
    np.testing.assert_array_equal(np.delete(again, 1), np.delete(together, 1))
    assert again[1] != together[1]


@pytest.mark.parametrize(("width", "rounded"), [(4, 8), (18, 24), (22, 24), (24, 24), (60, 64), (144, 144)])
def test_round_width(width, rounded):
    assert round_width(width) == rounded


def test_widths_that_group_norm_cannot_split_are_refused():
    with pytest.raises(ConfigError, match="group_size"):
        init(dataclasses.replace(TINY, group_size=7))
