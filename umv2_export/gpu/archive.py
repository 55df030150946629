"""All kernels of a build in one file, for the plugins in C++: fixed records, then the cubins.

`plugins/cuda/kernel_archive.h` reads it; all numbers are little endian.
"""

import struct
from pathlib import Path

from umv2_export.gpu.index import read_index

__all__ = ["ARCHIVE_FILE", "archive_kernels"]

ARCHIVE_FILE = "kernels.bin"

MAGIC = b"UMV2KERN"
FORMAT_VERSION = 3

HEADER = struct.Struct("<8sII")
# Facts of a kernel, its entry, and place and size of its cubin.
RECORD = struct.Struct("<20i64sQQ")

# Of cubins; more than the driver asks for.
ALIGNMENT = 16

OPS = {"MemoryLookup": 0, "TuckerTopK": 1, "MemoryLookupSum": 2}

# As ONNX numbers element types.
ELEMENT_TYPES = {"float32": 1, "int8": 3, "float16": 10, "bfloat16": 16}

# In the order of the record, after op, architecture, threads and shared memory; what an op has not is 0.
FACTS = (
    "scores_dtype",
    "rows_dtype",
    "shards",
    "cores",
    "grouped",
    "pre_values",
    "gelu",
    "divisor",
    "ranks",
    "block_k",
    "block_p",
    "block_v",
    "block_m",
    "split",
)


def archive_kernels(folder: Path) -> bytes:
    """Records and cubins of the kernels of a folder, in the order of its index.

    Raises:
        InputRejected: it holds no kernels, or other files than its index describes.
    """
    kernels = read_index(folder)
    cubins = [_aligned((folder / kernel.cubin).read_bytes()) for kernel in kernels]
    offset = HEADER.size + RECORD.size * len(kernels)
    records = []
    for kernel, cubin in zip(kernels, cubins, strict=True):
        major, minor = map(int, kernel.compute_capability.split("."))
        numbers = [
            OPS[kernel.op],
            major,
            minor,
            # Code of a target such as sm_90a would run on that architecture alone.
            int(kernel.target.endswith("a")),
            kernel.block[0],
            kernel.shared_bytes,
            *(_number(kernel.variant.get(fact, 0)) for fact in FACTS),
        ]
        records.append(RECORD.pack(*numbers, kernel.entry.encode(), offset, len(cubin)))
        offset += len(cubin)
    return b"".join([HEADER.pack(MAGIC, FORMAT_VERSION, len(kernels)), *records, *cubins])


def _aligned(cubin: bytes) -> bytes:
    """Filled up with zeros, so that the next one is aligned too."""
    return cubin + bytes(-len(cubin) % ALIGNMENT)


def _number(fact: int | str) -> int:
    return ELEMENT_TYPES[fact] if isinstance(fact, str) else int(fact)
