"""Graphs to a TFLite file, by litert-converter: the one place that touches its interface, which is not a stable one (version 0.5).

    jax.export of each graph, weights as arguments ─► StableHLO ─► weights bound as constants, whole numbers behind a
    "quant.dequantize" ─► one module of all signatures ─► TFL passes ─► file ─► dequantisation fused into products

Weights never become constants of a traced program, so a model of two billion parameters is converted in a few gigabytes.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flatbuffers
import jax
import numpy as np
from ai_edge_litert import schema_py_generated as schema

# The converter says on standard error that it would use oneDNN, which has no part in converting.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
from litert_converter.mlir import ir, passmanager
from litert_converter.mlir._mlir_libs import converter_api_ext as api
from litert_converter.mlir.dialects import arith, stablehlo

from tools.artifacts import ArtifactError
from tools.edge_graphs import Graph
from tools.quantisation import QuantisedMatrix

_LEGALISE = "builtin.module(vhlo-legalize-stablehlo,reconcile-unrealized-casts,inline)"


def convert(graphs: Callable[[], Sequence[Graph]], path: pathlib.Path) -> None:
    """Writes graphs as the signatures of one file; weights of the same name must be the same arrays and are stored once.

    Args:
        graphs: makes them; nobody else should hold them, since their weights are let go when the converter has its own copy.
        path: the file to write.

    Raises:
        ArtifactError: litert-converter cannot convert an operation.
    """
    try:
        if _write(graphs, path):
            _fuse(path)
    except (ir.MLIRError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ArtifactError(f"litert-converter cannot convert {path.stem}: {reason}") from error


def _write(graphs: Callable[[], Sequence[Graph]], path: pathlib.Path) -> bool:
    """Writes the file as the converter makes it; whether it holds whole numbers. The converter's own memory is free afterwards."""
    context, bound = ir.Context(), dict[str, Any]()
    api.prepare_mlir_context(context)
    modules = [_module(context, graph, bound) for graph in graphs()]
    module = api.merge_modules(modules) if len(modules) > 1 else modules[0]
    settings = api.ConvertToTFLConfig()
    settings.unsafe_fuse_dynamic_shaped_broadcast = True
    settings.qdq_conversion_mode = "NONE"
    settings.strict_qdq_mode = any(isinstance(value, _Integers) for value in bound.values())
    with context:
        api.run_convert_to_tfl_passes(module, passmanager.PassManager(), settings)
        # Not to a file: a disk that is full would end the process there.
        path.write_bytes(api.export_flatbuffer_to_bytes(module.operation))
    return settings.strict_qdq_mode


@dataclasses.dataclass(frozen=True)
class _Integers:
    """The attributes of a quantised matrix."""

    values: Any
    scale: Any
    zero: Any
    bits: int


def _module(context: Any, graph: Graph, bound: dict[str, Any]) -> Any:
    """A graph as a StableHLO module whose weights are constants; attributes are kept in `bound` for the next graph."""
    weights = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in graph.weights.items()}
    traced = jax.export.export(jax.jit(graph.function, keep_unused=True), platforms=["cpu"])(
        weights, *graph.inputs.values()
    )
    with context, ir.Location.unknown():
        module = ir.Module.parse(traced.mlir_module_serialized)
        passmanager.PassManager.parse(_LEGALISE).run(module.operation)
        (main,) = (f for f in module.body.operations if ir.StringAttr(f.attributes["sym_name"]).value == "main")
        # JAX flattens a dictionary in the order of its sorted keys.
        _bind(main, sorted(weights), graph, bound)
    api.set_signature(
        module.operation, signature_name=graph.name, input_names=list(graph.inputs), output_names=list(graph.outputs)
    )
    return module


def _bind(main: Any, names: Sequence[str], graph: Graph, bound: dict[str, Any]) -> None:
    """Replaces the first arguments of a function by constants."""
    block = main.regions[0].blocks[0]
    with ir.InsertionPoint.at_block_begin(block):
        for name, argument in zip(names, list(block.arguments), strict=False):
            if name not in bound:
                bound[name] = _attributes(graph.weights[name], argument.type)
            argument.replace_all_uses_with(_constant(bound[name], argument.type))
    for number in reversed(range(len(names))):
        block.erase_argument(number)
    results = ir.FunctionType(ir.TypeAttr(main.attributes["function_type"]).value).results
    main.attributes["function_type"] = ir.TypeAttr.get(ir.FunctionType.get([a.type for a in block.arguments], results))
    if "arg_attrs" in main.attributes:
        del main.attributes["arg_attrs"]


def _attributes(weight: np.ndarray | QuantisedMatrix, kind: Any) -> Any:
    if not isinstance(weight, QuantisedMatrix):
        return ir.DenseElementsAttr.get(np.ascontiguousarray(weight), type=kind)
    byte, wide = (ir.IntegerType.get_signless(width) for width in (8, 64))
    return _Integers(
        ir.DenseElementsAttr.get(weight.values, type=byte, shape=list(weight.shape)),
        ir.DenseElementsAttr.get(weight.scale, type=ir.F32Type.get(), shape=[len(weight.scale)]),
        ir.DenseElementsAttr.get(np.zeros(1, np.int64), type=wide, shape=[1]),
        weight.bits,
    )


def _constant(attributes: Any, kind: Any) -> Any:
    """A constant of float32 type, or whole numbers and what makes float32 of them."""
    if not isinstance(attributes, _Integers):
        return arith.ConstantOp(kind, attributes).result
    stored = ir.RankedTensorType.get(ir.ShapedType(kind).shape, ir.IntegerType.get_signless(8))
    call = stablehlo.CustomCallOp(
        result=[kind],
        inputs=[arith.ConstantOp(stored, attributes.values).result],
        call_target_name=ir.StringAttr.get("quant.dequantize"),
    )
    details: Mapping[str, Any] = {
        "dtype": ir.StringAttr.get(f"i{attributes.bits}"),
        "narrow_range": ir.BoolAttr.get(True),
        "scale": attributes.scale,
        "zero_point": attributes.zero,
        "quantization_dimension": ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 0),
    }
    for name, value in details.items():
        call.attributes[name] = value
    return call.results[0]


def _fuse(path: pathlib.Path) -> None:
    """Lets every product read its whole-numbered weights itself.

    The converter leaves a dequantisation before each product, which would hold all weights in float32 as it runs. Without it the
    runtime rounds the activations of each row to 8 bits and multiplies whole numbers ("dynamic" quantisation).
    """
    # Mapped (copy on write), the weights are read as they are packed again.
    model = schema.ModelT.InitFromPackedBuf(np.memmap(path, np.uint8, "c"), 0)
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    kinds = schema.BuiltinOperator
    for graph in model.subgraphs:
        stored = {op.outputs[0]: op.inputs[0] for op in graph.operators if codes[op.opcodeIndex] == kinds.DEQUANTIZE}
        for op in graph.operators:
            if codes[op.opcodeIndex] == kinds.FULLY_CONNECTED:
                op.inputs[1] = stored.get(op.inputs[1], op.inputs[1])
        read = {number for op in graph.operators for number in op.inputs} | set(graph.outputs)
        graph.operators = [op for op in graph.operators if op.outputs[0] in read or op.outputs[0] not in stored]
    builder = flatbuffers.Builder(path.stat().st_size + (1 << 20))
    builder.Finish(model.Pack(builder), b"TFL3")
    fused = path.with_suffix(".fused")
    with fused.open("wb") as stream:
        stream.write(memoryview(builder.Bytes)[builder.Head() :])
    fused.replace(path)
