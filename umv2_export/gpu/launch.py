"""The GPU kernels as implementations of the torch ops.

On tensors of a CPU they run in Triton's interpreter, if the environment asks for it (TRITON_INTERPRET=1).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch

from umv2_export.errors import Unsupported
from umv2_export.gpu.arguments import power_of_two
from umv2_export.gpu.lookup_variants import LookupVariant, is_gelu, lookup_variant, sum_variant
from umv2_export.gpu.topk_variants import MAX_ADDRESSES, part_variant, topk_variant
from umv2_export.kernels.triton.memory_lookup import (
    memory_lookup_by_row_kernel,
    memory_lookup_kernel,
    memory_lookup_sum_kernel,
)
from umv2_export.kernels.triton.tucker_topk import tucker_topk_kernel, tucker_topk_merge_kernel

__all__ = ["Form", "launch_lookup", "launch_topk", "shares_rows"]

Form = Literal["whole", "split", "by row"]
"""How a lookup is cut into programs."""

# Hits of a row, in the mean, from which taking hits in the order of rows is tried: it adds to the sums with atomics,
# whose traffic must be less than that of the rows which are not read again. From the bytes alone, not from timings.
SHARED_HITS = 4


def launch_topk(
    row_scores: torch.Tensor,
    col_scores: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    cores: torch.Tensor,
    row_topk: int,
    topk: int,
    *,
    whole: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `umv2_export.ops.tucker_topk`; `whole`: by one program a token and head, however few there are.

    Raises:
        Unsupported: a side has more keys than the kernel tells apart.
    """
    tokens, heads, keys_per_side, ranks = row_scores.shape
    if keys_per_side**2 > MAX_ADDRESSES:
        raise Unsupported(
            f"a top-k of {keys_per_side} keys a side", why=f"the kernel counts to {MAX_ADDRESSES} addresses"
        )
    variant = topk_variant(row_scores.dtype, ranks=ranks, cores=len(cores), row_topk=row_topk, topk=topk)
    addresses = row_scores.new_empty((tokens, heads * topk), dtype=torch.int64)
    scores = row_scores.new_empty((tokens, heads * topk, len(cores)))
    if not tokens or not heads:
        return addresses, scores
    shared = None if whole else part_variant(variant, retrievals=tokens * heads, row_topk=row_topk, topk=topk)
    inputs = [tensor.contiguous() for tensor in (row_scores, col_scores, u, v, cores)]
    if shared is None:
        tucker_topk_kernel[tokens, heads](
            *inputs, keys_per_side, row_topk, topk, addresses, scores, None,
            **variant.constants, num_warps=variant.num_warps,
        )  # fmt: skip
        return addresses, scores
    variant, parts = shared
    candidates = (tokens, heads, parts * topk)
    part_addresses = addresses.new_empty(candidates)
    part_scores = scores.new_empty((*candidates, len(cores)))
    keys = torch.empty(candidates, dtype=torch.uint32, device=scores.device)
    tucker_topk_kernel[tokens, heads, parts](
        *inputs, keys_per_side, row_topk, topk, part_addresses, part_scores, keys,
        **variant.constants, num_warps=variant.num_warps,
    )  # fmt: skip
    tucker_topk_merge_kernel[tokens, heads](
        keys, part_addresses, part_scores, parts * topk, topk, addresses, scores,
        CORES=len(cores), BLOCK_X=max(2, power_of_two(parts * topk)), BLOCK_K=variant.block_k, num_warps=8,
    )  # fmt: skip
    return addresses, scores


def launch_lookup(
    indices: torch.Tensor,
    scores: torch.Tensor,
    group: torch.Tensor | None,
    query: torch.Tensor | None,
    row_scales: torch.Tensor | None,
    rows: Sequence[torch.Tensor],
    pre_value_dim: int,
    activation: str,
    rows_per_shard: int,
    groups: int,
    *,
    form: Form | None = None,
) -> torch.Tensor:
    """As `umv2_export.ops.memory_lookup`, but for hits whose index or group is out of range: they add nothing.

    `form`: a program a token and group (whole), several (split), or hits in the order of rows (by row); None: the last
    where tokens share rows, else as many programs as fill the GPU.
    """
    tokens, hits, cores = scores.shape
    value_dim = rows[0].shape[1] - pre_value_dim
    if not tokens:
        return scores.new_empty((0, groups * value_dim))
    make = partial(
        lookup_variant,
        scores.dtype,
        rows[0].dtype,
        shards=len(rows),
        cores=cores,
        grouped=group is not None,
        pre_value_dim=pre_value_dim,
        value_dim=value_dim,
        gelu=is_gelu(activation),
    )
    variant = make()
    optional = tuple(None if tensor is None else tensor.contiguous() for tensor in (group, query, row_scales))
    inputs = (indices.contiguous(), scores.contiguous(), *optional, tuple(shard.contiguous() for shard in rows))
    sizes = (sum(len(shard) for shard in rows), rows_per_shard, pre_value_dim, value_dim)
    if form is None:
        form = "by row" if shares_rows(indices.numel(), sizes[0]) else "split"
    if form == "by row":
        return _launch_by_row(variant, inputs, sizes, groups)
    if form == "split":
        split = make(split=True)
        splits, share = split.shares(tokens * groups, hits)
        if splits > 1:
            return _launch_split(split, inputs, sizes, groups, splits, share)
    output = scores.new_empty((tokens, groups * value_dim))
    memory_lookup_kernel[tokens, groups](
        *inputs, hits, *sizes, None, output, **variant.constants, num_warps=variant.num_warps
    )
    return output


def shares_rows(hits: int, rows: int) -> bool:
    """Tokens hit the same rows often enough to take hits in the order of rows."""
    return hits >= SHARED_HITS * rows


def _launch_split(
    variant: LookupVariant, inputs: tuple[Any, ...], sizes: tuple[int, ...], groups: int, splits: int, share: int
) -> torch.Tensor:
    scores, value_dim = inputs[1], sizes[-1]
    tokens, hits, _ = scores.shape
    sums = scores.new_empty((tokens, groups, splits, value_dim), dtype=torch.float32)
    memory_lookup_kernel[tokens, groups, splits](
        *inputs, hits, *sizes, share, sums, **variant.constants, num_warps=variant.num_warps
    )
    output: torch.Tensor = scores.new_empty((tokens, groups * value_dim))
    adding = sum_variant(scores.dtype, value_dim=value_dim)
    memory_lookup_sum_kernel[tokens, groups](
        sums, splits, value_dim, output, **adding.constants, num_warps=adding.num_warps
    )
    return output


def _launch_by_row(
    variant: LookupVariant, inputs: tuple[Any, ...], sizes: tuple[int, ...], groups: int
) -> torch.Tensor:
    indices, scores = inputs[:2]
    tokens, hits = indices.shape
    sums = torch.zeros((tokens, groups * sizes[-1]), dtype=torch.float32, device=scores.device)
    programs = -(-indices.numel() // variant.block_k)
    memory_lookup_by_row_kernel[programs,](
        indices.flatten().argsort(),
        *inputs,
        indices.numel(),
        hits,
        groups,
        *sizes,
        sums,
        **variant.constants,
        num_warps=variant.num_warps,
    )
    output: torch.Tensor = sums.to(scores.dtype)
    return output
