"""The one key table between our parameters and checkpoints of other libraries, used in both directions.

A table is a tuple of `Entry`; each key of the checkpoint is used by one entry, each of our parameters filled by one. The
layers of a scanned parameter are stacked along its first axis, one checkpoint key a layer.

Towers and decoders are also published alone; a class that holds all of HyperVL with one encoder renames the same rows by a `Naming`.
A MobileNet's rows are those of one convolution, named by the form of its bottleneck.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Float

from hypervl_jax import mobilenet
from hypervl_jax.architecture import (
    DECODER,
    CompressorConfig,
    DecoderConfig,
    HyperVLConfig,
    VisionConfig,
    projector_part,
    vision_part,
)
from hypervl_jax.models.safetensors_files import CheckpointError, PendingTensor, SafetensorsReader

Axes = tuple[tuple[str, ...], ...]
Index = tuple[slice, ...]

VISION_PREFIX = "vision_model."
DECODER_PREFIX = "model."
POSITIONS = "position_embedding"
HEAD = "lm_head.weight"
DEVICE_ALIGNMENT = 64
CONVOLUTION = "d c r q"
"""Axes of a patch embedding that is stored as a convolution."""
PIXELS = "d (r q c)"
"""Axes of one that is stored as a matrix over a patch's pixels."""


def parse_axes(text: str) -> Axes:
    """Axes of an array from "d h k" or, where one axis of the array joins several, "(h k) d"."""
    groups = re.findall(r"\(([^)]*)\)|(\S+)", text)
    return tuple(tuple(joined.split()) if joined else (single,) for joined, single in groups)


@dataclasses.dataclass(frozen=True)
class Layout:
    """One tensor's axes on our side and on theirs: the same elementary axes, in another order and joined differently.

    `sizes` has the length of every elementary axis. Example: a query kernel is "d h k" here and "(h k) d" there.
    """

    ours: Axes
    theirs: Axes
    sizes: Mapping[str, int]

    def shape(self, axes: Axes) -> tuple[int, ...]:
        """Shape of the whole tensor on the side that has `axes`."""
        return tuple(math.prod(self.sizes[name] for name in group) for group in axes)

    def ranges(self, index: Index) -> dict[str, range]:
        """The part of each elementary axis that `index` selects on our side; joined axes cannot be cut."""
        selected = {name: range(size) for name, size in self.sizes.items()}
        for group, part, size in zip(self.ours, index, self.shape(self.ours), strict=True):
            chosen = range(size)[part]
            if len(group) == 1:
                selected[group[0]] = chosen
            elif len(chosen) != size:
                raise CheckpointError(f"the joined axis ({' '.join(group)}) of a parameter cannot be sharded")
        return selected

    def their_index(self, ranges: Mapping[str, range]) -> Index:
        """The same part as a slice of each of their axes; only the first of joined axes can be cut."""
        slices = []
        for first, *rest in self.theirs:
            if any(len(ranges[name]) != self.sizes[name] for name in rest):
                raise CheckpointError(
                    f"axes {rest} of a parameter cannot be sharded, the checkpoint joins them behind {first!r}"
                )
            inner = math.prod(self.sizes[name] for name in rest)
            slices.append(slice(ranges[first].start * inner, ranges[first].stop * inner))
        return tuple(slices)

    def to_ours(self, block: Float[np.ndarray, "..."], ranges: Mapping[str, range]) -> Float[np.ndarray, "..."]:
        """A part of their tensor, rearranged into the same part of ours."""
        return rearrange(block, self.theirs, self.ours, {name: len(chosen) for name, chosen in ranges.items()})

    def to_theirs(self, array: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """Our whole tensor, rearranged into theirs."""
        return rearrange(array, self.ours, self.theirs, self.sizes)


def rearrange(
    array: Float[np.ndarray, "..."], source: Axes, target: Axes, sizes: Mapping[str, int]
) -> Float[np.ndarray, "..."]:
    """`array` with axes `source`, its elementary axes reordered and joined as in `target`."""
    before = [name for group in source for name in group]
    after = [name for group in target for name in group]
    elementary = array.reshape([sizes[name] for name in before])
    ordered = elementary.transpose([before.index(name) for name in after])
    return ordered.reshape([math.prod(sizes[name] for name in group) for group in target])


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter of ours and the checkpoint key that holds it.

    `path` is the place in our tree, joined by "/"; `key` may contain "{layer}", then there are `num_layers` keys, stacked
    along the parameter's first axis.
    """

    path: str
    key: str
    layout: Layout
    num_layers: int | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The checkpoint keys, in the order of the layers."""
        return (
            (self.key,) if self.num_layers is None else tuple(self.key.format(layer=i) for i in range(self.num_layers))
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of our parameter, layers first."""
        single = self.layout.shape(self.layout.ours)
        return single if self.num_layers is None else (self.num_layers, *single)

    @property
    def key_shape(self) -> tuple[int, ...]:
        """Shape of the tensor under each key."""
        return self.layout.shape(self.layout.theirs)

    def read(self, reader: SafetensorsReader, index: Index) -> Float[np.ndarray, "..."]:
        """The part of our parameter that `index` selects, read from the checkpoint key by key."""
        if self.num_layers is None:
            return self._read_key(reader, self.key, index)
        keys = self.keys[index[0]]
        first = self._read_key(reader, keys[0], index[1:])
        stacked = aligned_empty((len(keys), *first.shape))
        stacked[0] = first
        for layer, key in enumerate(keys[1:], start=1):
            stacked[layer] = self._read_key(reader, key, index[1:])
        return stacked

    def _read_key(self, reader: SafetensorsReader, key: str, index: Index) -> Float[np.ndarray, "..."]:
        ranges = self.layout.ranges(index)
        return self.layout.to_ours(reader.read(key, self.layout.their_index(ranges)), ranges)

    def pending(self, parameter: jax.Array) -> Iterator[PendingTensor]:
        """The tensors to write for our parameter."""
        for layer, key in enumerate(self.keys):
            yield PendingTensor(key, self.key_shape, functools.partial(self._export, parameter, layer))

    def _export(self, parameter: jax.Array, layer: int) -> Float[np.ndarray, "..."]:
        return self.layout.to_theirs(np.asarray(parameter if self.num_layers is None else parameter[layer]))


def aligned_empty(shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """A float32 array that JAX on a CPU takes as it is: one that does not start at 64 bytes it would copy, and hold both."""
    size = math.prod(shape) * np.dtype(np.float32).itemsize
    buffer = np.empty(size + DEVICE_ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % DEVICE_ALIGNMENT
    return buffer[start : start + size].view(np.float32).reshape(shape)


Row = tuple[str, str, str, str]
"""A row of a key table: our path, their key, our axes, their axes."""

VISION_ROWS: tuple[Row, ...] = (
    ("patch_embedding/kernel", "embeddings.patch_embedding.weight", "(r q c) d", "d c r q"),
    ("patch_embedding/bias", "embeddings.patch_embedding.bias", "d", "d"),
    (POSITIONS, "embeddings.position_embedding.weight", "p d", "p d"),
    ("layers/attention_norm/scale", "encoder.layers.{layer}.layer_norm1.weight", "d", "d"),
    ("layers/attention_norm/bias", "encoder.layers.{layer}.layer_norm1.bias", "d", "d"),
    ("layers/attention/query/kernel", "encoder.layers.{layer}.self_attn.q_proj.weight", "d h k", "(h k) d"),
    ("layers/attention/query/bias", "encoder.layers.{layer}.self_attn.q_proj.bias", "h k", "(h k)"),
    ("layers/attention/key/kernel", "encoder.layers.{layer}.self_attn.k_proj.weight", "d h k", "(h k) d"),
    ("layers/attention/key/bias", "encoder.layers.{layer}.self_attn.k_proj.bias", "h k", "(h k)"),
    ("layers/attention/value/kernel", "encoder.layers.{layer}.self_attn.v_proj.weight", "d h k", "(h k) d"),
    ("layers/attention/value/bias", "encoder.layers.{layer}.self_attn.v_proj.bias", "h k", "(h k)"),
    ("layers/attention/output/kernel", "encoder.layers.{layer}.self_attn.out_proj.weight", "h k d", "d (h k)"),
    ("layers/attention/output/bias", "encoder.layers.{layer}.self_attn.out_proj.bias", "d", "d"),
    ("layers/mlp_norm/scale", "encoder.layers.{layer}.layer_norm2.weight", "d", "d"),
    ("layers/mlp_norm/bias", "encoder.layers.{layer}.layer_norm2.bias", "d", "d"),
    ("layers/mlp/up/kernel", "encoder.layers.{layer}.mlp.fc1.weight", "d m", "m d"),
    ("layers/mlp/up/bias", "encoder.layers.{layer}.mlp.fc1.bias", "m", "m"),
    ("layers/mlp/down/kernel", "encoder.layers.{layer}.mlp.fc2.weight", "m d", "d m"),
    ("layers/mlp/down/bias", "encoder.layers.{layer}.mlp.fc2.bias", "d", "d"),
    ("final_norm/scale", "post_layernorm.weight", "d", "d"),
    ("final_norm/bias", "post_layernorm.bias", "d", "d"),
)
"""SigLIP2's vision tower, keys without their optional `vision_model.` prefix."""

DECODER_ROWS: tuple[Row, ...] = (
    ("embedding", "embed_tokens.weight", "n d", "n d"),
    ("layers/attention_norm/scale", "layers.{layer}.input_layernorm.weight", "d", "d"),
    ("layers/attention/query/kernel", "layers.{layer}.self_attn.q_proj.weight", "d h k", "(h k) d"),
    ("layers/attention/key/kernel", "layers.{layer}.self_attn.k_proj.weight", "d g k", "(g k) d"),
    ("layers/attention/value/kernel", "layers.{layer}.self_attn.v_proj.weight", "d g k", "(g k) d"),
    ("layers/attention/output/kernel", "layers.{layer}.self_attn.o_proj.weight", "h k d", "d (h k)"),
    ("layers/attention/query_norm/scale", "layers.{layer}.self_attn.q_norm.weight", "k", "k"),
    ("layers/attention/key_norm/scale", "layers.{layer}.self_attn.k_norm.weight", "k", "k"),
    ("layers/mlp_norm/scale", "layers.{layer}.post_attention_layernorm.weight", "d", "d"),
    ("layers/mlp/gate/kernel", "layers.{layer}.mlp.gate_proj.weight", "d m", "m d"),
    ("layers/mlp/up/kernel", "layers.{layer}.mlp.up_proj.weight", "d m", "m d"),
    ("layers/mlp/down/kernel", "layers.{layer}.mlp.down_proj.weight", "m d", "d m"),
    ("final_norm/scale", "norm.weight", "d", "d"),
)
"""Qwen3, keys without their `model.` prefix; an untied decoder also has a head."""

PROJECTOR_ROWS: tuple[Row, ...] = (
    ("norm/scale", "norm.weight", "e", "e"),
    ("norm/bias", "norm.bias", "e", "e"),
    ("first/kernel", "first.weight", "e f", "f e"),
    ("first/bias", "first.bias", "f", "f"),
    ("second/kernel", "second.weight", "f d", "d f"),
    ("second/bias", "second.bias", "d", "d"),
)
"""The projector, by our names of its modules; every `Naming` has names of its own. Without LayerNorm the first two are not there."""


CONVOLUTION_ROWS: tuple[Row, ...] = (
    ("convolution/kernel", "{convolution}.weight", "r q c d", "d c r q"),
    ("norm/weight", "{norm}.weight", "d", "d"),
    ("norm/bias", "{norm}.bias", "d", "d"),
    ("norm/mean", "{norm}.running_mean", "d", "d"),
    ("norm/variance", "{norm}.running_var", "d", "d"),
)
"""A convolution of a MobileNet with its BatchNorm, which is folded once it is read (`models.mobilenet_weights`)."""

SQUEEZE_EXCITE_ROWS: tuple[Row, ...] = (
    ("squeeze/kernel", "se.conv_reduce.weight", "e (f r q)", "f e r q"),
    ("squeeze/bias", "se.conv_reduce.bias", "f", "f"),
    ("excite/kernel", "se.conv_expand.weight", "f (e r q)", "e f r q"),
    ("excite/bias", "se.conv_expand.bias", "e", "e"),
)
"""Squeeze-and-excite, stored as 1 × 1 convolutions."""

TIMM_CONVOLUTIONS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    mobilenet.INVERTED: {
        "expand": ("conv_pw", "bn1"),
        "depthwise": ("conv_dw", "bn2"),
        mobilenet.PROJECT: ("conv_pwl", "bn3"),
    },
    mobilenet.UNIVERSAL: {
        "start": ("dw_start.conv", "dw_start.bn"),
        "expand": ("pw_exp.conv", "pw_exp.bn"),
        "depthwise": ("dw_mid.conv", "dw_mid.bn"),
        mobilenet.PROJECT: ("pw_proj.conv", "pw_proj.bn"),
    },
    mobilenet.FUSED: {"expand": ("conv_exp", "bn1"), mobilenet.PROJECT: ("conv_pwl", "bn2")},
    mobilenet.PLAIN: {mobilenet.PROJECT: ("conv", "bn1")},
}
"""timm's names of convolution and norm in a bottleneck of each form."""

TIMM_SEPARABLE: Mapping[str, tuple[str, str]] = {"depthwise": ("conv_dw", "bn1"), mobilenet.PROJECT: ("conv_pw", "bn2")}
"""Those of an inverted bottleneck that does not expand."""

TIMM_STEM, TIMM_HEAD = ("conv_stem", "bn1"), ("conv", "bn1")


@dataclasses.dataclass(frozen=True)
class Naming:
    """What a class of another library calls the parts of HyperVL with one encoder.

    Attributes:
        architecture: name of the class.
        vision: prefix of the tower's keys.
        patches: axes of its patch embedding.
        projector: its name of each of our projector's modules.
        decoder: prefix of the decoder's keys.
        head: key of an untied decoder's head.
    """

    architecture: str
    vision: str
    patches: str
    projector: Mapping[str, str]
    decoder: str
    head: str


LFM2 = Naming(
    architecture="Lfm2VlForConditionalGeneration",
    vision="model.vision_tower.vision_model.",
    patches=PIXELS,
    projector={
        "norm": "model.multi_modal_projector.layer_norm",
        "first": "model.multi_modal_projector.linear_1",
        "second": "model.multi_modal_projector.linear_2",
    },
    decoder="model.language_model.",
    head=HEAD,
)
"""The class of `transformers`. Keys as on the Hub: it renames `vision_tower.vision_model` itself, llama.cpp's converter expects it."""

EAGLE = Naming(
    architecture="Eagle2_5_VLForConditionalGeneration",
    vision="vision_model.vision_model.",
    patches=CONVOLUTION,
    projector={"norm": "mlp1.0", "first": "mlp1.1", "second": "mlp1.3"},
    decoder="language_model.model.",
    head="language_model.lm_head.weight",
)
"""The class of vLLM and SGLang (`vllm/model_executor/models/eagle2_5_vl.py`)."""


def make_table(rows: Sequence[Row], sizes: Mapping[str, int], num_layers: int, prefix: str = "") -> tuple[Entry, ...]:
    """Entries of a model with these axis lengths, `prefix` before every key."""
    entries = []
    for path, key, ours, theirs in rows:
        our_axes = parse_axes(ours)
        used = {name: sizes[name] for group in our_axes for name in group}
        layers = num_layers if "{layer}" in key else None
        entries.append(Entry(path, prefix + key, Layout(our_axes, parse_axes(theirs), used), layers))
    return tuple(entries)


def vision_table(config: VisionConfig, prefix: str = VISION_PREFIX, patches: str = CONVOLUTION) -> tuple[Entry, ...]:
    """The key table of a SigLIP2 vision tower; `patches` are the axes of the stored patch embedding."""
    sizes = {
        "d": config.hidden_size,
        "m": config.intermediate_size,
        "h": config.num_heads,
        "k": config.head_dim,
        "p": config.num_patches,
        "r": config.patch_size,
        "q": config.patch_size,
        "c": 3,
    }
    (path, key, ours, _), *others = VISION_ROWS
    return make_table([(path, key, ours, patches), *others], sizes, config.num_layers, prefix)


def decoder_table(config: DecoderConfig, prefix: str = DECODER_PREFIX, head: str = HEAD) -> tuple[Entry, ...]:
    """The key table of a Qwen3 decoder."""
    sizes = {
        "d": config.hidden_size,
        "m": config.intermediate_size,
        "h": config.num_heads,
        "g": config.num_kv_heads,
        "k": config.head_dim,
        "n": config.vocab_size,
    }
    table = make_table(DECODER_ROWS, sizes, config.num_layers, prefix)
    untied = () if config.tie_embeddings else make_table([("head", head, "d n", "n d")], sizes, 0)
    return table + untied


def projector_table(config: HyperVLConfig, branch: str, names: Mapping[str, str]) -> tuple[Entry, ...]:
    """The key table of a branch's projector; `names` are the checkpoint's, by our modules'."""
    width = config.decoder.hidden_size
    sizes = {"e": config.vision(branch).hidden_size * config.tiling.shuffle**2, "f": width, "d": width}
    rows = []
    for path, key, ours, theirs in PROJECTOR_ROWS if config.projector.layer_norm else PROJECTOR_ROWS[2:]:
        module, leaf = key.split(".")
        rows.append((path, f"{names[module]}.{leaf}", ours, theirs))
    return make_table(rows, sizes, 0)


def model_tables(config: HyperVLConfig, branch: str, naming: Naming) -> dict[str, tuple[Entry, ...]]:
    """The key tables of the parts that a forward pass through `branch` reads, decoder first."""
    return {
        DECODER: decoder_table(config.decoder, naming.decoder, naming.head),
        vision_part(branch): vision_table(config.vision(branch), naming.vision, naming.patches),
        projector_part(branch): projector_table(config, branch, naming.projector),
    }


def mobilenet_table(config: CompressorConfig, names: Sequence[str], prefix: str = "") -> tuple[Entry, ...]:
    """The key table of a compressor's backbone in timm's layout, each BatchNorm unfolded.

    Args:
        config: of the compressor.
        names: of its bottlenecks and then its head in the checkpoint, e.g. `blocks.2.0`.
        prefix: of every key.
    """
    *places, last = names
    table = _convolution_entries("", mobilenet.stem(config), TIMM_STEM, prefix)
    for number, (block, name) in enumerate(zip(mobilenet.blocks(config), places, strict=True)):
        path, before = f"bottleneck_{number}/", f"{prefix}{name}."
        separable = block.form == mobilenet.INVERTED and len(block.convolutions) == len(TIMM_SEPARABLE)
        theirs = TIMM_SEPARABLE if separable else TIMM_CONVOLUTIONS[block.form]
        for found in block.convolutions:
            table += _convolution_entries(path, found, theirs[found.name], before)
        if block.squeezed:
            sizes = {"e": block.excited, "f": block.squeezed, "r": 1, "q": 1}
            rows = [(f"{path}squeeze_excite/{ours}", *rest) for ours, *rest in SQUEEZE_EXCITE_ROWS]
            table += make_table(rows, sizes, 0, before)
    return table + _convolution_entries("", mobilenet.head(config), TIMM_HEAD, f"{prefix}{last}.")


def _convolution_entries(
    path: str, found: mobilenet.Convolution, names: tuple[str, str], prefix: str
) -> tuple[Entry, ...]:
    sizes = {"r": found.kernel, "q": found.kernel, "c": found.inputs // found.groups, "d": found.width}
    keys = dict(zip(("convolution", "norm"), names, strict=True))
    rows = [(f"{path}{found.name}/{ours}", key.format(**keys), *axes) for ours, key, *axes in CONVOLUTION_ROWS]
    return make_table(rows, sizes, 0, prefix)
