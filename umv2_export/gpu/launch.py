"""The GPU kernels as implementations of the torch ops.

On tensors of a CPU they run in Triton's interpreter, if the environment asks for it (TRITON_INTERPRET=1).
"""

from collections.abc import Sequence

import torch

from umv2_export.errors import Unsupported
from umv2_export.gpu.variants import MAX_ADDRESSES, LookupVariant, is_gelu, lookup_variant, topk_variant
from umv2_export.kernels.triton.memory_lookup import memory_lookup_by_row_kernel, memory_lookup_kernel
from umv2_export.kernels.triton.tucker_topk import tucker_topk_kernel

__all__ = ["launch_lookup", "launch_topk", "shares_rows"]

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
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `umv2_export.ops.tucker_topk`.

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
    if tokens:
        tucker_topk_kernel[tokens, heads](
            *(tensor.contiguous() for tensor in (row_scores, col_scores, u, v, cores)),
            keys_per_side,
            row_topk,
            topk,
            addresses,
            scores,
            **variant.constants,
            num_warps=variant.num_warps,
        )
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
    by_row: bool | None = None,
) -> torch.Tensor:
    """As `umv2_export.ops.memory_lookup`; `by_row`: take hits in the order of rows (None: where tokens share them)."""
    tokens, hits, cores = scores.shape
    value_dim = rows[0].shape[1] - pre_value_dim
    if not tokens:
        return scores.new_empty((0, groups * value_dim))
    variant = lookup_variant(
        scores.dtype,
        rows[0].dtype,
        shards=len(rows),
        cores=cores,
        grouped=group is not None,
        pre_value_dim=pre_value_dim,
        value_dim=value_dim,
        gelu=is_gelu(activation),
    )
    indices, scores = indices.contiguous(), scores.contiguous()
    optional = tuple(None if tensor is None else tensor.contiguous() for tensor in (group, query, row_scales))
    shards = tuple(shard.contiguous() for shard in rows)
    sizes = (rows_per_shard, pre_value_dim, value_dim)
    if shares_rows(indices.numel(), sum(len(shard) for shard in rows)) if by_row is None else by_row:
        return _launch_by_row(variant, indices, scores, optional, shards, sizes, groups)
    output = scores.new_empty((tokens, groups * value_dim))
    memory_lookup_kernel[tokens, groups](
        indices,
        scores,
        *optional,
        shards,
        hits,
        *sizes,
        output,
        **variant.constants,
        num_warps=variant.num_warps,
    )
    return output


def shares_rows(hits: int, rows: int) -> bool:
    """Tokens hit the same rows often enough to take hits in the order of rows."""
    return hits >= SHARED_HITS * rows


def _launch_by_row(
    variant: LookupVariant,
    indices: torch.Tensor,
    scores: torch.Tensor,
    optional: tuple[torch.Tensor | None, ...],
    shards: tuple[torch.Tensor, ...],
    sizes: tuple[int, int, int],
    groups: int,
) -> torch.Tensor:
    tokens, hits = indices.shape
    sums = torch.zeros((tokens, groups * sizes[2]), dtype=torch.float32, device=scores.device)
    programs = -(-indices.numel() // variant.block_k)
    memory_lookup_by_row_kernel[programs,](
        indices.flatten().argsort(),
        indices,
        scores,
        *optional,
        shards,
        indices.numel(),
        hits,
        groups,
        *sizes,
        sums,
        **variant.constants,
        num_warps=variant.num_warps,
    )
    return sums.to(scores.dtype)
