"""Static quantisation of TFLite files by litert-quantizer: whole-numbered weights and activations, ranges from real inputs."""

from __future__ import annotations

import contextlib
import io
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from litert_quantizer import qtyping, quantizer, recipe, recipe_manager

from tools.artifacts import ArtifactError
from tools.edge_calibration import Feeds
from tools.edge_runtime import THREADS
from tools.quantisation import HEADROOM, Precision

FLOAT_OPERATIONS = (qtyping.TFLOperationName.MEAN, qtyping.TFLOperationName.RSQRT)
"""Of norms, one number a row each: in 16-bit whole numbers these two cost the trained demo's decoder over 20 dB."""


def quantise_file(source: pathlib.Path, target: pathlib.Path, precision: Precision, feeds: Feeds) -> None:
    """Quantises the signatures of a float32 file; inputs and outputs stay float32.

    Raises:
        ArtifactError: litert-quantizer cannot, or was given no inputs for a signature.
    """
    from ai_edge_litert.interpreter import Interpreter

    names = list(Interpreter(str(source)).get_signature_list())
    missing = [name for name in names if not feeds.get(name)]
    if missing:
        raise ArtifactError(f"no prompt of the calibration data runs {', '.join(missing)}; give more or longer records")
    quiet = io.StringIO()
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            made = quantizer.Quantizer(str(source), recipe_of(precision))
            seen = [made.calibrate({name: [feed]}, num_threads=THREADS) for name in names for feed in feeds[name]]
            made.quantize(widest(seen, HEADROOM[precision.activations])).export_model(str(target))
    except (RuntimeError, ValueError) as error:
        raise ArtifactError(
            f"litert-quantizer cannot quantise {source.name}: {str(error).splitlines()[0][:200]}"
        ) from error


def widest(seen: Iterable[Mapping[str, Mapping[str, Any]]], wider: float) -> dict[str, dict[str, Any]]:
    """The smallest and the largest value that each tensor ever took, `wider` times.

    The quantizer's own way to join inputs is a moving average, which cuts off what only a few of them reach.
    """
    joined: dict[str, dict[str, Any]] = {}
    for ranges in seen:
        for name, found in ranges.items():
            ends = joined.setdefault(name, dict(found))
            ends["min"], ends["max"] = np.minimum(ends["min"], found["min"]), np.maximum(ends["max"], found["max"])
    return {name: ends | {"min": ends["min"] * wider, "max": ends["max"] * wider} for name, ends in joined.items()}


def recipe_of(precision: Precision) -> Sequence[Mapping[str, object]]:
    """Every supported operation but `FLOAT_OPERATIONS` with 8-bit weights, matrix products with the precision's own."""
    manager, names = recipe_manager.RecipeManager(), qtyping.TFLOperationName
    bits = {"activation_num_bits": precision.activations}
    manager.add_static_config(regex=".*", operation_name=names.ALL_SUPPORTED, weight_num_bits=8, **bits)
    manager.add_static_config(
        regex=".*", operation_name=names.FULLY_CONNECTED, weight_num_bits=precision.layers, **bits
    )
    for kept in (names.INPUT, names.OUTPUT, *FLOAT_OPERATIONS):
        manager.add_quantization_config(regex=".*", operation_name=kept, algorithm_key=recipe.AlgorithmName.NO_QUANTIZE)
    return manager.get_quantization_recipe()
