"""The graph that a builder is given: functions expanded, all but the ops that are plugins; and what none can build."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from umv2_export.bundle import MODEL_FILE, Bundle
from umv2_export.engines.backend import Backend
from umv2_export.engines.profiles import MOST_ELEMENTS, ValueInfo
from umv2_export.errors import Unsupported
from umv2_export.onnx.passes import inline_bodies
from umv2_export.ops import DOMAIN
from umv2_export.system.files import inside

__all__ = ["Graph", "check_graph", "read_graph", "write_graph"]

_FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16")
# What to do instead of building an op.
_ALTERNATIVES = {
    "MoE": "models of experts run in ONNX Runtime",
    "GroupQueryAttention": "export with --cache growing: a static cache is for ONNX Runtime on a CPU",
}
_DTYPES = (*_FLOATS, "INT64", "INT32", "INT8", "UINT8", "BOOL")


@dataclass(frozen=True)
class Graph:
    """What a builder parses.

    Attributes:
        model: the graph; it holds no functions.
        inputs, outputs: of the graph.
        float_dtypes: name -> float, float16 or bfloat16, of every value between them that has such a dtype.
    """

    model: ir.Model
    inputs: list[ValueInfo]
    outputs: list[ValueInfo]
    float_dtypes: Mapping[str, str]

    @property
    def plugin_ops(self) -> list[str]:
        """Ops that a plugin computes."""
        return sorted({node.op_type for node in self.model.graph if node.domain == DOMAIN})


def read_graph(bundle: Bundle, backend: Backend) -> Graph:
    """The graph of a bundle as a backend shall see it.

    Functions are expanded here and not by the parser, whose names for what it expands are its own: names are what
    dtypes are compared by and weights are refitted by. An op that is a plugin loses its body: with the body at hand, a
    parser that finds no plugin expands it without a word.

    Args:
        bundle: what to build.
        backend: that shall build it.

    Raises:
        InputRejected: the bundle is corrupt.
        Unsupported: it holds ops, dtypes or sizes that the backend has not.
    """
    model = ir.from_proto(bundle.graph())
    if backend.plugin_ops:
        common_passes.InlinePass(criteria=lambda function: function.name not in backend.plugin_ops)(model)
    else:
        inline_bodies(model)
    dtypes = _float_dtypes(model)
    model.functions.clear()
    check_graph(model, bundle.model_file, backend)
    inputs, outputs = ([_value_info(value) for value in values] for values in (model.graph.inputs, model.graph.outputs))
    return Graph(model, inputs, outputs, dtypes)


def _value_info(value: ir.Value) -> ValueInfo:
    """An input or output of a bundle's graph."""
    if value.name is None or value.shape is None or value.dtype is None:
        raise AssertionError(f"{value.name} has no shape or dtype")
    axes = tuple(axis if isinstance(axis, int) else str(axis) for axis in value.shape.dims)
    return ValueInfo(value.name, value.dtype.name.lower(), axes)


def check_graph(model: ir.Model, where: Path, backend: Backend) -> None:
    """Refuse ops, dtypes and sizes that a backend has not.

    Args:
        model: the graph with its functions expanded.
        where: its file.
        backend: that shall build it.

    Raises:
        Unsupported: it cannot be built.
    """
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain not in ("", "ai.onnx") and (node.domain != DOMAIN or node.op_type not in backend.plugin_ops):
            raise Unsupported(
                f"op {node.domain}::{node.op_type} of node {node.name!r}",
                where=where,
                why=f"it is not a standard op, has no body in the file, and {backend.title} has no plugin for it",
                fix=_ALTERNATIVES.get(node.op_type),
            )
        if node.op_type in backend.missing_ops:
            raise Unsupported(
                f"op {node.op_type} of node {node.name!r}",
                where=where,
                why=backend.missing_ops[node.op_type],
                fix="models of experts run in ONNX Runtime",
            )
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        if value.dtype is None or value.dtype.name not in _DTYPES:
            raise Unsupported(
                f"tensor {value.name!r} has dtype {value.dtype and value.dtype.name.lower()}",
                where=where,
                why=f"{backend.title} takes " + ", ".join(_DTYPES).lower(),
            )
    for name, value in model.graph.initializers.items():
        shape = () if value.shape is None else value.shape.numpy()
        if math.prod(shape) > MOST_ELEMENTS:
            raise Unsupported(
                f"tensor {name!r} has {math.prod(shape)} elements, shape {list(shape)}",
                where=where,
                why=f"TensorRT counts to {MOST_ELEMENTS} elements of a tensor",
                fix="export with a smaller --shard-size",
            )


def _float_dtypes(model: ir.Model) -> dict[str, str]:
    """Dtypes of all values of a graph, inferred through its functions: an export keeps those of inputs and outputs."""
    inferred = onnx.shape_inference.infer_shapes(ir.to_proto(model))
    names = {value.name: ir.DataType(value.type.tensor_type.elem_type).name for value in inferred.graph.value_info}
    return {name: dtype.lower() for name, dtype in names.items() if dtype in _FLOATS}


def write_graph(graph: Graph, bundle: Bundle, folder: Path) -> Path:
    """Write the graph, and links to its weights beside it: external data may not leave the folder; returns the file.

    Args:
        graph: of the bundle.
        bundle: that has the weights.
        folder: made here, and for nothing else: names of links come from the bundle, and what is written to one of them
            goes into its target.
    """
    folder.mkdir()
    ir.save(graph.model, folder / MODEL_FILE)
    for name in bundle.manifest.files:
        if name != MODEL_FILE:
            link = folder / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(inside(bundle.path, name).resolve())
    return folder / MODEL_FILE
