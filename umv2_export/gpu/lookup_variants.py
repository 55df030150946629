"""Variants of MemoryLookup on a GPU, and of the sum of its splits: what is fixed in a kernel, how it is called."""

from dataclasses import dataclass
from typing import get_args

import torch

from umv2_export.config import Activation
from umv2_export.errors import InputRejected, shown
from umv2_export.gpu.arguments import ELEMENTS, Argument, power_of_two

__all__ = ["LookupVariant", "SumVariant", "is_gelu", "lookup_variant", "sum_variant"]

# Elements of rows that a thread holds at once, and those of a program of one warp: 18 loads of 16 bytes of fp32 in
# flight together. More registers would leave a multiprocessor fewer programs, hence no more bytes in flight.
THREAD_ELEMENTS = 72
SPLIT_THREAD_ELEMENTS = 48

# Bytes of one load of a thread.
LOAD_BYTES = 16

# Programs from which a lookup is not split: four for each of the 132 multiprocessors of an H100. A number that does not
# depend on the card, so that sums are the same on all.
SPLIT_PROGRAMS = 528


@dataclass(frozen=True)
class LookupVariant:
    """What is fixed in one compiled MemoryLookup.

    Attributes:
        scores_dtype: of scores, query and output.
        rows_dtype: of rows.
        shards: number of pointers to rows.
        cores: parts of a value.
        grouped, pre_values, gelu: groups > 1; pre_value_dim > 0; GELU of the pre-score.
        split: programs share the hits of a token, and a MemoryLookupSum adds what they sum.
        divisor: divides pre_value_dim and value_dim; 16 or a lower power of two.
        chunk: elements of a piece of a row; a power of two.
        block_k, block_p, block_v: hits at once; whole pieces that are not below pre_value_dim and value_dim.
        num_warps: of a program.
    """

    scores_dtype: torch.dtype
    rows_dtype: torch.dtype
    shards: int
    cores: int
    grouped: bool
    pre_values: bool
    gelu: bool
    split: bool
    divisor: int
    chunk: int
    block_k: int
    block_p: int
    block_v: int
    num_warps: int

    op = "MemoryLookup"
    module = "memory_lookup"
    kernel = "memory_lookup_kernel"

    @property
    def grid(self) -> tuple[str, str, str]:
        """Programs along x, y and z."""
        return ("tokens", "groups", "splits" if self.split else "1")

    @property
    def name(self) -> str:
        """Names the entry and its files."""
        flags = "".join(
            f"_{flag}"
            for flag, present in (
                ("group", self.grouped),
                ("query", self.pre_values),
                ("gelu", self.gelu),
                ("split", self.split),
            )
            if present
        )
        sizes = f"k{self.block_k}p{self.block_p if self.pre_values else 0}v{self.block_v}x{self.chunk}d{self.divisor}"
        return (
            f"memory_lookup_{ELEMENTS[self.scores_dtype]}_rows_{ELEMENTS[self.rows_dtype]}_x{self.shards}_c{self.cores}"
            f"{flags}_{sizes}"
        )

    @property
    def arguments(self) -> list[Argument]:
        """In order: inputs as the op has them, sizes, output."""
        scores, rows = ELEMENTS[self.scores_dtype], ELEMENTS[self.rows_dtype]
        inputs = [
            ("indices", "i64", True),
            ("scores", scores, True),
            ("group", "i64", self.grouped),
            ("query", scores, self.pre_values),
            ("row_scales", "fp32", self.rows_dtype == torch.int8),
            *((f"rows_{s}", rows, True) for s in range(self.shards)),
        ]
        return [
            *(Argument(name, "input", dtype, 16) for name, dtype, present in inputs if present),
            *(Argument(name, "size", "int32", 1) for name in ("hits", "table_rows", "rows_per_shard")),
            *(Argument(name, "size", "int32", self.divisor) for name in ("pre_value_dim", "value_dim")),
            *([Argument("share", "size", "int32", 1)] if self.split else []),
            Argument("output", "output", "fp32" if self.split else scores, 16),
        ]

    @property
    def waste(self) -> tuple[int, ...]:
        """Of kernels that serve a node, the least is taken: no idle pointers, wide loads, then few idle lanes."""
        return self.shards, -self.divisor, self.block_p + self.block_v, self.block_v

    @property
    def constants(self) -> dict[str, int | bool]:
        """Compile-time constants of the kernel."""
        return {
            "CORES": self.cores,
            "GELU": self.gelu,
            "ALIGNMENT": min(16, self.divisor * self.rows_dtype.itemsize),
            "BLOCK_K": self.block_k,
            "CHUNK": self.chunk,
            "PIECES_P": self.block_p // self.chunk if self.pre_values else 0,
            "PIECES_V": self.block_v // self.chunk,
        }

    def shares(self, programs: int, hits: int) -> tuple[int, int]:
        """Splits of the hits of a token, and hits of a split.

        Args:
            programs: that there are without splits.
            hits: of a token.
        """
        wanted = -(-SPLIT_PROGRAMS // programs)
        blocks = -(-hits // self.block_k)
        share = self.block_k * -(-blocks // min(wanted, blocks))
        return -(-hits // share), share


@dataclass(frozen=True)
class SumVariant:
    """What is fixed in one compiled sum of the splits of a MemoryLookup.

    Attributes:
        scores_dtype: of the output.
        block_s, block_v: powers of two: splits at once; not below value_dim.
        num_warps: of a program.
    """

    scores_dtype: torch.dtype
    block_s: int
    block_v: int
    num_warps: int

    op = "MemoryLookupSum"
    module = "memory_lookup"
    kernel = "memory_lookup_sum_kernel"
    grid = ("tokens", "groups", "1")

    @property
    def name(self) -> str:
        """Names the entry and its files."""
        return f"memory_lookup_sum_{ELEMENTS[self.scores_dtype]}_s{self.block_s}v{self.block_v}"

    @property
    def arguments(self) -> list[Argument]:
        """In order: inputs, sizes, output."""
        return [
            Argument("sums", "input", "fp32", 16),
            *(Argument(name, "size", "int32", 1) for name in ("splits", "value_dim")),
            Argument("output", "output", ELEMENTS[self.scores_dtype], 16),
        ]

    @property
    def waste(self) -> tuple[int, ...]:
        """See `LookupVariant.waste`."""
        return (self.block_v,)

    @property
    def constants(self) -> dict[str, int | bool]:
        """Compile-time constants of the kernel."""
        return {"BLOCK_S": self.block_s, "BLOCK_V": self.block_v}


def lookup_variant(
    scores_dtype: torch.dtype,
    rows_dtype: torch.dtype,
    *,
    shards: int,
    cores: int,
    grouped: bool,
    pre_value_dim: int,
    value_dim: int,
    gelu: bool,
    split: bool = False,
) -> LookupVariant:
    """The variant for rows of these sizes."""
    lanes = LOAD_BYTES // rows_dtype.itemsize
    chunk = _chunk(pre_value_dim, value_dim, lanes)
    block_p, block_v = (chunk * -(-max(size, 1) // chunk) for size in (pre_value_dim, value_dim))
    held = (block_p if pre_value_dim else 0) + block_v
    num_warps, elements = (1, SPLIT_THREAD_ELEMENTS) if split else (4, THREAD_ELEMENTS)
    threads = 32 * num_warps
    # As many hits as registers hold, and at least so many that a thread has a whole load of each piece.
    block_k = max(_power_of_two_below(threads * elements // held), threads * lanes // chunk)
    divisor = 16
    while pre_value_dim % divisor or value_dim % divisor:
        divisor //= 2
    return LookupVariant(
        scores_dtype,
        rows_dtype,
        shards,
        cores,
        grouped,
        pre_value_dim > 0,
        gelu,
        split,
        divisor,
        chunk,
        block_k=min(32, block_k),
        block_p=block_p,
        block_v=block_v,
        num_warps=num_warps,
    )


def sum_variant(scores_dtype: torch.dtype, *, value_dim: int) -> SumVariant:
    """The variant that adds the splits of values of this size."""
    block_v = power_of_two(max(value_dim, 32))
    return SumVariant(scores_dtype, block_s=max(1, 4096 // block_v), block_v=block_v, num_warps=4)


def is_gelu(activation: str) -> bool:
    """Whether the pre-score goes through GELU.

    Raises:
        InputRejected: the activation is none that the op has; to leave it out would give other numbers.
    """
    if activation not in get_args(Activation):
        raise InputRejected(f"activation must be one of {', '.join(get_args(Activation))}, got {shown(activation)}")
    return activation == "gelu"


def _chunk(pre_value_dim: int, value_dim: int, lanes: int) -> int:
    """Elements of a piece of a row: as many as a warp reads with one load, or fewer where pieces would be left idle.

    192 + 192 elements are 3 + 3 pieces of 64, and none is idle; of 128, a quarter would be. Wider rows take wider
    pieces, for a thread holds whole pieces.
    """
    size = pre_value_dim + value_dim
    widest = max(32 * lanes, power_of_two(-(-lanes * size // THREAD_ELEMENTS)))
    chunks = [widest >> i for i in range(widest.bit_length()) if widest >> i >= 16]
    held = {chunk: chunk * (-(-pre_value_dim // chunk) + -(-value_dim // chunk)) for chunk in chunks}
    fitting = [chunk for chunk in chunks if 20 * held[chunk] <= 21 * size]
    return fitting[0] if fitting else min(chunks, key=held.__getitem__)


def _power_of_two_below(size: int) -> int:
    """The highest power of two that is not above `size`; 1 for what is below it."""
    return 1 << max(0, size.bit_length() - 1)
