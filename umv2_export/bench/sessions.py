"""Sessions of ONNX Runtime on the CPU, as benchmarks and tests of single ops open them."""

from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from umv2_export import native_library

__all__ = ["open_session", "share_threads"]


def share_threads(threads: int) -> None:
    """Let all sessions that are opened with `threads=None` use one pool of so many threads; once a process.

    A session's own threads spin for a while after each run, on cores that the other contender of a benchmark then
    lacks: a memory layer at 64 tokens took 10 ms instead of 1.8 ms.
    """
    onnxruntime.set_global_thread_pool_sizes(threads, 1)


def open_session(model: onnx.ModelProto | Path, *, native: bool, threads: int | None) -> Any:
    """An inference session on the CPU with threads of its own, or, with None, those of `share_threads`."""
    options = onnxruntime.SessionOptions()
    if threads is None:
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = threads
    if native:
        options.register_custom_ops_library(native_library())
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
