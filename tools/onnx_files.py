"""ONNX files: a small NAME.onnx and its weights beside it, written straight from the arrays; and sessions that run them on this CPU."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from onnx import StringStringEntryProto, TensorProto, helper

from tools.onnx_graphs import ELEMENT_TYPES, OPSET, OUTPUT, OnnxGraph

IR_VERSION = 11
_ALIGNED = 4096
"""Weights begin at multiples of this many bytes, so that a runtime can map them."""
_INSIDE = 1024
"""Constants of at most so many bytes stand in the file itself: runtimes must know shapes and axes while they load it."""

Signature = Callable[..., Mapping[str, np.ndarray]]
"""A graph that is called with its inputs by name."""


def save(
    graph: OnnxGraph, path: pathlib.Path, weights: Mapping[str, TensorProto] | None = None
) -> dict[str, TensorProto]:
    """Writes `path` and, unless `weights` says where they are already, `path` with the ending ".weights".

    Args:
        graph: nodes and constants.
        path: ends in ".onnx".
        weights: what `save` returned for another graph of the same directory that has all constants of this one.

    Returns:
        Where every large constant lies.
    """
    places = write_weights(graph.constants, path.with_suffix(".weights")) if weights is None else dict(weights)
    initializers = [places.get(name) or _tensor(name, value) for name, value in graph.constants.items()]
    ends = [
        [
            helper.make_tensor_value_info(name, ELEMENT_TYPES[np.dtype(kind.dtype)], kind.shape)
            for name, kind in side.items()
        ]
        for side in (graph.inputs, graph.outputs)
    ]
    proto = helper.make_graph(graph.nodes, graph.name, *ends, initializer=initializers)
    opsets = [helper.make_opsetid("", OPSET)]
    path.write_bytes(helper.make_model(proto, opset_imports=opsets, ir_version=IR_VERSION).SerializeToString())
    return places


def write_weights(constants: Mapping[str, np.ndarray], path: pathlib.Path) -> dict[str, TensorProto]:
    """Writes the large constants one after another; where each of them lies."""
    places = {}
    with path.open("wb") as file:
        for name, value in constants.items():
            if value.nbytes <= _INSIDE:
                continue
            file.seek(-(-file.tell() // _ALIGNED) * _ALIGNED)
            offset = file.tell()
            file.write(_bytes(value))
            where = {"location": path.name, "offset": offset, "length": file.tell() - offset}
            places[name] = _outside(name, value, where)
    return places


def _outside(name: str, value: np.ndarray, where: Mapping[str, Any]) -> TensorProto:
    tensor = TensorProto(name=name, dims=value.shape, data_type=ELEMENT_TYPES[value.dtype])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.extend(StringStringEntryProto(key=key, value=str(entry)) for key, entry in where.items())
    return tensor


def _tensor(name: str, value: np.ndarray) -> TensorProto:
    return TensorProto(name=name, dims=value.shape, data_type=ELEMENT_TYPES[value.dtype], raw_data=_bytes(value))


def _bytes(value: np.ndarray) -> bytes:
    """As ONNX stores it: little endian, two 4-bit numbers in a byte, the first in the low half."""
    if value.dtype != ml_dtypes.int4:
        return np.ascontiguousarray(value).tobytes()
    halves = value.astype(np.int8).reshape(-1).view(np.uint8) & 15
    halves = np.append(halves, np.zeros(len(halves) % 2, np.uint8))
    return (halves[::2] | halves[1::2] << 4).tobytes()


def open_session(path: pathlib.Path, threads: int = 2) -> Any:
    """A file in ONNX Runtime on this CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def signature(session: Any) -> Signature:
    """A session as a function of inputs by name; outputs by the names that the graph gave them."""
    names = [output.name for output in session.get_outputs()]

    def call(**inputs: np.ndarray) -> Mapping[str, np.ndarray]:
        found = session.run(names, inputs)
        return {name.removeprefix(OUTPUT): value for name, value in zip(names, found, strict=True)}

    return call
