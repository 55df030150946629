"""What a builder cannot build is named before a build starts."""

import importlib
from pathlib import Path

import onnx.parser
import onnx_ir as ir
import pytest

from umv2_export.engines.backends import TENSORRT, TENSORRT_RTX
from umv2_export.engines.build import check_layers, check_parsed
from umv2_export.engines.graph import check_graph
from umv2_export.engines.profiles import Profile, ValueInfo, check_profiles
from umv2_export.errors import BuildFailed, Unsupported

HERE = Path("model.onnx")


def graph(text: str) -> ir.Model:
    """A graph in the text form of ONNX."""
    header = '<ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1, "umv2" : 1]>'
    return ir.from_proto(onnx.parser.parse_model(header + text))


def test_architectures_are_those_of_the_library() -> None:
    known = importlib.import_module("tensorrt_rtx").ComputeCapability.__members__
    named = {"SM" + name.replace(".", "") for name in TENSORRT_RTX.architectures}
    assert named == set(known) - {"NONE", "CURRENT", "SM75"}


def test_an_op_of_another_domain_is_unsupported() -> None:
    model = graph("g (float[2] x) => (float[2] y) { y = com.microsoft.MoE(x) }")
    with pytest.raises(Unsupported, match=r"com\.microsoft::MoE") as caught:
        check_graph(model, HERE, TENSORRT_RTX)
    assert "run in ONNX Runtime" in str(caught.value)


def test_non_zero_is_unsupported() -> None:
    with pytest.raises(Unsupported, match="op NonZero"):
        check_graph(graph("g (bool[2] x) => (int64[1,n] y) { y = NonZero(x) }"), HERE, TENSORRT_RTX)


def test_a_dtype_that_the_library_has_not_is_unsupported() -> None:
    with pytest.raises(Unsupported, match="'x' has dtype double"):
        check_graph(graph("g (double[2] x) => (double[2] y) { y = Neg(x) }"), HERE, TENSORRT_RTX)


@pytest.mark.parametrize(("rows", "refused"), [(2**27 - 1, False), (2**27, True)])
def test_a_table_of_more_elements_than_32_bits_count_is_unsupported(rows: int, refused: bool) -> None:
    model = graph("g (int64[n] i) => (float16[n,16] y) { y = Gather(rows, i) }")
    rows_value = ir.Value(name="rows", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape([rows, 16]))
    shape = ir.Shape([rows, 16])
    rows_value.const_value = ir.ExternalTensor("rows", 0, rows * 32, ir.DataType.FLOAT16, shape=shape, name="rows")
    model.graph.initializers["rows"] = rows_value
    if not refused:
        check_graph(model, HERE, TENSORRT_RTX)
        return
    with pytest.raises(Unsupported, match="'rows' has 2147483648 elements") as caught:
        check_graph(model, HERE, TENSORRT_RTX)
    assert "--shard-size" in str(caught.value)


@pytest.mark.parametrize(("tokens", "refused"), [(2**23 - 1, False), (2**23, True)])
def test_logits_of_more_elements_than_32_bits_count_are_unsupported(tokens: int, refused: bool) -> None:
    logits = ValueInfo("logits", "float", ("batch", "sequence", 256))
    profile = Profile("prefill", (1, 1, 1), (1, 1, tokens), (0, 0, 0))
    if not refused:
        check_profiles([profile], [logits], HERE)
        return
    with pytest.raises(Unsupported, match="'logits' has up to 2147483648 elements") as caught:
        check_profiles([profile], [logits], HERE)
    assert "--max-shapes" in str(caught.value)


def test_the_length_of_the_new_cache_counts() -> None:
    present = ValueInfo("present.0.key", "float", ("batch", 4, "past_sequence + sequence", 16))
    assert Profile("prefill", (1, 1, 2), (1, 1, 5), (0, 0, 7)).shape(present, 2) == [2, 4, 12, 16]


@pytest.mark.parametrize("change", [{"name": "ids"}, {"dtype": "int32"}, {"dims": [-1, 1]}, {"dims": [-1]}, None])
def test_a_network_that_is_not_the_graph_is_refused(change: dict[str, object] | None) -> None:
    inputs = [ValueInfo("input_ids", "int64", ("batch", "sequence"))]
    same = {"name": "input_ids", "dtype": "int64", "dims": [-1, -1]}
    check_parsed(inputs, [], {"inputs": [same], "outputs": []}, HERE)
    parsed = [] if change is None else [{**same, **change}]
    with pytest.raises(BuildFailed, match="the parsed network has"):
        check_parsed(inputs, [], {"inputs": parsed, "outputs": []}, HERE)


def test_non_zero_is_left_to_the_parser_of_tensorrt() -> None:
    check_graph(graph("g (bool[2] x) => (int64[1,n] y) { y = NonZero(x) }"), HERE, TENSORRT)


def test_an_op_of_ours_is_taken_where_it_has_a_plugin() -> None:
    model = graph('g (float[2] x) => (float[2] y) { y = umv2.MemoryLookup <a="b"> (x) }')
    check_graph(model, HERE, TENSORRT)
    with pytest.raises(Unsupported, match=r"(?s)umv2::MemoryLookup.*TensorRT-RTX has no plugin for it"):
        check_graph(model, HERE, TENSORRT_RTX)
    with pytest.raises(Unsupported, match=r"umv2::KeyScores"):
        check_graph(graph("g (float[2] x) => (float[2] y) { y = umv2.KeyScores (x) }"), HERE, TENSORRT)


def test_layers_are_compared_by_name() -> None:
    graph_dtypes = {"hidden": "float", "scores": "float16"}
    layers = [("hidden", "float"), ("scores", "float16"), ("(Unnamed Layer 3)", "int8")]
    assert check_layers(graph_dtypes, layers, HERE) == 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "float8"])
def test_a_value_that_was_narrowed_is_refused(dtype: str) -> None:
    with pytest.raises(BuildFailed, match=f"'hidden' is {dtype} in the parsed network, float in the graph"):
        check_layers({"hidden": "float"}, [("hidden", dtype)], HERE)
