"""Models of a single custom op, to run it in ONNX Runtime with and without the native library."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
from onnx import parser

from umv2_export import native_library
from umv2_export.ops import LookupSignature
from umv2_export.ops.tucker_topk import function_body as tucker_topk_body

__all__ = ["Array", "lookup_model", "run", "session", "tucker_model"]

Array = npt.NDArray[Any]

_PLUGIN = 'plugin_namespace = "umv2", plugin_version = "1"'


def lookup_model(
    signature: LookupSignature,
    *,
    pre_value_dim: int,
    rows_per_shard: int,
    groups: int = 1,
    scores: str = "float",
    rows: str = "float",
) -> bytes:
    """A model of one MemoryLookup node whose inputs are all graph inputs."""
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
    names = ", ".join(name for name, _ in signature.inputs)
    node = f"output = umv2.MemoryLookup <{attributes}> ({names})"
    return _model(inputs, [f"{scores}[t, v] output"], node, signature.function_body(opset=18))


def tucker_model(*, row_topk: int, topk: int, scores: str = "float") -> bytes:
    """A model of one TuckerTopK node."""
    shapes = {"row_scores": "t,h,n,r", "col_scores": "t,h,n,r", "u": "h,r", "v": "h,r", "cores": "c,h,r,r"}
    inputs = [f"{scores}[{shape}] {name}" for name, shape in shapes.items()]
    outputs = ["int64[t, k] addresses", f"{scores}[t, k, c] scores"]
    node = (
        f"addresses, scores = umv2.TuckerTopK <row_topk = {row_topk}, topk = {topk}, {_PLUGIN}> ({', '.join(shapes)})"
    )
    return _model(inputs, outputs, node, tucker_topk_body(opset=18))


def _model(inputs: list[str], outputs: list[str], node: str, body: ir.Function) -> bytes:
    text = (
        f'<ir_version: 9, opset_import: ["" : 18, "umv2" : 1]>\n'
        f"one_node ({', '.join(inputs)}) => ({', '.join(outputs)}) {{ {node} }}"
    )
    model = ir.serde.deserialize_model(parser.parse_model(text))
    model.functions[body.identifier()] = body
    return bytes(ir.serde.serialize_model(model).SerializeToString())


def session(model: bytes, *, native: bool, threads: int = 2) -> Any:
    """An inference session, stock or with the native library."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if native:
        options.register_custom_ops_library(native_library())
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(model: bytes, feed: Mapping[str, Array], *, native: bool, threads: int = 2) -> list[Array]:
    """All outputs of one run."""
    outputs: list[Array] = session(model, native=native, threads=threads).run(None, dict(feed))
    return [np.asarray(output) for output in outputs]
