"""Runs one-node models in ONNX Runtime, with the bodies of the ops or with the native library."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from umv2_export.bench.sessions import open_session

__all__ = ["Array", "run_body", "run_native"]

Array = npt.NDArray[Any]


def run_body(model: onnx.ModelProto, feed: Mapping[str, Array]) -> list[Array]:
    """All outputs of one run of the bodies; the model must pass the checker."""
    onnx.checker.check_model(model, full_check=True)
    return _run(model, feed, native=False, threads=2)


def run_native(model: onnx.ModelProto, feed: Mapping[str, Array], *, threads: int = 2) -> list[Array]:
    """All outputs of one run of the native ops."""
    return _run(model, feed, native=True, threads=threads)


def _run(model: onnx.ModelProto, feed: Mapping[str, Array], *, native: bool, threads: int) -> list[Array]:
    session = open_session(model, native=native, threads=threads)
    outputs = session.run(None, {name: _value(array) for name, array in feed.items()})
    return [np.asarray(output) for output in outputs]


def _value(array: Array) -> Any:
    """Numpy knows no bf16, and hands it over as its bits."""
    if array.dtype != ml_dtypes.bfloat16:
        return array
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), onnx.TensorProto.BFLOAT16)
