"""What every runtime does: one forward of the exported graph, prefill or decode."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from packaging.version import Version

from umv2_export.bundle import Bundle
from umv2_export.config import ModelConfig
from umv2_export.errors import EnvironmentUnfit, InvalidRequest
from umv2_export.names import BUILD_RUNTIMES
from umv2_export.onnx.minimum import OLDEST_ONNXRUNTIME

__all__ = [
    "Array",
    "Cache",
    "EngineChoice",
    "Runtime",
    "ShowsParts",
    "StepInput",
    "StepOutput",
    "choose_engine",
    "empty_cache",
    "open_runtime",
    "require_runtime",
]

Array = npt.NDArray[Any]

# Per block: rotated keys and values, [B, H, length, head_size].
Cache = Sequence[tuple[Array, Array]]


@dataclass(frozen=True)
class StepInput:
    """Input of one forward.

    Attributes:
        input_ids: int64 [B, S].
        attention_mask: int64 [B, past + S]; 0 marks padding, on the left.
        past: cache of length `past`, in fp32; a runtime converts it to the dtype of its inputs.
    """

    input_ids: Array
    attention_mask: Array
    past: Cache


@dataclass(frozen=True)
class StepOutput:
    """Output of one forward.

    Attributes:
        logits: fp32 [B, S, columns].
        present: cache of length past + S, in fp32.
        probes: inner values by the names of `umv2_export.interface.inner_names`, where they were asked for; an
            engine has none.
    """

    logits: Array
    present: Cache
    probes: dict[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineChoice:
    """What the runtimes tensorrt and tensorrt-rtx run.

    Attributes:
        path: folder of an engine.
        trust: the user vouches for a file that is not what its manifest says.
        plugin_library: with the plugins, where the engine was built with one.
    """

    path: Path
    trust: bool = False
    plugin_library: Path | None = None


class Runtime(Protocol):
    """Something that executes a model."""

    name: str

    def run(self, step: StepInput, *, probe: bool = False) -> StepOutput:
        """One forward; with `probe`, inner values too."""
        ...


@runtime_checkable
class ShowsParts(Protocol):
    """A runtime that shows what each part puts out."""

    def run_parts(self, step: StepInput) -> StepOutput:
        """One forward; its probes are all of `umv2_export.interface.inner_names` that there are.

        ONNX Runtime then fuses less: in 16 bits its outputs are not bit by bit those of `run`. With the probes of `run`
        they are, measured on three models.
        """
        ...


def empty_cache(config: ModelConfig, batch: int) -> Cache:
    """A cache of length 0."""
    empty = np.zeros((batch, config.kv_heads, 0, config.head_size), dtype=np.float32)
    return [(empty, empty)] * config.num_layers


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


def require_runtime(
    name: str,
    minimum: str = OLDEST_ONNXRUNTIME,
    *,
    where: object = None,
    why: str = "older releases refuse the graph, or compute something else",
) -> None:
    """Notice before long work begins that ONNX Runtime is not installed, or older than what it is to run.

    Other runtimes notice when they are opened.

    Args:
        name: of the runtime.
        minimum: the oldest release that will do.
        where: what needs it.
        why: what is wrong with older ones.

    Raises:
        EnvironmentUnfit: it is not installed, or older.
    """
    if not name.startswith("onnxruntime"):
        return
    try:
        import onnxruntime  # noqa: PLC0415 - an optional package
    except ImportError as error:
        raise EnvironmentUnfit(
            "ONNX Runtime is not installed", fix="pip install 'umv2-export[cpu]' (or onnxruntime-gpu)"
        ) from error
    if Version(onnxruntime.__version__) < Version(minimum):
        package = "onnxruntime-gpu" if name == "onnxruntime-cuda" else "onnxruntime"
        raise EnvironmentUnfit(
            f"ONNX Runtime {onnxruntime.__version__} is installed, {minimum} or later is needed",
            where=where,
            why=why,
            fix=f"pip install --upgrade '{package}>={minimum}'",
        )


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
