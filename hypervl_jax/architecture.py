"""What HyperVL is, as data: frozen configs, named sizes, parameter and FLOP counts of each part.

Imports no jax, so data workers and planners can use it. Sources: HyperVL (arXiv 2512.14052), the published `config.json`
files of Qwen3 and SigLIP2; what the paper leaves open is our choice and says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

BRANCHES = ("base", "large")
"""The two visual branches, in the order of `lax.switch`: 0 is the small student, 1 the large teacher."""

DECODER = "decoder"


def vision_part(branch: str) -> str:
    """Name of a branch's vision tower in the parameter tree."""
    return f"vision_{branch}"


def projector_part(branch: str) -> str:
    """Name of a branch's projector in the parameter tree."""
    return f"projector_{branch}"


def branch_parts(branch: str) -> tuple[str, str, str]:
    """Parts of the parameter tree that a forward pass through `branch` reads."""
    return (vision_part(branch), projector_part(branch), DECODER)


PARTS = (*(part(branch) for branch in BRANCHES for part in (vision_part, projector_part)), DECODER)
"""Top-level keys of HyperVL's parameter tree. The compressor (VRC) is plug and play and has its own tree."""


class ConfigError(ValueError):
    """A configuration that cannot work; the message says which value and what would be right."""


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_positive(section: str, config: Any, *names: str) -> None:
    """Raises `ConfigError` unless these numbers of `config` are above 0 and finite; `section` is what the message calls it."""
    for name in names:
        value = getattr(config, name)
        require(0 < value < math.inf, f"{section} {name} {value} must be positive and finite")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A SigLIP2 fixed-resolution vision tower without its pooling head (arXiv 2502.14786).

    `image_size` is the side in pixels that the position embedding was made for; HyperVL feeds square tiles of that side.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    patch_size: int = 16
    image_size: int = 512
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        require_positive("vision", self, *(field.name for field in dataclasses.fields(self)))
        require(
            self.hidden_size % self.num_heads == 0,
            f"vision hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}",
        )
        require(
            self.image_size % self.patch_size == 0,
            f"vision image_size {self.image_size} is not divisible by patch_size {self.patch_size}",
        )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def num_patches(self) -> int:
        """Patches of one tile."""
        return (self.image_size // self.patch_size) ** 2

    def parameter_count(self) -> int:
        """Parameters of the tower without the pooling head."""
        d, m = self.hidden_size, self.intermediate_size
        embeddings = self.patch_size**2 * 3 * d + d + self.num_patches * d
        layer = 4 * (d * d + d) + (d * m + m) + (m * d + d) + 4 * d
        return embeddings + self.num_layers * layer + 2 * d

    def forward_flops(self) -> int:
        """Multiply-add FLOPs (2 per multiply-add, matrix products only) of one forward pass over one tile."""
        p, d, m = self.num_patches, self.hidden_size, self.intermediate_size
        layer = 2 * p * (4 * d * d + 2 * d * m) + 4 * p * p * d
        return 2 * p * self.patch_size**2 * 3 * d + self.num_layers * layer


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A dense Qwen3 decoder (arXiv 2505.09388): grouped-query attention with q/k-norm, RoPE, SwiGLU, RMSNorm."""

    vocab_size: int = 151_936
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_layers: int = 28
    num_heads: int = 16
    num_kv_heads: int = 8
    head_dim: int = 128
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        numbers = (field.name for field in dataclasses.fields(self) if field.name != "tie_embeddings")
        require_positive("decoder", self, *numbers)
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"decoder num_heads {self.num_heads} is not divisible by num_kv_heads {self.num_kv_heads}",
        )
        require(self.head_dim % 2 == 0, f"decoder head_dim {self.head_dim} must be even for rotary embeddings")

    def parameter_count(self) -> int:
        """Parameters, the tied head counted once."""
        d, m, k = self.hidden_size, self.intermediate_size, self.head_dim
        attention = d * k * (2 * self.num_heads + 2 * self.num_kv_heads) + 2 * k
        layer = attention + 3 * d * m + 2 * d
        head = 0 if self.tie_embeddings else self.vocab_size * d
        return self.vocab_size * d + self.num_layers * layer + d + head

    def forward_flops(self, tokens: int, attended: int | None = None, head_tokens: int | None = None) -> int:
        """Multiply-add FLOPs (2 per multiply-add) of a forward pass.

        Args:
            tokens: number of positions.
            attended: query-key pairs attended, summed over all positions; the causal sum over one sequence when None.
            head_tokens: positions at which logits are formed; all of them when None.
        """
        d, m, k = self.hidden_size, self.intermediate_size, self.head_dim
        attended = tokens * (tokens + 1) // 2 if attended is None else attended
        head_tokens = tokens if head_tokens is None else head_tokens
        matmuls = d * k * (2 * self.num_heads + 2 * self.num_kv_heads) + 3 * d * m
        layers = self.num_layers * (2 * tokens * matmuls + 4 * attended * self.num_heads * k)
        return layers + 2 * head_tokens * d * self.vocab_size


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
    """Pixel shuffle, optional LayerNorm, and a two-layer MLP with exact GELU: Linear(4C, D) -> GELU -> Linear(D, D).

    This is the form that `Lfm2VlForConditionalGeneration` and, with the LayerNorm, `Eagle2_5_VL` hold.
    """

    layer_norm: bool = True
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        require_positive("projector", self, "layer_norm_eps")

    def parameter_count(self, vision: VisionConfig, decoder: DecoderConfig, shuffle: int) -> int:
        """Parameters of one branch's projector."""
        inner, d = vision.hidden_size * shuffle**2, decoder.hidden_size
        return (2 * inner if self.layer_norm else 0) + (inner * d + d) + (d * d + d)

    def forward_flops(self, vision: VisionConfig, decoder: DecoderConfig, shuffle: int) -> int:
        """Multiply-add FLOPs of projecting one tile."""
        inner, d = vision.hidden_size * shuffle**2, decoder.hidden_size
        return 2 * (vision.num_patches // shuffle**2) * (inner * d + d * d)


@dataclasses.dataclass(frozen=True)
class TilingConfig:
    """AnyRes settings: square tiles of `tile_size` pixels, at most `max_tiles` for an image, pixel shuffle by `shuffle`.

    `thumbnail` adds one more tile with the whole image (only when the grid has more than one tile). `separators` writes a
    newline token after each row of tiles but the last. A *cell* is the square of pixels behind one visual token.
    """

    tile_size: int = 512
    patch_size: int = 16
    shuffle: int = 2
    max_tiles: int = 12
    thumbnail: bool = False
    separators: bool = False

    def __post_init__(self) -> None:
        require_positive("tiling", self, "tile_size", "patch_size", "shuffle", "max_tiles")
        require(
            self.tile_size % self.cell_size == 0,
            f"tile_size {self.tile_size} is not divisible by the {self.cell_size}-pixel cell of a visual token",
        )

    @property
    def cell_size(self) -> int:
        """Side in pixels of the square behind one visual token."""
        return self.patch_size * self.shuffle

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one tile without padding."""
        return (self.tile_size // self.cell_size) ** 2

    @property
    def tile_limit(self) -> int:
        """Most tiles one image can take, thumbnail included."""
        return self.max_tiles + (1 if self.thumbnail and self.max_tiles > 1 else 0)


Stage = tuple[int, int, int, bool, str, int] | tuple[int, int, int, bool, str, int, str, int]
"""A bottleneck of MobileNetV3: kernel, expanded width, width, squeeze-excite, activation, stride; of MobileNetV4 also its form and the
kernel of the depthwise convolution before its expansion (`hypervl_jax.mobilenet`)."""


@dataclasses.dataclass(frozen=True)
class CompressorConfig:
    """The Visual Resolution Compressor (VRC): a MobileNet, weighted pooling and an MLP.

    It sees a square proxy of the image with side `proxy_size` and predicts the log of the kept area in proxy units
    (see `hypervl_jax.models.compressor`). `norm` is "group" from scratch, "affine" for folded BatchNorm.
    """

    proxy_size: int = 224
    stem_width: int = 16
    stages: tuple[Stage, ...] = ()
    head_width: int = 576
    hidden_size: int = 128
    norm: str = "group"
    group_size: int = 8

    def __post_init__(self) -> None:
        require_positive("compressor", self, "proxy_size", "stem_width", "head_width", "hidden_size", "group_size")
        require(self.norm in ("group", "affine"), f"compressor norm {self.norm!r} must be 'group' or 'affine'")
        for stage in self.stages:
            require(len(stage) in (6, 8), f"a stage of the compressor has 6 or 8 values, not {stage}")

    @property
    def outer_activation(self) -> str:
        """Of stem and head: in MobileNetV4 that of the bottlenecks, in MobileNetV3 hard_swish."""
        return self.stages[0][4] if self.stages and len(self.stages[0]) == 8 else "hard_swish"


MOBILENET_V3_SMALL = (
    (3, 16, 16, True, "relu", 2),
    (3, 72, 24, False, "relu", 2),
    (3, 88, 24, False, "relu", 1),
    (5, 96, 40, True, "hard_swish", 2),
    (5, 240, 40, True, "hard_swish", 1),
    (5, 240, 40, True, "hard_swish", 1),
    (5, 120, 48, True, "hard_swish", 1),
    (5, 144, 48, True, "hard_swish", 1),
    (5, 288, 96, True, "hard_swish", 2),
    (5, 576, 96, True, "hard_swish", 1),
    (5, 576, 96, True, "hard_swish", 1),
)
MOBILENET_V3_LARGE = (
    (3, 16, 16, False, "relu", 1),
    (3, 64, 24, False, "relu", 2),
    (3, 72, 24, False, "relu", 1),
    (5, 72, 40, True, "relu", 2),
    (5, 120, 40, True, "relu", 1),
    (5, 120, 40, True, "relu", 1),
    (3, 240, 80, False, "hard_swish", 2),
    (3, 200, 80, False, "hard_swish", 1),
    (3, 184, 80, False, "hard_swish", 1),
    (3, 184, 80, False, "hard_swish", 1),
    (3, 480, 112, True, "hard_swish", 1),
    (3, 672, 112, True, "hard_swish", 1),
    (5, 672, 160, True, "hard_swish", 2),
    (5, 960, 160, True, "hard_swish", 1),
    (5, 960, 160, True, "hard_swish", 1),
)
MOBILENET_TINY = (
    (3, 16, 16, True, "relu", 2),
    (3, 48, 24, False, "relu", 2),
    (3, 72, 24, True, "hard_swish", 1),
)


@dataclasses.dataclass(frozen=True)
class HyperVLConfig:
    """The whole model. `vision_base` and `vision_large` share the decoder; each has its own projector."""

    vision_base: VisionConfig
    vision_large: VisionConfig
    decoder: DecoderConfig
    projector: ProjectorConfig
    tiling: TilingConfig
    compressor: CompressorConfig

    def __post_init__(self) -> None:
        for branch in BRANCHES:
            vision = self.vision(branch)
            require(
                vision.image_size == self.tiling.tile_size,
                f"vision_{branch}.image_size {vision.image_size} must equal tiling.tile_size {self.tiling.tile_size}",
            )
            require(
                vision.patch_size == self.tiling.patch_size,
                f"vision_{branch}.patch_size {vision.patch_size} must equal tiling.patch_size {self.tiling.patch_size}",
            )

    def vision(self, branch: str) -> VisionConfig:
        """The tower of a branch."""
        require(branch in BRANCHES, f"branch {branch!r} is not one of {', '.join(BRANCHES)}")
        return self.vision_base if branch == "base" else self.vision_large

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of each part, by the names of `PARTS`."""
        counts = {}
        for branch in BRANCHES:
            counts[vision_part(branch)] = self.vision(branch).parameter_count()
            counts[projector_part(branch)] = self.projector.parameter_count(
                self.vision(branch), self.decoder, self.tiling.shuffle
            )
        counts[DECODER] = self.decoder.parameter_count()
        return counts

    def forward_flops_per_tile(self, branch: str) -> dict[str, int]:
        """Multiply-add FLOPs of one tile through a branch's tower and projector."""
        vision = self.vision(branch)
        return {
            vision_part(branch): vision.forward_flops(),
            projector_part(branch): self.projector.forward_flops(vision, self.decoder, self.tiling.shuffle),
        }


SIGLIP2 = {
    "siglip2-base": VisionConfig(768, 3072, 12, 12),
    "siglip2-large": VisionConfig(1024, 4096, 24, 16),
    "siglip2-so400m": VisionConfig(1152, 4304, 27, 16),
}
"""SigLIP2 widths by family name; patch and image size come from the full name."""

QWEN3 = {
    "qwen3-0.6b": DecoderConfig(hidden_size=1024, intermediate_size=3072, num_layers=28, num_heads=16),
    "qwen3-1.7b": DecoderConfig(),
    "qwen3-4b": DecoderConfig(hidden_size=2560, intermediate_size=9728, num_layers=36, num_heads=32),
    "qwen3-8b": DecoderConfig(
        hidden_size=4096, intermediate_size=12_288, num_layers=36, num_heads=32, tie_embeddings=False
    ),
    "qwen3-14b": DecoderConfig(
        hidden_size=5120, intermediate_size=17_408, num_layers=40, num_heads=40, tie_embeddings=False
    ),
    "qwen3-32b": DecoderConfig(
        hidden_size=5120, intermediate_size=25_600, num_layers=64, num_heads=64, tie_embeddings=False
    ),
}
"""All dense Qwen3 sizes, from their published configurations."""


def siglip2(name: str) -> VisionConfig:
    """The tower called `siglip2-{base,large,so400m}-patch{P}-{SIZE}`, e.g. `siglip2-base-patch16-512`."""
    try:
        family, patch, size = name.rsplit("-", 2)
        return dataclasses.replace(SIGLIP2[family], patch_size=int(patch.removeprefix("patch")), image_size=int(size))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"unknown vision tower {name!r}; write siglip2-{{base,large,so400m}}-patch{{P}}-{{SIZE}}, e.g. siglip2-base-patch16-512"
        ) from error


def qwen3(name: str) -> DecoderConfig:
    """The decoder called `name`, one of `QWEN3`."""
    require(name in QWEN3, f"unknown decoder {name!r}; known: {', '.join(QWEN3)}")
    return QWEN3[name]


def hypervl_2b(tile_size: int = 512, max_tiles: int = 12) -> HyperVLConfig:
    """HyperVL at the paper's size: SigLIP2 Base and Large at patch 16, Qwen3-1.7B."""
    return HyperVLConfig(
        vision_base=siglip2(f"siglip2-base-patch16-{tile_size}"),
        vision_large=siglip2(f"siglip2-large-patch16-{tile_size}"),
        decoder=qwen3("qwen3-1.7b"),
        projector=ProjectorConfig(),
        tiling=TilingConfig(tile_size=tile_size, max_tiles=max_tiles),
        compressor=CompressorConfig(stages=MOBILENET_V3_SMALL),
    )


def hypervl_tiny(vocab_size: int = 768) -> HyperVLConfig:
    """A model of the same kind that trains on two CPU cores: 64-pixel tiles of 8-pixel patches, 16 tokens a tile."""
    tiling = TilingConfig(tile_size=64, patch_size=8, shuffle=2, max_tiles=9)
    vision = VisionConfig(hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, patch_size=8, image_size=64)
    return HyperVLConfig(
        vision_base=vision,
        vision_large=dataclasses.replace(vision, hidden_size=96, intermediate_size=192, num_layers=3, num_heads=6),
        decoder=DecoderConfig(vocab_size, 128, 256, 3, 4, 2, 32, rope_theta=1e4),
        projector=ProjectorConfig(),
        tiling=tiling,
        compressor=CompressorConfig(proxy_size=64, stem_width=8, stages=MOBILENET_TINY, head_width=64, hidden_size=32),
    )


def to_json(config: HyperVLConfig) -> dict[str, Any]:
    """A plain dictionary that `from_json` turns back into an equal config; what a checkpoint says of itself."""
    return dataclasses.asdict(config)


def from_json(values: Mapping[str, Any]) -> HyperVLConfig:
    """The config that `to_json` wrote. Raises `ConfigError` on a missing or unknown key."""
    kinds = {
        "vision_base": VisionConfig,
        "vision_large": VisionConfig,
        "decoder": DecoderConfig,
        "projector": ProjectorConfig,
        "tiling": TilingConfig,
    }
    try:
        return HyperVLConfig(
            compressor=compressor_from_json(values["compressor"]),
            **{key: kind(**values[key]) for key, kind in kinds.items()},
        )
    except (KeyError, TypeError) as error:
        raise ConfigError(f"this architecture description does not fit this version of the code: {error}") from error


def compressor_from_json(values: Mapping[str, Any]) -> CompressorConfig:
    """The compressor's config from its JSON form, in which `stages` are lists. Raises `ConfigError` as `from_json`."""
    try:
        return CompressorConfig(**{**values, "stages": tuple(map(tuple, values["stages"]))})
    except (KeyError, TypeError) as error:
        raise ConfigError(f"this compressor description does not fit this version of the code: {error}") from error
