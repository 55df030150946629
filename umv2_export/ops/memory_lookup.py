"""umv2::MemoryLookup: the weighted sum of the rows that a token activates.

    output[t, part c] = sum_k act(rows[i_k, :P] . query[t]) * scores[t, k, c] * rows[i_k, P:][part c]

A row holds a pre-value (P) and a value (V) side by side, one contiguous read per hit; the C parts of a value are
contiguous, each with its own score. With groups G > 1 the sum runs per group and the G sums are concatenated. Without
pre-values (P = 0) the pre-score is 1. Source: UltraMemV2, arXiv 2508.18756 (one-neuron experts).
"""

from collections.abc import Iterator, Sequence

import torch

__all__ = ["ACTIVATIONS", "NAME", "memory_lookup"]

NAME = "MemoryLookup"

ACTIVATIONS = ("none", "gelu")


@torch.library.custom_op(f"umv2::{NAME}", mutates_args=())
def memory_lookup(
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
) -> torch.Tensor:
    """Gather rows, score them against the query, and sum them; eager reference.

    Args:
        indices: int64 [T, K], physical rows.
        scores: [T, K, C], fp32 or fp16.
        group: int64 [T, K] from 0 to groups - 1; given if and only if groups > 1.
        query: [T, P], given if and only if pre_value_dim = P > 0.
        row_scales: fp32 [rows, 2], of the pre-value and the value part; given if and only if rows are int8.
        rows: shards [R_s, P + V] of fp32, fp16, bf16 or int8; row i is in shard i // rows_per_shard.
        pre_value_dim: P.
        activation: of the pre-score, "none" or "gelu" (exact).
        rows_per_shard: rows of every shard but the last.
        groups: G.

    Returns:
        [T, G*V], group-major, in the dtype of scores, accumulated in fp32.

    Raises:
        ValueError: shapes or attributes contradict each other.
        IndexError: an index is outside the table.
    """
    for problem in _problems(
        indices, scores, group, query, row_scales, rows, pre_value_dim, activation, rows_per_shard, groups
    ):
        raise ValueError(problem)
    row_TKX = _gather(indices, rows, rows_per_shard)
    value_TKV = row_TKX[..., pre_value_dim:]
    weight_TKC = scores.float()
    if row_scales is not None:
        value_TKV = value_TKV * row_scales[indices, 1, None]
    if query is not None:
        pre_score_TK = torch.einsum("tkp,tp->tk", row_TKX[..., :pre_value_dim], query.float())
        if row_scales is not None:
            pre_score_TK = pre_score_TK * row_scales[indices, 0]
        if activation == "gelu":
            pre_score_TK = torch.nn.functional.gelu(pre_score_TK)
        weight_TKC = weight_TKC * pre_score_TK[..., None]
    tokens, hits, cores = scores.shape
    part_TKCX = value_TKV.reshape(tokens, hits, cores, value_TKV.shape[-1] // cores)
    if group is None:
        summed = torch.einsum("tkc,tkcx->tcx", weight_TKC, part_TKCX)
    else:
        chosen_TKG = torch.nn.functional.one_hot(group, groups).float()
        summed = torch.einsum("tkg,tkc,tkcx->tgcx", chosen_TKG, weight_TKC, part_TKCX)
    return summed.flatten(1).to(scores.dtype)


@memory_lookup.register_kernel("cuda")
def _(
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
) -> torch.Tensor:
    from umv2_export.gpu.launch import launch_lookup  # noqa: PLC0415 - needs triton, an optional package

    for problem in _problems(
        indices, scores, group, query, row_scales, rows, pre_value_dim, activation, rows_per_shard, groups
    ):
        raise ValueError(problem)
    return launch_lookup(
        indices, scores, group, query, row_scales, rows, pre_value_dim, activation, rows_per_shard, groups
    )


@memory_lookup.register_fake
def _(
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
) -> torch.Tensor:
    return scores.new_empty((indices.shape[0], groups * (rows[0].shape[1] - pre_value_dim)))


def _gather(indices: torch.Tensor, rows: Sequence[torch.Tensor], rows_per_shard: int) -> torch.Tensor:
    """The rows `indices` [T, K] in fp32: [T, K, P + V]."""
    count = sum(len(shard) for shard in rows)
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= count):
        raise IndexError(
            f"indices reach from {int(indices.min())} to {int(indices.max())}, the table has rows 0 to {count - 1}"
        )
    flat = indices.reshape(-1)
    gathered = torch.empty((flat.numel(), rows[0].shape[1]), dtype=torch.float32)
    shard_of = flat // rows_per_shard
    for number, shard in enumerate(rows):
        here = (shard_of == number).nonzero()[:, 0]
        gathered[here] = shard.index_select(0, flat[here] - number * rows_per_shard).float()
    return gathered.reshape(*indices.shape, rows[0].shape[1])


def _problems(
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
) -> Iterator[str]:
    if indices.dim() != 2 or scores.dim() != 3 or scores.shape[:2] != indices.shape:
        yield f"indices [T, K] and scores [T, K, C] expected, got {list(indices.shape)} and {list(scores.shape)}"
    if not scores.shape[-1]:
        yield "scores have no parts: at least one core is needed"
    if not rows or any(shard.dim() != 2 or shard.shape[1] != rows[0].shape[1] for shard in rows):
        yield f"rows must be shards of equal width, got {[list(shard.shape) for shard in rows]}"
    if any(shard.dtype != rows[0].dtype for shard in rows):
        yield f"rows must be shards of one dtype, got {[str(shard.dtype) for shard in rows]}"
    if any(len(shard) != rows_per_shard for shard in rows[:-1]) or not 1 <= len(rows[-1]) <= rows_per_shard:
        yield f"shards of {[len(shard) for shard in rows]} rows do not fit rows_per_shard {rows_per_shard}"
    width = rows[0].shape[1]
    if not 0 <= pre_value_dim < width or (width - pre_value_dim) % scores.shape[2]:
        yield f"rows of {width} do not split into a pre-value of {pre_value_dim} and {scores.shape[2]} equal parts"
    if (query is not None) != (pre_value_dim > 0):
        yield f"pre_value_dim is {pre_value_dim}, and query is {'missing' if query is None else 'given'}"
    if query is not None and query.shape != (indices.shape[0], pre_value_dim):
        yield f"query must be [{indices.shape[0]}, {pre_value_dim}], got {list(query.shape)}"
    if (row_scales is not None) != (rows[0].dtype == torch.int8):
        yield f"rows are {rows[0].dtype}, and row_scales is {'missing' if row_scales is None else 'given'}"
    if row_scales is not None and row_scales.shape != (sum(len(shard) for shard in rows), 2):
        yield f"row_scales must be [rows, 2], got {list(row_scales.shape)}"
    if (group is not None) != (groups > 1) or (group is not None and group.shape != indices.shape):
        yield f"groups is {groups}, and group is {'missing' if group is None else list(group.shape)}"
    if activation not in ACTIVATIONS:
        yield f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
