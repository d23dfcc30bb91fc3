"""The compressor (VRC) at inference: decoded images in, α out, whole images where it is unsure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float, UInt8

from hypervl_jax.architecture import CompressorConfig
from hypervl_jax.inference.generate import PROGRAMS, bucket
from hypervl_jax.models.compressor import Compressor
from hypervl_jax.vision.resolution import MAX_ALPHA, alpha_from_prediction, make_proxies

Rgb = UInt8[np.ndarray, "h w 3"]

VIEWS = (
    lambda rgb: rgb,
    lambda rgb: rgb[:, ::-1],
    lambda rgb: rgb[::-1],
)
"""A picture as it is, mirrored, and upside down: they need the same resolution, so a compressor that judges them differently is
unsure."""


def compress(params: dict[str, Any], proxies: UInt8[Array, "b s s 3"], *, compressor: Compressor) -> Float[Array, "b"]:
    """The VRC's outputs for a batch of proxies."""
    return compressor.apply({"params": params}, proxies)


class AlphaPredictor:
    """A compressor ready to say how much of an image to keep.

    Args:
        config: its architecture.
        dtype: of its arithmetic.
        params: its tree.
    """

    def __init__(self, config: CompressorConfig, dtype: str, params: Mapping[str, Any]) -> None:
        self._size, self._module, self._params = config.proxy_size, Compressor(config, dtype), params

    def predict(self, images: Sequence[Rgb], unsure: float | None = None) -> list[float]:
        """α of each image; 1 where the log areas that it predicts for the `VIEWS` of the image spread by more than `unsure`."""
        if not images:
            return []
        views = VIEWS[:1] if unsure is None else VIEWS
        proxies, sides = make_proxies([view(image) for view in views for image in images], self._size)
        outputs = PROGRAMS.run(compress, self._params, pad_rows(proxies, bucket(len(proxies))), compressor=self._module)
        areas = np.asarray(outputs)[: len(proxies)].reshape(len(views), len(images))
        alphas = alpha_from_prediction(areas[0], sides[: len(images)], self._size)
        if unsure is not None:
            alphas = np.where(np.ptp(areas, axis=0) > unsure, MAX_ALPHA, alphas)
        return alphas.tolist()


def pad_rows(array: np.ndarray, rows: int) -> np.ndarray:
    """`array` with rows of zeros up to `rows`."""
    return np.concatenate([array, np.zeros((rows - len(array), *array.shape[1:]), array.dtype)])
