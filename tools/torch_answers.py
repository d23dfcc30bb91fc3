"""Directories of `tools.to_torch` answering questions in PyTorch, for `tools.evaluate_artifact`.

Pictures go in cut as in training (`OURS`, the code that lies in the directory), or as the processor of `transformers` cuts them by
itself (`THEIRS`): it stretches a picture onto a grid of tiles, and leaves small ones at sizes that the tower was not trained on.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from hypervl_jax.evaluation.benchmarks import Item
from hypervl_jax.text.conversation import IMAGE_SLOT, Turn
from hypervl_jax.text.tokenizer import load_tokenizer
from hypervl_jax.vision.decoding import decode_image
from tools.artifacts import ArtifactError
from tools.torch_parity import shipped_module

OURS, THEIRS = "ours", "transformers"

Prepare = Callable[[Item], dict[str, torch.Tensor]]


def messages_of(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as messages; each image slot becomes a content part."""
    return [{"role": turn.role, "content": parts_of(turn)} for turn in turns]


def parts_of(turn: Turn) -> list[dict[str, str]]:
    """A turn's texts with its images between them."""
    first, *others = turn.text.split(IMAGE_SLOT) if turn.role == "user" else [turn.text]
    parts = [{"type": "text", "text": first}]
    for text in others:
        parts += [{"type": "image"}, {"type": "text", "text": text}]
    return parts


def prepare_ours(directory: pathlib.Path) -> Prepare:
    """Inputs by the code that lies in the artifact."""
    inputs = shipped_module(directory).HyperVLInputs.from_pretrained(directory)
    return lambda item: inputs(messages_of(item.turns), [decode_image(image) for image in item.images])


def prepare_theirs(directory: pathlib.Path) -> Prepare:
    """Inputs by the artifact's processor alone. Raises `ArtifactError` where it cannot be loaded."""
    try:
        processor = transformers.AutoProcessor.from_pretrained(directory)
    except ImportError as error:
        raise ArtifactError("the processor of transformers needs torchvision, which is not installed") from error

    def prepare(item: Item) -> dict[str, torch.Tensor]:
        text = processor.apply_chat_template(messages_of(item.turns), tokenize=False, add_generation_prompt=True)
        images = [[decode_image(image) for image in item.images]] if item.images else None
        return processor(images=images, text=[text], use_image_special_tokens=False, return_tensors="pt")

    return prepare


PREPARE = {OURS: prepare_ours, THEIRS: prepare_theirs}


def open_answers(directory: pathlib.Path, tiling: str) -> Callable[[Item, int], str]:
    """Greedy answers of an artifact in float32, at α = 1, with pictures cut by `tiling`, a key of `PREPARE`."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer, prepare = load_tokenizer(directory), PREPARE[tiling](directory)
    model = transformers.AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()

    def answer(item: Item, new_tokens: int) -> str:
        with torch.no_grad():
            return tokenizer.decode(greedy_ids(model, prepare(item), new_tokens))

    return answer


def greedy_ids(model: torch.nn.Module, inputs: dict[str, torch.Tensor], new_tokens: int) -> list[int]:
    """Greedy ids up to the first stop token."""
    generated = model.generate(**inputs, max_new_tokens=new_tokens)[0, inputs["input_ids"].shape[1] :].tolist()
    stops = set(model.generation_config.eos_token_id)
    return generated[: next((place for place, token in enumerate(generated) if token in stops), len(generated))]
