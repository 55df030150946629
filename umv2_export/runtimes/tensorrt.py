"""TensorRT and TensorRT-RTX: an engine of a bundle, run on the GPU of this machine."""

import contextlib
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from umv2_export.bundle import MANIFEST_FILE, Bundle
from umv2_export.engines.backends import BACKENDS
from umv2_export.engines.graph import Graph, read_graph
from umv2_export.engines.manifest import Engine, require_trusted
from umv2_export.engines.plugins import check_plugin_library, plugins_to_load
from umv2_export.engines.tasks import dtype_name, load_engine
from umv2_export.errors import BuildFailed, EnvironmentUnfit, InputRejected, InvalidRequest, Umv2Error, shown
from umv2_export.gpu import driver
from umv2_export.interface import ATTENTION_MASK, INPUT_IDS, LOGITS, cache_of, feed
from umv2_export.progress import silent
from umv2_export.runtimes.base import Array, EngineChoice, StepInput, StepOutput
from umv2_export.system.files import file_sha256
from umv2_export.terminal import echo

__all__ = ["TensorRtRuntime"]

# Shown of what the library said where it failed.
LOG_LINES = 12

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Profile:
    """Shapes that an engine accepts together.

    Attributes:
        name: prefill or decode.
        bounds: input -> smallest and largest shape.
    """

    name: str
    bounds: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    def misfit(self, shapes: Shapes) -> str | None:
        """The first input whose shape it does not hold, and its range."""
        for name, shape in shapes.items():
            low, high = self.bounds[name]
            if not all(least <= size <= most for least, size, most in zip(low, shape, high, strict=True)):
                return f"{self.name} takes {name} {_text(low)} to {_text(high)}, not {_text(shape)}"
        return None


@dataclass
class _Loaded:
    """An engine and what runs it, held here alone: both free memory of the GPU, so they go before the device does.

    Attributes:
        engine: of the library.
        context: its execution context.
    """

    engine: Any = None
    context: Any = None

    def release(self) -> None:
        """Let go of the context, then of its engine."""
        self.context = None
        self.engine = None


class TensorRtRuntime:
    """An engine, loaded into this process; it shows no inner values, so `run` with `probe` gives none.

    Args:
        name: tensorrt or tensorrt-rtx.
        bundle: that the engine was built from.
        choice: the engine.

    Raises:
        InvalidRequest: the engine is of the other runtime; a plugin library is missing, or there is no use for it.
        InputRejected: the engine is not trusted, has no weights, or was built from another bundle; the library refuses
            it.
        EnvironmentUnfit: the library, a GPU, a plugin or memory is missing, or another version built the engine.
        Unsupported: the bundle holds what no engine is built from.
    """

    def __init__(self, name: str, bundle: Bundle, choice: EngineChoice) -> None:
        self.name = name
        backend = BACKENDS[name]
        self._title = backend.title
        self._engine_folder = choice.path
        opened = require_trusted(choice.path, trust=choice.trust)
        _check_engine(opened, name, bundle)
        check_plugin_library(opened.manifest, choice.plugin_library)
        backend.check_card(opened.manifest, driver.compute_capability())
        trt = backend.load()
        graph = read_graph(bundle, backend)
        self._dtypes = {tensor.name: tensor.dtype for tensor in (*graph.inputs, *graph.outputs)}
        self._outputs = [tensor.name for tensor in graph.outputs]
        self._log = _log_of(trt, self._title)
        resources = contextlib.ExitStack()
        self._device = resources.enter_context(driver.open_device())
        self._loaded = _Loaded()
        resources.callback(self._loaded.release)
        weakref.finalize(self, _close, resources)
        # TensorRT waits for the whole GPU where it is given the default stream.
        self._stream = self._device.stream()
        self._loaded.engine = self._load(trt, opened, bundle, graph, choice.plugin_library)
        self._check_tensors(trt, self._loaded.engine, graph)
        self._profiles = _profiles(self._loaded.engine, [tensor.name for tensor in graph.inputs], opened)
        self._loaded.context = self._loaded.engine.create_execution_context()
        if self._loaded.context is None:
            raise self._failure(EnvironmentUnfit, "cannot prepare to run the engine")

    def run(self, step: StepInput, *, probe: bool = False) -> StepOutput:
        """One forward.

        Raises:
            InvalidRequest: no profile of the engine holds the shapes of the step.
            InputRejected: the library refuses to run the engine.
            EnvironmentUnfit: the GPU has too little memory, or failed.
        """
        inputs = feed(step.input_ids, step.attention_mask, step.past)
        shapes = self._set_shapes({name: array.shape for name, array in inputs.items()})
        with self._device.scope():
            addresses = {name: self._device.upload(_bytes(array, self._dtypes[name])) for name, array in inputs.items()}
            for name, shape in shapes.items():
                addresses[name] = self._device.allocate(self._size(name, shape))
            for name, address in addresses.items():
                self._require(self._loaded.context.set_tensor_address(name, address), f"refuses memory for {name!r}")
            self._require(self._loaded.context.execute_async_v3(self._stream), "cannot run the engine")
            self._device.synchronize()
            outputs = {
                name: _array(self._device.download(addresses[name], self._size(name, shape)), self._dtypes[name], shape)
                for name, shape in shapes.items()
            }
        return StepOutput(outputs[LOGITS], cache_of(outputs, len(step.past)))

    def _set_shapes(self, shapes: Shapes) -> Shapes:
        """Take the profile that holds the shapes of the inputs, and tell the engine of them; shapes of the outputs."""
        index = self._profile(shapes)
        if self._loaded.context.active_optimization_profile != index:
            done = self._loaded.context.set_optimization_profile_async(index, self._stream)
            self._require(done, f"cannot take the profile {self._profiles[index].name!r}")
        for name, shape in shapes.items():
            self._require(
                self._loaded.context.set_input_shape(name, shape), f"refuses {name!r} of shape {_text(shape)}"
            )
        unknown = self._loaded.context.infer_shapes()
        self._require(not unknown, f"cannot tell its shapes for want of {', '.join(unknown)}")
        return {name: tuple(self._loaded.context.get_tensor_shape(name)) for name in self._outputs}

    def _profile(self, shapes: Shapes) -> int:
        """Number of the profile for the shapes of the inputs.

        Raises:
            InvalidRequest: there is none.
        """
        misfits = [profile.misfit(shapes) for profile in self._profiles]
        # The last: decode comes after prefill, and is made for the steps of one token that both hold.
        for index in reversed(range(len(misfits))):
            if misfits[index] is None:
                return index
        raise InvalidRequest(
            f"no profile of the engine holds {INPUT_IDS} {_text(shapes[INPUT_IDS])} with {ATTENTION_MASK} "
            f"{_text(shapes[ATTENTION_MASK])}",
            where=self._engine_folder,
            why="; ".join(misfit for misfit in misfits if misfit is not None),
            fix="build an engine with wider --min-shapes and --max-shapes",
        )

    def _load(self, trt: Any, opened: Engine, bundle: Bundle, graph: Graph, plugin_library: Path | None) -> Any:
        manifest = opened.manifest
        with tempfile.TemporaryDirectory(prefix="umv2-engine-") as folder:
            plugins = plugins_to_load(manifest, bundle, graph.plugin_ops, plugin_library, Path(folder), silent)
            try:
                return load_engine(
                    trt,
                    self._log,
                    opened.file,
                    sha256=opened.expected_sha256,
                    version=manifest.runtime_version,
                    version_compatible=manifest.version_compatible,
                    plugins=plugins,
                )
            except BuildFailed as error:
                raise self._failure(InputRejected, "cannot load the engine") from error

    def _check_tensors(self, trt: Any, engine: Any, graph: Graph) -> None:
        """A file that the user vouched for may be any engine."""
        expected = [(tensor.name, "INPUT", tensor.dtype) for tensor in graph.inputs]
        expected += [(tensor.name, "OUTPUT", tensor.dtype) for tensor in graph.outputs]
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        found = [
            (name, engine.get_tensor_mode(name).name, dtype_name(trt, engine.get_tensor_dtype(name))) for name in names
        ]
        different = sorted(set(expected) ^ set(found))
        if different:
            name, mode, dtype = different[0]
            side = "the graph, not the engine," if different[0] in expected else "the engine, not the graph,"
            raise InputRejected(
                f"{side} has the {mode.lower()} {name!r} of {dtype}",
                where=self._engine_folder,
                fix="build the engine again from this bundle",
            )

    def _size(self, name: str, shape: Sequence[int]) -> int:
        """Bytes of a tensor."""
        return int(np.prod(shape)) * _numpy_dtype(self._dtypes[name]).itemsize

    def _require(self, done: bool, failure: str) -> None:
        if not done:
            raise self._failure(InputRejected, failure)

    def _failure(self, kind: type[Umv2Error], what: str) -> Umv2Error:
        said = "\n".join(self._log.errors[-LOG_LINES:])
        return kind(f"{self._title} {what}", where=self._engine_folder, why=said or None)


def _check_engine(engine: Engine, name: str, bundle: Bundle) -> None:
    """Refuse an engine of another runtime, without weights, or of another bundle."""
    manifest = engine.manifest
    if manifest.runtime != name:
        raise InvalidRequest(
            f"the engine is of {shown(manifest.runtime)}, and {name} was asked for",
            where=engine.path,
            fix="name the runtime that it was built for by --runtime",
        )
    if manifest.weights == "stripped":
        raise InputRejected(
            "the engine has no weights",
            where=engine.path,
            fix="umv2-export refit ENGINE BUNDLE -o WHOLE puts them in",
        )
    digest = file_sha256(bundle.path / MANIFEST_FILE)
    if digest != manifest.bundle:
        raise InputRejected(
            f"the engine has the weights of a bundle whose manifest has sha256 {shown(manifest.bundle)}, that of this "
            f"bundle has {digest}",
            where=engine.path,
            fix="name the bundle that it was built from, or build an engine of this one",
        )


def _profiles(engine: Any, inputs: Sequence[str], opened: Engine) -> list[_Profile]:
    """Profiles as the engine itself knows them; their names stand in the manifest."""
    names = [profile["name"] for profile in opened.manifest.profiles]
    profiles = []
    for index in range(engine.num_optimization_profiles):
        shapes = {name: engine.get_tensor_profile_shape(name, index) for name in inputs}
        bounds = {name: (tuple(low), tuple(high)) for name, (low, _, high) in shapes.items()}
        profiles.append(_Profile(names[index] if index < len(names) else f"profile {index}", bounds))
    return profiles


def _log_of(trt: Any, title: str) -> Any:
    """A log on stderr: that of the library goes to stdout, among the results."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if int(severity) <= int(trt.ILogger.ERROR):
                self.errors.append(msg)
            elif int(severity) == int(trt.ILogger.WARNING):
                echo(f"{title}: {msg}", err=True)

    return Log()


def _close(resources: contextlib.ExitStack) -> None:
    # A GPU that failed refuses this too, and its first error was told.
    with contextlib.suppress(EnvironmentUnfit):
        resources.close()


def _numpy_dtype(dtype: str) -> "np.dtype[Any]":
    """Of a dtype of the graph."""
    return ir.DataType[dtype.upper()].numpy()


def _bytes(array: Array, dtype: str) -> bytes:
    """An array in a dtype of the graph, rounded to the nearest."""
    return array.astype(_numpy_dtype(dtype)).tobytes()


def _array(data: bytes, dtype: str, shape: Sequence[int]) -> Array:
    """An output in fp32."""
    return np.frombuffer(data, _numpy_dtype(dtype)).reshape(shape).astype(np.float32)


def _text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
