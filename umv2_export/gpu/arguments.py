"""The arguments of compiled kernels: their kinds, their element types, and how large a size may be."""

from dataclasses import dataclass
from typing import Literal

import torch

__all__ = ["ELEMENTS", "MAX_SIZE", "Argument", "power_of_two"]

# Names of element types in the signatures of Triton.
ELEMENTS = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.int64: "i64",
}

# Sizes are arguments of 32 bits.
MAX_SIZE = 2**31 - 1


@dataclass(frozen=True)
class Argument:
    """One argument of a compiled kernel.

    Attributes:
        name: as in the kernel's source; shards are rows_0, rows_1, ...
        kind: `input` and `output` are pointers, `size` is an int32.
        dtype: element type of a pointer, `int32` of a size.
        divisor: what the compiler may assume to divide the address or the size.
    """

    name: str
    kind: Literal["input", "size", "output"]
    dtype: str
    divisor: int


def power_of_two(size: int) -> int:
    """The lowest power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()
