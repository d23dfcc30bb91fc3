"""What HyperVL needs in PyTorch beside `AutoModelForImageTextToText`: its own tiling, and the resolution compressor (VRC).

    import sys; sys.path.insert(0, "DIR/code")
    from hypervl_torch import HyperVLInputs, load_compressor, predict_alpha

    inputs = HyperVLInputs.from_pretrained("DIR")(messages, images)
    model.generate(**inputs, max_new_tokens=64)

Needs torch, transformers, safetensors, numpy, pillow and jaxtyping; the four files of `hypervl_jax` beside it are the training code's
own, unchanged, so that sizes, tiles and α are the same integers everywhere.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hypervl_jax.architecture import CompressorConfig, TilingConfig, compressor_from_json
from hypervl_jax.mobilenet import Block, Convolution, blocks, head, stem
from hypervl_jax.vision.anyres import ImagePlan, plan_image, tile_image, visual_slots
from hypervl_jax.vision.resolution import alpha_from_prediction, make_proxy

SETTINGS = "hypervl.json"
COMPRESSOR = "compressor"
IMAGE = "<|image_pad|>"
PICTURE = f"<|vision_start|>{IMAGE}<|vision_end|>"
"""What the chat template writes for a picture; its middle becomes one `IMAGE` for each visual token."""

GROUP_NORM_EPS = 1e-5

Rgb = UInt8[np.ndarray, "h w 3"]


@dataclasses.dataclass(frozen=True)
class HyperVLInputs:
    """Messages and pictures to the arguments of the model, exactly as the model was trained.

    Every tile is encoded whole. Visual tokens that lie wholly in padding are hidden by `attention_mask`: nothing attends to them
    and `generate` gives them no position, which is the same as leaving them out.
    """

    tokenizer: PreTrainedTokenizerBase
    tiling: TilingConfig

    @classmethod
    def from_pretrained(cls, directory: str | pathlib.Path) -> HyperVLInputs:
        """The preprocessing of an exported directory."""
        values = json.loads((pathlib.Path(directory) / SETTINGS).read_text())
        return cls(AutoTokenizer.from_pretrained(directory), TilingConfig(**values["tiling"]))

    def __call__(
        self, messages: Sequence[Mapping[str, Any]], images: Sequence[Rgb] = (), alphas: Sequence[float] | None = None
    ) -> dict[str, torch.Tensor]:
        """Arguments of `generate` for one conversation, ending in the assistant's turn.

        Args:
            messages: as for `apply_chat_template`, with {"type": "image"} where a picture stands.
            images: RGB bytes, in the order of the messages.
            alphas: share of each picture's area to keep; 1 when None.
        """
        plans = [
            plan_image(*image.shape[:2], alpha, self.tiling)
            for image, alpha in zip(images, alphas or [1.0] * len(images), strict=True)
        ]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(expand(text, plans, self.tiling), add_special_tokens=False)["input_ids"]
        mask = self._attention_mask(np.array(ids), plans)
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.from_numpy(mask)[None]}
        if not plans:
            return inputs
        tiles = [tile_image(image, plan, self.tiling) for image, plan in zip(images, plans, strict=True)]
        return inputs | tile_inputs(np.concatenate(tiles), self.tiling.patch_size)

    def _attention_mask(self, ids: Int[np.ndarray, "l"], plans: Sequence[ImagePlan]) -> Int[np.ndarray, "l"]:
        """0 at visual tokens of padding, else 1."""
        mask = np.ones(len(ids), np.int64)
        kept = [kept_tokens(plan, self.tiling) for plan in plans]
        mask[ids == self.tokenizer.convert_tokens_to_ids(IMAGE)] = np.concatenate([np.zeros(0, bool), *kept])
        return mask


def kept_tokens(plan: ImagePlan, tiling: TilingConfig) -> Bool[np.ndarray, "v"]:
    """Which of the visual tokens of a picture's tiles, in tile order, show some of the picture."""
    kept = np.zeros(plan.tiles * tiling.tokens_per_tile, bool)
    kept[visual_slots(plan, tiling)] = True
    return kept


def expand(text: str, plans: Sequence[ImagePlan], tiling: TilingConfig) -> str:
    """A rendered conversation with one `IMAGE` for each visual token, padding's included, in place of each picture."""
    first, *others = text.split(PICTURE)
    if len(others) != len(plans):
        raise ValueError(f"the messages hold {len(others)} pictures and {len(plans)} were given; give one for each")
    pieces = [first]
    for plan, rest in zip(plans, others, strict=True):
        pieces += [PICTURE.replace(IMAGE, picture_text(plan, tiling)), rest]
    return "".join(pieces)


def picture_text(plan: ImagePlan, tiling: TilingConfig) -> str:
    """The visual tokens of a picture's tiles; a newline between rows of tiles where the model was trained with separators."""
    rows = [plan.columns] * plan.rows + [1] * bool(plan.thumbnail_height)
    separator = "\n" if tiling.separators else ""
    return separator.join(IMAGE * (tiles * tiling.tokens_per_tile) for tiles in rows)


def tile_inputs(tiles: UInt8[np.ndarray, "t s s 3"], patch_size: int) -> dict[str, torch.Tensor]:
    """Tiles as the class takes them: patches row by row, each flattened as (row, column, channel), bytes to [-1, 1].

    Bit-equal to what `Lfm2VlImageProcessor` makes of the same tiles with `do_image_splitting=False`.
    """
    count, side = tiles.shape[:2]
    grid = side // patch_size
    patches = tiles.reshape(count, grid, patch_size, grid, patch_size, 3).swapaxes(2, 3)
    pixels = (torch.from_numpy(patches.reshape(count, grid * grid, -1)).float() - 127.5) / 127.5
    return {
        "pixel_values": pixels,
        "pixel_attention_mask": torch.ones((count, grid * grid), dtype=torch.int32),
        "spatial_shapes": torch.tensor([[grid, grid]] * count),
    }


class Compressor(torch.nn.Module):
    """The VRC: a MobileNet backbone, weighted pooling, and an MLP with one output.

    Proxies uint8 [b, s, s, 3] to the natural log of the area to keep in proxy units [b].
    """

    def __init__(self, config: CompressorConfig, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.config = config
        for key, value in weights.items():
            self.register_buffer(key.replace("/", "_"), torch_layout(value))

    def forward(self, proxies: UInt8[torch.Tensor, "b s s 3"]) -> Float[torch.Tensor, "b"]:
        """One number a proxy."""
        x = self._convolve((proxies.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5, "stem", stem(self.config))
        for number, block in enumerate(blocks(self.config)):
            x = self._bottleneck(x, f"bottleneck_{number}", block)
        x = self._convolve(x, "head", head(self.config)).flatten(2).transpose(1, 2)
        x = (x * self._linear(x, "pooling_score").softmax(1)).sum(1)
        return self._linear(functional.hardswish(self._linear(x, "hidden")), "output")[:, 0]

    def _bottleneck(self, x: torch.Tensor, name: str, block: Block) -> torch.Tensor:
        inputs, (*before, last) = x, block.convolutions
        for found in before:
            x = self._convolve(x, f"{name}_{found.name}", found)
        if block.squeezed:
            squeezed = functional.relu(self._linear(x.mean((2, 3)), f"{name}_squeeze_excite_squeeze"))
            excited = self._linear(squeezed, f"{name}_squeeze_excite_excite")
            x = x * functional.hardsigmoid(excited)[..., None, None]
        x = self._convolve(x, f"{name}_{last.name}", last)
        return inputs + x if block.residual else x

    def _convolve(self, x: torch.Tensor, name: str, found: Convolution) -> torch.Tensor:
        kernel, margin = getattr(self, f"{name}_convolution_kernel"), (found.kernel - 1) // 2
        x = functional.conv2d(x, kernel, stride=found.stride, padding=margin, groups=found.groups)
        scale, bias = getattr(self, f"{name}_norm_scale"), getattr(self, f"{name}_norm_bias")
        if self.config.norm == "group":
            x = functional.group_norm(x, x.shape[1] // self.config.group_size, scale, bias, GROUP_NORM_EPS)
        else:
            x = x * scale[:, None, None] + bias[:, None, None]
        return {"": lambda y: y, "relu": functional.relu, "hard_swish": functional.hardswish}[found.activation](x)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, getattr(self, f"{name}_kernel"), getattr(self, f"{name}_bias"))


def torch_layout(value: torch.Tensor) -> torch.Tensor:
    """A stored kernel [rows, columns, inputs, outputs] or [inputs, outputs] in PyTorch's order; vectors as they are."""
    orders = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
    return value.permute(orders[value.ndim]).contiguous()


def load_compressor(directory: str | pathlib.Path) -> Compressor:
    """The compressor of an exported directory."""
    home = pathlib.Path(directory) / COMPRESSOR
    config = compressor_from_json(json.loads((home / "description.json").read_text())["compressor"])
    return Compressor(config, load_file(home / "compressor.safetensors"))


@torch.no_grad()
def predict_alpha(compressor: Compressor, image: Rgb) -> float:
    """The share of a picture's area that the compressor keeps, for `alphas`."""
    size = compressor.config.proxy_size
    output = compressor(torch.from_numpy(make_proxy(image, size))[None])
    return float(alpha_from_prediction(output.numpy(), max(image.shape[:2]), size)[0])
