"""The Python plugins of TensorRT, registered with a stand-in for it; no GPU is needed."""

import contextlib
import importlib.metadata
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo  # looks at what these tests replace in sys.modules and torch, so it is imported before
from onnx.defs import OpSchema

from tests.gpu.compiled import CASES, compiled_folder
from tests.gpu.made_up import lookup, made_up_folder, topk
from tests.ops.test_memory_lookup import Lookup
from tests.ops.test_tucker_topk import inputs
from tests.plugins.tensorrt_plugin_api import DataType, Expression, Plugin, TensorDesc, stand_in, value
from umv2_export.errors import EnvironmentUnfit, InputRejected, InvalidRequest, Unsupported
from umv2_export.gpu.index import read_index
from umv2_export.gpu.launch import launch_lookup
from umv2_export.ops import LookupSignature, memory_lookup, tucker_topk
from umv2_export.ops.domain import PLUGIN_ATTRIBUTES
from umv2_export.ops.tucker_topk import schema as topk_schema
from umv2_export.plugins.tensorrt.python_plugins import register_plugins

TOPK, LOOKUP = "umv2::TuckerTopK", "umv2::MemoryLookup"

DTYPES = {
    "float32": DataType.FLOAT,
    "float16": DataType.HALF,
    "bfloat16": DataType.BF16,
    "int8": DataType.INT8,
    "int64": DataType.INT64,
}

# Dimensions of tokens are known when the engine runs.
TOKENS = {"tokens": 5}

Register = Callable[..., dict[str, Plugin]]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Registers the kernels of a folder; returns what TensorRT was told."""

    def registered(folder: Path, **options: Any) -> dict[str, Plugin]:
        tensorrt, plugin, plugins = stand_in()
        monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
        monkeypatch.setitem(sys.modules, "tensorrt.plugin", plugin)
        register_plugins(tensorrt, folder, **options)
        return plugins

    return registered


def described(tensor: torch.Tensor) -> TensorDesc:
    """A tensor while an engine is built: its first dimension, if it is that of tokens, is not known."""
    shape = [Expression.dynamic("tokens") if size == TOKENS["tokens"] else Expression(size) for size in tensor.shape]
    return TensorDesc(shape, DTYPES[str(tensor.dtype).removeprefix("torch.")])


def shape_of(description: TensorDesc) -> list[int]:
    return [dimension.at(TOKENS) for dimension in description.shape_expr]


def lookup_node(case: str, **shape: Any) -> tuple[list[TensorDesc], dict[str, Any], list[Any]]:
    """Inputs and attributes of a node of a golden case, and the arguments of the torch op."""
    memory = CASES[case].memory
    arguments = Lookup(
        tokens=TOKENS["tokens"],
        hits=7,
        shards=CASES[case].shards,
        rows="int8" if CASES[case].rows is torch.int8 else "float",
        pre_value_dim=memory.pre_value_dim,
        value_dim=shape.get("value_dim", memory.value_dim),
        cores=memory.tucker_cores,
        groups=memory.value_groups,
        activation=memory.activation,
        rows_per_shard=11,
    ).op_arguments()
    tensors = [tensor for tensor in arguments[:5] if tensor is not None] + arguments[5]
    names = ("pre_value_dim", "activation", "rows_per_shard", "groups")
    attributes = dict(zip(names, arguments[6:], strict=True))
    return [described(tensor) for tensor in tensors], attributes, list(arguments)


def topk_node(**shape: Any) -> tuple[list[TensorDesc], dict[str, Any], list[Any]]:
    tensors = [torch.from_numpy(array) for array in inputs(**{"tokens": 5, "heads": 2, "keys": 19} | shape).values()]
    return [described(tensor) for tensor in tensors], {"row_topk": 12, "topk": 11}, [*tensors, 12, 11]


def built(plugin: Plugin, node: tuple[list[TensorDesc], dict[str, Any], list[Any]]) -> Any:
    """The ahead-of-time implementation, called as TensorRT does."""
    descriptions, attributes, _ = node
    outputs = plugin.functions["register"](*descriptions, **attributes)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return plugin.functions["aot_impl"](*descriptions, *attributes.values(), outputs, tactic=0)


@pytest.mark.parametrize("case", CASES)
def test_inputs_and_attributes_are_those_of_the_onnx_node(register: Register, case: str) -> None:
    memory = CASES[case].memory
    signature = LookupSignature(
        CASES[case].shards, memory.value_groups > 1, memory.pre_value_dim > 0, CASES[case].rows is torch.int8
    )
    plugins = register(compiled_folder(case, "8.9"))
    assert plugins.keys() == {TOPK, LOOKUP}
    for plugin, schema in ((plugins[TOPK], topk_schema()), (plugins[LOOKUP], signature.schema())):
        assert plugin.inputs == [parameter.name for parameter in schema.inputs]
        assert plugin.outputs == len(schema.outputs)
        types = {OpSchema.AttrType.INT: int, OpSchema.AttrType.STRING: str}
        assert plugin.attributes == {
            name: types[attribute.type]
            for name, attribute in schema.attributes.items()
            if name not in PLUGIN_ATTRIBUTES
        }


def test_what_registers_a_plugin_has_annotations_and_the_result_of_a_kernel(register: Register) -> None:
    for plugin in register(compiled_folder("query", "8.9"), allow_jit=True).values():
        assert inspect.get_annotations(plugin.functions["register"]).keys() == {
            *plugin.inputs,
            *plugin.attributes,
            "return",
        }
        assert inspect.get_annotations(plugin.functions["aot_impl"]).keys() == {"return"}
        for kind in ("autotune", "impl"):
            assert inspect.get_annotations(plugin.functions[kind]) == {}


@pytest.mark.parametrize("case", CASES)
def test_a_lookup_has_the_output_of_the_op(register: Register, case: str) -> None:
    descriptions, attributes, arguments = lookup_node(case)
    plugin = register(compiled_folder(case, "8.9"))[LOOKUP]
    output = plugin.functions["register"](*descriptions, **attributes)
    assert shape_of(output) == list(memory_lookup(*arguments).shape)
    assert output.dtype is DataType.FLOAT


def test_a_topk_has_the_outputs_of_the_op(register: Register, tmp_path: Path) -> None:
    descriptions, attributes, arguments = topk_node(dtype=np.float16)
    plugin = register(made_up_folder(tmp_path, [topk(scores_dtype=torch.float16), lookup()]))[TOPK]
    addresses, scores = plugin.functions["register"](*descriptions, **attributes)
    expected = tucker_topk(*arguments)
    assert [shape_of(addresses), shape_of(scores)] == [list(output.shape) for output in expected]
    assert [addresses.dtype, scores.dtype] == [DataType.INT64, DataType.HALF]


@pytest.mark.parametrize(
    ("case", "types"),
    [
        ("query", [["INT64", "FP32", "FP32", "FP32", "FP32"]]),
        ("groups", [["INT64", "FP32", "INT64", "FP32", "FP32", "FP32"]]),
        ("int8", [["INT64", "FP32", "FP32", "FP32", "INT8", "INT8", "FP32"]]),
    ],
)
def test_dtypes_of_inputs_and_outputs_are_those_of_the_kernels(
    register: Register, case: str, types: list[list[str]]
) -> None:
    plugins = register(compiled_folder(case, "8.9"))
    for plugin, expected in ((plugins[LOOKUP], types), (plugins[TOPK], [["FP32"] * 5 + ["INT64", "FP32"]])):
        count = len(plugin.inputs) + len(plugin.attributes)
        combinations = plugin.functions["autotune"](*[None] * count, [])
        assert [combination.types for combination in combinations] == expected


def test_each_kernel_gives_a_combination_of_dtypes(register: Register, tmp_path: Path) -> None:
    half = {"scores_dtype": torch.float16, "rows_dtype": torch.float16}
    variants = [topk(), lookup(), lookup(**half), lookup(rows_dtype=torch.bfloat16), lookup(value_dim=96)]
    plugin = register(made_up_folder(tmp_path, variants))[LOOKUP]
    assert [combination.types for combination in plugin.functions["autotune"](*[None] * 8, [])] == [
        ["INT64", "FP16", "FP16", "FP16", "FP16"],
        ["INT64", "FP32", "FP32", "BF16", "FP32"],
        ["INT64", "FP32", "FP32", "FP32", "FP32"],
    ]


def check_built(result: Any, node: tuple[Any, ...], entry: str, sizes: list[int], grid: tuple[int, ...]) -> None:
    """Entry, PTX, launch parameters and extra arguments of a built node, when it runs."""
    name, ptx, launch, extra = result
    assert name == entry
    head = re.search(rf"\.visible \.entry {entry}\((.*?)\)", ptx.decode(), re.DOTALL)
    assert head is not None
    outputs = 2 if entry.startswith("tucker") else 1
    # Pointers of inputs, sizes, pointers of outputs: the order in which TensorRT calls.
    expected = ["u64"] * len(node[0]) + ["u32"] * len(sizes) + ["u64"] * outputs
    assert re.findall(r"\.param \.(u64|u32)", head[1]) == expected
    assert extra.at(TOKENS) == sizes
    assert tuple(value(getattr(launch, f"grid_{axis}"), TOKENS) for axis in "xyz") == grid


@pytest.mark.parametrize("case", CASES)
def test_a_lookup_is_built_from_its_kernel(register: Register, case: str) -> None:
    folder, node, memory = compiled_folder(case, "8.9"), lookup_node(case), CASES[case].memory
    result = built(register(folder)[LOOKUP], node)
    rows = sum(len(shard) for shard in node[2][5])
    sizes = [7, rows, 11, memory.pre_value_dim, memory.value_dim]
    check_built(result, node, "memory_lookup_kernel", sizes, (5, memory.value_groups, 1))
    kernel = next(kernel for kernel in read_index(folder) if kernel.op == "MemoryLookup")
    launch = result[2]
    assert (launch.block_x, launch.block_y, launch.block_z) == kernel.block
    assert launch.shared_mem == kernel.shared_bytes


def test_a_topk_is_built_from_its_kernel(register: Register) -> None:
    node = topk_node()
    result = built(register(compiled_folder("query", "8.9"))[TOPK], node)
    check_built(result, node, "tucker_topk_kernel", [19, 12, 11], (5, 2, 1))


def test_a_node_whose_dimensions_are_fake_is_built_from_the_only_kernel_that_fits(register: Register) -> None:
    for name, node in ((TOPK, topk_node()), (LOOKUP, lookup_node("shards"))):
        for description in node[0]:
            description.shape_expr = [Expression.fake() for _ in description.shape_expr]
        entry, ptx, *_ = built(register(compiled_folder("shards", "8.9"))[name], node)
        assert f".entry {entry}(".encode() in ptx


def test_a_node_that_no_kernel_fits_is_told_why(register: Register) -> None:
    plugin = register(compiled_folder("query", "8.9"))[LOOKUP]
    with pytest.raises(Unsupported, match="no compiled kernel fits a node MemoryLookup") as caught:
        built(plugin, lookup_node("query", value_dim=96))
    assert "value_dim up to 32, not 96" in str(caught.value.why)


def test_rows_of_a_size_that_is_not_known_at_build_time_are_refused(register: Register) -> None:
    plugin, node = register(compiled_folder("query", "8.9"))[LOOKUP], lookup_node("query")
    node[0][-1].shape_expr = [node[0][-1].shape_expr[0], Expression.dynamic("width")]
    with pytest.raises(Unsupported, match="not known when the engine is built"):
        built(plugin, node)


def test_a_dtype_without_a_kernel_is_refused(register: Register) -> None:
    plugin, node = register(compiled_folder("query", "8.9"))[LOOKUP], lookup_node("query")
    node[0][-1].dtype = DataType.FP8
    with pytest.raises(Unsupported, match="FP8"):
        built(plugin, node)


def test_kernels_of_several_architectures_are_refused(register: Register, tmp_path: Path) -> None:
    folder = made_up_folder(tmp_path, [topk(), lookup()], ["8.0", "8.9"])
    with pytest.raises(InvalidRequest, match=r"8\.0, 8\.9"):
        register(folder)


def test_of_kernels_with_several_sets_of_inputs_those_of_the_named_inputs_are_taken(
    register: Register, tmp_path: Path
) -> None:
    folder = made_up_folder(tmp_path, [topk(), lookup(), lookup(rows_dtype=torch.int8)])
    with pytest.raises(InvalidRequest, match="2 sets of inputs"):
        register(folder)
    names = ["indices", "scores", "query", "row_scales", "rows_0"]
    plugin = register(folder, lookup_inputs=names)[LOOKUP]
    assert plugin.inputs == names
    (combination,) = plugin.functions["autotune"](*[None] * 9, [])
    assert combination.types == ["INT64", "FP32", "FP32", "FP32", "INT8", "FP32"]
    with pytest.raises(InputRejected, match="no kernel for MemoryLookup"):
        register(folder, lookup_inputs=["indices", "scores", "rows_0"])


def test_without_kernels_nothing_is_registered(register: Register, tmp_path: Path) -> None:
    folder = made_up_folder(tmp_path, [lookup()])
    with pytest.raises(InputRejected, match="no kernel for TuckerTopK"):
        register(folder)


def test_no_body_in_python_is_registered_unless_it_is_allowed(register: Register) -> None:
    folder = compiled_folder("query", "8.9")
    for plugin in register(folder).values():
        assert plugin.functions.keys() == {"register", "autotune", "aot_impl"}
    for plugin in register(folder, allow_jit=True).values():
        assert plugin.functions.keys() == {"register", "autotune", "aot_impl", "impl"}


def test_bodies_in_python_need_no_compiled_kernels(register: Register, tmp_path: Path) -> None:
    plugins = register(made_up_folder(tmp_path, []), allow_jit=True, lookup_inputs=["indices", "scores", "rows_0"])
    for plugin in plugins.values():
        assert plugin.functions.keys() == {"register", "impl"}


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets torch compute on the CPU, where there is no GPU; the streams that were asked for."""
    asked: list[int] = []

    def external(stream: int) -> None:
        asked.append(stream)

    monkeypatch.setattr(torch.cuda, "ExternalStream", external)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch, "as_tensor", lambda data, device: data)
    return asked


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are not interpreted where there is a GPU")
@pytest.mark.parametrize("case", ["groups", "int8", "gelu"])
def test_the_body_of_a_lookup_in_python_computes_the_op(register: Register, streams: list[int], case: str) -> None:
    plugin = register(compiled_folder(case, "8.9"), allow_jit=True)[LOOKUP]
    _, attributes, arguments = lookup_node(case)
    expected = memory_lookup(*arguments)
    output = torch.empty_like(expected)
    tensors = [tensor for tensor in arguments[:5] if tensor is not None] + arguments[5]
    plugin.functions["impl"](*tensors, *attributes.values(), (output,), stream=77)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=5e-5)
    assert streams == [77]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are not interpreted where there is a GPU")
@pytest.mark.usefixtures("streams")
def test_the_body_of_a_topk_in_python_computes_the_op(register: Register) -> None:
    plugin = register(compiled_folder("query", "8.9"), allow_jit=True)[TOPK]
    tensors = [torch.from_numpy(array) for array in inputs(tokens=1, heads=1, keys=9).values()]
    expected = tucker_topk(*tensors, 2, 2)
    outputs = [torch.empty_like(tensor) for tensor in expected]
    plugin.functions["impl"](*tensors, 2, 2, outputs, stream=0)
    assert outputs[0].sort().values.tolist() == expected[0].sort().values.tolist()


def test_an_activation_that_the_op_has_not_is_refused_and_never_left_out(register: Register) -> None:
    plugin = register(compiled_folder("gelu", "8.9"), allow_jit=True)[LOOKUP]
    descriptions, attributes, arguments = lookup_node("gelu")
    for unknown in ("relu", "", "gelu\0!", "GELU"):
        changed = attributes | {"activation": unknown}
        with pytest.raises(InputRejected, match="activation must be one of none, gelu"):
            built(plugin, (descriptions, changed, arguments))
        arguments[7] = unknown
        with pytest.raises(InputRejected, match="activation must be one of none, gelu"):
            launch_lookup(*arguments)


def test_groups_may_be_left_out_of_a_node(register: Register) -> None:
    plugin = register(compiled_folder("query", "8.9"))[LOOKUP]
    descriptions, attributes, arguments = lookup_node("query")
    del attributes["groups"]
    assert shape_of(plugin.functions["register"](*descriptions, **attributes)) == list(memory_lookup(*arguments).shape)


def test_a_tensorrt_without_such_plugins_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tensorrt, plugin, _ = stand_in()
    del plugin.__dict__["aot_impl"]
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", plugin)
    with pytest.raises(EnvironmentUnfit, match=r"TensorRT 10\.13\.0\.35 has no Python plugins"):
        register_plugins(tensorrt, tmp_path)


def test_the_stand_in_has_the_names_of_the_bindings() -> None:
    try:
        files = importlib.metadata.files("tensorrt-stubs")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("tensorrt-stubs is not installed")
    assert files is not None
    text = next(file for file in files if file.match("tensorrt_bindings/tensorrt.pyi")).read_text()
    members = members_of(text, "DataType")
    assert {kind.name: str(kind.value) for kind in DataType}.items() <= members.items()
    launch = re.search(r"^class KernelLaunchParams:\n((?:    .*\n)+)", text, re.MULTILINE)
    assert launch is not None
    assert set(re.findall(r"    (\w+):", launch[1])) == {
        *(f"{kind}_{axis}" for kind in ("grid", "block") for axis in "xyz"),
        "shared_mem",
    }


def members_of(text: str, name: str) -> Mapping[str, str]:
    """Members of an enumeration in a stub, with their values."""
    return dict(re.findall(rf"^    (\w+): typing\.ClassVar\[{name}\].*<{name}\.\w+: (\d+)>$", text, re.MULTILINE))
