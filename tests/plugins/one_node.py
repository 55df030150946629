"""Runs the one-node models of the benchmarks in ONNX Runtime, with and without the native library."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from umv2_export.bench.one_node import open_session

__all__ = ["Array", "run"]

Array = npt.NDArray[Any]


def run(model: bytes, feed: Mapping[str, Array], *, native: bool, threads: int = 2) -> list[Array]:
    """All outputs of one run."""
    outputs: list[Array] = open_session(model, native=native, threads=threads).run(None, dict(feed))
    return [np.asarray(output) for output in outputs]
