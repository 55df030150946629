"""The former lookup: kept until a GPU has timed it beside the present one (`make gpu`), then one of them goes.

A program sums the rows of one token and group in blocks of powers of two, whose dot products cross warps.
"""

import torch
import triton
import triton.language as tl

from umv2_export.gpu.lookup_variants import lookup_variant

__all__ = ["former_lookup"]


def former_lookup(
    indices: torch.Tensor, scores: torch.Tensor, query: torch.Tensor | None, table: torch.Tensor, pre_value_dim: int
) -> torch.Tensor:
    """umv2::MemoryLookup of one shard of floats, without groups and activation: [T, V]."""
    tokens, hits, cores = scores.shape
    value_dim = table.shape[1] - pre_value_dim
    block_p, block_v = (1 << (max(size, 16) - 1).bit_length() for size in (pre_value_dim, value_dim))
    held = (block_p if pre_value_dim else 0) + block_v
    num_warps = 4 if held <= 512 else 8
    variant = lookup_variant(
        scores.dtype,
        table.dtype,
        shards=1,
        cores=cores,
        grouped=False,
        pre_value_dim=pre_value_dim,
        value_dim=value_dim,
        gelu=False,
    )
    output = scores.new_empty((tokens, value_dim))
    former_lookup_kernel[tokens, 1](
        indices,
        scores,
        None,
        query,
        None,
        (table,),
        hits,
        len(table),
        pre_value_dim,
        value_dim,
        output,
        CORES=cores,
        GELU=False,
        ALIGNMENT=variant.constants["ALIGNMENT"],
        BLOCK_K=max(1, min(32, 8192 * num_warps // 4 // (1 << (held - 1).bit_length()))),
        BLOCK_P=block_p,
        BLOCK_V=block_v,
        num_warps=num_warps,
    )
    return output


@triton.jit
def former_lookup_kernel(
    indices,
    scores,
    group,
    query,
    row_scales,
    rows,
    hits,
    rows_per_shard,
    pre_value_dim,
    value_dim,
    output,
    CORES: tl.constexpr,
    GELU: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """output[t, g, part c] = sum over hits k of group g of act(row[:P] . query[t]) * scores[t, k, c] * row[P:][part c].

    Grid: (tokens, groups).

    Args:
        indices: int64 [T, K].
        scores: [T, K, C].
        group: int64 [T, K], or None with one group.
        query: [T, P], or None without pre-values.
        row_scales: fp32 [rows, 2], or None if rows are not int8.
        rows: tuple of shards [rows_per_shard, P + V].
        hits, rows_per_shard, pre_value_dim, value_dim: K, rows of a shard, P, V.
        output: [T, G, V], in the dtype of scores.
        CORES, GELU: C; apply GELU to the pre-score.
        ALIGNMENT: bytes that divide the address of every pre-value and value.
        BLOCK_K, BLOCK_P, BLOCK_V: powers of two: hits at once; not below P and V.
    """
    token = tl.program_id(0).to(tl.int64)
    own_group = tl.program_id(1)
    p, v = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_V)
    query_XP = None
    if query is not None:
        query_P = tl.load(query + token * pre_value_dim + p, mask=p < pre_value_dim, other=0.0)
        query_XP = query_P.to(tl.float32)[None, :]
    sum_V = tl.zeros([BLOCK_V], dtype=tl.float32)
    for start in range(0, hits, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        live_K = k < hits
        place_K = token * hits + k
        if group is not None:
            # A hit of another group is masked, so that every row is loaded by one program only.
            live_K = live_K & (tl.load(group + place_K, mask=live_K, other=-1) == own_group)
        weighted_KV = _weighted_values(
            indices, scores, query_XP, row_scales, rows, place_K, live_K, p, v,
            rows_per_shard, pre_value_dim, value_dim, CORES, GELU, ALIGNMENT,
        )  # fmt: skip
        sum_V += tl.sum(weighted_KV, 0)
    place = (token * tl.num_programs(1) + own_group) * value_dim + v
    tl.store(output + place, sum_V.to(output.dtype.element_ty), mask=v < value_dim)


@triton.jit
def _weighted_values(
    indices, scores, query_XP, row_scales, rows, place_K, live_K, p, v,
    rows_per_shard, pre_value_dim, value_dim, CORES: tl.constexpr, GELU: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """The values of the hits at `place_K`, each part times its score and the pre-score; fp32 [K, V]."""
    index_K = tl.load(indices + place_K, mask=live_K, other=0)
    address_K = _row_addresses(index_K, rows, rows_per_shard, pre_value_dim + value_dim)
    value_KV = _load_part(address_K, rows, pre_value_dim, value_dim, v, live_K, ALIGNMENT)
    weight_K = tl.full(place_K.shape, 1.0, dtype=tl.float32)
    if query_XP is not None:
        pre_value_KP = _load_part(address_K, rows, 0, pre_value_dim, p, live_K, ALIGNMENT)
        weight_K = tl.sum(pre_value_KP * query_XP, 1)
        if row_scales is not None:
            weight_K *= tl.load(row_scales + 2 * index_K, mask=live_K, other=0.0)
        if GELU:
            weight_K = 0.5 * weight_K * (1.0 + tl.math.erf(weight_K * 0.70710678118654752))
    if row_scales is not None:
        weight_K *= tl.load(row_scales + 2 * index_K + 1, mask=live_K, other=0.0)
    part_V = v // (value_dim // CORES)
    weight_KV = tl.zeros(value_KV.shape, dtype=tl.float32)
    for c in tl.static_range(CORES):
        score_K = tl.load(scores + place_K * CORES + c, mask=live_K, other=0.0).to(tl.float32)
        weight_KV = tl.where(part_V[None, :] == c, (score_K * weight_K)[:, None], weight_KV)
    return weight_KV * value_KV


@triton.jit
def _row_addresses(index_K, rows, rows_per_shard, width):
    """Addresses of rows in their shards, int64 [K]."""
    shard_K = index_K // rows_per_shard
    base_K = tl.full(index_K.shape, 0, dtype=tl.int64)
    for s in tl.static_range(len(rows)):
        base_K = tl.where(shard_K == s, rows[s].to(tl.int64), base_K)
    row_bytes = width * (rows[0].dtype.element_ty.primitive_bitwidth // 8)
    return base_K + (index_K - shard_K * rows_per_shard) * row_bytes


@triton.jit
def _load_part(address_K, rows, start, size, columns, live_K, ALIGNMENT: tl.constexpr):
    """Columns start to start + size of rows, in fp32; zeros where a hit is not live."""
    start_bytes = start * (rows[0].dtype.element_ty.primitive_bitwidth // 8)
    pointer_K = (address_K + start_bytes).to(tl.pointer_type(rows[0].dtype.element_ty))
    # Once a number, an address has lost what is known of its alignment, and the loads would not be vectors.
    pointer_K1 = tl.multiple_of(pointer_K[:, None], [ALIGNMENT, ALIGNMENT])
    live_KX = live_K[:, None] & (columns < size)[None, :]
    return tl.load(pointer_K1 + columns[None, :], mask=live_KX, other=0).to(tl.float32)
