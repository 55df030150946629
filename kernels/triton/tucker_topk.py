"""umv2::TuckerTopK on a GPU: a program retrieves the hits of one token and head, or several share their grid of cells.

The highest of many scores are selected by radix: a histogram of 5 bits of the keys says in which of 32 bins the last
one to be chosen lies, then of the next 5, until all keys of that bin are chosen, which takes seven times at the most.
32 bins are a lane each, so that only the histogram itself makes warps meet. Nothing is sorted: a last histogram turns
the running count of the chosen into their places, in ascending order.

Of equal scores the lowest address wins, and -0 equals +0. NaN ranks like -inf: it is returned only for want of numbers,
and then with its score, NaN.

Shape suffixes: N keys of a block, M chosen keys of a side, R Tucker ranks, I rows of the grid of chosen keys in a
block, X cells of these, B bins.
"""

import triton
import triton.language as tl

__all__ = ["tucker_topk_kernel", "tucker_topk_merge_kernel"]

BIN_BITS = tl.constexpr(5)
BINS = tl.constexpr(32)


@triton.jit
def tucker_topk_kernel(
    row_scores,
    col_scores,
    u,
    v,
    cores,
    keys_per_side,
    row_topk,
    topk,
    addresses,
    scores,
    keys,
    RANKS: tl.constexpr,
    CORES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Top keys of each side by merged scores, then the top cells of their grid by Tucker scores.

    Grid: (tokens, heads, parts). Without parts the outputs are the op's. A part looks at BLOCK_I rows of the grid, and
    `tucker_topk_merge_kernel` chooses among what the parts have chosen.

    Args:
        row_scores, col_scores: [T, H, N, R].
        u, v: [H, R].
        cores: [C, H, R, R].
        keys_per_side, row_topk, topk: N, M, K.
        addresses: int64 [T, H*K]; with parts [T, H, parts, K], -1 where a part has fewer cells.
        scores: [T, H*K, C], in the dtype of row_scores; with parts [T, H, parts, K, C].
        keys: with parts uint32 [T, H, parts, K], total scores in their order; or None.
        RANKS, CORES: R and C.
        BLOCK_N, BLOCK_I: keys, and rows of the grid, that are looked at together.
        BLOCK_M, BLOCK_K: powers of two, not below M and K.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads = tl.num_programs(1)
    own_rows = row_scores + (token * heads + head) * keys_per_side * RANKS
    own_cols = col_scores + (token * heads + head) * keys_per_side * RANKS
    own_cores = cores + head * RANKS * RANKS
    core_size = heads * RANKS * RANKS
    row_M = _top_keys(own_rows, u + head * RANKS, keys_per_side, row_topk, RANKS, BLOCK_N, BLOCK_M)
    col_M = _top_keys(own_cols, v + head * RANKS, keys_per_side, row_topk, RANKS, BLOCK_N, BLOCK_M)
    folded_M = _folded(own_cols, col_M, own_cores, core_size, RANKS, CORES)

    k = tl.arange(0, BLOCK_K)
    if keys is not None:
        part = tl.program_id(2)
        key_X, live_X = _cell_keys(
            own_rows, row_M, folded_M, part * BLOCK_I, row_topk, RANKS, CORES, BLOCK_I, BLOCK_M
        )  # fmt: skip
        chosen = tl.minimum(topk, tl.sum(live_X.to(tl.int32), 0))
        place_K = tl.where(k < chosen, _chosen_places(key_X, live_X, chosen, BLOCK_K), 0)
        output = ((token * heads + head) * tl.num_programs(2) + part) * topk + k
        tl.store(keys + output, tl.gather(key_X, place_K, 0), mask=k < chosen)
        _store_hits(
            own_rows, own_cols, own_cores, row_M, col_M, part * BLOCK_I * BLOCK_M + place_K, output, k < chosen,
            k < topk, core_size, keys_per_side, addresses, scores, RANKS, CORES, BLOCK_M,
        )  # fmt: skip
        return

    # The first block stays in registers; further ones are computed again in each pass.
    key_X, live_X = _cell_keys(own_rows, row_M, folded_M, 0, row_topk, RANKS, CORES, BLOCK_I, BLOCK_M)
    prefix, left = tl.full([], 0, dtype=tl.uint32), tl.full([], 0, dtype=tl.int32) + topk
    bits, open_bits = tl.full([], 0, dtype=tl.int32), tl.full([], 32, dtype=tl.int32)
    while open_bits > 0:
        count_B = _count(key_X, live_X, prefix, bits)
        if BLOCK_I < BLOCK_M:
            for start in range(BLOCK_I, row_topk, BLOCK_I):
                more_X, there_X = _cell_keys(own_rows, row_M, folded_M, start, row_topk, RANKS, CORES, BLOCK_I, BLOCK_M)
                count_B += _count(more_X, there_X, prefix, bits)
        prefix, left, bits, open_bits = _descend(count_B, prefix, left, bits)
    threshold = prefix << (32 - bits)
    run_K, above, equal = _runs(key_X, live_X, threshold, left, 0, 0, BLOCK_K)
    if BLOCK_I < BLOCK_M:
        for start in range(BLOCK_I, row_topk, BLOCK_I):
            more_X, there_X = _cell_keys(own_rows, row_M, folded_M, start, row_topk, RANKS, CORES, BLOCK_I, BLOCK_M)
            added_K, above, equal = _runs(more_X, there_X, threshold, left, above, equal, BLOCK_K)
            run_K += added_K
    live_K = k < topk
    cell_K = tl.where(live_K, tl.cumsum(run_K, 0), 0)
    _store_hits(
        own_rows, own_cols, own_cores, row_M, col_M, cell_K, (token * heads + head) * topk + k, live_K, live_K,
        core_size, keys_per_side, addresses, scores, RANKS, CORES, BLOCK_M,
    )  # fmt: skip


@triton.jit
def tucker_topk_merge_kernel(
    keys, part_addresses, part_scores, candidates, topk, addresses, scores,
    CORES: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The hits of the highest keys among those that the parts of one token and head have chosen.

    Parts follow each other as the rows of the grid do, so that of equal keys the lowest address comes first here too.
    Grid: (tokens, heads).

    Args:
        keys: uint32 [T, H, X].
        part_addresses: int64 [T, H, X], -1 where there is no hit.
        part_scores: [T, H, X, C].
        candidates, topk: X, K.
        addresses: int64 [T, H*K].
        scores: [T, H*K, C].
        CORES: C.
        BLOCK_X, BLOCK_K: powers of two, not below X and K; BLOCK_X at most 2**15.
    """
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    x, k = tl.arange(0, BLOCK_X), tl.arange(0, BLOCK_K)
    live_X = tl.load(part_addresses + place * candidates + x, mask=x < candidates, other=-1) >= 0
    key_X = tl.load(keys + place * candidates + x, mask=live_X, other=0)
    live_K = k < topk
    hit_K = place * candidates + tl.where(live_K, _chosen_places(key_X, live_X, topk, BLOCK_K), 0)
    output = place * topk + k
    tl.store(addresses + output, tl.load(part_addresses + hit_K), mask=live_K)
    for c in tl.static_range(CORES):
        tl.store(scores + output * CORES + c, tl.load(part_scores + hit_K * CORES + c), mask=live_K)


@triton.jit
def _chosen_places(key_X, live_X, count, BLOCK_K: tl.constexpr):
    """The places of the `count` highest keys of one block, in ascending order, int32 [BLOCK_K]."""
    prefix, left = tl.full([], 0, dtype=tl.uint32), tl.full([], 0, dtype=tl.int32) + count
    bits, open_bits = tl.full([], 0, dtype=tl.int32), tl.full([], 32, dtype=tl.int32)
    while open_bits > 0:
        prefix, left, bits, open_bits = _descend(_count(key_X, live_X, prefix, bits), prefix, left, bits)
    run_K, _, _ = _runs(key_X, live_X, prefix << (32 - bits), left, 0, 0, BLOCK_K)
    return tl.cumsum(run_K, 0)


@triton.jit
def _store_hits(
    own_rows, own_cols, own_cores, row_M, col_M, cell_K, output, chosen_K, live_K, core_size, keys_per_side,
    addresses, scores, RANKS: tl.constexpr, CORES: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Addresses and scores of chosen cells; -1 where a hit is live but none was chosen."""
    row_K = tl.gather(row_M, cell_K // BLOCK_M, 0)
    col_K = tl.gather(col_M, cell_K % BLOCK_M, 0)
    address_K = tl.where(chosen_K, row_K.to(tl.int64) * keys_per_side + col_K, -1)
    tl.store(addresses + output, address_K, mask=live_K)
    folded_K = _folded(own_cols, col_K, own_cores, core_size, RANKS, CORES)
    for c in tl.static_range(CORES):
        score_K = tl.zeros(cell_K.shape, dtype=tl.float32)
        for r in tl.static_range(RANKS):
            score_K += tl.load(own_rows + row_K * RANKS + r).to(tl.float32) * folded_K[c * RANKS + r]
        tl.store(scores + output * CORES + c, score_K.to(scores.dtype.element_ty), mask=chosen_K)


@triton.jit
def _top_keys(
    own_scores, weights, keys_per_side, row_topk, RANKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr
):
    """The M keys of the highest merged scores in ascending order, int32 [M]; key 0 in the places beyond."""
    key_N, live_N = _side_keys(own_scores, weights, 0, keys_per_side, RANKS, BLOCK_N)
    prefix, left = tl.full([], 0, dtype=tl.uint32), tl.full([], 0, dtype=tl.int32) + row_topk
    bits, open_bits = tl.full([], 0, dtype=tl.int32), tl.full([], 32, dtype=tl.int32)
    while open_bits > 0:
        count_B = _count(key_N, live_N, prefix, bits)
        for start in range(BLOCK_N, keys_per_side, BLOCK_N):
            more_N, there_N = _side_keys(own_scores, weights, start, keys_per_side, RANKS, BLOCK_N)
            count_B += _count(more_N, there_N, prefix, bits)
        prefix, left, bits, open_bits = _descend(count_B, prefix, left, bits)
    threshold = prefix << (32 - bits)
    run_M, above, equal = _runs(key_N, live_N, threshold, left, 0, 0, BLOCK_M)
    for start in range(BLOCK_N, keys_per_side, BLOCK_N):
        more_N, there_N = _side_keys(own_scores, weights, start, keys_per_side, RANKS, BLOCK_N)
        added_M, above, equal = _runs(more_N, there_N, threshold, left, above, equal, BLOCK_M)
        run_M += added_M
    return tl.where(tl.arange(0, BLOCK_M) < row_topk, tl.cumsum(run_M, 0), 0)


@triton.jit
def _side_keys(own_scores, weights, start, keys_per_side, RANKS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Merged scores of a block of keys, as keys of the selection; and which of them there are."""
    n = start + tl.arange(0, BLOCK_N)
    live_N = n < keys_per_side
    merged_N = tl.zeros([BLOCK_N], dtype=tl.float32)
    for r in tl.static_range(RANKS):
        score_N = tl.load(own_scores + n * RANKS + r, mask=live_N, other=0.0).to(tl.float32)
        merged_N += score_N * tl.load(weights + r).to(tl.float32)
    return _ordered(merged_N), live_N


@triton.jit
def _folded(own_cols, col_X, own_cores, core_size, RANKS: tl.constexpr, CORES: tl.constexpr):
    """Sum over s of core c[r, s] * col[s]: C*R tensors of fp32, once for a column instead of once for a cell."""
    folded = ()
    for c in tl.static_range(CORES):
        for r in tl.static_range(RANKS):
            sum_X = tl.zeros(col_X.shape, dtype=tl.float32)
            for s in tl.static_range(RANKS):
                weight = tl.load(own_cores + c * core_size + r * RANKS + s).to(tl.float32)
                sum_X += weight * tl.load(own_cols + col_X * RANKS + s).to(tl.float32)
            folded = folded + (sum_X,)
    return folded


@triton.jit
def _cell_keys(
    own_rows, row_M, folded_M, start, row_topk, RANKS: tl.constexpr, CORES: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Total Tucker scores of a block of rows of the grid, as keys; and which of them there are. Row-major."""
    i = start + tl.arange(0, BLOCK_I)
    row_I = row_M if BLOCK_I == BLOCK_M else tl.gather(row_M, tl.minimum(i, BLOCK_M - 1), 0)
    rank_I = ()
    for r in tl.static_range(RANKS):
        rank_I = rank_I + (tl.load(own_rows + row_I * RANKS + r).to(tl.float32),)
    total_IM = tl.zeros([BLOCK_I, BLOCK_M], dtype=tl.float32)
    for c in tl.static_range(CORES):
        score_IM = rank_I[0][:, None] * folded_M[c * RANKS][None, :]
        for r in tl.static_range(1, RANKS):
            score_IM += rank_I[r][:, None] * folded_M[c * RANKS + r][None, :]
        total_IM += score_IM
    live_IM = (i < row_topk)[:, None] & (tl.arange(0, BLOCK_M) < row_topk)[None, :]
    return tl.reshape(_ordered(total_IM), [BLOCK_I * BLOCK_M]), tl.reshape(live_IM, [BLOCK_I * BLOCK_M])


@triton.jit
def _ordered(score):
    """Scores as uint32 in their order."""
    # Comparisons with NaN are false.
    score = tl.where(score >= float("-inf"), score, float("-inf"))
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    # Negative floats order backwards as integers, and below the others: all their bits are turned, of others the sign.
    return (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)


@triton.jit
def _count(key, live, prefix, bits):
    """How many of the keys that begin with `prefix`, of so many bits, have each value in their next; int32 [B]."""
    width = tl.minimum(32 - bits, BIN_BITS)
    own = key >> (32 - bits - width)
    here = live & (own >> width == prefix)
    return tl.histogram((own - (prefix << width)).to(tl.int32, bitcast=True), BINS, mask=here)


@triton.jit
def _descend(count_B, prefix, left, bits):
    """The prefix with the next bits of the last key that is chosen.

    Returns:
        the prefix; how many of its keys are chosen; its bits; how many more must be looked at, 0 where all are chosen.
    """
    # From the highest bin down; a bin is above the last chosen key while fewer than `left` lie in it and higher.
    from_top_B = tl.cumsum(count_B, 0, reverse=True)
    last = tl.sum((from_top_B >= left).to(tl.int32), 0) - 1
    b = tl.arange(0, BINS)
    left -= tl.sum(tl.where(b > last, count_B, 0), 0)
    here = tl.sum(tl.where(b == last, count_B, 0), 0)
    width = tl.minimum(32 - bits, BIN_BITS)
    bits += width
    return (prefix << width) + last.to(tl.uint32), left, bits, tl.where(here == left, 0, 32 - bits)


@triton.jit
def _runs(key, live, threshold, left, above, equal, COUNT: tl.constexpr):
    """How many places follow the k-th chosen one before the next, int32 [COUNT]: its sums are the places of the chosen.

    Args:
        key, live: of a block of at most 2**15 places.
        threshold: the last key that is chosen, or one below it and above all that are not.
        left: of the keys equal to it, how many are, the lowest places first.
        above, equal: keys above the threshold and equal to it in the blocks before.

    Returns:
        runs; above and equal with this block.
    """
    # Both are counted by one scan, 16 bits each.
    kind = tl.where(live & (key > threshold), 1, 0) + tl.where(live & (key == threshold), 1 << 16, 0)
    so_far = tl.cumsum(kind, 0)
    chosen = above + (so_far & 0xFFFF) + tl.minimum(equal + (so_far >> 16), left)
    runs = tl.histogram(chosen, COUNT, mask=chosen < COUNT)
    total = tl.sum(kind, 0)
    return runs, above + (total & 0xFFFF), equal + (total >> 16)
