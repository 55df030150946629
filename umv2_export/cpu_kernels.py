"""The CPU kernels of the native op library with no runtime around them: which ones run here, and a plain gather.

`tests/kernels/kernel_calls.py` calls the others, those of the ops: a model calls them through its runtime.
"""

import ctypes
import os
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from umv2_export import native_library
from umv2_export.errors import EnvironmentUnfit

__all__ = ["address", "cpu_target", "gather", "kernels_of", "load_kernels"]

Array = npt.NDArray[Any]


@cache
def load_kernels() -> ctypes.CDLL:
    """The library: that of the installation, or the one that UMV2_KERNEL_LIBRARY names (a build with sanitizers, say).

    Raises:
        EnvironmentUnfit: it is not installed.
    """
    library = ctypes.CDLL(os.environ.get("UMV2_KERNEL_LIBRARY") or native_library())
    library.umv2_cpu_target.restype = ctypes.c_char_p
    library.umv2_kernels.restype = ctypes.c_void_p
    library.umv2_memory_lookup.restype = library.umv2_tucker_topk.restype = ctypes.c_bool
    return library


def cpu_target() -> str:
    """Name of the kernels that this processor uses.

    Raises:
        EnvironmentUnfit: UMV2_CPU_TARGET names kernels that it does not run, or the library is not installed.
    """
    name: bytes | None = load_kernels().umv2_cpu_target()
    if name is None:
        raise EnvironmentUnfit("UMV2_CPU_TARGET names kernels that this processor does not run", fix="leave it unset")
    return name.decode()


def kernels_of(target: str) -> ctypes.c_void_p:
    """The library's table of kernels of a target: portable, avx2 or avx512.

    Raises:
        EnvironmentUnfit: this processor does not run them.
    """
    found: int | None = load_kernels().umv2_kernels(target.encode())
    if found is None:
        raise EnvironmentUnfit(f"this processor does not run the kernels {target!r}", fix="see `umv2-export env`")
    return ctypes.c_void_p(found)


def gather(target: str, table: Array, indices: Array) -> float:
    """Sum of whole rows of an fp32 table [rows, size], read one after the other: the yardstick of benchmarks."""
    total = ctypes.c_float()
    load_kernels().umv2_gather(
        kernels_of(target),
        ctypes.c_void_p(address(table, np.float32)),
        ctypes.c_int64(table.shape[1]),
        ctypes.c_void_p(address(indices, np.int64)),
        ctypes.c_int64(indices.size),
        ctypes.byref(total),
    )
    return float(total.value)


def address(array: Array, dtype: type) -> int:
    """Of the first element of a contiguous array.

    Raises:
        TypeError: it is not contiguous, or of another dtype.
    """
    if array.dtype != dtype or not array.flags.c_contiguous:
        raise TypeError(f"expected a contiguous {np.dtype(dtype)} array, got {array.dtype}")
    return int(array.ctypes.data)
