"""What timm's MobileNets compute, frozen in `data/timm_mobilenets.npz` since timm needs a torchvision that few environments have.

    python -m tests.hypervl_jax.models.timm_reference    # with timm installed: writes the file again

Weights are no part of the file: they follow from the tensors' names. It holds names and shapes of all tensors, and the features
before the classifier's pooling (of MobileNetV4: before the convolution after it) of one proxy. Made with timm 1.0.31 and torch 2.13.0.
"""

from __future__ import annotations

import json
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

FILE = pathlib.Path(__file__).parent / "data" / "timm_mobilenets.npz"
NETWORKS = {
    "mobilenetv3_small_100": ("small", 1.0),
    "mobilenetv3_small_050": ("small", 0.5),
    "mobilenetv3_small_075": ("small", 0.75),
    "mobilenetv3_large_100": ("large", 1.0),
    "mobilenetv4_conv_small": ("v4-small", 1.0),
    "mobilenetv4_conv_small_050": ("v4-small", 0.5),
    "mobilenetv4_conv_medium": ("v4-medium", 1.0),
    "mobilenetv4_conv_large": ("v4-large", 1.0),
}
"""timm's name: backbone and width of ours."""

SIDE = 64


def weights(shapes: Mapping[str, list[int]]) -> dict[str, np.ndarray]:
    """Tensors by their names alone, of sizes that keep features from dying out or growing."""
    return {name: _tensor(name, tuple(shape)) for name, shape in shapes.items() if "num_batches" not in name}


def _tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        return rng.uniform(0.5, 2, shape).astype(np.float32)
    if len(shape) == 1:
        centre = 1.0 if name.endswith("weight") else 0.0
        return rng.normal(centre, 0.2, shape).astype(np.float32)
    return rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape).astype(np.float32)


def proxy() -> np.ndarray:
    """One proxy image."""
    return np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 3), dtype=np.uint8)


def read() -> dict[str, tuple[dict[str, list[int]], np.ndarray]]:
    """(shapes by name, features [1, r, q, c]) of every network."""
    with np.load(FILE) as values:
        return {name: (json.loads(str(values[f"{name}/shapes"])), values[f"{name}/features"]) for name in NETWORKS}


def compute(name: str) -> dict[str, Any]:
    """Shapes and features by timm. Pictures are padded with mid-grey as ours are, where timm's own padding is the mean colour."""
    import timm
    import torch

    model = timm.create_model(name, pretrained=False).eval()
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict({key: torch.from_numpy(value) for key, value in weights(shapes).items()}, strict=False)
    mean, spread = (
        torch.tensor(model.pretrained_cfg[key])[None, :, None, None].to(torch.float32) for key in ("mean", "std")
    )
    pixels = torch.from_numpy(proxy() / np.float32(255)).permute(0, 3, 1, 2)
    grey = torch.nn.functional.pad(pixels - 0.5, (1, 1, 1, 1)) + 0.5
    model.conv_stem.padding = (0, 0)
    with torch.no_grad():
        features = model.blocks(model.bn1(model.conv_stem((grey - mean) / spread)))
    return {"shapes": json.dumps(shapes), "features": features.permute(0, 2, 3, 1).numpy()}


def main() -> None:
    """Writes the file."""
    values = {f"{name}/{key}": value for name in NETWORKS for key, value in compute(name).items()}
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(FILE, **values)


if __name__ == "__main__":
    main()
