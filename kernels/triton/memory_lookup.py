"""umv2::MemoryLookup on a GPU: programs sum rows of one token and group, several rows in flight.

A row is read once, in pieces of CHUNK elements that lie within a warp: a pre-value's product with the query is summed
by shuffles, and a value is added lane by lane, so that warps meet once, at the end. The indices of the next rows are
loaded before the present ones are waited for. Addresses have 64 bits, and sums are fp32.

A hit whose index lies outside the table, or whose group outside the groups, adds nothing.

Shape suffixes: K hits of a block, C elements of a piece; P pre-value, V value, S splits.
"""

import triton
import triton.language as tl

__all__ = ["memory_lookup_by_row_kernel", "memory_lookup_kernel", "memory_lookup_sum_kernel"]


@triton.jit
def memory_lookup_kernel(
    indices,
    scores,
    group,
    query,
    row_scales,
    rows,
    hits,
    table_rows,
    rows_per_shard,
    pre_value_dim,
    value_dim,
    share,
    output,
    CORES: tl.constexpr,
    GELU: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECES_P: tl.constexpr,
    PIECES_V: tl.constexpr,
):
    """output[t, g, part c] = sum over hits k of group g of act(row[:P] . query[t]) * scores[t, k, c] * row[P:][part c].

    Grid: (tokens, groups, splits); a split sums `share` hits of its token. Without splits, output is the op's.

    Args:
        indices: int64 [T, K].
        scores: [T, K, C].
        group: int64 [T, K], or None with one group.
        query: [T, P], or None without pre-values.
        row_scales: fp32 [rows, 2], or None if rows are not int8.
        rows: tuple of shards [rows_per_shard, P + V].
        hits, table_rows, rows_per_shard, pre_value_dim, value_dim: K, rows of all shards, rows of a shard, P, V.
        share: hits of a split, or None without splits.
        output: [T, G, V], in the dtype of scores; with splits fp32 [T, G, S, V], for `memory_lookup_sum_kernel`.
        CORES, GELU: C; apply GELU to the pre-score.
        ALIGNMENT: bytes that divide the address of every pre-value and value.
        BLOCK_K, CHUNK: hits at once, elements of a piece; powers of two.
        PIECES_P, PIECES_V: pieces that cover P and V.
    """
    token, own_group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, end = 0, hits
    if share is not None:
        first = tl.program_id(2) * share
        end = tl.minimum(first + share, hits)
    x = tl.arange(0, CHUNK)
    query_XC = ()
    for j in tl.static_range(PIECES_P):
        p = j * CHUNK + x
        piece_C = tl.load(query + token * pre_value_dim + p, mask=p < pre_value_dim, other=0.0)
        query_XC = query_XC + (piece_C.to(tl.float32)[None, :],)
    sum_KC = ()
    for _ in tl.static_range(PIECES_V):
        sum_KC = sum_KC + (tl.zeros([BLOCK_K, CHUNK], dtype=tl.float32),)
    k = tl.arange(0, BLOCK_K)
    own_hits = token * hits
    index_K = _own_index(indices, group, own_hits, first + k, end, own_group)
    for start in range(first, end, BLOCK_K):
        next_K = _own_index(indices, group, own_hits, start + BLOCK_K + k, end, own_group)
        weighted_KC = _weighted_values(
            index_K, scores, query_XC, row_scales, rows, own_hits + start + k, x,
            table_rows, rows_per_shard, pre_value_dim, value_dim, CORES, GELU, ALIGNMENT, CHUNK, PIECES_P, PIECES_V,
        )  # fmt: skip
        added_KC = ()
        for j in tl.static_range(PIECES_V):
            added_KC = added_KC + (sum_KC[j] + weighted_KC[j],)
        sum_KC = added_KC
        index_K = next_K
    place = token * tl.num_programs(1) + own_group
    if share is not None:
        place = place * tl.num_programs(2) + tl.program_id(2)
    for j in tl.static_range(PIECES_V):
        v = j * CHUNK + x
        sum_C = tl.sum(sum_KC[j], 0).to(output.dtype.element_ty)
        tl.store(output + place * value_dim + v, sum_C, mask=v < value_dim)


@triton.jit
def memory_lookup_sum_kernel(sums, splits, value_dim, output, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr):
    """output[t, g] = sums[t, g, 0] + sums[t, g, 1] + ..., always in the same order.

    Grid: (tokens, groups).

    Args:
        sums: fp32 [T, G, S, V].
        splits, value_dim: S, V.
        output: [T, G, V].
        BLOCK_S, BLOCK_V: powers of two: splits at once; not below V.
    """
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    v = tl.arange(0, BLOCK_V)
    sum_SV = tl.zeros([BLOCK_S, BLOCK_V], dtype=tl.float32)
    for start in range(0, splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        live_SV = (s < splits)[:, None] & (v < value_dim)[None, :]
        sum_SV += tl.load(sums + ((place * splits + s) * value_dim)[:, None] + v[None, :], mask=live_SV, other=0.0)
    tl.store(output + place * value_dim + v, tl.sum(sum_SV, 0).to(output.dtype.element_ty), mask=v < value_dim)


@triton.jit
def memory_lookup_by_row_kernel(
    order,
    indices,
    scores,
    group,
    query,
    row_scales,
    rows,
    count,
    hits,
    groups,
    table_rows,
    rows_per_shard,
    pre_value_dim,
    value_dim,
    sums,
    CORES: tl.constexpr,
    GELU: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECES_P: tl.constexpr,
    PIECES_V: tl.constexpr,
):
    """The same for prefill, where tokens share rows: programs take hits in the order of their rows.

    Hits of one row lie side by side in `order`, so that a row that several tokens hit comes from memory once and then
    from cache. Grid: (hits of all tokens / BLOCK_K,).

    Args:
        order: int64 [T*K], places in `indices` that sort it.
        count: T*K.
        groups: G.
        sums: fp32 [T, G, V], zeros; each hit is added.

    The others are those of `memory_lookup_kernel`.
    """
    slot = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    live_K = slot < count
    place_K = tl.load(order + slot, mask=live_K, other=0)
    index_K = tl.load(indices + place_K, mask=live_K, other=-1)
    token_K = place_K // hits
    sum_K = token_K * groups
    if group is not None:
        group_K = tl.load(group + place_K, mask=live_K, other=-1)
        index_K = tl.where((group_K >= 0) & (group_K < groups), index_K, -1)
        sum_K += group_K
    live_K = _within(index_K, table_rows)
    x = tl.arange(0, CHUNK)
    query_XC = ()
    for j in tl.static_range(PIECES_P):
        p = j * CHUNK + x
        piece_KC = tl.load(
            query + (token_K * pre_value_dim)[:, None] + p[None, :],
            mask=live_K[:, None] & (p < pre_value_dim)[None, :],
            other=0.0,
        )
        query_XC = query_XC + (piece_KC.to(tl.float32),)
    weighted_KC = _weighted_values(
        index_K, scores, query_XC, row_scales, rows, place_K, x,
        table_rows, rows_per_shard, pre_value_dim, value_dim, CORES, GELU, ALIGNMENT, CHUNK, PIECES_P, PIECES_V,
    )  # fmt: skip
    for j in tl.static_range(PIECES_V):
        v = j * CHUNK + x
        tl.atomic_add(
            sums + (sum_K * value_dim)[:, None] + v[None, :],
            weighted_KC[j],
            mask=live_K[:, None] & (v < value_dim)[None, :],
            sem="relaxed",
        )


@triton.jit
def _own_index(indices, group, own_hits, k, end, own_group):
    """The rows of hits k; -1 past the end, and for a hit of another group, whose row another program loads."""
    index_K = tl.load(indices + own_hits + k, mask=k < end, other=-1)
    if group is not None:
        index_K = tl.where(tl.load(group + own_hits + k, mask=k < end, other=-1) == own_group, index_K, -1)
    return index_K


@triton.jit
def _within(index_K, table_rows):
    """Whether indices name rows; ptxas makes one comparison of the two."""
    return (index_K >= 0) & (index_K < table_rows)


@triton.jit
def _weighted_values(
    index_K, scores, query_XC, row_scales, rows, place_K, x,
    table_rows, rows_per_shard, pre_value_dim, value_dim, CORES: tl.constexpr, GELU: tl.constexpr,
    ALIGNMENT: tl.constexpr, CHUNK: tl.constexpr, PIECES_P: tl.constexpr, PIECES_V: tl.constexpr,
):  # fmt: skip
    """The values of hits, each part times its score and the pre-score: PIECES_V pieces of fp32 [K, C]."""
    live_K = _within(index_K, table_rows)
    index_K = tl.where(live_K, index_K, 0)
    address_K = _row_addresses(index_K, rows, rows_per_shard, pre_value_dim + value_dim)
    # All loads come before what waits for the first of them.
    pre_value_KC = _load_pieces(address_K, rows, 0, pre_value_dim, x, live_K, ALIGNMENT, CHUNK, PIECES_P)
    value_KC = _load_pieces(address_K, rows, pre_value_dim, value_dim, x, live_K, ALIGNMENT, CHUNK, PIECES_V)
    score_K = ()
    for c in tl.static_range(CORES):
        score_K = score_K + (tl.load(scores + place_K * CORES + c, mask=live_K, other=0.0).to(tl.float32),)
    weight_K = tl.full(index_K.shape, 1.0, dtype=tl.float32)
    if PIECES_P > 0:
        product_KC = pre_value_KC[0].to(tl.float32) * query_XC[0]
        for j in tl.static_range(1, PIECES_P):
            product_KC += pre_value_KC[j].to(tl.float32) * query_XC[j]
        weight_K = tl.sum(product_KC, 1)
        if row_scales is not None:
            weight_K *= tl.load(row_scales + 2 * index_K, mask=live_K, other=0.0)
        if GELU:
            weight_K = 0.5 * weight_K * (1.0 + tl.math.erf(weight_K * 0.70710678118654752))
    if row_scales is not None:
        weight_K *= tl.load(row_scales + 2 * index_K + 1, mask=live_K, other=0.0)
    # A query of inf times the zeros that a dead hit loads is NaN.
    weight_K = tl.where(live_K, weight_K, 0.0)
    weighted_KC = ()
    for j in tl.static_range(PIECES_V):
        weight_KC = (score_K[0] * weight_K)[:, None]
        if CORES > 1:
            part_C = (j * CHUNK + x) // (value_dim // CORES)
            for c in tl.static_range(1, CORES):
                weight_KC = tl.where((part_C == c)[None, :], (score_K[c] * weight_K)[:, None], weight_KC)
        weighted_KC = weighted_KC + (weight_KC * value_KC[j].to(tl.float32),)
    return weighted_KC


@triton.jit
def _row_addresses(index_K, rows, rows_per_shard, width):
    """Addresses of rows in their shards, int64 [K]."""
    row_bytes = width * (rows[0].dtype.element_ty.primitive_bitwidth // 8)
    if len(rows) == 1:
        return rows[0].to(tl.int64) + index_K * row_bytes
    shard_K = index_K // rows_per_shard
    base_K = tl.full(index_K.shape, 0, dtype=tl.int64)
    for s in tl.static_range(len(rows)):
        base_K = tl.where(shard_K == s, rows[s].to(tl.int64), base_K)
    return base_K + (index_K - shard_K * rows_per_shard) * row_bytes


@triton.jit
def _load_pieces(
    address_K, rows, start, size, x, live_K, ALIGNMENT: tl.constexpr, CHUNK: tl.constexpr, PIECES: tl.constexpr
):
    """Columns start to start + size of rows, piece by piece [K, C]; zeros where a hit is not live."""
    start_bytes = start * (rows[0].dtype.element_ty.primitive_bitwidth // 8)
    pointer_K = (address_K + start_bytes).to(tl.pointer_type(rows[0].dtype.element_ty))
    # Once a number, an address has lost what is known of its alignment, and the loads would not be vectors.
    pointer_K1 = tl.multiple_of(pointer_K[:, None], [ALIGNMENT, ALIGNMENT])
    pieces_KC = ()
    for j in tl.static_range(PIECES):
        column_C = j * CHUNK + x
        live_KC = live_K[:, None] & (column_C < size)[None, :]
        pieces_KC = pieces_KC + (tl.load(pointer_K1 + column_C[None, :], mask=live_KC, other=0),)
    return pieces_KC
