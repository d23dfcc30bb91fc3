"""An ONNX graph in whole numbers: ranges measured on real inputs, and a QuantizeLinear and DequantizeLinear around every operation.

    OnnxGraph ─► the same with the smallest and largest of every value as outputs, run on real inputs ─► Range of each value
              └► matrices in 8 or 4 bits, activations in 16 or 8, biases in 32 ─► OnnxGraph ("QDQ")

Operations that only move values (`MOVES`) share the range of what they move, so they move whole numbers. Softmax sees the differences
within a row only: what lies `SOFTMAX_REACH` below the smallest of the rows' largest scores is cut off, which a mask otherwise
spends the range on.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
import onnx
from jaxtyping import Float32
from onnx import helper

from tools import onnx_files
from tools.onnx_graphs import OnnxGraph, renamed
from tools.quantisation import HEADROOM, Precision, quantise, quantise_blocks

MOVES = frozenset({"Reshape", "Transpose", "Slice", "Concat"})
BOUNDED = {"Softmax": (0.0, 1.0), "Sigmoid": (0.0, 1.0)}
SOFTMAX_REACH = 20.0
"""A score so far below the largest of its row has a weight under 2.1e-9."""

BLOCK = 32
"""Inputs of a 4-bit matrix that share a scale."""

Feeds = Sequence[Mapping[str, np.ndarray]]


class Range(NamedTuple):
    """The values that a tensor takes; 0 is one of them."""

    low: float
    high: float

    def joined(self, other: Range) -> Range:
        """Both together."""
        return Range(min(self.low, other.low), max(self.high, other.high))


# Ranges.


def measure(graph: OnnxGraph, feeds: Feeds) -> dict[str, Range]:
    """The range of every float32 input and of every value that a node makes.

    Args:
        graph: in float32.
        feeds: inputs by name, as the graph will get them in use.
    """
    watched, stats = _watching(graph)
    with tempfile.TemporaryDirectory() as home:
        path = pathlib.Path(home) / "watched.onnx"
        onnx_files.save(watched, path)
        session = onnx_files.open_session(path)
        runs = [session.run(list(watched.outputs), dict(feed)) for feed in feeds]
    seen = {name: np.stack(values) for name, *values in zip(watched.outputs, *runs, strict=True)}
    ranges = {value: Range(float(seen[low].min()), float(seen[high].max())) for value, (low, high) in stats.items()}
    for name in graph.inputs:
        found = [feed[name] for feed in feeds]
        ranges[name] = Range(min(float(x.min()) for x in found), max(float(x.max()) for x in found))
    return _shared(graph, ranges | _fixed(graph))


def _fixed(graph: OnnxGraph) -> dict[str, Range]:
    return {node.output[0]: Range(*BOUNDED[node.op_type]) for node in graph.nodes if node.op_type in BOUNDED}


def _watching(graph: OnnxGraph) -> tuple[OnnxGraph, dict[str, tuple[str, str]]]:
    """The graph with the ends of every value as its outputs, and their names by value."""
    scores = {node.input[0] for node in graph.nodes if node.op_type == "Softmax"}
    nodes, stats = list(graph.nodes), {}
    for value, kind in graph.kinds.items():
        if kind.dtype != np.float32:
            continue
        stats[value] = (f"{value}:low", f"{value}:high")
        source = value
        if value in scores:
            source = f"{value}:cut"
            nodes += _cut_off(value, source)
        nodes.append(helper.make_node("ReduceMin", [source], [stats[value][0]], keepdims=0))
        nodes.append(helper.make_node("ReduceMax", [value], [stats[value][1]], keepdims=0))
    scalar = jax.ShapeDtypeStruct((), np.float32)
    outputs = {name: scalar for ends in stats.values() for name in ends}
    constants = {**graph.constants, ":reach": np.float32(SOFTMAX_REACH).reshape(()), ":last": np.array([-1])}
    return dataclasses.replace(graph, nodes=tuple(nodes), outputs=outputs, constants=constants), stats


def _cut_off(value: str, cut: str) -> list[onnx.NodeProto]:
    """No score is lower than the reach below the smallest of the rows' largest."""
    rows, least, reached = (f"{value}:{name}" for name in ("rows", "least", "reached"))
    return [
        helper.make_node("ReduceMax", [value, ":last"], [rows], keepdims=0),
        helper.make_node("ReduceMin", [rows], [least], keepdims=0),
        helper.make_node("Sub", [least, ":reach"], [reached]),
        helper.make_node("Max", [value, reached], [cut]),
    ]


def _shared(graph: OnnxGraph, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """Ranges in which everything that is moved into one another has the same."""
    parent = {name: name for name in ranges}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    for node in graph.nodes:
        if node.op_type in MOVES:
            for name in node.input:
                if name in parent:
                    parent[root(name)] = root(node.output[0])
    joined: dict[str, Range] = {}
    for name, found in ranges.items():
        joined[root(name)] = joined.get(root(name), found).joined(found)
    return {name: joined[root(name)] for name in ranges}


def gram_matrices(graph: OnnxGraph, precision: Precision, feeds: Feeds) -> dict[str, Float32[np.ndarray, "c c"]]:
    """XᵀX over all positions of what each matrix with block scales is multiplied with, by the matrix's name.

    Args:
        graph: in float32.
        precision: that it will have.
        feeds: inputs by name, as the graph will get them in use.
    """
    sources = {
        node.input[1]: node.input[0]
        for node in graph.nodes
        if node.op_type == "Gemm" and _in_blocks(node.input[1], graph.constants[node.input[1]], precision)
    }
    if not sources:
        return {}
    watched = {name: graph.kinds.get(name) or graph.inputs[name] for name in dict.fromkeys(sources.values())}
    with tempfile.TemporaryDirectory() as home:
        path = pathlib.Path(home) / "watched.onnx"
        onnx_files.save(dataclasses.replace(graph, outputs=watched), path)
        session = onnx_files.open_session(path)
        grams: dict[str, np.ndarray] = {}
        for feed in feeds:
            for name, value in zip(watched, session.run(list(watched), dict(feed)), strict=True):
                rows = value.reshape(-1, value.shape[-1])
                grams[name] = grams.get(name, np.float32(0)) + rows.T @ rows
    return {matrix: grams[source] for matrix, source in sources.items()}


# Whole numbers.


@dataclasses.dataclass(frozen=True)
class _Scale:
    """value = scale · (whole number - zero)."""

    scale: np.ndarray
    zero: np.ndarray


def _scale_of(found: Range, bits: int) -> _Scale:
    """Unsigned, with an exact 0."""
    kind = np.dtype(f"uint{bits}")
    wider = HEADROOM[bits]
    low, high = min(0.0, found.low * wider), max(0.0, found.high * wider)
    steps = 2**bits - 1
    scale = np.float32(max((high - low) / steps, 1e-9))
    return _Scale(scale.reshape(()), np.array(np.clip(np.rint(-low / scale), 0, steps), kind))


def _symmetric_of(found: Range) -> _Scale:
    largest = max(abs(found.low), abs(found.high)) * HEADROOM[16]
    return _Scale(np.float32(max(largest / 32767, 1e-9)).reshape(()), np.array(0, np.int16))


def quantise_graph(
    graph: OnnxGraph, precision: Precision, feeds: Feeds, grams: Mapping[str, np.ndarray] | None = None
) -> OnnxGraph:
    """The graph with whole-numbered weights and activations; inputs and outputs stay float32.

    Args:
        graph: in float32, of linear layers, norms, products, softmax and elementwise operations.
        precision: bits of matrices and activations.
        feeds: real inputs by name, for the ranges.
        grams: of matrices with block scales by name, so that their rounding makes good its own errors; None: those of `feeds`.
    """
    grams = gram_matrices(graph, precision, feeds) if grams is None else grams
    prepared = _split_biases(graph, precision)
    return _Quantiser(prepared, precision, measure(prepared, feeds), grams).run()


def _bits(name: str, precision: Precision) -> int:
    return precision.layers if "layers_" in name else precision.others


def _in_blocks(name: str, value: np.ndarray, precision: Precision) -> bool:
    return _bits(name, precision) == 4 and value.shape[1] % BLOCK == 0


def _split_biases(graph: OnnxGraph, precision: Precision) -> OnnxGraph:
    """Adds the biases of matrices with block scales in an operation of their own: those matrices become MatMul, which has none."""
    nodes, kinds = [], dict(graph.kinds)
    for node in graph.nodes:
        read = node.input
        if node.op_type != "Gemm" or len(read) < 3 or not _in_blocks(read[1], graph.constants[read[1]], precision):
            nodes.append(node)
            continue
        output, product = node.output[0], f"{node.output[0]}:product"
        nodes.append(renamed(node, read[:2], [product]))
        nodes.append(helper.make_node("Add", [product, read[2]], [output], name=f"{node.name}:bias"))
        kinds[product] = kinds[output]
    return dataclasses.replace(graph, nodes=tuple(nodes), kinds=kinds)


class _Quantiser:
    def __init__(
        self,
        graph: OnnxGraph,
        precision: Precision,
        ranges: Mapping[str, Range],
        grams: Mapping[str, np.ndarray],
    ) -> None:
        self.graph, self.precision, self.grams = graph, precision, grams
        self.scales = {name: _scale_of(found, precision.activations) for name, found in ranges.items()}
        self.ranges = ranges
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self._near: set[str] = set()

    def run(self) -> OnnxGraph:
        for name in self.graph.inputs:
            self._round_trip(name, name, self.scales[name])
        for node in self.graph.nodes:
            inputs = [self._input(node, place) for place in range(len(node.input))]
            output = node.output[0]
            if node.op_type == "Gemm" and f"{node.input[1]}:blocks" in self.constants:
                self.nodes.append(helper.make_node("MatMul", inputs, [f"{output}:exact"], name=node.name))
            else:
                self.nodes.append(renamed(node, inputs, [f"{output}:exact"]))
            self._round_trip(f"{output}:exact", output, self.scales[output])
        # Values keep their names as they come out of the last pair.
        names = {f"{name}:near": name for name in self.graph.outputs}
        nodes = [
            renamed(node, *([names.get(n, n) for n in side] for side in (node.input, node.output)))
            for node in self.nodes
        ]
        return dataclasses.replace(self.graph, nodes=tuple(nodes), constants=self.constants)

    def _round_trip(self, source: str, name: str, scale: _Scale) -> str:
        """Rounds a value and makes float32 of it again."""
        ends = [self._constant(f"{name}:scale", scale.scale), self._constant(f"{name}:zero", scale.zero)]
        self.nodes.append(helper.make_node("QuantizeLinear", [source, *ends], [f"{name}:whole"], name=f"{name}:q"))
        self.nodes.append(
            helper.make_node("DequantizeLinear", [f"{name}:whole", *ends], [f"{name}:near"], name=f"{name}:dq")
        )
        return f"{name}:near"

    def _constant(self, name: str, value: np.ndarray) -> str:
        self.constants[name] = value
        return name

    def _input(self, node: onnx.NodeProto, place: int) -> str:
        name = node.input[place]
        value = self.graph.constants.get(name)
        if value is None:
            rounded = f"{name}:near"
            if node.op_type == "MatMul" and place == 1 and self.precision.activations == 16:
                # With both sides unsigned the runtime would make 8 bits of this one; signed it keeps 16.
                return self._round_trip(rounded, f"{node.output[0]}:right", _symmetric_of(self.ranges[name]))
            return rounded
        if value.dtype != np.float32:
            return self._constant(name, value)
        if node.op_type == "Gemm":
            return self._matrix(name, value) if place == 1 else self._bias(node, value)
        if node.op_type == "LayerNormalization":
            return self._norm_constant(node, name, place, value)
        return self._plain_constant(name, value)

    def _constant_scale(self, value: np.ndarray) -> _Scale:
        """Of a constant, which needs no headroom."""
        bits = self.precision.activations
        return _scale_of(Range(float(value.min()) / HEADROOM[bits], float(value.max()) / HEADROOM[bits]), bits)

    def _norm_constant(self, node: onnx.NodeProto, name: str, place: int, value: np.ndarray) -> str:
        """Scales as signed numbers, the bias in 32 bits: what the runtime takes of 16-bit activations."""
        if self.precision.activations == 8:
            scale = self._constant_scale(self.graph.constants[node.input[1]])
        else:
            scale = _symmetric_of(Range(0, float(np.abs(self.graph.constants[node.input[1]]).max()) / HEADROOM[16]))
        if place == 2:
            return self._whole_bias(name, value, self.scales[node.input[0]].scale * scale.scale)
        limits = np.iinfo(scale.zero.dtype)
        whole = np.clip(np.rint(value / scale.scale) + scale.zero, limits.min, limits.max)
        return self._stored(name, whole.astype(scale.zero.dtype), scale)

    def _plain_constant(self, name: str, value: np.ndarray) -> str:
        """A constant with the bits of activations, of its own range."""
        scale = self._constant_scale(value)
        limit = np.iinfo(scale.zero.dtype).max
        whole = np.clip(np.rint(value / scale.scale) + scale.zero, 0, limit).astype(scale.zero.dtype)
        return self._stored(name, whole, scale)

    def _stored(self, name: str, whole: np.ndarray, scale: _Scale, **attributes: int) -> str:
        ends = [(f"{name}:whole", whole), (f"{name}:scale", scale.scale), (f"{name}:zero", scale.zero)]
        read = [self._constant(*end) for end in ends]
        near = f"{name}:near"
        if near not in self._near:
            self._near.add(near)
            self.nodes.append(helper.make_node("DequantizeLinear", read, [near], name=f"{name}:dq", **attributes))
        return near

    def _matrix(self, name: str, value: Float32[np.ndarray, "e c"]) -> str:
        bits = _bits(name, self.precision)
        if _in_blocks(name, value, self.precision):
            return self._blocks(name, value)
        found = quantise(value, bits)
        kind = np.int8 if bits == 8 else ml_dtypes.int4
        zero = np.zeros(len(value), kind)
        return self._stored(name, found.values.astype(kind), _Scale(found.scale, zero), axis=0)

    def _blocks(self, name: str, value: Float32[np.ndarray, "e c"]) -> str:
        """4 bits with a scale for every `BLOCK` inputs: a whole number of at most 4 bits times the scale of the output.

        Stored as [inputs, outputs] for MatMul: of Gemm the runtime (QAIRT 2.51) makes wrong numbers where it is not square.
        """
        found = quantise_blocks(value, BLOCK, self.grams.get(name))
        outer = [
            (f"{name}:blocks", np.ascontiguousarray(found.multiples.T)),
            (f"{name}:scale", found.scale),
            (f"{name}:none", np.zeros(len(value), np.uint8)),
        ]
        read = [self._constant(*entry) for entry in outer]
        scales = f"{name}:scales"
        self.nodes.append(helper.make_node("DequantizeLinear", read, [scales], name=f"{name}:dqs", axis=1))
        whole = self._constant(f"{name}:whole", np.ascontiguousarray(found.values.T).astype(ml_dtypes.int4))
        zero = self._constant(f"{name}:zero", np.zeros(found.multiples.T.shape, ml_dtypes.int4))
        near = f"{name}:near"
        node = helper.make_node(
            "DequantizeLinear", [whole, scales, zero], [near], name=f"{name}:dq", axis=0, block_size=BLOCK
        )
        self.nodes.append(node)
        return near

    def _bias(self, node: onnx.NodeProto, value: np.ndarray) -> str:
        name = node.input[2]
        return self._whole_bias(
            name, value, self.scales[node.input[0]].scale * self.constants[f"{node.input[1]}:scale"]
        )

    def _whole_bias(self, name: str, value: np.ndarray, scale: np.ndarray) -> str:
        """32 bits, at the scale of the products that it is added to."""
        limit = 2**31 - 1
        whole = np.clip(np.rint(value.astype(np.float64) / scale), -limit, limit).astype(np.int32)
        zero = np.zeros(scale.shape, np.int32)
        attributes = {"axis": 0} if scale.ndim else {}
        return self._stored(name, whole, _Scale(np.asarray(scale, np.float32), zero), **attributes)
