"""One file a runtime, behind one small interface."""

from umv2_export.runtimes.base import EngineChoice, Runtime, StepInput, StepOutput, empty_cache
from umv2_export.runtimes.open import choose_engine, open_runtime
from umv2_export.runtimes.versions import require_runtime

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
