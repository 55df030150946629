"""What every runtime does: one forward of the exported graph, prefill or decode."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from umv2_export.config import ModelConfig

__all__ = [
    "Array",
    "Cache",
    "EngineChoice",
    "Runtime",
    "ShowsParts",
    "StepInput",
    "StepOutput",
    "empty_cache",
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
