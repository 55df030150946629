"""A runtime by its name: the only file that knows all of them."""

from collections.abc import Sequence
from pathlib import Path

from umv2_export.bundle import Bundle
from umv2_export.errors import InvalidRequest
from umv2_export.names import BUILD_RUNTIMES
from umv2_export.runtimes.base import EngineChoice, Runtime

__all__ = ["choose_engine", "open_runtime"]


def choose_engine(
    runtimes: Sequence[str], path: Path | None, *, trust: bool = False, plugin_library: Path | None = None
) -> EngineChoice | None:
    """The engine that some of these runtimes are to run; None where none of them runs one.

    Raises:
        InvalidRequest: an engine and no runtime for it, or the reverse; or an option of an engine without one.
    """
    named = sorted(set(runtimes) & set(BUILD_RUNTIMES))
    if len(named) > 1:
        raise InvalidRequest(f"{' and '.join(named)} run no engine in common", fix="check one of them at a time")
    if path is None and named:
        raise InvalidRequest(
            f"the runtime {named[0]} runs an engine",
            fix=f"build one: umv2-export build BUNDLE --runtime {named[0]}; then name it by --engine",
        )
    if path is not None and not named:
        raise InvalidRequest(
            "--engine without a runtime that runs it", fix="pass --runtime " + " or ".join(BUILD_RUNTIMES)
        )
    if path is None and (trust or plugin_library is not None):
        option = "--trust-engine" if trust else "--plugin-library"
        raise InvalidRequest(f"{option} without an engine", fix=f"name it by --engine, or leave out {option}")
    return None if path is None else EngineChoice(path, trust, plugin_library)


def open_runtime(
    name: str, bundle: Bundle, *, preload: bool = False, engine: EngineChoice | None = None, device: str = "cpu"
) -> Runtime:
    """Load a bundle into runtime `name`, one of `umv2_export.names.RUNTIMES`.

    Args:
        name: which.
        bundle: what to run.
        preload: read all tables into memory first.
        engine: of the bundle, for a runtime that runs engines; others do not look at it.
        device: where torch computes; others do not look at it.

    Raises:
        EnvironmentUnfit: the runtime is not installed, or lacks what the bundle needs, such as a GPU.
        Unsupported: the bundle holds nothing that this runtime is for, or arithmetic that it lacks.
        BuildFailed: the kernels of a GPU could not be compiled.
        InvalidRequest: this runtime does not preload, or runs an engine and was given none.
        InputRejected: the runtime refuses the graph, or the engine.
    """
    if name == "torch":
        if preload:
            raise InvalidRequest(
                "the runtime torch maps its tables", fix="leave out --preload, or name another runtime"
            )
        from umv2_export.runtimes.device import require_device  # noqa: PLC0415 - one runtime is loaded, not all
        from umv2_export.runtimes.torch import TorchRuntime  # noqa: PLC0415 - likewise

        require_device(device, bundle.config)
        return TorchRuntime.from_bundle(bundle, device)
    if name in BUILD_RUNTIMES:
        if preload:
            raise InvalidRequest(f"the runtime {name} copies its engine to the GPU", fix="leave out --preload")
        if engine is None:
            raise InvalidRequest(f"the runtime {name} runs an engine, and none was named")
        from umv2_export.runtimes.tensorrt import TensorRtRuntime  # noqa: PLC0415 - needs TensorRT

        return TensorRtRuntime(name, bundle, engine)
    from umv2_export.runtimes.onnxruntime import OnnxRuntime  # noqa: PLC0415 - it is an optional package

    return OnnxRuntime(name, bundle, preload=preload)
