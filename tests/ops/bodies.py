"""Models of a single custom op with its body, run in stock ONNX Runtime."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import parser

from umv2_export.ops import LookupSignature
from umv2_export.ops.tucker_topk import function_body as tucker_topk_body

__all__ = ["Array", "lookup_model", "run_body", "tucker_model"]

Array = npt.NDArray[Any]

_PLUGIN = 'plugin_namespace = "umv2", plugin_version = "1"'


def lookup_model(
    signature: LookupSignature,
    *,
    pre_value_dim: int,
    rows_per_shard: int,
    groups: int,
    scores: str = "float",
    rows: str = "float",
    opset: int = 18,
) -> onnx.ModelProto:
    """One MemoryLookup node whose inputs are all graph inputs; `scores` and `rows` are ONNX type names."""
    types = {"I": "int64", "T": scores, "R": rows, "F": "float"}
    inputs = [
        f"{types[kind]}[{','.join(f'{name}_{axis}' for axis in range(3 if name == 'scores' else 2))}] {name}"
        for name, kind in signature.inputs
    ]
    attributes = (
        f'pre_value_dim = {pre_value_dim}, activation = "{signature.activation}", '
        f"rows_per_shard = {rows_per_shard}, groups = {groups}, {_PLUGIN}"
    )
    node = f"output = umv2.MemoryLookup <{attributes}> ({', '.join(name for name, _ in signature.inputs)})"
    return _model(inputs, [f"{scores}[t, v] output"], node, signature.function_body(opset=opset), opset)


def tucker_model(*, row_topk: int, topk: int, scores: str = "float", opset: int = 18) -> onnx.ModelProto:
    """One TuckerTopK node whose inputs are all graph inputs."""
    shapes = {"row_scores": "t,h,n,r", "col_scores": "t,h,n,r", "u": "h,r", "v": "h,r", "cores": "c,h,r,r"}
    inputs = [f"{scores}[{shape}] {name}" for name, shape in shapes.items()]
    outputs = ["int64[t, k] addresses", f"{scores}[t, k, c] scores"]
    attributes = f"row_topk = {row_topk}, topk = {topk}, {_PLUGIN}"
    node = f"addresses, scores = umv2.TuckerTopK <{attributes}> ({', '.join(shapes)})"
    return _model(inputs, outputs, node, tucker_topk_body(opset=opset), opset)


def _model(inputs: list[str], outputs: list[str], node: str, body: ir.Function, opset: int) -> onnx.ModelProto:
    text = (
        f'<ir_version: 9, opset_import: ["" : {opset}, "umv2" : 1]>\n'
        f"one_node ({', '.join(inputs)}) => ({', '.join(outputs)}) {{ {node} }}"
    )
    model = ir.serde.deserialize_model(parser.parse_model(text))
    model.functions[body.identifier()] = body
    return ir.serde.serialize_model(model)


def run_body(model: onnx.ModelProto, feed: Mapping[str, Array]) -> list[Array]:
    """All outputs of one run; the model must pass the checker."""
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, dict(feed))]
