"""The ops as plugins of TensorRT in Python ("quickly deployable plugins"), whose kernels were compiled before.

TensorRT puts their PTX into the engine, which then needs neither Python nor a plugin library.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import GenericAlias
from typing import Any, cast

from umv2_export.errors import EnvironmentUnfit, InputRejected, InvalidRequest, Unsupported
from umv2_export.gpu.index import INDEX_FILE, CompiledKernel, read_index
from umv2_export.gpu.nodes import Dimension, LookupNode, Node, TopkNode, choose_kernel
from umv2_export.ops import DOMAIN
from umv2_export.ops.tucker_topk import schema as topk_schema
from umv2_export.plugins.tensorrt.interface import LaunchParameters, PluginModule, SymbolicInts, TensorDescription

__all__ = ["register_plugins"]

# Element types: as `tensorrt.DataType` names them, and as an index of kernels names those of arguments.
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "INT64": "int64"}
_COMBINED = {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16", "i8": "INT8", "i64": "INT64"}


def register_plugins(
    trt: Any, kernels: Path, *, allow_jit: bool = False, lookup_inputs: Sequence[str] | None = None
) -> None:
    """Register umv2::TuckerTopK and umv2::MemoryLookup with TensorRT, once in a process.

    Args:
        trt: the module `tensorrt`.
        kernels: folder that `umv2-export kernels` wrote, for one architecture.
        allow_jit: also register bodies that Python compiles and launches while an engine runs, for architectures that
            no kernel was compiled for; then `kernels` may list none. Without this, a node that no kernel fits ends the
            build.
        lookup_inputs: of the MemoryLookup nodes, by the names in its schema; None: those of the kernels.

    Raises:
        EnvironmentUnfit: this TensorRT has no such plugins.
        InputRejected: the folder holds no kernels, or a damaged one.
        InvalidRequest: it holds kernels of several architectures, or of several sets of inputs and none is named.
    """
    trtp = _plugin_module(trt)
    compiled = read_index(kernels)
    architectures = sorted({kernel.compute_capability for kernel in compiled})
    if len(architectures) > 1:
        raise InvalidRequest(
            f"kernels for {', '.join(architectures)}; TensorRT builds for one architecture",
            where=kernels,
            fix=f"umv2-export kernels BUNDLE -o KERNELS --compute-capability {architectures[-1]}",
        )
    topk_inputs = [parameter.name for parameter in topk_schema().inputs]
    if lookup_inputs is None:
        lookup_inputs = _only_inputs(compiled, kernels)
    plugins = [
        _Plugin(trt, trtp, kernels, call, list(inputs), _serving(compiled, call.op, inputs))
        for call, inputs in ((TopkNode, topk_inputs), (LookupNode, lookup_inputs))
    ]
    for plugin in plugins:
        if not plugin.kernels and not allow_jit:
            raise InputRejected(
                f"no kernel for {plugin.call.op} with the inputs {', '.join(plugin.inputs)}",
                where=kernels / INDEX_FILE,
                fix="compile the kernels of this bundle: umv2-export kernels BUNDLE -o KERNELS",
            )
    for plugin in plugins:
        plugin.register(allow_jit=allow_jit)


def _plugin_module(trt: Any) -> PluginModule:
    try:
        module = importlib.import_module("tensorrt.plugin")
    except ImportError:
        module = None
    if not hasattr(module, "aot_impl"):
        raise EnvironmentUnfit(
            f"TensorRT {trt.__version__} has no Python plugins that are compiled ahead of time",
            fix="pip install --upgrade tensorrt-cu13",
        )
    return cast("PluginModule", module)


def _inputs(kernel: CompiledKernel) -> list[str]:
    return [argument["name"] for argument in kernel.arguments if argument["kind"] == "input"]


def _serving(kernels: Sequence[CompiledKernel], op: str, inputs: Sequence[str]) -> list[CompiledKernel]:
    return [kernel for kernel in kernels if kernel.op == op and _inputs(kernel) == list(inputs)]


def _only_inputs(kernels: Sequence[CompiledKernel], folder: Path) -> list[str]:
    """The inputs of all lookups among the kernels.

    Raises:
        InvalidRequest: there is none, or their inputs differ.
    """
    inputs = sorted({tuple(_inputs(kernel)) for kernel in kernels if kernel.op == LookupNode.op})
    if len(inputs) == 1:
        return list(inputs[0])
    raise InvalidRequest(
        f"the kernels take {len(inputs)} sets of inputs, and a plugin has one",
        where=folder,
        why="\n".join(", ".join(names) for names in inputs) or None,
        fix="name the inputs of the MemoryLookup nodes",
    )


def _known(dimension: Dimension) -> int | None:
    if isinstance(dimension, int):
        return dimension
    return None if dimension.is_fake or not dimension.is_constant else int(dimension.constant_value())


@dataclass(frozen=True)
class _Plugin:
    """One op, as TensorRT asks for it.

    Attributes:
        trt: the module `tensorrt`.
        trtp: the module `tensorrt.plugin`.
        folder: of the kernels.
        call: the op.
        inputs: names in order.
        kernels: that take these inputs.
    """

    trt: Any
    trtp: PluginModule
    folder: Path
    call: type[TopkNode | LookupNode]
    inputs: list[str]
    kernels: list[CompiledKernel]

    @property
    def attributes(self) -> dict[str, Any]:
        """Name -> type, as the ONNX nodes have them; `plugin_namespace` and `plugin_version` are the parser's."""
        common = {field.name for field in fields(Node)}
        return {field.name: field.type for field in fields(self.call) if field.name not in common}

    def register(self, *, allow_jit: bool) -> None:
        """Hand the functions to TensorRT."""
        plugin_id = f"{DOMAIN}::{self.call.op}"
        description = self.trtp.TensorDesc
        returned: Any = GenericAlias(tuple, (description, description)) if self.call is TopkNode else description
        annotated = {**dict.fromkeys(self.inputs, description), **self.attributes}
        self.trtp.register(plugin_id)(_function(self.describe, annotated, returned))
        # The functions below take the same without annotations, which TensorRT compares where it finds some.
        taken = dict.fromkeys([*annotated, "outputs"], inspect.Parameter.empty)
        if self.kernels:
            self.trtp.autotune(plugin_id)(_function(self.combinations, taken))
            kernel: Any = GenericAlias(tuple, (str, bytes, self.trtp.KernelLaunchParams, self.trtp.SymIntExprs))
            with_tactic = taken | {"tactic": inspect.Parameter.empty}
            self.trtp.aot_impl(plugin_id)(_function(self.compiled, with_tactic, kernel))
        if allow_jit:
            self.trtp.impl(plugin_id)(_function(self.launch, taken | {"stream": inspect.Parameter.empty}))

    def describe(self, values: dict[str, Any]) -> Any:
        """Shapes and dtypes of the outputs."""
        # Dtypes are passed on as they are: they are not read here, where TensorRT may not know them yet.
        described = tuple(
            self.trtp.from_shape_expr(shape, self.trt.DataType.INT64 if like is None else values[like].dtype)
            for shape, like in self._node(values, {}).outputs
        )
        return described if len(described) > 1 else described[0]

    def combinations(self, _: dict[str, Any]) -> list[object]:
        """The dtypes of inputs and outputs that kernels were compiled for."""
        types = sorted(
            {
                ", ".join(_COMBINED[argument["dtype"]] for argument in kernel.arguments if argument["kind"] != "size")
                for kernel in self.kernels
            }
        )
        return [self.trtp.AutoTuneCombination(combination, "LINEAR") for combination in types]

    def compiled(self, values: dict[str, Any]) -> tuple[str, bytes, LaunchParameters, SymbolicInts]:
        """Entry, PTX, launch parameters, and the sizes that the kernel takes between inputs and outputs."""
        node = self._node(values, {name: self._dtype(values[name]) for name in self.inputs})
        for dimension in node.decisive:
            if not isinstance(dimension, int) and not dimension.is_fake and not dimension.is_constant:
                raise Unsupported(
                    f"a node {node.op} whose rows, ranks or cores are not known when the engine is built",
                    why="a kernel is compiled for their sizes",
                )
        kernel = choose_kernel(self.kernels, node, _known)
        launch = self.trtp.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = node.grid(kernel)
        launch.block_x, launch.block_y, launch.block_z = kernel.block
        launch.shared_mem = kernel.shared_bytes
        sizes = node.size_arguments(kernel)
        extra = self.trtp.SymIntExprs(len(sizes))
        for place, size in enumerate(sizes):
            extra[place] = self.trtp.SymInt32(size)
        return kernel.entry, (self.folder / kernel.ptx).read_bytes(), launch, extra

    def launch(self, values: dict[str, Any]) -> None:
        """Compute the outputs on the stream of the engine, with kernels that Triton compiles now."""
        import torch  # noqa: PLC0415 - needed while an engine runs, not while it is built

        from umv2_export.gpu.launch import launch_lookup, launch_topk  # noqa: PLC0415 - needs triton

        with torch.cuda.stream(torch.cuda.ExternalStream(values["stream"])):
            tensors = {name: torch.as_tensor(values[name], device="cuda") for name in self.inputs}
            arguments: list[Any] = list(tensors.values())
            if self.call is LookupNode:
                shards = [tensor for name, tensor in tensors.items() if name.startswith("rows_")]
                arguments = [tensors.get(name) for name in ("indices", "scores", "group", "query", "row_scales")]
                arguments.append(shards)
            attributes = self._given(values)
            results = (
                launch_topk(*arguments, **attributes)
                if self.call is TopkNode
                else [launch_lookup(*arguments, **attributes)]
            )
            for output, result in zip(values["outputs"], results, strict=True):
                torch.as_tensor(output, device="cuda").copy_(result)

    def _node(self, values: dict[str, Any], dtypes: dict[str, str]) -> TopkNode | LookupNode:
        return self.call({name: values[name].shape_expr for name in self.inputs}, dtypes, **self._given(values))

    def _given(self, values: dict[str, Any]) -> dict[str, Any]:
        """The attributes of a node; what it leaves out is not among them."""
        given = {name: values[name] for name in self.attributes if name in values}
        # The parser counts the zero behind a C string as part of it, and TensorRT decodes both.
        return {name: value.rstrip("\0") if isinstance(value, str) else value for name, value in given.items()}

    def _dtype(self, description: TensorDescription) -> str:
        for name, element in _DTYPES.items():
            if description.dtype == getattr(self.trt.DataType, name):
                return element
        raise Unsupported(f"tensors of {description.dtype} in a node {self.call.op}")


def _function(
    body: Callable[[dict[str, Any]], Any], parameters: dict[str, Any], returned: Any = inspect.Signature.empty
) -> Callable[..., Any]:
    """A function with these parameters (name -> annotation) that calls `body` with their values by name."""
    signature = inspect.Signature(
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)
            for name, annotation in parameters.items()
        ],
        return_annotation=returned,
    )

    def function(*args: Any, **kwargs: Any) -> Any:
        # Partly: a tactic is passed only where the plugin offers several.
        return body(signature.bind_partial(*args, **kwargs).arguments)

    function.__name__ = function.__qualname__ = body.__name__
    function.__signature__ = signature  # type: ignore[attr-defined]
    function.__annotations__ = {
        name: annotation for name, annotation in parameters.items() if annotation is not inspect.Parameter.empty
    } | ({} if returned is inspect.Signature.empty else {"return": returned})
    return function
