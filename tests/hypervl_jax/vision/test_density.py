"""The hand rules: entropy and edge density of pictures whose figures are known."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from hypervl_jax.vision.density import edge_density, entropy


def stack(levels: np.ndarray) -> np.ndarray:
    return np.repeat(levels.astype(np.uint8)[..., None], 3, axis=-1)


def test_entropy_of_known_histograms():
    assert entropy(stack(np.full((8, 8), 77))) == 0
    halves = np.zeros((8, 8))
    halves[:4] = 200
    assert entropy(stack(halves)) == pytest.approx(1 / 8)
    every = entropy(stack(np.arange(256).reshape(16, 16)))
    # Luma rounds down, so some neighbouring levels share a bin.
    assert 0.85 < every <= 1


def test_edges_of_a_line_are_counted_once_a_pixel():
    levels = np.full((10, 10), 255)
    levels[:, 4] = 0
    assert edge_density(stack(levels)) == pytest.approx(20 / 100)
    assert edge_density(stack(np.full((10, 10), 3))) == 0


def test_the_same_drawing_at_twice_the_resolution_has_half_of_the_edges():
    drawn = []
    for scale in (1, 2):
        image = Image.new("RGB", (64 * scale, 64 * scale), "white")
        ImageDraw.Draw(image).rectangle((10 * scale, 10 * scale, 40 * scale, 30 * scale), fill="black")
        drawn.append(edge_density(np.asarray(image)))
    assert drawn[1] == pytest.approx(drawn[0] / 2, rel=0.05)
