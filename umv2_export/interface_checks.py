"""Inputs and outputs of an exported graph: what the interface says, what the manifest says, what the graph has."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from umv2_export.config import ModelConfig
from umv2_export.errors import InputRejected, shown
from umv2_export.interface import graph_inputs, graph_outputs
from umv2_export.records.forms import either, integer, list_of, record, text

__all__ = ["VALUES", "check_graph_values", "check_manifest_values", "describe_value"]

Value = Mapping[str, Any]

# Of a manifest: an axis of any size has a name.
VALUES = list_of(record({"name": text, "dtype": text, "axes": list_of(either(text, integer(0)))}))


def check_manifest_values(
    inputs: Sequence[Value], outputs: Sequence[Value], config: ModelConfig, dtype: str, *, where: Path
) -> None:
    """Compare the inputs and outputs of a manifest with those of a model; an axis of any size has a name there.

    Args:
        inputs: name, dtype and axes of each.
        outputs: likewise.
        config: the model.
        dtype: fp32, fp16 or bf16, of the cache; logits are fp32.
        where: the manifest.

    Raises:
        InputRejected: they differ.
    """
    for kind, values, expected in (
        ("inputs", inputs, graph_inputs(config, dtype)),
        ("outputs", outputs, graph_outputs(config, dtype)),
    ):
        if [value["name"] for value in values] != [value.name for value in expected]:
            raise InputRejected(f"field {kind!r} does not name the {kind} of the model", where=where)
        for value, wanted in zip(values, expected, strict=True):
            found = value["axes"]
            fits = [
                isinstance(axis, str) if isinstance(size, str) else axis == size
                for axis, size in zip(found, wanted.axes, strict=False)
            ]
            if value["dtype"] != wanted.dtype or len(found) != len(wanted.axes) or not all(fits):
                raise InputRejected(
                    f"field {kind!r}: {wanted.name} is {shown(value['dtype'])} {shown(found)}, the model's is "
                    f"{wanted.dtype} {['any' if isinstance(size, str) else size for size in wanted.axes]}",
                    where=where,
                )


def check_graph_values(
    graph: onnx.GraphProto, inputs: Sequence[Value], outputs: Sequence[Value], *, where: Path
) -> None:
    """Compare the inputs and outputs of a graph with those of its manifest.

    Raises:
        InputRejected: they differ.
    """
    for kind, said, values in (("input", inputs, graph.input), ("output", outputs, graph.output)):
        found = list(map(describe_value, values))
        if found != list(said):
            raise InputRejected(
                f"the graph's {kind}s are not those of the manifest: {_first(said, found)}", where=where
            )


def _first(said: Iterable[Value], found: Iterable[Value]) -> str:
    """The first difference."""
    ours, theirs = ({value["name"]: value for value in values} for values in (found, said))
    for name in theirs:
        if name not in ours:
            return f"it has no {shown(name)}"
        if ours[name] != theirs[name]:
            return f"{shown(name)} is {_plain(ours[name])}, not {_plain(theirs[name])}"
    more = [name for name in ours if name not in theirs]
    return f"it has {shown(more[0])} besides" if more else "they stand in another order, or twice"


def _plain(value: Value) -> str:
    return f"{value['dtype']} {shown(value['axes'])}"


def describe_value(value: onnx.ValueInfoProto) -> dict[str, Any]:
    """Name, dtype and axes of an input or output."""
    tensor = value.type.tensor_type
    axes = [axis.dim_param or axis.dim_value for axis in tensor.shape.dim]
    known = onnx.TensorProto.DataType.values()
    dtype = onnx.TensorProto.DataType.Name(tensor.elem_type).lower() if tensor.elem_type in known else "unknown"
    return {"name": value.name, "dtype": dtype, "axes": axes}
