"""The form of exported graphs: what older releases of ONNX Runtime and graph tools stumble over is not there."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

Exported = Callable[..., tuple[Path, dict[str, Any]]]

INLINED = ("--inline-functions", "--shard-size", "30KB")
BUNDLES = [
    ("v2_shared_ring",),
    ("v1_skip_layer",),
    ("olmoe",),
    ("v2_shared_ring", *INLINED),
    ("olmoe", "--moe-form", "contrib"),
]

each_bundle = pytest.mark.parametrize("arguments", BUNDLES, ids=" ".join)


def node_lists(model: onnx.ModelProto) -> Iterator[list[onnx.NodeProto]]:
    yield list(model.graph.node)
    yield from (list(function.node) for function in model.functions)


@each_bundle
def test_every_constant_is_a_tensor_or_an_attribute_of_its_function(
    arguments: tuple[str, ...], exported: Exported
) -> None:
    model = onnx.load(exported(*arguments)[0] / "model.onnx", load_external_data=False)
    constants = [node for nodes in node_lists(model) for node in nodes if node.op_type == "Constant"]
    assert constants
    for node in constants:
        (attribute,) = node.attribute
        assert attribute.name == "value" or attribute.ref_attr_name, node


@each_bundle
def test_every_node_has_a_name_of_its_own(arguments: tuple[str, ...], exported: Exported) -> None:
    model = onnx.load(exported(*arguments)[0] / "model.onnx", load_external_data=False)
    for nodes in node_lists(model):
        names = Counter(node.name for node in nodes)
        assert "" not in names
        assert names.most_common(1)[0][1] == 1


def test_what_the_op_for_experts_reads_is_read_once_more_with_its_output(exported: Exported) -> None:
    bundle, _ = exported("olmoe", "--moe-form", "contrib")
    nodes = list(onnx.load(bundle / "model.onnx", load_external_data=False).graph.node)
    mixtures = [node for node in nodes if node.op_type == "MoE"]
    assert len(mixtures) == 2
    for mixture in mixtures:
        (reader,) = [node for node in nodes if mixture.output[0] in node.input]
        assert list(reader.input[1:]) == [mixture.output[0], mixture.input[0]]
        (condition,) = [node for node in nodes if reader.input[0] in node.output]
        assert (reader.op_type, onnx.numpy_helper.to_array(condition.attribute[0].t).item()) == ("Where", True)
