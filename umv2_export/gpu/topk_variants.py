"""Variants of TuckerTopK on a GPU: what is fixed when one is compiled, and how it is called."""

from dataclasses import dataclass

import torch

from umv2_export.gpu.arguments import ELEMENTS, Argument, power_of_two

__all__ = ["MAX_ADDRESSES", "TopkVariant", "topk_variant"]

# Of a top-k: a hit travels in 31 bits beside its score.
MAX_ADDRESSES = 2**31


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
