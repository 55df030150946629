"""One file a runtime, behind one small interface."""

from umv2_export.runtimes.base import Runtime, StepInput, StepOutput, empty_cache, open_runtime, require_runtime

__all__ = ["Runtime", "StepInput", "StepOutput", "empty_cache", "open_runtime", "require_runtime"]
