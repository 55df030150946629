"""Variants of the GPU kernels: what is fixed when one is compiled, and how it is called.

Plain data, with no compiler and no runtime in sight: PyTorch, the ahead-of-time build and the plugins all take the
constants, the order of arguments and the grid from here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from umv2_export.config import Activation, ModelConfig
from umv2_export.errors import InputRejected, Unsupported, shown

__all__ = [
    "MAX_ADDRESSES",
    "MAX_SIZE",
    "Argument",
    "LookupVariant",
    "SumVariant",
    "TopkVariant",
    "Variant",
    "is_gelu",
    "lookup_variant",
    "model_variants",
    "sum_variant",
    "topk_variant",
]

# Names of element types in the signatures of Triton.
_ELEMENTS = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.int64: "i64",
}

# Row dtypes that an export can store beside scores of each dtype.
ROW_DTYPES = {
    torch.float32: (torch.float32, torch.float16, torch.bfloat16, torch.int8),
    torch.float16: (torch.float16, torch.int8),
    torch.bfloat16: (torch.bfloat16, torch.int8),
}

# Elements of rows that a thread holds at once, and those of a program of one warp: 18 loads of 16 bytes of fp32 in
# flight together. More registers would leave a multiprocessor fewer programs, hence no more bytes in flight.
THREAD_ELEMENTS = 72
SPLIT_THREAD_ELEMENTS = 48

# Bytes of one load of a thread.
LOAD_BYTES = 16

# Programs from which a lookup is not split: four for each of the 132 multiprocessors of an H100. A number that does not
# depend on the card, so that sums are the same on all.
SPLIT_PROGRAMS = 528

# Sizes are arguments of 32 bits.
MAX_SIZE = 2**31 - 1

# Of a top-k: a hit travels in 31 bits beside its score.
MAX_ADDRESSES = 2**31


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
            f"memory_lookup_{_ELEMENTS[self.scores_dtype]}_rows_{_ELEMENTS[self.rows_dtype]}_x{self.shards}_c{self.cores}"
            f"{flags}_{sizes}"
        )

    @property
    def arguments(self) -> list[Argument]:
        """In order: inputs as the op has them, sizes, output."""
        scores, rows = _ELEMENTS[self.scores_dtype], _ELEMENTS[self.rows_dtype]
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
        return f"memory_lookup_sum_{_ELEMENTS[self.scores_dtype]}_s{self.block_s}v{self.block_v}"

    @property
    def arguments(self) -> list[Argument]:
        """In order: inputs, sizes, output."""
        return [
            Argument("sums", "input", "fp32", 16),
            *(Argument(name, "size", "int32", 1) for name in ("splits", "value_dim")),
            Argument("output", "output", _ELEMENTS[self.scores_dtype], 16),
        ]

    @property
    def constants(self) -> dict[str, int | bool]:
        """Compile-time constants of the kernel."""
        return {"BLOCK_S": self.block_s, "BLOCK_V": self.block_v}


@dataclass(frozen=True)
class TopkVariant:
    """What is fixed in one compiled TuckerTopK.

    Attributes:
        scores_dtype: of all floating inputs and of the scores.
        ranks, cores: of the decomposition.
        block_n, block_i: keys, and rows of the grid of chosen keys, looked at together.
        block_m, block_k: powers of two not below row_topk and topk.
        num_warps: of a program.
    """

    scores_dtype: torch.dtype
    ranks: int
    cores: int
    block_n: int
    block_m: int
    block_i: int
    block_k: int
    num_warps: int

    op = "TuckerTopK"
    module = "tucker_topk"
    kernel = "tucker_topk_kernel"
    grid = ("tokens", "heads", "1")

    @property
    def name(self) -> str:
        """Names the entry and its files."""
        return f"tucker_topk_{_ELEMENTS[self.scores_dtype]}_r{self.ranks}_c{self.cores}_m{self.block_m}k{self.block_k}"

    @property
    def arguments(self) -> list[Argument]:
        """In order: inputs as the op has them, sizes, outputs."""
        scores = _ELEMENTS[self.scores_dtype]
        return [
            *(Argument(name, "input", scores, 16) for name in ("row_scores", "col_scores", "u", "v", "cores")),
            *(Argument(name, "size", "int32", 1) for name in ("keys_per_side", "row_topk", "topk")),
            Argument("addresses", "output", "i64", 16),
            Argument("scores", "output", scores, 16),
        ]

    @property
    def constants(self) -> dict[str, int | bool]:
        """Compile-time constants of the kernel."""
        return {
            "RANKS": self.ranks,
            "CORES": self.cores,
            "BLOCK_N": self.block_n,
            "BLOCK_M": self.block_m,
            "BLOCK_I": self.block_i,
            "BLOCK_K": self.block_k,
        }


Variant = LookupVariant | SumVariant | TopkVariant


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
    block_v = _power_of_two(max(value_dim, 32))
    return SumVariant(scores_dtype, block_s=max(1, 4096 // block_v), block_v=block_v, num_warps=4)


def _chunk(pre_value_dim: int, value_dim: int, lanes: int) -> int:
    """Elements of a piece of a row: as many as a warp reads with one load, or fewer where pieces would be left idle.

    192 + 192 elements are 3 + 3 pieces of 64, and none is idle; of 128, a quarter would be. Wider rows take wider
    pieces, for a thread holds whole pieces.
    """
    size = pre_value_dim + value_dim
    widest = max(32 * lanes, _power_of_two(-(-lanes * size // THREAD_ELEMENTS)))
    chunks = [widest >> i for i in range(widest.bit_length()) if widest >> i >= 16]
    held = {chunk: chunk * (-(-pre_value_dim // chunk) + -(-value_dim // chunk)) for chunk in chunks}
    fitting = [chunk for chunk in chunks if 20 * held[chunk] <= 21 * size]
    return fitting[0] if fitting else min(chunks, key=held.__getitem__)


def is_gelu(activation: str) -> bool:
    """Whether the pre-score goes through GELU.

    Raises:
        InputRejected: the activation is none that the op has; to leave it out would give other numbers.
    """
    if activation not in get_args(Activation):
        raise InputRejected(f"activation must be one of {', '.join(get_args(Activation))}, got {shown(activation)}")
    return activation == "gelu"


def topk_variant(scores_dtype: torch.dtype, *, ranks: int, cores: int, row_topk: int, topk: int) -> TopkVariant:
    """The variant for these top-k sizes."""
    block_m, block_k = max(2, _power_of_two(row_topk)), max(2, _power_of_two(topk))
    block_i = max(1, min(block_m, 4096 // block_m))
    cells = block_i * block_m
    return TopkVariant(
        scores_dtype,
        ranks,
        cores,
        block_n=512,
        block_m=block_m,
        block_i=block_i,
        block_k=block_k,
        num_warps=4 if cells <= 1024 else 8,
    )


def model_variants(
    config: ModelConfig, shards: int, dtypes: Mapping[torch.dtype, Sequence[torch.dtype]] = ROW_DTYPES
) -> list[Variant]:
    """All variants that nodes of a model can ask for.

    Args:
        config: of the model.
        shards: of its tables.
        dtypes: of scores -> of rows.

    Raises:
        Unsupported: it has no memory layers.
    """
    m = config.memory
    if m.kind == "none":
        raise Unsupported("the model has no memory layers, so no GPU kernels of ours")
    variants: list[Variant] = []
    for scores_dtype, rows_dtypes in dtypes.items():
        variants += [
            lookup_variant(
                scores_dtype,
                rows_dtype,
                shards=shards,
                cores=m.tucker_cores,
                grouped=m.value_groups > 1,
                pre_value_dim=m.pre_value_dim,
                value_dim=m.value_dim,
                gelu=is_gelu(m.activation),
                split=split,
            )
            for rows_dtype in rows_dtypes
            for split in (False, True)
        ]
        variants.append(sum_variant(scores_dtype, value_dim=m.value_dim))
        variants.append(
            topk_variant(scores_dtype, ranks=m.score_rank, cores=m.tucker_cores, row_topk=m.row_topk, topk=m.topk)
        )
    return variants


def _power_of_two(size: int) -> int:
    """The lowest power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()


def _power_of_two_below(size: int) -> int:
    """The highest power of two that is not above `size`; 1 for what is below it."""
    return 1 << max(0, size.bit_length() - 1)
