"""ONNX models of a single op, for sessions with and without the native library."""

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import parser

from umv2_export.ops import DOMAIN, VERSION, ExpertsSignature, KeyScoresSignature, LookupSignature
from umv2_export.ops.domain import CONTRIB_DOMAIN
from umv2_export.ops.experts import contrib_attributes
from umv2_export.ops.tucker_topk import function_body as tucker_topk_body

__all__ = [
    "OPSET",
    "experts_model",
    "key_scores_model",
    "lookup_model",
    "repeated",
    "tucker_model",
    "with_constants",
]

OPSET = 18

_PLUGIN = 'plugin_namespace = "umv2", plugin_version = "1"'


def lookup_model(
    signature: LookupSignature,
    *,
    pre_value_dim: int,
    rows_per_shard: int,
    groups: int = 1,
    scores: str = "float",
    rows: str = "float",
    opset: int = OPSET,
) -> onnx.ModelProto:
    """A model of one MemoryLookup node whose inputs are all graph inputs; `scores` and `rows` are ONNX type names."""
    types = {"I": "int64", "T": scores, "R": rows, "F": "float"}
    ranks = {"scores": 3}
    inputs = [
        f"{types[kind]}[{','.join(f'{name}_{axis}' for axis in range(ranks.get(name, 2)))}] {name}"
        for name, kind in signature.inputs
    ]
    attributes = (
        f'pre_value_dim = {pre_value_dim}, activation = "{signature.activation}", '
        f"rows_per_shard = {rows_per_shard}, groups = {groups}, {_PLUGIN}"
    )
    node = f"output = {DOMAIN}.MemoryLookup <{attributes}> ({', '.join(name for name, _ in signature.inputs)})"
    return _model(inputs, [f"{scores}[t, v] output"], node, signature.function_body(opset=opset), opset)


def repeated(model: onnx.ModelProto, shared: str, count: int) -> onnx.ModelProto:
    """The only node of a model `count` times, as the layers of a model have it: each with inputs of its own.

    Args:
        model: of one node.
        shared: the inputs whose names begin so are the same for all.
        count: nodes; those of node i get the suffix `.i`.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for field in (result.graph.node, result.graph.input, result.graph.output):
        del field[:]
    result.graph.input.extend(value for value in model.graph.input if value.name.startswith(shared))
    for i in range(count):
        node = result.graph.node.add()
        node.CopyFrom(model.graph.node[0])
        for names in (node.input, node.output):
            names[:] = [name if name.startswith(shared) else f"{name}.{i}" for name in names]
        for source, target in ((model.graph.input, result.graph.input), (model.graph.output, result.graph.output)):
            for value in source:
                if not value.name.startswith(shared):
                    added = target.add()
                    added.CopyFrom(value)
                    added.name = f"{value.name}.{i}"
    return result


def with_constants(model: onnx.ModelProto, arrays: Mapping[str, npt.NDArray[Any]]) -> onnx.ModelProto:
    """The model with these inputs as constants of its own, as the keys of an exported model are."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    kept = [value for value in result.graph.input if value.name not in arrays]
    del result.graph.input[:]
    result.graph.input.extend(kept)
    result.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    return result


def key_scores_model(
    signature: KeyScoresSignature, *, queries: str = "float", keys: str = "float", opset: int = OPSET
) -> onnx.ModelProto:
    """A model of one KeyScores node whose inputs are all graph inputs; `queries` and `keys` are ONNX type names."""
    inputs = [f"{queries}[t, q] queries", *(f"{keys}[k, n_{name}] {name}" for name in signature.matrices)]
    outputs = ["float[t, h, n, r] row_scores", "float[t, h, n, r] col_scores"]
    texts = {
        name: f"{value:.9e}" if isinstance(value, float) else value for name, value in signature.attributes.items()
    }
    attributes = ", ".join(f"{name} = {text}" for name, text in texts.items())
    names = ", ".join(["queries", *signature.matrices])
    node = f"row_scores, col_scores = {DOMAIN}.KeyScores <{attributes}> ({names})"
    return _model(inputs, outputs, node, signature.function_body(opset=opset), opset)


def experts_model(
    signature: ExpertsSignature, *, form: str = "standard", dtype: str = "float", opset: int = OPSET
) -> onnx.ModelProto:
    """A model of one node of experts, standard or contrib, whose inputs are all graph inputs."""
    inputs = [f"{dtype}[t, d] hidden", f"{dtype}[t, e] router_logits"]
    outputs = [f"{dtype}[t, d] output"]
    if form == "standard":
        inputs += [f"{dtype}[{name}_0, {name}_1] {name}" for name in signature.matrices]
        names = ", ".join(["hidden", "router_logits", *signature.matrices])
        node = f"output = {DOMAIN}.Experts ({names})"
        return _model(inputs, outputs, node, signature.function_body(opset=opset), opset)
    inputs += [f"{dtype}[e, i2, d] ff_proj", f"{dtype}[e, d, i] ff_out"]
    attributes = ", ".join(
        f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value}"
        for name, value in contrib_attributes(signature).items()
    )
    node = f'output = {CONTRIB_DOMAIN}.MoE <{attributes}> (hidden, router_logits, ff_proj, "", ff_out)'
    return _model(inputs, outputs, node, None, opset)


def tucker_model(*, row_topk: int, topk: int, scores: str = "float", opset: int = OPSET) -> onnx.ModelProto:
    """A model of one TuckerTopK node whose inputs are all graph inputs."""
    shapes = {"row_scores": "t,h,n,r", "col_scores": "t,h,n,r", "u": "h,r", "v": "h,r", "cores": "c,h,r,r"}
    inputs = [f"{scores}[{shape}] {name}" for name, shape in shapes.items()]
    outputs = ["int64[t, k] addresses", f"{scores}[t, k, c] scores"]
    attributes = f"row_topk = {row_topk}, topk = {topk}, {_PLUGIN}"
    node = f"addresses, scores = {DOMAIN}.TuckerTopK <{attributes}> ({', '.join(shapes)})"
    return _model(inputs, outputs, node, tucker_topk_body(opset=opset), opset)


def _model(inputs: list[str], outputs: list[str], node: str, body: ir.Function | None, opset: int) -> onnx.ModelProto:
    domain = CONTRIB_DOMAIN if body is None else DOMAIN
    text = (
        f'<ir_version: 9, opset_import: ["" : {opset}, "{domain}" : {VERSION}]>\n'
        f"single_op ({', '.join(inputs)}) => ({', '.join(outputs)}) {{ {node} }}"
    )
    model = ir.serde.deserialize_model(parser.parse_model(text))
    if body is not None:
        model.functions[body.identifier()] = body
    return ir.serde.serialize_model(model)
