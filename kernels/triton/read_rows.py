"""Random rows, read and summed up: the rate of it is what no lookup can beat by much."""

import triton
import triton.language as tl

__all__ = ["read_rows_kernel"]


@triton.jit
def read_rows_kernel(indices, table, sums, count, width, BLOCK_K: tl.constexpr, BLOCK_X: tl.constexpr):
    """sums[program] = sum of all elements of its rows.

    Grid: (rows to read / BLOCK_K,).

    Args:
        indices: int64 [count].
        table: [rows, width].
        sums: fp32 [programs].
        count, width: rows to read; elements of a row.
        BLOCK_K, BLOCK_X: rows of a program; a power of two not below width.
    """
    program = tl.program_id(0)
    k, x = program * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_X)
    index_K = tl.load(indices + k, mask=k < count, other=0)
    live_KX = (k < count)[:, None] & (x < width)[None, :]
    row_KX = tl.load(table + index_K[:, None] * width + x[None, :], mask=live_KX, other=0.0)
    tl.store(sums + program, tl.sum(tl.sum(row_KX.to(tl.float32), 1), 0))
