"""Variants of TuckerTopK on a GPU: what is fixed when one is compiled, and how it is called."""

from dataclasses import dataclass, replace

import torch

from umv2_export.gpu.arguments import ELEMENTS, Argument, power_of_two

__all__ = ["MAX_ADDRESSES", "TopkVariant", "part_variant", "topk_variant"]

# Of a top-k: a hit travels in 31 bits beside its score.
MAX_ADDRESSES = 2**31


# Cells of a program where several share a grid. One program takes 1024 cells in one block: 227M/1.2B has no more.
PART_CELLS = 1024

# Retrievals from which one program each is enough: one for each of the 132 multiprocessors of an H100. Parts find the
# keys of the sides again, each for itself.
PART_RETRIEVALS = 132

# Of all parts; their places are counted in 16 bits.
MAX_CANDIDATES = 2**15


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
        return f"tucker_topk_{ELEMENTS[self.scores_dtype]}_r{self.ranks}_c{self.cores}_m{self.block_m}k{self.block_k}"

    @property
    def arguments(self) -> list[Argument]:
        """In order: inputs as the op has them, sizes, outputs."""
        scores = ELEMENTS[self.scores_dtype]
        return [
            *(Argument(name, "input", scores, 16) for name in ("row_scores", "col_scores", "u", "v", "cores")),
            *(Argument(name, "size", "int32", 1) for name in ("keys_per_side", "row_topk", "topk")),
            Argument("addresses", "output", "i64", 16),
            Argument("scores", "output", scores, 16),
        ]

    @property
    def waste(self) -> tuple[int, ...]:
        """Of kernels that serve a node, the least is taken: fewest idle cells, then hits."""
        return self.block_m, self.block_k

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


def topk_variant(scores_dtype: torch.dtype, *, ranks: int, cores: int, row_topk: int, topk: int) -> TopkVariant:
    """The variant for these top-k sizes."""
    block_m, block_k = max(2, power_of_two(row_topk)), max(2, power_of_two(topk))
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


def part_variant(whole: TopkVariant, *, retrievals: int, row_topk: int, topk: int) -> tuple[TopkVariant, int] | None:
    """The variant whose programs share the grid of a token and head, and how many; None where one program is enough.

    Args:
        whole: the variant of one program.
        retrievals: tokens times heads.
        row_topk: of the node.
        topk: of the node.
    """
    block_i = max(1, PART_CELLS // whole.block_m)
    parts = -(-row_topk // block_i)
    if retrievals >= PART_RETRIEVALS or parts == 1 or power_of_two(parts * topk) > MAX_CANDIDATES:
        return None
    return replace(whole, block_i=block_i, num_warps=4), parts
