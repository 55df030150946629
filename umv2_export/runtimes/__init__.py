"""One file a runtime, behind one small interface."""

from umv2_export.runtimes.base import (
    EngineChoice,
    Runtime,
    StepInput,
    StepOutput,
    choose_engine,
    empty_cache,
    open_runtime,
    require_runtime,
)

__all__ = [
    "EngineChoice",
    "Runtime",
    "StepInput",
    "StepOutput",
    "choose_engine",
    "empty_cache",
    "open_runtime",
    "require_runtime",
]
