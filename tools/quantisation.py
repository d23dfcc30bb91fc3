"""Precisions of an edge artifact, and matrices rounded to whole numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float32, Int8, UInt8

_SHRUNK = np.linspace(0.975, 0.6, 16, dtype=np.float32)
"""Shares of an output's largest weight that are tried as its range."""

_LIMIT = np.float32(7)
"""The largest whole number of 4 bits that has a negative."""

_ROWS = 4096
"""Outputs that are rounded at once."""

_DAMPING = 0.01
"""Of a Gram matrix, as a share of its mean diagonal: inputs that were hardly seen must not be trusted to make good the others."""


@dataclasses.dataclass(frozen=True)
class Precision:
    """How an artifact's numbers are stored and computed.

    Attributes:
        layers: bits of the matrices in transformer layers, None for float32.
        others: bits of the patch embedding, the projector, the head and the token embeddings; with calibrated activations of the
            token embeddings alone, since the static quantizer gives all products of a file the bits of `layers`.
        activations: bits of calibrated activations; None where they are float32, rounded row by row to 8 bits as products with
            whole-numbered weights run.
    """

    layers: int | None = None
    others: int | None = None
    activations: int | None = None

    def bits(self, name: str) -> int | None:
        """Bits of a weight that is bound as it is exported; norms, biases, positions and convolutions stay float32."""
        if self.activations is not None or not name.endswith("kernel") or name.endswith("convolution/kernel"):
            return None
        return self.layers if "layers_" in name else self.others


PRECISIONS = {
    "float32": Precision(),
    "int8": Precision(8, 8),
    "int4": Precision(4, 8),
    "w8a8": Precision(8, 8, 8),
    "w8a16": Precision(8, 8, 16),
    "w4a16": Precision(4, 8, 16),
}


HEADROOM = {8: 1.0, 16: 1.25}
"""How much wider than what was seen a range is made, by bits: with 16 there is room for inputs that were not seen."""

FLOAT16 = "float16"
QNN_PRECISIONS = {FLOAT16: Precision(), **{name: PRECISIONS[name] for name in ("w8a16", "w4a16", "w8a8")}}
"""Those of `tools.export_qnn`, where 4-bit matrices have block scales."""


@dataclasses.dataclass(frozen=True)
class QuantisedMatrix:
    """A matrix as scale · values, symmetric, one scale an output; |values| < 2^(bits - 1)."""

    values: Int8[np.ndarray, "e c"]
    scale: Float32[np.ndarray, "e"]
    bits: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:
        """What it stands for."""
        return self.scale.dtype


def quantise(matrix: Float32[np.ndarray, "e c"], bits: int) -> QuantisedMatrix:
    """Rounds to whole numbers. Below 8 bits each output takes, of a few ranges, the one with the least squared error.

    At 4 bits cutting off the largest weights is often the smaller loss; at 8 bits hardly ever. A vocabulary's matrix is a gigabyte, so
    a few outputs are rounded at a time.
    """
    values, scale = np.empty(matrix.shape, np.int8), np.empty(len(matrix), np.float32)
    for first in range(0, len(matrix), _ROWS):
        rows = slice(first, first + _ROWS)
        values[rows], scale[rows] = _rounded(np.ascontiguousarray(matrix[rows], np.float32), bits)
    return QuantisedMatrix(values, scale, bits)


def quantise_weights(
    weights: Mapping[str, np.ndarray], precision: Precision
) -> dict[str, np.ndarray | QuantisedMatrix]:
    """The weights of a graph by name, those that the precision stores so as whole numbers."""
    bits = {name: precision.bits(name) for name in weights}
    return {name: value if bits[name] is None else quantise(value, bits[name]) for name, value in weights.items()}


def _rounded(
    matrix: Float32[np.ndarray, "e c"], bits: int
) -> tuple[Float32[np.ndarray, "e c"], Float32[np.ndarray, "e"]]:
    """Whole numbers and the scale of each output."""
    limit = np.float32(2 ** (bits - 1) - 1)
    largest = np.maximum(np.abs(matrix).max(1), np.float32(1e-20))
    scale = largest / limit
    if bits < 8:
        least = _error(matrix, scale, limit)
        for share in _SHRUNK:
            candidate = largest * share / limit
            error = _error(matrix, candidate, limit)
            least, scale = np.minimum(least, error), np.where(error < least, candidate, scale)
    return _round(matrix, scale, limit), scale


@dataclasses.dataclass(frozen=True)
class BlockedMatrix:
    """A matrix as scale · multiple · values: one scale an output, one whole multiple (1 to 15) for every block of its inputs."""

    values: Int8[np.ndarray, "e c"]
    multiples: UInt8[np.ndarray, "e blocks"]
    scale: Float32[np.ndarray, "e"]


def quantise_blocks(
    matrix: Float32[np.ndarray, "e c"], block: int, gram: Float32[np.ndarray, "c c"] | None = None
) -> BlockedMatrix:
    """4 bits; the range of each block is the one, of those that its multiples give, with the least squared error.

    The layout that Qualcomm's compiler calls low power block quantisation. The inputs must be whole blocks.

    Args:
        matrix: outputs by inputs.
        block: inputs that share a range.
        gram: XᵀX of inputs X [n, c] that the matrix is multiplied with. What rounding one input's weights adds to the products is
            then taken back by the weights of the inputs that are rounded later, as far as inputs go together (GPTQ, arXiv 2210.17323).
    """
    rows, columns = matrix.shape
    rest = np.array(matrix, np.float32)
    scale = np.maximum(np.abs(rest).max(1), np.float32(1e-20)) / _LIMIT / np.float32(15)
    values, multiples = np.empty((rows, columns), np.int8), np.empty((rows, columns // block), np.uint8)
    spread = None if gram is None else _spread(gram)
    for first in range(0, columns, block):
        here, later = slice(first, first + block), slice(first + block, columns)
        counts = _multiples(rest[:, here], scale)
        multiples[:, first // block] = counts
        if spread is None:
            values[:, here] = _round(rest[:, here], counts * scale, _LIMIT)
            continue
        values[:, here], errors = _compensated(rest[:, here], counts * scale, spread[here, here])
        rest[:, later] -= errors @ spread[here, later]
    return BlockedMatrix(values, multiples, scale)


def _multiples(cut: Float32[np.ndarray, "e k"], scale: Float32[np.ndarray, "e"]) -> Float32[np.ndarray, "e"]:
    """The multiple of its output's scale, 1 to 15, with which each row of a block is rounded with the least squared error."""
    wanted = np.abs(cut).max(1) / _LIMIT / scale
    least, multiples = np.full(len(cut), np.inf, np.float32), np.ones(len(cut), np.float32)
    for share in (1.0, 0.94, 0.88, 0.82, 0.76, 0.7):
        candidate = np.clip(np.ceil(wanted * np.float32(share) - np.float32(1e-3)), 1, 15)
        error = _error(cut, candidate * scale, _LIMIT)
        least, multiples = np.minimum(least, error), np.where(error < least, candidate, multiples)
    return multiples


def _spread(gram: Float32[np.ndarray, "c c"]) -> Float32[np.ndarray, "c c"]:
    """U with UᵀU = (XᵀX + damping)⁻¹, upper triangular: row i says how later inputs make good an error of input i."""
    wide = gram.astype(np.float64)
    damping = _DAMPING * max(np.trace(wide) / len(wide), 1e-20)
    inverse = np.linalg.inv(wide + damping * np.eye(len(wide)))
    return np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)


def _compensated(
    cut: Float32[np.ndarray, "e k"], scale: Float32[np.ndarray, "e"], spread: Float32[np.ndarray, "k k"]
) -> tuple[Float32[np.ndarray, "e k"], Float32[np.ndarray, "e k"]]:
    """Rounds a block input by input; also what each left to be made good."""
    rest, values, errors = cut.copy(), np.empty_like(cut), np.empty_like(cut)
    for at in range(cut.shape[1]):
        values[:, at] = np.clip(np.rint(rest[:, at] / scale), -_LIMIT, _LIMIT)
        errors[:, at] = (rest[:, at] - values[:, at] * scale) / spread[at, at]
        rest[:, at + 1 :] -= errors[:, at, None] * spread[at, at + 1 :]
    return values, errors


def _error(matrix: np.ndarray, scale: np.ndarray, limit: np.float32) -> Float32[np.ndarray, "e"]:
    return np.square(_round(matrix, scale, limit) * scale[:, None] - matrix).sum(1)


def _round(matrix: np.ndarray, scale: np.ndarray, limit: np.float32) -> Float32[np.ndarray, "e c"]:
    return np.clip(np.rint(matrix / scale[:, None]), -limit, limit)
