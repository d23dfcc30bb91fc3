"""The MobileNet behind the compressor (VRC), spelled out from its configuration: every convolution with its sizes.

The network, its cost, the graphs that leave for other runtimes and the key table of pretrained weights all go by it. It is the
MobileNetV3 of arXiv 1905.02244 (form "inverted") and the convolutional MobileNetV4 of arXiv 2404.10518 (the other forms). No jax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hypervl_jax.architecture import (
    MOBILENET_TINY,
    MOBILENET_V3_LARGE,
    MOBILENET_V3_SMALL,
    CompressorConfig,
    Stage,
    require,
)

SQUEEZE_RATIO = 4
WIDTH_MULTIPLE = 8

FORMS = INVERTED, UNIVERSAL, FUSED, PLAIN = "inverted", "universal", "fused", "plain"
"""Forms of a bottleneck: MobileNetV3's; MobileNetV4's universal one, which may have a depthwise convolution before it expands and may
lack the one after; the one whose expansion has a kernel instead of a depthwise convolution; and a convolution alone."""

STEM, HEAD = "stem", "head"
PROJECT = "project"
"""Name of a bottleneck's last convolution; squeeze-and-excite lies before it."""


class Convolution(NamedTuple):
    """A convolution without bias, padded by (kernel − 1) // 2 on every side, its norm, and its activation ("" for none).

    `side` is the height and width of its input.
    """

    name: str
    kernel: int
    inputs: int
    width: int
    stride: int
    depthwise: bool
    activation: str
    side: int

    @property
    def groups(self) -> int:
        """Groups of channels that do not mix."""
        return self.inputs if self.depthwise else 1

    @property
    def output_side(self) -> int:
        """Height and width of its output."""
        return -(-self.side // self.stride)

    @property
    def weights(self) -> int:
        """Elements of its kernel."""
        return self.kernel**2 * (self.inputs // self.groups) * self.width


class Block(NamedTuple):
    """One bottleneck: its convolutions in order, and whether its input is added to its output.

    `squeezed` is the width between the two layers of squeeze-and-excite before the last convolution, 0 without.
    """

    form: str
    convolutions: tuple[Convolution, ...]
    squeezed: int
    residual: bool

    @property
    def excited(self) -> int:
        """Channels that squeeze-and-excite scales."""
        return self.convolutions[-1].inputs


def round_width(width: float) -> int:
    """The multiple of 8 nearest to `width` that is not below 90 % of it (MobileNet's rule)."""
    rounded = max(WIDTH_MULTIPLE, int(width + WIDTH_MULTIPLE / 2) // WIDTH_MULTIPLE * WIDTH_MULTIPLE)
    return rounded + WIDTH_MULTIPLE if rounded < 0.9 * width else rounded


def stem(config: CompressorConfig) -> Convolution:
    """The first convolution."""
    return Convolution(STEM, 3, 3, config.stem_width, 2, False, config.outer_activation, config.proxy_size)


def blocks(config: CompressorConfig) -> Iterator[Block]:
    """The bottlenecks of a compressor in order."""
    last = stem(config)
    for stage in config.stages:
        block = _block(stage, last.width, last.output_side)
        yield block
        last = block.convolutions[-1]


def head(config: CompressorConfig) -> Convolution:
    """The convolution between the last bottleneck and the pooling."""
    last = stem(config)
    for block in blocks(config):
        last = block.convolutions[-1]
    return Convolution(HEAD, 1, last.width, config.head_width, 1, False, config.outer_activation, last.output_side)


def convolutions(config: CompressorConfig) -> Iterator[Convolution]:
    """All of them in order."""
    yield stem(config)
    for block in blocks(config):
        yield from block.convolutions
    yield head(config)


def _block(stage: Stage, inputs: int, side: int) -> Block:
    kernel, expanded, width, squeeze_excite, activation, stride, form, start = (*stage, INVERTED, 0)[:8]
    require(form in FORMS, f"{form!r} is no form of a compressor's bottleneck; forms are {', '.join(FORMS)}")
    rows: list[tuple[str, int, int, int, bool, str]] = []  # name, kernel, width, stride, depthwise, activation
    if form == PLAIN:
        rows = [(PROJECT, kernel, width, stride, False, activation)]
    elif form == FUSED:
        rows = [("expand", kernel, expanded, stride, False, activation), (PROJECT, 1, width, 1, False, "")]
    else:
        if start:
            rows.append(("start", start, inputs, 1 if kernel else stride, True, ""))
        if expanded != inputs or form == UNIVERSAL:
            rows.append(("expand", 1, expanded, 1, False, activation))
        if kernel:
            rows.append(("depthwise", kernel, expanded, stride, True, activation))
        rows.append((PROJECT, 1, width, 1, False, ""))
    squeezed = round_width(expanded / SQUEEZE_RATIO) if squeeze_excite else 0
    residual = form != PLAIN and stride == 1 and inputs == width
    return Block(form, tuple(_chain(rows, inputs, side)), squeezed, residual)


def _chain(rows: Sequence[tuple[str, int, int, int, bool, str]], inputs: int, side: int) -> Iterator[Convolution]:
    for name, kernel, width, stride, depthwise, activation in rows:
        made = Convolution(name, kernel, inputs, width, stride, depthwise, activation, side)
        yield made
        inputs, side = width, made.output_side


class Backbone(NamedTuple):
    """A published network at width 1, without its classifier: `fixed_stem` is the width below which its stem is not made narrower."""

    stages: tuple[Stage, ...]
    stem: int
    head: int
    fixed_stem: float = 0.75


def _plain(kernel: int, stride: int, width: int) -> Stage:
    return (kernel, width, width, False, "relu", stride, PLAIN, 0)


def _universal(inputs: int, rows: Sequence[tuple[int, int, int, float, int]]) -> tuple[Stage, ...]:
    """Rows of (start kernel, kernel, stride, expansion, width)."""
    found = []
    for start, kernel, stride, expansion, width in rows:
        found.append((kernel, round_width(inputs * expansion), width, False, "relu", stride, UNIVERSAL, start))
        inputs = width
    return tuple(found)


_FUSED_32: Stage = (3, 128, 48, False, "relu", 2, FUSED, 0)
_FUSED_24: Stage = (3, 96, 48, False, "relu", 2, FUSED, 0)

MOBILENET_V4_SMALL = (
    *(_plain(3, 2, 32), _plain(1, 1, 32), _plain(3, 2, 96), _plain(1, 1, 64)),
    *_universal(64, [(5, 5, 2, 3, 96), *[(0, 3, 1, 2, 96)] * 4, (3, 0, 1, 4, 96)]),
    *_universal(
        96, [(3, 3, 2, 6, 128), (5, 5, 1, 4, 128), (0, 5, 1, 4, 128), (0, 5, 1, 3, 128), *[(0, 3, 1, 4, 128)] * 2]
    ),
)
MOBILENET_V4_MEDIUM = (
    _FUSED_32,
    *_universal(48, [(3, 5, 2, 4, 80), (3, 3, 1, 2, 80)]),
    *_universal(80, [(3, 5, 2, 6, 160), *[(3, 3, 1, 4, 160)] * 2, (3, 5, 1, 4, 160), (3, 3, 1, 4, 160)]),
    *_universal(160, [(3, 0, 1, 4, 160), (0, 0, 1, 2, 160), (3, 0, 1, 4, 160)]),
    *_universal(
        160, [(5, 5, 2, 6, 256), (5, 5, 1, 4, 256), *[(3, 5, 1, 4, 256)] * 2, (0, 0, 1, 4, 256), (3, 0, 1, 4, 256)]
    ),
    *_universal(256, [(3, 5, 1, 2, 256), (5, 5, 1, 4, 256), *[(0, 0, 1, 4, 256)] * 2, (5, 0, 1, 2, 256)]),
)
MOBILENET_V4_LARGE = (
    _FUSED_24,
    *_universal(48, [(3, 5, 2, 4, 96), (3, 3, 1, 4, 96)]),
    *_universal(
        96,
        [(3, 5, 2, 4, 192), *[(3, 3, 1, 4, 192)] * 3, (3, 5, 1, 4, 192), *[(5, 3, 1, 4, 192)] * 5, (3, 0, 1, 4, 192)],
    ),
    *_universal(
        192,
        [(5, 5, 2, 4, 512), *[(5, 5, 1, 4, 512)] * 3, (5, 0, 1, 4, 512), (5, 3, 1, 4, 512), *[(5, 0, 1, 4, 512)] * 2],
    ),
    *_universal(512, [(5, 3, 1, 4, 512), (5, 5, 1, 4, 512), *[(5, 0, 1, 4, 512)] * 3]),
)

BACKBONES = {
    "tiny": Backbone(MOBILENET_TINY, 8, 64),
    "small": Backbone(MOBILENET_V3_SMALL, 16, 576),
    "large": Backbone(MOBILENET_V3_LARGE, 16, 960),
    "v4-small": Backbone(MOBILENET_V4_SMALL, 32, 960, 1.0),
    "v4-medium": Backbone(MOBILENET_V4_MEDIUM, 32, 960, 1.0),
    "v4-large": Backbone(MOBILENET_V4_LARGE, 24, 960, 1.0),
}
"""By name: ours, MobileNetV3 (tables 1 and 2), and the convolutional MobileNetV4 (tables 11 to 13)."""


def mobilenet_config(base: CompressorConfig, backbone: str, width: float = 1.0) -> CompressorConfig:
    """`base` with another backbone; `width` multiplies its numbers of channels, rounded as MobileNet does; expansions keep their factor.

    Raises `ConfigError` for an unknown backbone, or a width that is not positive.
    """
    require(backbone in BACKBONES, f"backbone {backbone!r} is not one of {', '.join(BACKBONES)}")
    require(width > 0, f"backbone width {width} must be positive")
    found = BACKBONES[backbone]
    stem_width = found.stem if width < found.fixed_stem else round_width(found.stem * width)
    stages, whole, inputs = [], found.stem, stem_width
    for kernel, expanded, outputs, *rest in found.stages:
        scaled = round_width(outputs * width)
        plain = rest[3:4] == [PLAIN]
        stages.append((kernel, scaled if plain else _expanded(expanded / whole, inputs), scaled, *rest))
        whole, inputs = outputs, scaled
    head_width = round_width(found.head * width)
    return dataclasses.replace(base, stages=tuple(stages), stem_width=stem_width, head_width=head_width)


def _expanded(factor: float, inputs: int) -> int:
    return inputs if factor == 1 else round_width(inputs * factor)
