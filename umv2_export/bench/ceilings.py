"""What the memory of this machine gives: rates that no model can beat by much."""

import concurrent.futures
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from umv2_export.cpu_kernels import cpu_target, gather
from umv2_export.runtimes.base import Array
from umv2_export.system.host_memory import anonymous_memory

__all__ = ["Ceilings", "gather_rate", "measure_ceilings"]

REPEATS = 5
GATHERED_ROWS = 20_000

# A gather ceiling on less would be one of the cache.
CEILING_BYTES = 2 * 2**30
SMALLEST_ROW = 256


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second that this machine reads: from end to end, and whole rows or experts at random."""

    streaming: float
    gather: float
    row_bytes: int


def measure_ceilings(row_bytes: int, threads: int) -> Ceilings:
    """Of this machine, for rows of so many bytes, of which smaller ones count as SMALLEST_ROW."""
    row_bytes = max(row_bytes, SMALLEST_ROW)
    words = _table_of_words(CEILING_BYTES)
    return Ceilings(_streaming_rate(words, threads), gather_rate(words, row_bytes, threads), row_bytes)


def _table_of_words(size: int) -> Array:
    """`size` bytes of fp32 zeros in pages of 4 KiB, each touched: untouched ones are all the same page."""
    words = np.frombuffer(anonymous_memory(size, huge_pages=False), dtype=np.float32)
    words[:: 4096 // 4] = 1.0
    return words


def _streaming_rate(words: Array, threads: int) -> float:
    """Bytes per second of reading memory from one end to the other, each thread a part of its own; the best of five."""
    rows = words.reshape(-1, 1024)
    parts = np.array_split(np.arange(len(rows)), threads)
    return max(_rate(threads, words.nbytes, partial(_read, rows, parts)) for _ in range(REPEATS))


def gather_rate(words: Array, row_bytes: int, threads: int) -> float:
    """Bytes per second of plain reads of whole random rows; the best of five, each thread with rows of its own."""
    size = row_bytes // 4
    rows = words[: len(words) // size * size].reshape(-1, size)
    rng = np.random.default_rng(1)
    best = 0.0
    for _ in range(REPEATS):
        indices = [rng.integers(0, len(rows), GATHERED_ROWS) for _ in range(threads)]
        best = max(best, _rate(threads, threads * GATHERED_ROWS * row_bytes, partial(_read, rows, indices)))
    return best


def _read(rows: Array, indices: Sequence[Array], thread: int) -> float:
    return gather(cpu_target(), rows, indices[thread])


def _rate(threads: int, size: int, read: Callable[[int], object]) -> float:
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        list(pool.map(read, range(threads)))
        return size / (time.perf_counter() - started)
