"""Graphs of `tools.edge_graphs` as ONNX: the jaxpr of a graph, operation by operation.

    Graph ─► jaxpr ─► OnnxGraph (nodes, constants) ─► NAME.onnx and NAME.weights

Functions under `jax.jit` that ONNX has as one operation become that operation (`linear` is Gemm, `layer_norm` LayerNormalization, …);
everything else is written one by one. Weights are never copied into a protocol buffer: they lie in a file beside it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import onnx
from jax.extend import core
from onnx import TensorProto, helper

from tools.artifacts import ArtifactError
from tools.edge_graphs import GELU, Graph

OPSET = 23
"""The first with RMSNormalization."""

ELEMENT_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int16): TensorProto.INT16,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.uint16): TensorProto.UINT16,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.bool_): TensorProto.BOOL,
    np.dtype(ml_dtypes.int4): TensorProto.INT4,
}
OUTPUT = "out_"
"""Before the names of outputs: an output may be called as an input, which ONNX does not allow."""


@dataclasses.dataclass(frozen=True)
class OnnxGraph:
    """Nodes over named values.

    Attributes:
        name: of the graph it was made from.
        nodes: in an order in which they can run.
        constants: arrays by name; int4 as `ml_dtypes.int4`.
        inputs: shapes and dtypes by name, in order.
        outputs: the same.
        kinds: shape and dtype of every value that a node makes.
    """

    name: str
    nodes: tuple[onnx.NodeProto, ...]
    constants: Mapping[str, np.ndarray]
    inputs: Mapping[str, jax.ShapeDtypeStruct]
    outputs: Mapping[str, jax.ShapeDtypeStruct]
    kinds: Mapping[str, jax.ShapeDtypeStruct]


def onnx_graph(graph: Graph) -> OnnxGraph:
    """The same graph in ONNX. Raises `ArtifactError` for an operation that no rule below knows."""
    weights = dict(graph.weights)
    closed = jax.make_jaxpr(graph.function)(weights, *graph.inputs.values())
    jaxpr = closed.jaxpr
    writer = _Writer()
    # JAX flattens a dictionary in the order of its sorted keys.
    weight_names = sorted(weights)
    known: dict[core.Var, Any] = dict(zip(jaxpr.constvars, map(np.asarray, closed.consts), strict=True))
    for name, variable in zip(weight_names, jaxpr.invars, strict=False):
        known[variable] = writer.name_constant(name, weights[name])
    for name, variable in zip(graph.inputs, jaxpr.invars[len(weight_names) :], strict=True):
        known[variable] = name
    found = writer.write(jaxpr, known)
    names = {str(value): f"{OUTPUT}{name}" for name, value in zip(graph.outputs, found, strict=True)}
    nodes = [
        renamed(node, *([names.get(n, n) for n in side] for side in (node.input, node.output))) for node in writer.nodes
    ]
    kinds = {names.get(name, name): kind for name, kind in writer.kinds.items()}
    outputs = {name: kinds[name] for name in names.values()}
    return OnnxGraph(graph.name, tuple(nodes), writer.constants, dict(graph.inputs), outputs, kinds)


Value = str | np.ndarray
"""A value that a node makes, by name, or one that is known now."""
Rule = Callable[["_Writer", Any, list[Value]], list[Value]]


class _Writer:
    """Nodes and constants while a jaxpr is walked."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.kinds: dict[str, jax.ShapeDtypeStruct] = {}
        self._names: dict[int, str] = {}

    def name_constant(self, name: str, value: np.ndarray) -> np.ndarray:
        """Gives an array the name it will have when a node reads it."""
        self._names[id(value)] = name
        return value

    def write(self, jaxpr: core.Jaxpr, known: dict[core.Var, Value]) -> list[Value]:
        """Writes the equations of a jaxpr whose inputs are known; its outputs."""
        read = lambda atom: np.asarray(atom.val) if isinstance(atom, core.Literal) else known[atom]
        for equation in jaxpr.eqns:
            inputs = [read(atom) for atom in equation.invars]
            known.update(zip(equation.outvars, self._equation(equation, inputs), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, inputs: list[Value]) -> list[Value]:
        kind, params = equation.primitive.name, equation.params
        inner = params.get("jaxpr") or params.get("call_jaxpr")
        if inner is None and all(isinstance(value, np.ndarray) for value in inputs):
            return [np.asarray(equation.primitive.bind(*map(jnp.asarray, inputs), **params))]
        rule = FUNCTIONS.get(str(params["name"])) if "name" in params else RULES.get(kind)
        if rule is not None:
            return rule(self, equation, inputs)
        if inner is None:
            raise ArtifactError(f"ONNX: no rule for the operation {kind!r}; add one to tools/onnx_graphs.py")
        body = inner.jaxpr
        return self.write(body, dict(zip(body.invars, inputs, strict=True)))

    def add(self, operation: str, inputs: Sequence[Value], names: Sequence[str], kind: Any, **attributes: Any) -> str:
        """Appends a node; the name of its output."""
        read = [self._constant(value) if isinstance(value, np.ndarray) else value for value in inputs]
        self.nodes.append(helper.make_node(operation, read, list(names), name=f"{operation}_{names[0]}", **attributes))
        self.kinds[names[0]] = jax.ShapeDtypeStruct(kind.shape, kind.dtype)
        return names[0]

    def emit(self, operation: str, inputs: Sequence[Value], equation: Any, **attributes: Any) -> list[Value]:
        """A node that makes the output of an equation."""
        return [self.add(operation, inputs, [f"v{len(self.nodes)}"], equation.outvars[0].aval, **attributes)]

    def through(self, operation: str, value: Value, shape: Sequence[int], *more: Value, **attributes: Any) -> str:
        """A node that makes a float32 value inside the rule of an equation."""
        kind = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
        return self.add(operation, [value, *more], [f"v{len(self.nodes)}"], kind, **attributes)

    def _constant(self, value: np.ndarray) -> str:
        name = self._names.get(id(value))
        if name is None:
            name = f"constant_{len(self.constants)}"
            self._names[id(value)] = name
        # Held here, so that no other array can get its id.
        self.constants[name] = value
        return name


# Rules for primitives.


def _plain(operation: str) -> Rule:
    return lambda writer, equation, inputs: writer.emit(operation, inputs, equation)


def _shape(values: Sequence[int]) -> np.ndarray:
    return np.array(values, np.int64)


def _reshape(writer: _Writer, equation: Any, inputs: list[Value]) -> list[Value]:
    return writer.emit("Reshape", [inputs[0], _shape(equation.outvars[0].aval.shape)], equation)


def _broadcast(writer: _Writer, equation: Any, inputs: list[Value]) -> list[Value]:
    """New axes of size 1, which every operation of ONNX stretches by itself."""
    source, target = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if math.prod(source) == math.prod(target):
        return _reshape(writer, equation, inputs)
    places = equation.params["broadcast_dimensions"]
    between = [source[places.index(axis)] if axis in places else 1 for axis in range(len(target))]
    whole = writer.through("Reshape", inputs[0], between, _shape(between))
    return writer.emit("Expand", [whole, _shape(target)], equation)


def _transpose(writer: _Writer, equation: Any, inputs: list[Value]) -> list[Value]:
    return writer.emit("Transpose", inputs, equation, perm=list(equation.params["permutation"]))


def _slice(writer: _Writer, equation: Any, inputs: list[Value]) -> list[Value]:
    params, source = equation.params, equation.invars[0].aval.shape
    starts, limits = params["start_indices"], params["limit_indices"]
    if any(step != 1 for step in params["strides"] or ()):
        raise ArtifactError("ONNX: slices with steps are not written; take neighbouring elements")
    cut = [axis for axis, size in enumerate(source) if (starts[axis], limits[axis]) != (0, size)]
    if not cut:
        return [inputs[0]]
    ends = [_shape([places[axis] for axis in cut]) for places in (starts, limits)]
    return writer.emit("Slice", [inputs[0], *ends, _shape(cut)], equation)


def _concatenate(writer: _Writer, equation: Any, inputs: list[Value]) -> list[Value]:
    return writer.emit("Concat", inputs, equation, axis=equation.params["dimension"])


def _reduce(operation: str) -> Rule:
    def rule(writer: _Writer, equation: Any, inputs: list[Value]) -> list[Value]:
        axes = _shape(equation.params["axes"])
        return writer.emit(operation, [inputs[0], axes], equation, keepdims=0)

    return rule


def _product(writer: _Writer, equation: Any, inputs: list[Value]) -> list[Value]:
    """Batched matrix products whose rows and contracted axes are the last two."""
    (left_axes, right_axes), (left_batch, right_batch) = equation.params["dimension_numbers"]
    left, right = (variable.aval.shape for variable in equation.invars)
    batch = tuple(range(len(left_batch)))
    last = len(left) - 1
    if (left_batch, right_batch, left_axes) != (batch, batch, (last,)) or len(left) != len(right) != len(batch) + 2:
        raise ArtifactError(f"ONNX: a product of {left} and {right} over {left_axes}, {right_axes} is not written")
    value = inputs[1]
    if right_axes == (last,):
        order = [*batch, last, last - 1]
        value = writer.through("Transpose", value, [right[axis] for axis in order], perm=order)
    return writer.emit("MatMul", [inputs[0], value], equation)


def _convolution(writer: _Writer, equation: Any, inputs: list[Value]) -> list[Value]:
    """NHWC in JAX, NCHW in ONNX."""
    params, kernel = equation.params, np.asarray(inputs[1])
    numbers = params["dimension_numbers"]
    if (numbers.lhs_spec, numbers.rhs_spec) != ((0, 3, 1, 2), (3, 2, 0, 1)):
        raise ArtifactError("ONNX: only convolutions of NHWC by HWIO are written")
    source, target = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    first = writer.through("Transpose", inputs[0], [source[axis] for axis in (0, 3, 1, 2)], perm=[0, 3, 1, 2])
    padding = params["padding"]
    attributes = {
        "kernel_shape": kernel.shape[:2],
        "strides": params["window_strides"],
        "pads": [pair[end] for end in (0, 1) for pair in padding],
        "group": params["feature_group_count"],
    }
    weights = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
    found = writer.through("Conv", first, [target[axis] for axis in (0, 3, 1, 2)], weights, **attributes)
    return writer.emit("Transpose", [found], equation, perm=[0, 2, 3, 1])


def _gather(writer: _Writer, equation: Any, inputs: list[Value]) -> list[Value]:
    """Rows of a table."""
    numbers, table = equation.params["dimension_numbers"], equation.invars[0].aval.shape
    rows = (numbers.collapsed_slice_dims, numbers.start_index_map, equation.params["slice_sizes"])
    if rows != ((0,), (0,), (1, *table[1:])):
        raise ArtifactError("ONNX: only rows of a table are gathered")
    places = equation.invars[1].aval.shape[:-1]
    kind = jax.ShapeDtypeStruct(places, equation.invars[1].aval.dtype)
    flat = writer.add("Reshape", [inputs[1], _shape(places)], [f"v{len(writer.nodes)}"], kind)
    return writer.emit("Gather", [inputs[0], flat], equation, axis=0)


def _cast(writer: _Writer, equation: Any, inputs: list[Value]) -> list[Value]:
    source, target = equation.invars[0].aval, equation.outvars[0].aval
    if source.dtype == target.dtype:
        return [inputs[0]]
    return writer.emit("Cast", inputs, equation, to=ELEMENT_TYPES[np.dtype(target.dtype)])


def _select(writer: _Writer, equation: Any, inputs: list[Value]) -> list[Value]:
    return writer.emit("Where", [inputs[0], inputs[2], inputs[1]], equation)


def _power(writer: _Writer, equation: Any, inputs: list[Value]) -> list[Value]:
    return writer.emit("Pow", [inputs[0], np.float32(equation.params["y"])[None].reshape(())], equation)


def _reciprocal_root(writer: _Writer, equation: Any, inputs: list[Value]) -> list[Value]:
    root = writer.through("Sqrt", inputs[0], equation.invars[0].aval.shape)
    return writer.emit("Reciprocal", [root], equation)


def _square(writer: _Writer, equation: Any, inputs: list[Value]) -> list[Value]:
    return writer.emit("Mul", [inputs[0], inputs[0]], equation)


def _composite(writer: _Writer, equation: Any, inputs: list[Value]) -> list[Value]:
    attributes = {name: leaves[0] for name, leaves, _ in equation.params["attributes"]}
    return writer.emit("Gelu", inputs, equation, **attributes)


RULES: Mapping[str, Rule] = {
    "add": _plain("Add"),
    "sub": _plain("Sub"),
    "mul": _plain("Mul"),
    "div": _plain("Div"),
    "max": _plain("Max"),
    "min": _plain("Min"),
    "neg": _plain("Neg"),
    "exp": _plain("Exp"),
    "logistic": _plain("Sigmoid"),
    "lt": _plain("Less"),
    "square": _square,
    "integer_pow": _power,
    "rsqrt": _reciprocal_root,
    "reduce_sum": _reduce("ReduceSum"),
    "reshape": _reshape,
    "squeeze": _reshape,
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "slice": _slice,
    "concatenate": _concatenate,
    "dot_general": _product,
    "conv_general_dilated": _convolution,
    "gather": _gather,
    "convert_element_type": _cast,
    "select_n": _select,
    "copy": lambda writer, equation, inputs: [inputs[0]],
}
"""By primitive."""


# Rules for functions that ONNX has as one operation. Weights come first, by rising name.


def _linear(writer: _Writer, equation: Any, inputs: list[Value]) -> list[Value]:
    *bias, kernel, x = inputs
    return writer.emit("Gemm", [x, kernel, *bias], equation, transB=1)


def _layer_norm(writer: _Writer, equation: Any, inputs: list[Value]) -> list[Value]:
    bias, scale, x, eps = inputs
    return writer.emit("LayerNormalization", [x, scale, bias], equation, axis=-1, epsilon=float(eps))


def _rms_norm(writer: _Writer, equation: Any, inputs: list[Value]) -> list[Value]:
    scale, x, eps = inputs
    return writer.emit("RMSNormalization", [x, scale], equation, axis=-1, epsilon=float(eps))


def _softmax(writer: _Writer, equation: Any, inputs: list[Value]) -> list[Value]:
    return writer.emit("Softmax", inputs, equation, axis=-1)


def _hard_sigmoid(writer: _Writer, equation: Any, inputs: list[Value]) -> list[Value]:
    return writer.emit("HardSigmoid", inputs, equation, alpha=1 / 6, beta=0.5)


FUNCTIONS: Mapping[str, Rule] = {
    "linear": _linear,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "softmax": _softmax,
    "relu": _plain("Relu"),
    "hard_sigmoid": _hard_sigmoid,
    "hard_silu": _plain("HardSwish"),
    GELU: _composite,
}
"""By the name of a function under `jax.jit`, or of a composite."""


def renamed(node: onnx.NodeProto, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.NodeProto:
    """A node that reads and writes values of other names."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.ClearField("input")
    copy.ClearField("output")
    copy.input.extend(inputs)
    copy.output.extend(outputs)
    return copy
