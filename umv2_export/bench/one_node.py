"""ONNX models around a single op, or around one memory layer, for sessions with and without the native library."""

from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import parser
from torch import nn

from umv2_export import native_library
from umv2_export.config import ModelConfig
from umv2_export.model.folded import FoldedMemoryLayer, FoldedPool, TableLayout
from umv2_export.onnx.passes import attach_bodies, make_reproducible, simplify
from umv2_export.onnx.trace import lookup_signature, quiet_exporter, translations
from umv2_export.ops import DOMAIN, VERSION, LookupSignature
from umv2_export.ops.tucker_topk import function_body as tucker_topk_body

__all__ = ["lookup_model", "memory_layer_model", "open_session", "tucker_model"]

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


def tucker_model(*, row_topk: int, topk: int, scores: str = "float", opset: int = OPSET) -> onnx.ModelProto:
    """A model of one TuckerTopK node whose inputs are all graph inputs."""
    shapes = {"row_scores": "t,h,n,r", "col_scores": "t,h,n,r", "u": "h,r", "v": "h,r", "cores": "c,h,r,r"}
    inputs = [f"{scores}[{shape}] {name}" for name, shape in shapes.items()]
    outputs = ["int64[t, k] addresses", f"{scores}[t, k, c] scores"]
    attributes = f"row_topk = {row_topk}, topk = {topk}, {_PLUGIN}"
    node = f"addresses, scores = {DOMAIN}.TuckerTopK <{attributes}> ({', '.join(shapes)})"
    return _model(inputs, outputs, node, tucker_topk_body(opset=opset), opset)


def memory_layer_model(config: ModelConfig, folder: Path) -> Path:
    """One memory layer of random weights, projections and keys included: input `hidden` [T, D], output `output`."""
    layout = TableLayout.of(config.memory, torch.float32, 2 * 10**9)
    signature = lookup_signature(config, layout)
    with quiet_exporter():
        program = torch.onnx.export(
            _Layer(config, layout),
            (torch.zeros(3, config.hidden_size),),
            dynamo=True,
            dynamic_shapes=({0: "tokens"},),
            input_names=["hidden"],
            output_names=["output"],
            opset_version=OPSET,
            custom_translation_table=translations(signature),
            optimize=False,
            verbose=False,
        )
    if program is None:
        raise AssertionError("torch.onnx.export returned no program")
    program.model.opset_imports[DOMAIN] = VERSION
    simplify(program.model)
    attach_bodies(program.model, signature, opset=OPSET)
    make_reproducible(program.model)
    ir.save(program.model, folder / "layer.onnx", external_data="layer.data")
    return folder / "layer.onnx"


def open_session(model: onnx.ModelProto | Path, *, native: bool, threads: int) -> Any:
    """An inference session on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if native:
        options.register_custom_ops_library(native_library())
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


class _Layer(nn.Module):
    """A memory layer alone, its scores of a size that keeps outputs near 1."""

    def __init__(self, config: ModelConfig, layout: TableLayout) -> None:
        super().__init__()
        self.layer = FoldedMemoryLayer(config, 0, layout=layout)
        self.pool = FoldedPool(layout)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.layer.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(drawn * parameter.shape[-1] ** -0.5)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layer(hidden, self.pool, None)[0]
        return output


def _model(inputs: list[str], outputs: list[str], node: str, body: ir.Function, opset: int) -> onnx.ModelProto:
    text = (
        f'<ir_version: 9, opset_import: ["" : {opset}, "{DOMAIN}" : {VERSION}]>\n'
        f"one_node ({', '.join(inputs)}) => ({', '.join(outputs)}) {{ {node} }}"
    )
    model = ir.serde.deserialize_model(parser.parse_model(text))
    model.functions[body.identifier()] = body
    return ir.serde.serialize_model(model)
