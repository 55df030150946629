"""What the custom ops share: their ONNX domain and the attributes that make TensorRT's parser choose a plugin."""

from collections.abc import Mapping, Sequence

import onnx
import onnx.defs
import onnx.parser
import onnx_ir as ir
from onnx.defs import OpSchema

__all__ = ["CONTRIB_DOMAIN", "DOMAIN", "PLUGIN_ATTRIBUTES", "VERSION", "op_schema", "parse_body"]

DOMAIN = "umv2"
VERSION = 1

# Of the ops that ONNX Runtime has beside the standard ones.
CONTRIB_DOMAIN = "com.microsoft"

# Without a namespace on the node, TensorRT expands the local function instead of asking for a plugin.
PLUGIN_ATTRIBUTES: Mapping[str, str] = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}


def op_schema(
    name: str,
    doc: str,
    inputs: Sequence[tuple[str, str]],
    outputs: Sequence[tuple[str, str]],
    type_constraints: Mapping[str, Sequence[str]],
    attributes: Mapping[str, OpSchema.AttrType],
    *,
    defaults: Mapping[str, int] | None = None,
    plugin: bool = True,
) -> OpSchema:
    """An ONNX schema whose inputs are all single and required.

    Args:
        name: op type.
        doc: one paragraph.
        inputs: (name, type variable) in order.
        outputs: likewise.
        type_constraints: type variable -> element types.
        attributes: name -> type, of those that a node must have.
        defaults: name -> value, of whole numbers that a node may leave out.
        plugin: add the plugin attributes.
    """
    return OpSchema(
        name,
        DOMAIN,
        VERSION,
        doc=doc,
        inputs=[OpSchema.FormalParameter(*parameter) for parameter in inputs],
        outputs=[OpSchema.FormalParameter(*parameter) for parameter in outputs],
        type_constraints=[
            (variable, [f"tensor({t})" for t in types], "") for variable, types in type_constraints.items()
        ],
        attributes=[
            *(OpSchema.Attribute(name, kind, required=True) for name, kind in attributes.items()),
            *(
                OpSchema.Attribute(name, onnx.AttributeProto(name=name, type=onnx.AttributeProto.INT, i=value))
                for name, value in (defaults or {}).items()
            ),
            *(
                OpSchema.Attribute(name, OpSchema.AttrType.STRING, required=True)
                for name in PLUGIN_ATTRIBUTES
                if plugin
            ),
        ],
    )


def parse_body(schema: OpSchema, statements: str, *, opset: int, contrib: bool = False) -> ir.Function:
    """The ONNX function of `schema` whose body is `statements`, in standard ops of version `opset`.

    Constants are written as tensors. What ONNX Runtime up to 1.24 infers from `value_ints` has no dimension, and TopK
    refuses it as K; onnx-graphsurgeon, onnxslim and Polygraphy read `value_float` as a double, and write back a double.

    Every node is named, after its first output: ONNX Runtime up to 1.21 names what it fuses after the nodes fused, and
    refuses the model when that leaves two nodes with one name.

    Args:
        schema: of the op.
        statements: in the text form of ONNX.
        opset: version of the standard ops.
        contrib: the body has ops of ONNX Runtime too.
    """
    attributes = f"<{', '.join(sorted(schema.attributes))}>" if schema.attributes else ""
    inputs = ", ".join(parameter.name for parameter in schema.inputs)
    outputs = ", ".join(parameter.name for parameter in schema.outputs)
    imported = f', "{CONTRIB_DOMAIN}" : 1' if contrib else ""
    text = (
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}{imported}]>\n'
        f"{schema.name} {attributes} ({inputs}) => ({outputs})\n{{\n{statements}\n}}"
    )
    body = ir.serde.deserialize_function(onnx.parser.parse_function(text))
    for node in body:
        node.name = node.outputs[0].name
    return body
