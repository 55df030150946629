"""The former top-k: kept until a GPU has timed it beside the present one (`make gpu`), then one of them goes.

Blocks of keys, then of cells, are sorted and merged into the best so far.
"""

import torch
import triton
import triton.language as tl

__all__ = ["former_topk"]


def former_topk(
    row_scores: torch.Tensor,
    col_scores: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    cores: torch.Tensor,
    row_topk: int,
    topk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """umv2::TuckerTopK."""
    tokens, heads, keys_per_side, ranks = row_scores.shape
    addresses = row_scores.new_empty((tokens, heads * topk), dtype=torch.int64)
    scores = row_scores.new_empty((tokens, heads * topk, len(cores)))
    block_m, block_k = (max(2, 1 << (size - 1).bit_length()) for size in (row_topk, topk))
    largest = max(block_m, block_k)
    former_topk_kernel[tokens, heads](
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
        RANKS=ranks,
        CORES=len(cores),
        BLOCK_N=max(256 if largest <= 32 else 512, 2 * block_m),
        BLOCK_M=block_m,
        BLOCK_X=max(512, 2 * block_k),
        BLOCK_K=block_k,
        num_warps=4 if largest <= 32 else 8 if largest <= 256 else 16,
    )
    return addresses, scores


@triton.jit
def former_topk_kernel(
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
    RANKS: tl.constexpr,
    CORES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Top keys of each side by merged scores, then the top cells of their grid by Tucker scores.

    Grid: (tokens, heads).

    Args:
        row_scores, col_scores: [T, H, N, R].
        u, v: [H, R].
        cores: [C, H, R, R].
        keys_per_side, row_topk, topk: N, M, K.
        addresses: int64 [T, H*K].
        scores: [T, H*K, C], in the dtype of row_scores.
        RANKS, CORES: R and C.
        BLOCK_N, BLOCK_X: keys and cells that are compared at once.
        BLOCK_M, BLOCK_K: powers of two, not below M and K; at most BLOCK_N and BLOCK_X.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads = tl.num_programs(1)
    own_rows = row_scores + (token * heads + head) * keys_per_side * RANKS
    own_cols = col_scores + (token * heads + head) * keys_per_side * RANKS
    row_M = _top_keys(own_rows, u + head * RANKS, keys_per_side, RANKS, BLOCK_N, BLOCK_M)
    col_M = _top_keys(own_cols, v + head * RANKS, keys_per_side, RANKS, BLOCK_N, BLOCK_M)
    m = tl.arange(0, BLOCK_M)
    # A padded place of the grid never wins, but it is gathered: let it be a key that exists.
    row_M = tl.where(m < row_topk, row_M, 0)
    col_M = tl.where(m < row_topk, col_M, 0)

    best_K = tl.full([BLOCK_K], -0x8000000000000000, dtype=tl.int64)
    for start in range(0, row_topk * row_topk, BLOCK_X):
        x = start + tl.arange(0, BLOCK_X)
        live_X = x < row_topk * row_topk
        row_X = tl.gather(row_M, tl.where(live_X, x // row_topk, 0), 0)
        col_X = tl.gather(col_M, tl.where(live_X, x % row_topk, 0), 0)
        total_X = tl.zeros([BLOCK_X], dtype=tl.float32)
        for c in tl.static_range(CORES):
            total_X += _tucker_scores(own_rows, own_cols, row_X, col_X, cores, c, head, heads, RANKS)
        address_X = row_X * keys_per_side + col_X
        best_K = _merge(best_K, _ranked(total_X, address_X, live_X), BLOCK_K)
    k = tl.arange(0, BLOCK_K)
    live_K = k < topk
    address_K = tl.where(live_K, _place(best_K), 0)
    output = (token * heads + head) * topk + k
    tl.store(addresses + output, address_K, mask=live_K)
    row_K, col_K = address_K // keys_per_side, address_K % keys_per_side
    for c in tl.static_range(CORES):
        score_K = _tucker_scores(own_rows, own_cols, row_K, col_K, cores, c, head, heads, RANKS)
        tl.store(scores + output * CORES + c, score_K.to(scores.dtype.element_ty), mask=live_K)


@triton.jit
def _top_keys(own_scores, weights, keys_per_side, RANKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """The BLOCK_M keys of the highest merged scores, best first; int64 [M]."""
    best_M = tl.full([BLOCK_M], -0x8000000000000000, dtype=tl.int64)
    for start in range(0, keys_per_side, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        live_N = n < keys_per_side
        merged_N = tl.zeros([BLOCK_N], dtype=tl.float32)
        for r in tl.static_range(RANKS):
            score_N = tl.load(own_scores + n * RANKS + r, mask=live_N, other=0.0).to(tl.float32)
            merged_N += score_N * tl.load(weights + r).to(tl.float32)
        best_M = _merge(best_M, _ranked(merged_N, n.to(tl.int64), live_N), BLOCK_M)
    return _place(best_M)


@triton.jit
def _tucker_scores(own_rows, own_cols, row_X, col_X, cores, c, head, heads, RANKS: tl.constexpr):
    """Sum over r, s of row[r] * core c[r, s] * col[s], fp32 [X]."""
    score_X = tl.zeros(row_X.shape, dtype=tl.float32)
    for r in tl.static_range(RANKS):
        folded_X = tl.zeros(row_X.shape, dtype=tl.float32)
        for s in tl.static_range(RANKS):
            weight = tl.load(cores + ((c * heads + head) * RANKS + r) * RANKS + s).to(tl.float32)
            folded_X += weight * tl.load(own_cols + col_X * RANKS + s).to(tl.float32)
        score_X += tl.load(own_rows + row_X * RANKS + r).to(tl.float32) * folded_X
    return score_X


@triton.jit
def _ranked(score, place, live):
    """Scores and the places (below 2**31) that they come from as int64, in the order of the scores."""
    bits = score.to(tl.int32, bitcast=True)
    # Negative floats order backwards as integers: their magnitude bits are turned.
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return tl.where(live, (ordered << 32) | (0x7FFFFFFF - place), -0x8000000000000000)


@triton.jit
def _place(ranked):
    """The places of ranked scores."""
    return 0x7FFFFFFF - (ranked & 0x7FFFFFFF)


@triton.jit
def _merge(best, ranked, COUNT: tl.constexpr):
    """The COUNT highest of both, best first."""
    return tl.topk(tl.cat(best, tl.topk(ranked, COUNT), can_reorder=True), COUNT)
