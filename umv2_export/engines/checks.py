"""What a builder cannot build, found before it starts; and that it parsed the graph it was given."""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from umv2_export.engines.profiles import Profile, TensorSpec
from umv2_export.errors import BuildFailed, Unsupported
from umv2_export.ops import DOMAIN

__all__ = [
    "ARCHITECTURES",
    "DEFAULT_ARCHITECTURES",
    "check_graph",
    "check_layers",
    "check_parsed",
    "check_profiles",
    "tensor_spec",
]

# Compute capabilities for which TensorRT-RTX 1.7 builds. It names 7.5 too, and refuses every fp32 product there.
ARCHITECTURES = ("8.0", "8.6", "8.9", "12.0", "12.1")
DEFAULT_ARCHITECTURES = "8.6,8.9,12.0"

# TensorRT's documented limit. The RTX 1.7 builder takes larger tensors without a word (tried: a table of 2^31 + 64
# elements, logits of 4.3e9), and whether its kernels can address them was not tried.
MOST_ELEMENTS = 2**31 - 1

_DTYPES = ("FLOAT", "FLOAT16", "BFLOAT16", "INT64", "INT32", "INT8", "UINT8", "BOOL")


def tensor_spec(value: ir.Value) -> TensorSpec:
    """An input or output of a bundle's graph."""
    if value.name is None or value.shape is None or value.dtype is None:
        raise AssertionError(f"{value.name} has no shape or dtype")
    axes = tuple(axis if isinstance(axis, int) else str(axis) for axis in value.shape.dims)
    return TensorSpec(value.name, value.dtype.name.lower(), axes)


def check_graph(model: ir.Model, where: Path, builder: str, plugin_ops: Collection[str] = ()) -> None:
    """Refuse ops, dtypes and sizes that a builder has not.

    Args:
        model: the graph with its functions expanded.
        where: its file.
        builder: TensorRT or TensorRT-RTX.
        plugin_ops: ops of our domain that it has plugins for.

    Raises:
        Unsupported: it cannot be built.
    """
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain not in ("", "ai.onnx") and (node.domain != DOMAIN or node.op_type not in plugin_ops):
            raise Unsupported(
                f"op {node.domain}::{node.op_type} of node {node.name!r}",
                where=where,
                why=f"it is no standard op, has no body in the file, and {builder} has no plugin for it",
                fix="models of experts run in ONNX Runtime" if node.op_type == "MoE" else None,
            )
        if node.op_type == "NonZero" and builder == "TensorRT-RTX":
            raise Unsupported(
                f"op NonZero of node {node.name!r}",
                where=where,
                why="experts in standard ops find their tokens by it, and TensorRT-RTX's ONNX parser has none",
                fix="models of experts run in ONNX Runtime",
            )
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        if value.dtype is None or value.dtype.name not in _DTYPES:
            raise Unsupported(
                f"tensor {value.name!r} has dtype {value.dtype and value.dtype.name.lower()}",
                where=where,
                why=f"{builder} takes " + ", ".join(_DTYPES).lower(),
            )
    for name, value in model.graph.initializers.items():
        shape = () if value.shape is None else value.shape.numpy()
        if math.prod(shape) > MOST_ELEMENTS:
            raise Unsupported(
                f"tensor {name!r} has {math.prod(shape)} elements, shape {list(shape)}",
                where=where,
                why=f"TensorRT counts to {MOST_ELEMENTS} elements of a tensor",
                fix="export with a smaller --shard-size",
            )


def check_profiles(profiles: Sequence[Profile], tensors: Sequence[TensorSpec], where: Path) -> None:
    """Refuse profiles at whose upper end an input or output is too large.

    Raises:
        Unsupported: one is.
    """
    for profile in profiles:
        for tensor in tensors:
            shape = profile.shape(tensor, 2)
            if math.prod(shape) > MOST_ELEMENTS:
                raise Unsupported(
                    f"profile {profile.name!r}: {tensor.name!r} has up to {math.prod(shape)} elements, shape {shape}",
                    where=where,
                    why=f"TensorRT counts to {MOST_ELEMENTS} elements of a tensor",
                    fix="give smaller --max-shapes, such as input_ids:1x1024",
                )


def check_parsed(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], parsed: Mapping[str, Any], where: Path
) -> None:
    """Compare the inputs and outputs of the parsed network with those of the graph.

    Args:
        inputs: of the graph.
        outputs: of the graph.
        parsed: "inputs" and "outputs", each a list of name, dtype and dims (-1 where dynamic).
        where: the graph file.

    Raises:
        BuildFailed: they differ in number, order, name, dtype or shape.
    """
    for kind, expected in (("inputs", inputs), ("outputs", outputs)):
        wanted = [{"name": tensor.name, "dtype": tensor.dtype, "dims": tensor.dims} for tensor in expected]
        got = parsed[kind]
        if len(wanted) != len(got):
            raise BuildFailed(f"the parsed network has {len(got)} {kind}, the graph {len(wanted)}", where=where)
        for ours, theirs in zip(wanted, got, strict=True):
            if ours != theirs:
                raise BuildFailed(f"the parsed network has {theirs} among its {kind}, the graph {ours}", where=where)


def check_layers(float_dtypes: Mapping[str, str], layers: Sequence[Sequence[str]], where: Path) -> int:
    """Compare the dtypes that layers of the parsed network put out with those of the graph, where names are the same.

    A parser splits a node into layers with names of its own, and the value of the node keeps its name: of a model of
    three blocks, 479 of 544 values of TensorRT-RTX. This shows that no value was narrowed, or widened, on the way into
    the network. That the engine computes what the network says is what strong typing promises, and is not looked at.

    Args:
        float_dtypes: name -> dtype, of the graph.
        layers: name and dtype of each value of the network.
        where: the graph file.

    Returns:
        How many values were compared.

    Raises:
        BuildFailed: one has another dtype.
    """
    found = [(name, dtype) for name, dtype in layers if name in float_dtypes]
    for name, dtype in found:
        if dtype != float_dtypes[name]:
            raise BuildFailed(
                f"value {name!r} is {dtype} in the parsed network, {float_dtypes[name]} in the graph", where=where
            )
    return len(found)
