"""Parts of a directory of `tools.to_torch` as PyTorch modules with the inputs and outputs of `tools.edge_graphs`."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from transformers import Lfm2VlForConditionalGeneration

from tools.edge_probe import DECODE, ENCODER


class Encoder(torch.nn.Module):
    """One tile to visual tokens: vision tower and projector."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self.patch = model.config.vision_config.patch_size

    def inputs(self, tile: torch.Tensor) -> dict[str, torch.Tensor]:
        """Bytes [1, s, s, 3] as the class takes them: patches [1, p, c] in [-1, 1]."""
        grid, patch = tile.shape[1] // self.patch, self.patch
        patches = tile.reshape(1, grid, patch, grid, patch, 3).swapaxes(2, 3).reshape(1, grid * grid, -1)
        return {"pixels": (patches.float() - 127.5) / 127.5}

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Patches [1, p, c] to "features" [1, v, d]."""
        count = pixels.shape[1]
        grid = int(count**0.5)
        found = self.tower(
            pixel_values=pixels,
            pixel_attention_mask=torch.ones((1, count), dtype=torch.int32),
            spatial_shapes=torch.tensor([[grid, grid]]),
        )
        features = self.projector(found.last_hidden_state.reshape(1, grid, grid, -1))
        return {"features": features.reshape(1, -1, features.shape[-1])}


class Prefill(torch.nn.Module):
    """Positions of a prompt, before which there are none; their hidden states after the final norm."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.decoder = model.model.language_model

    def forward(self, embeddings: torch.Tensor) -> dict[str, torch.Tensor]:
        """Embeddings [1, l, d] to "hidden" [1, l, d]."""
        return {"hidden": self.decoder(inputs_embeds=embeddings, use_cache=True).last_hidden_state}


class Decode(torch.nn.Module):
    """One position after those in a cache; its logits."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.decoder, self.head = model.model.language_model, model.lm_head

    def forward(self, embeddings: torch.Tensor, cache: transformers.DynamicCache) -> dict[str, torch.Tensor]:
        """Embeddings [1, 1, d] to "logits" [1, 1, n]; the cache grows by one."""
        found = self.decoder(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
        return {"logits": self.head(found.last_hidden_state)}


def open_part(directory: pathlib.Path, part: str) -> torch.nn.Module:
    """A part in float32; the rest of the model is let go."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = Lfm2VlForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    return {ENCODER: Encoder, DECODE: Decode}.get(part, Prefill)(model)


def rounded(part: torch.nn.Module) -> torch.nn.Module:
    """Linear layers with 8-bit weights, and activations rounded as they run; not the patch embedding, whose dtype the class reads."""
    names = [name for name, module in part.named_modules() if isinstance(module, torch.nn.Linear)]
    chosen = {name: torch.ao.quantization.default_dynamic_qconfig for name in names if "patch_embedding" not in name}
    return torch.ao.quantization.quantize_dynamic(part, chosen, dtype=torch.qint8)


def runner(part: torch.nn.Module, arrays: Mapping[str, np.ndarray]) -> Callable[[], dict[str, np.ndarray]]:
    """The part on the arrays of its graph. A cache holds what stands before the last slot, which is the new position's."""
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    if "tile" in tensors:
        return _called(part, lambda: part.inputs(tensors["tile"]))
    inputs = {"embeddings": tensors["embeddings"]}
    if tensors["embeddings"].shape[1] > 1:
        return _called(part, lambda: inputs)
    cache = transformers.DynamicCache()
    for layer, name in enumerate(name for name in tensors if name.startswith("key_")):
        cache.update(*(tensors[each][:, :, :-1] for each in (name, name.replace("key_", "value_"))), layer)
    written = cache.get_seq_length()

    def step() -> dict[str, torch.Tensor]:
        if cache.get_seq_length() > written:
            cache.crop(written - cache.get_seq_length())
        return {**inputs, "cache": cache}

    return _called(part, step)


def _called(part: torch.nn.Module, inputs: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, np.ndarray]]:
    def run() -> dict[str, np.ndarray]:
        with torch.inference_mode():
            return {name: value.numpy() for name, value in part(**inputs()).items()}

    return run
