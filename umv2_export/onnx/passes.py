"""What happens to the traced graph before it is written: simplification, function bodies, reproducible bytes."""

import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes import common as common_passes

from umv2_export import __version__
from umv2_export.ops import DOMAIN, OpSignatures
from umv2_export.ops.domain import CONTRIB_DOMAIN

__all__ = ["attach_bodies", "inline_bodies", "keep_hidden_alive", "make_reproducible", "simplify", "type_constants"]

# Shape arithmetic, not weights: those are never read here.
_FOLD_LIMIT = 1024

_CONSTANT_DTYPES = {
    ir.AttributeType.FLOAT: ir.DataType.FLOAT,
    ir.AttributeType.FLOATS: ir.DataType.FLOAT,
    ir.AttributeType.INT: ir.DataType.INT64,
    ir.AttributeType.INTS: ir.DataType.INT64,
}


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


def type_constants(model: ir.Model) -> None:
    """Write the constants of the graph as tensors, as those of the bodies are; see `umv2_export.ops.domain`."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type != "Constant" or "value" in node.attributes:
            continue
        (attribute,) = node.attributes.values()
        dtype = _CONSTANT_DTYPES[attribute.type]
        node.attributes.clear()
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(attribute.value, dtype=dtype))


def keep_hidden_alive(model: ir.Model) -> None:
    """Read what each com.microsoft::MoE reads once more after it: Where(true, its output, hidden) is its output.

    The kernel of ONNX Runtime 1.23.1 to 1.31 asks for its output in the buffer of `hidden` where nobody reads that
    later, sets it to zero, and then reads it; it copies first where it normalises the weights of routing alone. Logits
    were off by 4.3, with this they are off by 3.6e-6. The price: 1.6 us a node for 1 token of 2048, 0.5 ms for 256.
    """
    for node in list(model.graph):
        if (node.domain, node.op_type) != (CONTRIB_DOMAIN, "MoE"):
            continue
        output, hidden = node.outputs[0], node.inputs[0]
        always = ir.node("Constant", [], attributes={"value": ir.tensor(True)}, name=f"{node.name}_always")
        always.outputs[0].name = f"{output.name}_always"
        kept = ir.node("Where", [always.outputs[0], output, hidden], name=f"{node.name}_kept")
        kept.outputs[0].name = f"{output.name}_kept"
        kept.outputs[0].shape, kept.outputs[0].type = output.shape, output.type
        output.replace_all_uses_with(kept.outputs[0])
        kept.replace_input_with(1, output)
        model.graph.insert_after(node, [always, kept])


def attach_bodies(model: ir.Model, signatures: OpSignatures, *, opset: int) -> None:
    """Give the custom ops their bodies in standard ops, as functions of the model."""
    for body in signatures.function_bodies(opset=opset):
        model.functions[body.identifier()] = body


def inline_bodies(model: ir.Model) -> None:
    """Replace every call of a function by its body: standard ops only."""
    common_passes.InlinePass()(model)
    # Constants of the bodies that were attributes of the nodes.
    type_constants(model)
    model.opset_imports.pop(DOMAIN, None)


def make_reproducible(model: ir.Model) -> None:
    """Drop what differs between two exports of one model: traces of source lines, and the order of attributes.

    ClearMetadataAndDocStringPass (onnx-ir 1.1) leaves the model's and the values' alone, so this walk would stay.
    """
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
