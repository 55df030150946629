"""A stand-in for TensorRT, which cannot be installed everywhere: it records what it is asked, and compiles nothing.

It knows what workers and the runtime use and no more, so that anything else fails; `test_stand_in` compares each name
with the type stubs of TensorRT. How it behaves is read from the environment: STAND_IN is JSON, STAND_IN_CALLS the file
of the record.

An engine of it is a line of text and a line of JSON: inputs, outputs and profiles. It runs in ONNX Runtime, from the
graph that the word `graph` names, on memory of the stand-in for the CUDA driver.
"""

# Names and signatures are those of TensorRT.
# ruff: noqa: D101

import ctypes
import enum
import functools
import json
import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx

__version__ = "10.13.0.35"

_BEHAVIOUR: dict[str, Any] = json.loads(os.environ.get("STAND_IN", "{}"))

_DTYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "FLOAT",
    onnx.TensorProto.FLOAT16: "HALF",
    onnx.TensorProto.BFLOAT16: "BF16",
    onnx.TensorProto.INT64: "INT64",
    onnx.TensorProto.INT32: "INT32",
    onnx.TensorProto.BOOL: "BOOL",
}


def _called(name: str, *arguments: object) -> None:
    with open(os.environ["STAND_IN_CALLS"], "a", encoding="utf-8") as record:
        record.write(json.dumps([name, *arguments]) + "\n")


class DataType(enum.IntEnum):
    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BOOL = 4
    BF16 = 7
    INT64 = 8


_NUMPY_DTYPES: dict[DataType, Any] = {
    DataType.FLOAT: np.float32,
    DataType.HALF: np.float16,
    DataType.BF16: ml_dtypes.bfloat16,
    DataType.INT64: np.int64,
}


class TensorIOMode(enum.IntEnum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class BuilderFlag(enum.IntEnum):
    REFIT = 4
    TF32 = 6
    VERSION_COMPATIBLE = 13
    ERROR_ON_TIMING_CACHE_MISS = 16
    STRIP_PLAN = 19


if _BEHAVIOUR.get("only_strong_typing"):

    class NetworkDefinitionCreationFlag(enum.IntEnum):
        PREFER_JIT_PYTHON_PLUGINS = 2
        PREFER_AOT_PYTHON_PLUGINS = 3

else:

    class NetworkDefinitionCreationFlag(enum.IntEnum):  # type: ignore[no-redef]
        STRONGLY_TYPED = 1
        PREFER_JIT_PYTHON_PLUGINS = 2
        PREFER_AOT_PYTHON_PLUGINS = 3


class HardwareCompatibilityLevel(enum.IntEnum):
    NONE = 0
    AMPERE_PLUS = 1


class SerializationFlag(enum.IntEnum):
    EXCLUDE_WEIGHTS = 0


class ILogger:
    ERROR = 1
    WARNING = 2

    def __init__(self) -> None:
        self._ready = True

    def log(self, severity: int, msg: str) -> None:
        raise NotImplementedError


class Logger(ILogger):
    def __init__(self, min_severity: int) -> None:
        super().__init__()
        assert min_severity == Logger.WARNING

    def log(self, severity: int, msg: str) -> None:
        print(f"[TRT] [{severity}] {msg}", flush=True)


class IPluginRegistry:
    __slots__ = ("_creators",)

    def __init__(self) -> None:
        self._creators: set[tuple[str, str, str]] = set()

    def load_library(self, plugin_path: str) -> object | None:
        _called("load_library", plugin_path)
        if _BEHAVIOUR.get("refuse_library"):
            return None
        _register_creators()
        return object()

    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> object | None:  # noqa: A002
        return object() if (type, version, plugin_namespace) in self._creators else None


_REGISTRY = IPluginRegistry()


def get_plugin_registry() -> IPluginRegistry:
    return _REGISTRY


def _register_creators() -> None:
    _REGISTRY._creators |= {(op, "1", "umv2") for op in _BEHAVIOUR.get("creators", ["MemoryLookup", "TuckerTopK"])}


def _register_plugins(trt: Any, kernels: Path, *, allow_jit: bool, lookup_inputs: list[str]) -> None:
    assert trt.__version__ == __version__
    _called("register_plugins", sorted(file.name for file in kernels.iterdir()), allow_jit, lookup_inputs)
    _register_creators()


# The plugins themselves ask for more of TensorRT than this has.
_PYTHON_PLUGINS: Any = types.ModuleType("umv2_export.plugins.tensorrt.python_plugins")
_PYTHON_PLUGINS.register_plugins = _register_plugins
sys.modules[_PYTHON_PLUGINS.__name__] = _PYTHON_PLUGINS


class ITensor:
    __slots__ = ("dtype", "name", "shape")

    def __init__(self, name: str, dtype: DataType, shape: list[int]) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape


class ILayer:
    __slots__ = ("_output", "num_outputs")

    def __init__(self, output: ITensor) -> None:
        self._output, self.num_outputs = output, 1

    def get_output(self, index: int) -> ITensor | None:
        return self._output if index == 0 else None


class INetworkDefinition:
    __slots__ = ("_facts", "_inputs", "_layers", "_outputs", "_used")

    def __init__(self) -> None:
        self._facts: dict[str, Any] = {}
        self._inputs: list[ITensor] = []
        self._outputs: list[ITensor] = []
        self._layers: list[ILayer] = []
        self._used = False

    def get_input(self, index: int) -> ITensor:
        return self._inputs[index]

    def get_output(self, index: int) -> ITensor:
        return self._outputs[index]

    def get_layer(self, index: int) -> ILayer:
        return self._layers[index]

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    @property
    def num_layers(self) -> int:
        return len(self._layers)


class ParserError:
    def __init__(self, text: str) -> None:
        self._text = text

    def __str__(self) -> str:
        return self._text


def _tensor(value: onnx.ValueInfoProto) -> ITensor:
    dtype = _BEHAVIOUR.get("dtypes", {}).get(value.name, _DTYPES[value.type.tensor_type.elem_type])
    axes = value.type.tensor_type.shape.dim
    return ITensor(value.name, DataType[dtype], [-1 if axis.dim_param else axis.dim_value for axis in axes])


def _describe(values: Any) -> dict[str, Any]:
    """Name -> dtype and axes."""
    return {
        value.name: [
            DataType[_DTYPES[value.type.tensor_type.elem_type]],
            [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim],
        ]
        for value in values
    }


def _load(file: str) -> onnx.ModelProto:
    """A graph, whose weights must lie beside it."""
    model = onnx.load(file, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            assert entry.key != "location" or (Path(file).parent / entry.value).is_file(), entry.value
    return model


class OnnxParser:
    __slots__ = ("_errors", "_network")

    def __init__(self, network: INetworkDefinition, logger: Logger) -> None:
        assert isinstance(logger, Logger)
        self._network = network
        self._errors: list[str] = _BEHAVIOUR.get("parser_errors", [])

    def parse_from_file(self, model: str) -> bool:
        graph = _load(model)
        ops = sorted({f"{node.domain}::{node.op_type}" for node in graph.graph.node if node.domain})
        _called("parse_from_file", ops, [function.name for function in graph.functions])
        for node in graph.graph.node:
            named = {a.name: a.s.decode() for a in node.attribute if a.name.startswith("plugin_")}
            creator = (node.op_type, named.get("plugin_version", "1"), named.get("plugin_namespace", ""))
            assert not node.domain or creator in _REGISTRY._creators, creator
        inferred = onnx.shape_inference.infer_shapes(graph).graph
        self._network._facts = {"inputs": _describe(inferred.input), "outputs": _describe(inferred.output)}
        self._network._inputs = [_tensor(value) for value in inferred.input]
        self._network._outputs = [_tensor(value) for value in inferred.output]
        self._network._layers = [ILayer(_tensor(value)) for value in inferred.value_info]
        return not self._errors

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return ParserError(self._errors[index])


class IOptimizationProfile:
    __slots__ = ("_shapes",)

    def __init__(self) -> None:
        self._shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, input: str, min: list[int], opt: list[int], max: list[int]) -> None:  # noqa: A002
        self._shapes[input] = [min, opt, max]


class ITimingCache:
    __slots__ = ("_content",)

    def __init__(self, content: bytes) -> None:
        self._content = content

    def serialize(self) -> bytes:
        return self._content


class IBuilderConfig:
    __slots__ = ("_cache", "_flags", "_level", "_plugins", "_profiles")

    def __init__(self) -> None:
        self._flags = {BuilderFlag.TF32}
        self._profiles: list[IOptimizationProfile] = []
        self._cache: ITimingCache | None = None
        self._level = HardwareCompatibilityLevel.NONE
        self._plugins: list[str] = []

    def set_flag(self, flag: BuilderFlag) -> None:
        assert isinstance(flag, BuilderFlag)
        self._flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        assert isinstance(flag, BuilderFlag)
        self._flags.discard(flag)

    @property
    def hardware_compatibility_level(self) -> HardwareCompatibilityLevel:
        return self._level

    @hardware_compatibility_level.setter
    def hardware_compatibility_level(self, level: HardwareCompatibilityLevel) -> None:
        assert isinstance(level, HardwareCompatibilityLevel)
        self._level = level

    @property
    def plugins_to_serialize(self) -> list[str]:
        return self._plugins

    @plugins_to_serialize.setter
    def plugins_to_serialize(self, plugins: list[str]) -> None:
        self._plugins = plugins

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        if _BEHAVIOUR.get("refuse_profile"):
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        self._cache = cache
        return not _BEHAVIOUR.get("refuse_cache")

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache


class IStreamWriter:
    def __init__(self) -> None: ...


class Builder:
    __slots__ = ()

    def __init__(self, logger: Logger) -> None:
        assert isinstance(logger, Logger)
        _called("Builder")

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        _called("create_network", [flag.name for flag in NetworkDefinitionCreationFlag if flags >> flag & 1])
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network_to_stream(
        self, network: INetworkDefinition, config: IBuilderConfig, writer: Any
    ) -> bool:
        assert IStreamWriter in type(writer).__mro__
        _called(
            "build",
            {
                "flags": sorted(flag.name for flag in config._flags),
                "hardware": config.hardware_compatibility_level.name,
                "profiles": [profile._shapes["input_ids"] for profile in config._profiles],
                "plugins": [Path(plugin).name for plugin in config.plugins_to_serialize],
                "inputs": network.num_inputs,
            },
        )
        if _BEHAVIOUR.get("crash"):
            os.abort()
        timed = b"all tactics"
        if config._cache is not None and config._cache._content != timed:
            if BuilderFlag.ERROR_ON_TIMING_CACHE_MISS in config._flags:
                print("[TRT] [E] a tactic is not in the timing cache", flush=True)
                return False
            config._cache._content = timed
        if _BEHAVIOUR.get("refuse_graph"):
            print("[TRT] [E] no implementation for a node", flush=True)
            return False
        stripped = BuilderFlag.STRIP_PLAN in config._flags
        facts = network._facts | {"profiles": [profile._shapes for profile in config._profiles]}
        pieces = [b"stripped " if stripped else b"whole ", b"engine", b"\n" + json.dumps(facts).encode()]
        return all(writer.write(piece) == len(piece) for piece in pieces)


class ISerializationConfig:
    __slots__ = ("_flags",)

    def __init__(self) -> None:
        self._flags = {SerializationFlag.EXCLUDE_WEIGHTS}

    def clear_flag(self, flag: SerializationFlag) -> bool:
        self._flags.remove(flag)
        return True


def _driver() -> Any:
    """The stand-in for the driver, as the runtime loaded it; a worker runs no engine, and need not import it."""
    from umv2_export.gpu import driver

    return driver._library()


def _holds(address: int, size: int) -> bool:
    """Whether a block of device memory holds `size` bytes at an address."""
    base, length = ctypes.c_uint64(), ctypes.c_size_t()
    found = _driver().cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(length), ctypes.c_uint64(address)) == 0
    return found and address + size <= base.value + length.value


def _is_stream(handle: int) -> bool:
    return bool(_driver().cuStreamGetFlags(ctypes.c_void_p(handle), ctypes.byref(ctypes.c_uint())) == 0)


@functools.cache
def _session(graph: str) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])


_ONNX_RUNTIME_DTYPES = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}


class IExecutionContext:
    __slots__ = ("_addresses", "_engine", "_profile", "_shapes", "_work")

    def __init__(self, engine: "ICudaEngine") -> None:
        self._engine = engine
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._work: object = None

    @property
    def active_optimization_profile(self) -> int:
        return self._profile

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert _is_stream(stream_handle)
        _called("set_optimization_profile_async", profile_index)
        self._profile = profile_index
        self._shapes = {}
        return 0 <= profile_index < self._engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert isinstance(shape, tuple)
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        if _BEHAVIOUR.get("refuse_shapes") or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            self._engine._logger.log(ILogger.ERROR, f"{name} {shape} is out of bounds")
            return False
        self._shapes[name] = shape
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine._facts["inputs"] if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """-1 where a shape of an input is missing, and for inputs whose shapes contradict each other."""
        sizes: dict[str, int] = {}
        for given, shape in self._shapes.items():
            for axis, size in zip(self._engine._facts["inputs"][given][1], shape, strict=True):
                assert isinstance(axis, str) or axis == size
                assert sizes.setdefault(axis, size) == size, (given, axis)
        assert sizes.get("total_sequence", 0) == sizes.get("past_sequence", 0) + sizes.get("sequence", 0)
        if name in self._shapes:
            return self._shapes[name]
        axes = self._engine._tensor(name)[1]
        return tuple(
            axis if isinstance(axis, int) else sum(sizes.get(term, -1) for term in axis.split(" + ")) for axis in axes
        )

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert self._engine._tensor(name)
        assert isinstance(memory, int)
        self._addresses[name] = memory
        return memory != 0 and not _BEHAVIOUR.get("refuse_addresses")

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert _is_stream(stream_handle)
        assert not self.infer_shapes()
        if _BEHAVIOUR.get("refuse_execution"):
            self._engine._logger.log(ILogger.WARNING, "it will not work")
            self._engine._logger.log(ILogger.ERROR, "it did not work")
            return False
        session = _session(_BEHAVIOUR["graph"])
        feed = {}
        for value in session.get_inputs():
            dtype, address, shape = self._buffer(value.name)
            bits = ctypes.string_at(address, math.prod(shape) * np.dtype(dtype).itemsize)
            feed[value.name] = np.frombuffer(bits, dtype).reshape(shape).astype(_ONNX_RUNTIME_DTYPES[value.type])
        names = [value.name for value in session.get_outputs()]
        results = []
        for name, result in zip(names, session.run(names, feed), strict=True):
            dtype, address, shape = self._buffer(name)
            assert result.shape == shape, (name, result.shape, shape)
            spoiled = result + np.float32(_BEHAVIOUR.get("spoil", {}).get(name, 0))
            results.append((address, spoiled.astype(dtype).tobytes()))

        def write() -> None:
            for address, data in results:
                ctypes.memmove(address, data, len(data))

        # Kept, as the driver calls it when the stream is waited for.
        self._work = ctypes.CFUNCTYPE(None)(write)
        _driver().stand_in_defer(self._work)
        return True

    def _buffer(self, name: str) -> tuple[Any, int, tuple[int, ...]]:
        """Dtype, address and shape of a tensor, whose memory holds it."""
        dtype, shape = _NUMPY_DTYPES[self._engine.get_tensor_dtype(name)], self.get_tensor_shape(name)
        assert _holds(self._addresses[name], max(1, math.prod(shape) * np.dtype(dtype).itemsize)), name
        return dtype, self._addresses[name], shape


class ICudaEngine:
    __slots__ = ("_facts", "_logger", "_refitted")

    def __init__(self, content: bytes, logger: ILogger) -> None:
        self._refitted = not content.startswith(b"stripped")
        self._facts: dict[str, Any] = json.loads(content.partition(b"\n")[2] or "{}")
        self._logger = logger

    def _tensor(self, name: str) -> Any:
        return (self._facts["inputs"] | self._facts["outputs"])[name]

    @property
    def num_io_tensors(self) -> int:
        return len(self._facts["inputs"]) + len(self._facts["outputs"])

    def get_tensor_name(self, index: int) -> str:
        # Their order is not that of the network.
        name: str = sorted(self._facts["inputs"] | self._facts["outputs"])[index]
        return name

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._facts["inputs"] else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType(self._tensor(name)[0])

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._facts["profiles"])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        assert name in self._facts["inputs"]
        bounds: list[list[int]] = self._facts["profiles"][profile_index][name]
        return bounds

    def create_execution_context(self) -> IExecutionContext | None:
        _called("create_execution_context")
        if _BEHAVIOUR.get("no_memory"):
            self._logger.log(ILogger.ERROR, "out of memory")
            return None
        assert self._refitted
        return IExecutionContext(self)

    def create_serialization_config(self) -> ISerializationConfig:
        return ISerializationConfig()

    def serialize_with_config(self, arg0: ISerializationConfig) -> bytes:
        assert self._refitted
        facts = b"\n" + json.dumps(self._facts).encode() if self._facts else b""
        return (b"stripped engine" if arg0._flags else b"engine with its weights") + facts


class Runtime:
    __slots__ = ("_host_code", "_logger")

    def __init__(self, logger: ILogger) -> None:
        assert isinstance(logger, ILogger)
        assert logger._ready
        self._logger = logger
        self._host_code = False
        _called("Runtime")

    @property
    def engine_host_code_allowed(self) -> bool:
        return self._host_code

    @engine_host_code_allowed.setter
    def engine_host_code_allowed(self, allowed: bool) -> None:
        self._host_code = allowed

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        _called("deserialize_cuda_engine", serialized_engine.partition(b"\n")[0].decode(), self._host_code)
        if not serialized_engine.startswith((b"stripped", b"whole", b"engine with")):
            self._logger.log(ILogger.ERROR, "this is no engine")
            return None
        return ICudaEngine(serialized_engine, self._logger)


class Refitter:
    __slots__ = ("_engine",)

    def __init__(self, engine: ICudaEngine, logger: Logger) -> None:
        assert isinstance(logger, Logger)
        self._engine = engine

    def get_missing_weights(self) -> list[str]:
        missing: list[str] = _BEHAVIOUR.get("missing_weights", [])
        return missing

    def refit_cuda_engine(self) -> bool:
        self._engine._refitted = True
        return not _BEHAVIOUR.get("refuse_weights")


class OnnxParserRefitter:
    __slots__ = ("_errors",)

    def __init__(self, refitter: Refitter, logger: Logger) -> None:
        assert isinstance(refitter, Refitter)
        assert isinstance(logger, Logger)
        self._errors: list[str] = _BEHAVIOUR.get("refit_errors", [])

    def refit_from_file(self, model: str) -> bool:
        _called("refit_from_file", sorted(tensor.name for tensor in _load(model).graph.initializer))
        return not self._errors

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return ParserError(self._errors[index])
