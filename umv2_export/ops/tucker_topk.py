"""umv2::TuckerTopK: the rows of a memory layer that a token activates, and their scores.

    stage 1   I = top-M of sum_r row_scores[..., r] * u[r],   J = top-M of sum_r col_scores[..., r] * v[r]
    stage 2   G_c = row_scores[I] @ cores[c] @ col_scores[J]^T,   best = top-k of sum_c G_c
    output    addresses = I[best // M] * N + J[best % M],   scores = G_c[best]

Scores are raw: no softmax, any sign. Of equal scores, -0 and +0 among them, those of the lowest keys are kept in stage
1 and those of the lowest addresses in stage 2. NaN, which infinite scores can give, ranks with minus infinity. The
order of the hits is unspecified. This reference and the kernels keep that rule; the ONNX body keeps it in stage 1, and
in stage 2 ranks equal cells by the order in which the runtime returns the keys. Source: UltraMemV2, arXiv 2508.18756;
the Tucker retrieval is that of UltraMem, arXiv 2411.12364, section 3.
"""

import onnx_ir as ir
import torch
from onnx.defs import OpSchema

from umv2_export.ops.domain import op_schema, parse_body

__all__ = ["NAME", "function_body", "schema", "tucker_topk"]

NAME = "TuckerTopK"


@torch.library.custom_op(f"umv2::{NAME}", mutates_args=())
def tucker_topk(
    row_scores: torch.Tensor,
    col_scores: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    cores: torch.Tensor,
    row_topk: int,
    topk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two-stage top-k over the product of row and column keys; eager reference.

    Args:
        row_scores: [T, H, N, R], fp32 or fp16.
        col_scores: like row_scores.
        u: [H, R], merges the ranks of row scores in stage 1.
        v: [H, R], of column scores.
        cores: [C, H, R, R].
        row_topk: row keys, and column keys, that survive stage 1 [M].
        topk: hits per head; at most row_topk ** 2.

    Returns:
        addresses: int64 [T, H*topk], virtual (row * N + column).
        scores: [T, H*topk, C], in the dtype of row_scores, accumulated in fp32.

    Raises:
        ValueError: shapes or top-k sizes contradict each other.
    """
    _check(row_scores, col_scores, u, v, cores, row_topk, topk)
    row_THNR, col_THNR = row_scores.float(), col_scores.float()
    row_index_THM = _best((row_THNR * u.float()[:, None]).sum(-1), row_topk)
    col_index_THM = _best((col_THNR * v.float()[:, None]).sum(-1), row_topk)
    ranks = cores.shape[-1]
    row_THMR = row_THNR.gather(2, row_index_THM[..., None].expand(-1, -1, -1, ranks))
    col_THMR = col_THNR.gather(2, col_index_THM[..., None].expand(-1, -1, -1, ranks))
    grid_THCMM = row_THMR[:, :, None] @ cores.float().transpose(0, 1) @ col_THMR.transpose(2, 3)[:, :, None]
    grid_THCX = grid_THCMM.flatten(3)
    best_THK = _best(grid_THCX.sum(2), topk)
    scores_THCK = grid_THCX.gather(3, best_THK[:, :, None].expand(-1, -1, cores.shape[0], -1))
    keys_per_side = row_scores.shape[2]
    addresses_THK = row_index_THM.gather(2, best_THK // row_topk) * keys_per_side + col_index_THM.gather(
        2, best_THK % row_topk
    )
    return addresses_THK.flatten(1), scores_THCK.transpose(2, 3).flatten(1, 2).to(row_scores.dtype).contiguous()


def _best(scores_THX: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest scores [T, H, count], ascending; of equal scores the lowest indices.

    torch.topk promises no order among equal scores: it gives the value of the last that is kept, no more.
    """
    ranked_THX = scores_THX.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    least_TH1 = ranked_THX.topk(count).values[..., -1:]
    equal_THX = ranked_THX == least_TH1
    above_THX = ranked_THX > least_TH1
    places_TH1 = count - above_THX.sum(-1, keepdim=True)
    kept_THX = above_THX | (equal_THX & (equal_THX.cumsum(-1) <= places_TH1))
    return kept_THX.nonzero()[:, -1].reshape(*scores_THX.shape[:-1], count)


@tucker_topk.register_kernel("cuda")
def _(
    row_scores: torch.Tensor,
    col_scores: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    cores: torch.Tensor,
    row_topk: int,
    topk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    from umv2_export.gpu.launch import launch_topk  # noqa: PLC0415 - needs triton, an optional package

    _check(row_scores, col_scores, u, v, cores, row_topk, topk)
    return launch_topk(row_scores, col_scores, u, v, cores, row_topk, topk)


@tucker_topk.register_fake
def _(
    row_scores: torch.Tensor,
    col_scores: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    cores: torch.Tensor,
    row_topk: int,
    topk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, hits = row_scores.shape[0], row_scores.shape[1] * topk
    return (
        row_scores.new_empty((tokens, hits), dtype=torch.int64),
        row_scores.new_empty((tokens, hits, cores.shape[0])),
    )


def _check(
    row_scores: torch.Tensor,
    col_scores: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    cores: torch.Tensor,
    row_topk: int,
    topk: int,
) -> None:
    if row_scores.dim() != 4 or row_scores.shape != col_scores.shape:
        raise ValueError(
            f"row_scores and col_scores must both be [T, H, N, R], got {list(row_scores.shape)} and "
            f"{list(col_scores.shape)}"
        )
    _, heads, keys, ranks = row_scores.shape
    if u.shape != (heads, ranks) or v.shape != (heads, ranks):
        raise ValueError(f"u and v must be [{heads}, {ranks}], got {list(u.shape)} and {list(v.shape)}")
    if cores.dim() != 4 or cores.shape[1:] != (heads, ranks, ranks):
        raise ValueError(f"cores must be [C, {heads}, {ranks}, {ranks}], got {list(cores.shape)}")
    if not 1 <= row_topk <= keys:
        raise ValueError(f"row_topk must be from 1 to the {keys} keys of a side, got {row_topk}")
    if not 1 <= topk <= row_topk**2:
        raise ValueError(f"topk must be from 1 to row_topk**2 = {row_topk**2}, got {topk}")


def schema() -> OpSchema:
    """The ONNX schema."""
    return op_schema(
        NAME,
        "Two-stage top-k over the product of row and column keys with Tucker-decomposed scores.",
        inputs=[("row_scores", "T"), ("col_scores", "T"), ("u", "T"), ("v", "T"), ("cores", "T")],
        outputs=[("addresses", "I"), ("scores", "T")],
        type_constraints={"T": ("float", "float16", "bfloat16"), "I": ("int64",)},
        attributes={"row_topk": OpSchema.AttrType.INT, "topk": OpSchema.AttrType.INT},
    )


def function_body(*, opset: int) -> ir.Function:
    """The op in standard ONNX ops."""
    return parse_body(schema(), _BODY, opset=opset)


# Shapes are computed rather than written as 0 placeholders: Reshape then also serves T = 0.
_BODY = """
    one = Constant <value = int64[1] {1}> ()
    two = Constant <value = int64[1] {2}> ()
    last = Constant <value = int64[1] {-1}> ()
    ones3 = Constant <value = int64[3] {1, 1, 1}> ()
    ones2 = Constant <value = int64[2] {1, 1}> ()
    m = Constant <value_int: int = @row_topk> ()
    k = Constant <value_int: int = @topk> ()
    m1 = Reshape (m, one)
    k1 = Reshape (k, one)
    tokens = Shape <start = 0, end = 1> (row_scores)
    tokens_heads = Shape <start = 0, end = 2> (row_scores)
    heads = Shape <start = 1, end = 2> (row_scores)
    keys_per_side = Shape <start = 2, end = 3> (row_scores)
    ranks = Shape <start = 3, end = 4> (row_scores)
    core_count = Shape <start = 0, end = 1> (cores)

    row_THNR = Cast <to = 1> (row_scores)
    col_THNR = Cast <to = 1> (col_scores)
    u_HR = Cast <to = 1> (u)
    v_HR = Cast <to = 1> (v)
    u_H1R = Unsqueeze (u_HR, one)
    v_H1R = Unsqueeze (v_HR, one)
    row_weighted = Mul (row_THNR, u_H1R)
    col_weighted = Mul (col_THNR, v_H1R)
    row_merged_THN = ReduceSum <keepdims = 0> (row_weighted, last)
    col_merged_THN = ReduceSum <keepdims = 0> (col_weighted, last)
    row_top, row_index_THM = TopK <axis = -1, largest = 1, sorted = 0> (row_merged_THN, m1)
    col_top, col_index_THM = TopK <axis = -1, largest = 1, sorted = 0> (col_merged_THN, m1)

    rank_shape = Concat <axis = 0> (ones3, ranks)
    row_index_THM1 = Unsqueeze (row_index_THM, last)
    col_index_THM1 = Unsqueeze (col_index_THM, last)
    row_index_THMR = Expand (row_index_THM1, rank_shape)
    col_index_THMR = Expand (col_index_THM1, rank_shape)
    row_THMR = GatherElements <axis = 2> (row_THNR, row_index_THMR)
    col_THMR = GatherElements <axis = 2> (col_THNR, col_index_THMR)

    cores_f = Cast <to = 1> (cores)
    cores_HCRR = Transpose <perm = [1, 0, 2, 3]> (cores_f)
    row_TH1MR = Unsqueeze (row_THMR, two)
    col_THRM = Transpose <perm = [0, 1, 3, 2]> (col_THMR)
    col_TH1RM = Unsqueeze (col_THRM, two)
    row_core_THCMR = MatMul (row_TH1MR, cores_HCRR)
    grid_THCMM = MatMul (row_core_THCMR, col_TH1RM)
    cells = Mul (m1, m1)
    grid_shape = Concat <axis = 0> (tokens_heads, core_count, cells)
    grid_THCX = Reshape (grid_THCMM, grid_shape)
    total_THX = ReduceSum <keepdims = 0> (grid_THCX, two)
    best_total, best_THK = TopK <axis = -1, largest = 1, sorted = 0> (total_THX, k1)

    core_shape = Concat <axis = 0> (ones2, core_count, one)
    best_TH1K = Unsqueeze (best_THK, two)
    best_THCK = Expand (best_TH1K, core_shape)
    scores_THCK = GatherElements <axis = 3> (grid_THCX, best_THCK)
    scores_THKC = Transpose <perm = [0, 1, 3, 2]> (scores_THCK)
    hits = Mul (heads, k1)
    scores_shape = Concat <axis = 0> (tokens, hits, core_count)
    scores_f = Reshape (scores_THKC, scores_shape)
    scores = CastLike (scores_f, row_scores)

    row_position = Div (best_THK, m)
    row_start = Mul (row_position, m)
    col_position = Sub (best_THK, row_start)
    row_THK = GatherElements <axis = 2> (row_index_THM, row_position)
    col_THK = GatherElements <axis = 2> (col_index_THM, col_position)
    row_address = Mul (row_THK, keys_per_side)
    address_THK = Add (row_address, col_THK)
    address_shape = Concat <axis = 0> (tokens, hits)
    addresses = Reshape (address_THK, address_shape)
"""
