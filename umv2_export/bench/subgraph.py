"""The part of an exported graph that differs between models: FFNs and memory layers, or experts, of all blocks."""

import onnx
import onnx_ir as ir
from onnx_ir import convenience

from umv2_export.bundle import Bundle
from umv2_export.interface import part_names

__all__ = ["core_subgraph"]


def core_subgraph(bundle: Bundle) -> onnx.ModelProto:
    """The nodes of all blocks between their normed input and what is added to the residual stream.

    Its inputs are `normed.{i}` [batch, sequence, hidden_size], and inputs of the whole graph where shapes come from
    them; its weights lie in the bundle's files.
    """
    model = ir.serde.deserialize_model(bundle.graph())
    inputs, outputs = part_names(bundle.config)
    # Shapes come from some inputs of the whole graph: extract() wants to be told which, so it gets all, and those that
    # nothing reads go.
    whole = list(model.graph.inputs)
    core = convenience.extract(model.graph, [*(value.name or "" for value in whole), *inputs], outputs)
    for value in list(core.inputs):
        if value.name not in inputs and not value.uses():
            core.inputs.remove(value)
    cache = next(value for value in whole if (value.name or "").startswith("past_key_values."))
    for value in core.inputs:
        if value.name in inputs:
            value.type, value.shape = cache.type, ir.Shape(["batch", "sequence", bundle.config.hidden_size])
    return ir.serde.serialize_model(
        ir.Model(core, ir_version=model.ir_version, functions=list(model.functions.values()))
    )
