"""The graph that a builder is given: functions expanded, all but the ops that are plugins."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from umv2_export.bundle import MODEL_FILE, Bundle
from umv2_export.engines.checks import check_graph, tensor_spec
from umv2_export.engines.profiles import TensorSpec
from umv2_export.onnx.passes import inline_bodies
from umv2_export.ops import DOMAIN
from umv2_export.system.files import inside

__all__ = ["Graph", "read_graph", "write_graph"]

_FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16")


@dataclass(frozen=True)
class Graph:
    """What a builder parses.

    Attributes:
        model: the graph; it holds no functions.
        inputs, outputs: of the graph.
        float_dtypes: name -> float, float16 or bfloat16, of every value between them that has such a dtype.
    """

    model: ir.Model
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    float_dtypes: Mapping[str, str]

    @property
    def plugin_ops(self) -> list[str]:
        """Ops that a plugin computes."""
        return sorted({node.op_type for node in self.model.graph if node.domain == DOMAIN})


def read_graph(bundle: Bundle, builder: str, plugin_ops: Collection[str] = ()) -> Graph:
    """The graph of a bundle as a builder shall see it.

    Functions are expanded here and not by the parser, whose names for what it expands are its own: names are what
    dtypes are compared by and weights are refitted by. An op that is a plugin loses its body: with the body at hand, a
    parser that finds no plugin expands it without a word.

    Args:
        bundle: what to build.
        builder: name of the library, for messages.
        plugin_ops: ops of our domain that it has plugins for.

    Raises:
        InputRejected: the bundle is corrupt.
        Unsupported: it holds ops, dtypes or sizes that the builder has not.
    """
    model = ir.from_proto(bundle.graph())
    if plugin_ops:
        common_passes.InlinePass(criteria=lambda function: function.name not in plugin_ops)(model)
    else:
        inline_bodies(model)
    dtypes = _float_dtypes(model)
    model.functions.clear()
    check_graph(model, bundle.model_file, builder, plugin_ops)
    inputs, outputs = ([tensor_spec(value) for value in values] for values in (model.graph.inputs, model.graph.outputs))
    return Graph(model, inputs, outputs, dtypes)


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
