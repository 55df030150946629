"""The part of an exported graph that differs between models: FFNs and memory layers, or experts, of all blocks."""

import onnx

from umv2_export.bundle import Bundle
from umv2_export.interface import part_names

__all__ = ["part_graph"]

_ELEMENT_TYPES = {
    "fp32": onnx.TensorProto.FLOAT,
    "fp16": onnx.TensorProto.FLOAT16,
    "bf16": onnx.TensorProto.BFLOAT16,
}


def part_graph(bundle: Bundle) -> onnx.ModelProto:
    """The nodes of all blocks between their normed input and what is added to the residual stream.

    Its inputs are `normed.{i}` [batch, sequence, hidden_size], and inputs of the whole graph where shapes come from
    them; its weights lie in the bundle's files.
    """
    model = bundle.graph()
    inputs, outputs = part_names(bundle.config)
    producers = {name: node for node in model.graph.node for name in node.output}
    needed, reached = list(outputs), set(inputs)
    chosen: set[int] = set()
    while needed:
        name = needed.pop()
        if name in reached or not name:
            continue
        reached.add(name)
        node = producers.get(name)
        if node is not None and id(node) not in chosen:
            chosen.add(id(node))
            needed += node.input
    nodes = [node for node in model.graph.node if id(node) in chosen]
    kept = [value for value in model.graph.input if value.name in reached]
    weights = [tensor for tensor in model.graph.initializer if tensor.name in reached]
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for field in ("node", "input", "output", "initializer", "value_info"):
        result.graph.ClearField(field)
    result.graph.node.extend(nodes)
    result.graph.initializer.extend(weights)
    result.graph.input.extend(kept)
    for name in inputs:
        value = result.graph.input.add()
        value.name = name
        value.type.tensor_type.elem_type = _ELEMENT_TYPES[bundle.manifest.dtype]
        for axis in ("batch", "sequence", bundle.config.hidden_size):
            dimension = value.type.tensor_type.shape.dim.add()
            if isinstance(axis, int):
                dimension.dim_value = axis
            else:
                dimension.dim_param = axis
    for name in outputs:
        result.graph.output.add().name = name
    return result
