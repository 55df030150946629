"""What happens to the traced graph before it is written: simplification, function bodies, reproducible bytes."""

import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes import common as common_passes

from umv2_export import __version__
from umv2_export.ops import DOMAIN, OpSignatures

__all__ = ["attach_bodies", "inline_bodies", "make_reproducible", "simplify"]

# Shape arithmetic, not weights: those are never read here.
_FOLD_LIMIT = 1024


def simplify(model: ir.Model) -> None:
    """Fold constant subexpressions and drop repeated and unused nodes, leaving initializers and their names alone.

    To be called before bodies are attached. The stock optimizer would fold Transpose of a weight into a new, nameless
    weight, and merge equal weights.
    """
    onnxscript.optimizer.fold_constants(
        model,
        onnx_shape_inference=False,
        input_size_limit=_FOLD_LIMIT,
        output_size_limit=_FOLD_LIMIT,
        should_fold=lambda node: False if any(v is not None and v.is_initializer() for v in node.inputs) else None,
    )
    ir.passes.Sequential(
        common_passes.RemoveUnusedNodesPass(),
        common_passes.CommonSubexpressionEliminationPass(),
        common_passes.RemoveUnusedNodesPass(),
        common_passes.RemoveUnusedOpsetsPass(),
    )(model)


def attach_bodies(model: ir.Model, signatures: OpSignatures, *, opset: int) -> None:
    """Give the custom ops their bodies in standard ops, as functions of the model."""
    for body in signatures.function_bodies(opset=opset):
        model.functions[body.identifier()] = body


def inline_bodies(model: ir.Model) -> None:
    """Replace every call of a function by its body: standard ops only."""
    common_passes.InlinePass()(model)
    model.opset_imports.pop(DOMAIN, None)


def make_reproducible(model: ir.Model) -> None:
    """Drop what differs between two exports of one model: traces of source lines, and the order of attributes."""
    model.producer_name, model.producer_version = "umv2-export", __version__
    model.doc_string = model.graph.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name = "umv2"
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in ir.traversal.RecursiveGraphIterator(graph):
            node.doc_string = None
            node.metadata_props.clear()
            for value in node.outputs:
                _strip(value)
            attributes = sorted(node.attributes.values(), key=lambda attribute: attribute.name)
            node.attributes.clear()
            for attribute in attributes:
                node.attributes[attribute.name] = attribute
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        _strip(value)


def _strip(value: ir.Value) -> None:
    value.doc_string = None
    value.metadata_props.clear()
