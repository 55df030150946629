"""The rate at which a GPU reads random rows and does nothing else."""

from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.timing import replay_in_turns
from umv2_export.kernels.triton.read_rows import read_rows_kernel

__all__ = ["random_row_rate", "read_rows"]

# Rows that a program has in flight, and its warps; the best of all pairs is the ceiling.
WAYS = [(rows, warps) for rows in (1, 2, 4, 8, 16) for warps in (2, 4, 8)]


def read_rows(table: torch.Tensor, rows_in_flight: int, warps: int, indices: torch.Tensor) -> torch.Tensor:
    """The sums of the rows at `indices` [count] of a table, program by program, fp32."""
    count, width = indices.numel(), table.shape[1]
    programs = -(-count // rows_in_flight)
    sums = torch.empty(programs, dtype=torch.float32, device=table.device)
    block = 1 << (width - 1).bit_length()
    read_rows_kernel[programs,](
        indices, table, sums, count, width, BLOCK_K=rows_in_flight, BLOCK_X=block, num_warps=warps
    )
    return sums


def random_row_rate(table: torch.Tensor, indices: Sequence[torch.Tensor]) -> float:
    """Bytes per second of reading rows at random, the best of all ways.

    Args:
        table: large against any cache.
        indices: int64 [count], one for each call.
    """
    seconds = min(replay_in_turns([[partial(read_rows, table, *way, index) for index in indices] for way in WAYS]))
    return indices[0].numel() * table.shape[1] * table.dtype.itemsize / seconds
