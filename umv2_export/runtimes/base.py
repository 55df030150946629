"""What every runtime does: one forward of the exported graph, prefill or decode."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from umv2_export.bundle import Bundle
from umv2_export.config import ModelConfig
from umv2_export.errors import EnvironmentUnfit, InvalidRequest

__all__ = [
    "Array",
    "Cache",
    "Runtime",
    "StepInput",
    "StepOutput",
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
        probes: inner values by the names of `umv2_export.onnx.trace.probe_names`, where they were asked for.
    """

    logits: Array
    present: Cache
    probes: dict[str, Array] = field(default_factory=dict)


class Runtime(Protocol):
    """Something that executes a model."""

    name: str

    def run(self, step: StepInput, *, probe: bool = False) -> StepOutput:
        """One forward; with `probe`, inner values too."""
        ...


def empty_cache(config: ModelConfig, batch: int) -> Cache:
    """A cache of length 0."""
    empty = np.zeros((batch, config.num_heads, 0, config.head_size), dtype=np.float32)
    return [(empty, empty)] * config.num_layers


def require_runtime(name: str) -> None:
    """Notice that a runtime is not installed before long work begins.

    Raises:
        EnvironmentUnfit: it is not.
    """
    if name == "torch":
        return
    try:
        import onnxruntime  # noqa: F401, PLC0415 - an optional package
    except ImportError as error:
        raise EnvironmentUnfit(
            "ONNX Runtime is not installed", fix="pip install 'umv2-export[cpu]' (or onnxruntime-gpu)"
        ) from error


def open_runtime(name: str, bundle: Bundle, *, preload: bool = False) -> Runtime:
    """Load a bundle into runtime `name`, one of `umv2_export.names.RUNTIMES`.

    Args:
        name: which.
        bundle: what to run.
        preload: read all tables into memory first.

    Raises:
        EnvironmentUnfit: the runtime is not installed, or lacks what the bundle needs.
        InvalidRequest: this runtime does not preload.
        InputRejected: the runtime refuses the graph.
    """
    if name == "torch":
        if preload:
            raise InvalidRequest(
                "the runtime torch maps its tables", fix="leave out --preload, or name another runtime"
            )
        from umv2_export.runtimes.torch import TorchRuntime  # noqa: PLC0415 - one runtime is loaded, not all

        return TorchRuntime.from_bundle(bundle)
    from umv2_export.runtimes.onnxruntime import OnnxRuntime  # noqa: PLC0415 - it is an optional package

    return OnnxRuntime(bundle, native=name == "onnxruntime-native", preload=preload)
