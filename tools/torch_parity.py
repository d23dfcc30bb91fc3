"""An exported directory in PyTorch, compared with what JAX computed: the report of `to_torch`, and the check of `verify_artifact`.

Only public classes of `transformers` and the files inside the artifact are used, as whoever receives it would.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.utils import is_torchvision_available

from tools.artifacts import ArtifactError
from tools.golden import LAST_POSITIONS

TOLERANCE = 1e-4
"""Of logits, relative to the largest, in float32."""

CODE = "code"
MODULE = "hypervl_torch"
NO_TORCHVISION = "not run: torchvision is not installed"

Arrays = Mapping[str, np.ndarray]


def shipped_module(directory: pathlib.Path) -> ModuleType:
    """The artifact's own `hypervl_torch.py`, run from its text: importing it would leave bytecode in the artifact."""
    path = directory / CODE / f"{MODULE}.py"
    if not path.exists():
        raise ArtifactError(f"{path} is missing; export the checkpoint again")
    module = sys.modules[MODULE] = ModuleType(MODULE)  # dataclasses look their module up there
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), module.__dict__)
    return module


def messages_of(prompt: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A golden prompt as a conversation: its pictures, then its question."""
    content = [{"type": "image"}] * prompt["images"] + [{"type": "text", "text": prompt["question"]}]
    return [{"role": "user", "content": content}]


def compare(directory: pathlib.Path, prompts: Sequence[Mapping[str, Any]], golden: Arrays) -> dict[str, Any]:
    """Loads an artifact in float32 and runs the golden prompts through it.

    Args:
        directory: the artifact, as `transformers` loads it.
        prompts: name, question and number of images of each prompt.
        golden: inputs and outputs of JAX (`tools.golden.arrays`).

    Returns:
        A report with "prompts", "processor" and "passed".
    """
    transformers.logging.disable_progress_bar()
    shipped = shipped_module(directory)
    model = transformers.AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # all 64 tokens are compared, also those after an end of turn
    preprocessing = shipped.HyperVLInputs.from_pretrained(directory)
    reports, processors = {}, {}
    for prompt in prompts:
        name, arrays = prompt["name"], select(golden, prompt["name"])
        images = [arrays[f"image_{number}"] for number in range(prompt["images"])]
        inputs = preprocessing(messages_of(prompt), images)
        reports[name] = compare_prompt(model, inputs, arrays)
        if images and is_torchvision_available():
            processors[name] = compare_processor(directory, prompt, inputs, arrays, preprocessing.tiling)
    return {
        "prompts": reports,
        "processor": processors or NO_TORCHVISION,
        "passed": all(map(prompt_passed, reports.values()))
        and all(all(found.values()) for found in processors.values()),
    }


def select(golden: Arrays, name: str) -> dict[str, np.ndarray]:
    """The arrays of one prompt."""
    return {key.removeprefix(f"{name}/"): value for key, value in golden.items() if key.startswith(f"{name}/")}


@torch.no_grad()
def compare_prompt(model: torch.nn.Module, inputs: dict[str, torch.Tensor], golden: Arrays) -> dict[str, Any]:
    """Ids, pixels, logits and greedy tokens of one prompt against JAX."""
    mask = inputs["attention_mask"]
    ids = inputs["input_ids"][mask == 1].numpy()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(**inputs, position_ids=positions, logits_to_keep=LAST_POSITIONS).logits[0].numpy()
    count = len(golden["generated"])
    generated = model.generate(**inputs, max_new_tokens=count)[0, mask.shape[1] :].numpy()
    largest, difference = np.abs(golden["logits"]).max(), np.abs(logits - golden["logits"]).max()
    return {
        "prompt_tokens": len(ids),
        "hidden_padding_tokens": int((mask == 0).sum()),
        "tiles": len(golden.get("tiles", ())),
        "ids_equal": np.array_equal(ids, golden["tokens"]),
        "tiles_equal": tiles_equal(inputs, golden),
        "logits_largest": float(largest),
        "logits_difference": float(difference),
        "logits_relative_difference": float(difference / largest),
        "tokens_compared": count,
        "tokens_equal": count
        if np.array_equal(generated, golden["generated"])
        else first_difference(generated, golden),
    }


def first_difference(generated: np.ndarray, golden: Arrays) -> int:
    """Tokens before the first that differs."""
    return int(np.argmin(generated == golden["generated"]))


def tiles_equal(inputs: Mapping[str, torch.Tensor], golden: Arrays) -> bool:
    """Whether the pixels given to the model are, as bytes, the tiles that JAX saw."""
    if "pixel_values" not in inputs:
        return "tiles" not in golden
    tiles = golden["tiles"]
    grid = int(inputs["spatial_shapes"][0, 0])
    side = tiles.shape[1] // grid
    patches = tiles.reshape(len(tiles), grid, side, grid, side, 3).swapaxes(2, 3).reshape(len(tiles), grid * grid, -1)
    return np.array_equal((inputs["pixel_values"].numpy() * 127.5 + 127.5).round().astype(np.uint8), patches)


def prompt_passed(report: Mapping[str, Any]) -> bool:
    """Whether a prompt's ids and pixels are equal, and its logits within the tolerance."""
    return report["ids_equal"] and report["tiles_equal"] and report["logits_relative_difference"] <= TOLERANCE


def compare_processor(
    directory: pathlib.Path, prompt: Mapping[str, Any], inputs: Mapping[str, torch.Tensor], golden: Arrays, tiling: Any
) -> dict[str, bool]:
    """Our tiles given to the artifact's own processor as pictures, with `do_image_splitting=False`: bit-equal inputs."""
    processor = transformers.AutoProcessor.from_pretrained(directory)
    text = processor.apply_chat_template(messages_of(prompt), tokenize=False, add_generation_prompt=True)
    tiles = [Image.fromarray(tile) for tile in golden["tiles"]]
    text = text.replace(processor.image_token, processor.image_token * len(tiles))
    how = {"do_image_splitting": False, "use_image_special_tokens": False, "return_tensors": "pt"}
    found = processor(images=[tiles], text=[text], **how)
    names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
    equal = {name: bool(torch.equal(found[name].to(inputs[name].dtype), inputs[name])) for name in names}
    # Separators stand between rows of tiles, which a list of pictures does not know of.
    return (
        equal
        if tiling.separators
        else equal | {"input_ids": bool(torch.equal(found["input_ids"], inputs["input_ids"]))}
    )


@torch.no_grad()
def compare_compressor(directory: pathlib.Path, proxies: np.ndarray, outputs: np.ndarray) -> dict[str, float]:
    """The artifact's VRC on golden proxies: the largest difference of its outputs (natural log of an area) from JAX."""
    compressor = shipped_module(directory).load_compressor(directory)
    found = compressor(torch.from_numpy(proxies)).numpy()
    return {"proxies": len(proxies), "difference": float(np.abs(found - outputs).max())}
