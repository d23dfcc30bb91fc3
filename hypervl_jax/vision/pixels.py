"""Pixels as the networks take them."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

PIXEL_MEAN = 0.5
PIXEL_STD = 0.5

Pixels = TypeVar("Pixels")
"""An array of NumPy or of JAX."""


def normalise_pixels(pixels: Pixels) -> Pixels:
    """Bytes 0…255 of any shape to float32 in [-1, 1], as SigLIP2 takes them."""
    return (pixels.astype(np.float32) / 255 - PIXEL_MEAN) / PIXEL_STD
