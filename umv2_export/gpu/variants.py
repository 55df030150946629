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
    "Argument",
    "LookupVariant",
    "TopkVariant",
    "Variant",
    "is_gelu",
    "lookup_variant",
    "model_variants",
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

# Elements of rows that a program holds at once: 16 loads of 16 bytes a thread of fp32, in flight together; ptxas then
# takes 112 registers and spills none. With twice as many it spills.
TILE_ELEMENTS = 8192

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
        divisor: divides pre_value_dim and value_dim; 16 or a lower power of two.
        block_k, block_p, block_v: hits at once; powers of two not below pre_value_dim and value_dim.
        num_warps: of a program.
    """

    scores_dtype: torch.dtype
    rows_dtype: torch.dtype
    shards: int
    cores: int
    grouped: bool
    pre_values: bool
    gelu: bool
    divisor: int
    block_k: int
    block_p: int
    block_v: int
    num_warps: int

    op = "MemoryLookup"
    module = "memory_lookup"
    kernel = "memory_lookup_kernel"
    grid = ("tokens", "groups", "1")

    @property
    def name(self) -> str:
        """Names the entry and its files."""
        flags = "".join(
            f"_{flag}"
            for flag, present in (("group", self.grouped), ("query", self.pre_values), ("gelu", self.gelu))
            if present
        )
        return (
            f"memory_lookup_{_ELEMENTS[self.scores_dtype]}_rows_{_ELEMENTS[self.rows_dtype]}_x{self.shards}_c{self.cores}"
            f"{flags}_k{self.block_k}p{self.block_p if self.pre_values else 0}v{self.block_v}d{self.divisor}"
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
            Argument("hits", "size", "int32", 1),
            Argument("rows_per_shard", "size", "int32", 1),
            Argument("pre_value_dim", "size", "int32", self.divisor),
            Argument("value_dim", "size", "int32", self.divisor),
            Argument("output", "output", scores, 16),
        ]

    @property
    def constants(self) -> dict[str, int | bool]:
        """Compile-time constants of the kernel."""
        return {
            "CORES": self.cores,
            "GELU": self.gelu,
            "ALIGNMENT": min(16, self.divisor * self.rows_dtype.itemsize),
            "BLOCK_K": self.block_k,
            "BLOCK_P": self.block_p,
            "BLOCK_V": self.block_v,
        }


@dataclass(frozen=True)
class TopkVariant:
    """What is fixed in one compiled TuckerTopK.

    Attributes:
        scores_dtype: of all floating inputs and of the scores.
        ranks, cores: of the decomposition.
        block_n, block_x: keys, and cells of the grid, compared at once.
        block_m, block_k: powers of two not below row_topk and topk.
        num_warps: of a program.
    """

    scores_dtype: torch.dtype
    ranks: int
    cores: int
    block_n: int
    block_m: int
    block_x: int
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
            "BLOCK_X": self.block_x,
            "BLOCK_K": self.block_k,
        }


Variant = LookupVariant | TopkVariant


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
) -> LookupVariant:
    """The variant for rows of these sizes."""
    block_p, block_v = _power_of_two(max(pre_value_dim, 16)), _power_of_two(max(value_dim, 16))
    held = (block_p if pre_value_dim else 0) + block_v
    num_warps = 4 if held <= 512 else 8
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
        divisor,
        block_k=max(1, min(32, TILE_ELEMENTS * num_warps // 4 // _power_of_two(held))),
        block_p=block_p,
        block_v=block_v,
        num_warps=num_warps,
    )


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
    # tl.topk of one element fails to compile (triton 3.7.1).
    block_m, block_k = max(2, _power_of_two(row_topk)), max(2, _power_of_two(topk))
    # Smaller blocks sort faster a comparison, larger ones merge less often. Up to the top 768 these spill nothing on
    # any architecture; 1024 cells spilled 8 bytes on sm_86 with 4 warps and 16 bytes on sm_100 with 8, and the top 768
    # spilled 4 bytes on sm_80 with 8 warps.
    largest = max(block_m, block_k)
    small = largest <= 32
    return TopkVariant(
        scores_dtype,
        ranks,
        cores,
        block_n=max(256 if small else 512, 2 * block_m),
        block_m=block_m,
        block_x=max(512, 2 * block_k),
        block_k=block_k,
        num_warps=4 if small else 8 if largest <= 256 else 16,
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
            )
            for rows_dtype in rows_dtypes
        ]
        variants.append(
            topk_variant(scores_dtype, ranks=m.tucker_rank, cores=m.tucker_cores, row_topk=m.row_topk, topk=m.topk)
        )
    return variants


def _power_of_two(size: int) -> int:
    """The lowest power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()
