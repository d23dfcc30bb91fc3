"""Hand rules for how much detail an image holds: what a learned compressor must beat. Imports no jax."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, UInt8

EDGE_STEP = 24
"""Grey levels between neighbouring pixels from which there is an edge: above scanner noise, below printed strokes."""

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""ITU-R BT.601."""


def grey(rgb: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "h w"]:
    """Luma in 0–255."""
    return rgb.astype(np.float32) @ _LUMA


def entropy(rgb: UInt8[np.ndarray, "h w 3"]) -> float:
    """Shannon entropy of the grey levels as a share of its most, 8 bits: 0 for one flat colour, 1 for all levels alike."""
    counts = np.bincount(grey(rgb).astype(np.uint8).ravel(), minlength=256)
    shares = counts[counts > 0] / counts.sum()
    # Rounding can take the entropy of one flat colour just below 0.
    return max(0.0, float(-(shares * np.log2(shares)).sum() / 8))


def edge_density(rgb: UInt8[np.ndarray, "h w 3"]) -> float:
    """Share of pixels whose right or lower neighbour differs by `EDGE_STEP` grey levels or more.

    The same drawing at twice the resolution has about half of it.
    """
    levels = grey(rgb)
    edges = np.zeros(levels.shape, bool)
    edges[:, :-1] |= np.abs(np.diff(levels, axis=1)) >= EDGE_STEP
    edges[:-1] |= np.abs(np.diff(levels, axis=0)) >= EDGE_STEP
    return float(edges.mean())
