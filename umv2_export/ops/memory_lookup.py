"""umv2::MemoryLookup: the weighted sum of the rows that a token activates.

    output[t, part c] = sum_k act(rows[i_k, :P] . query[t]) * scores[t, k, c] * rows[i_k, P:][part c]

A row holds a pre-value (P) and a value (V) side by side, one contiguous read per hit; the C parts of a value are
contiguous, each with its own score. With groups G > 1 the sum runs per group and the G sums are concatenated. Without
pre-values (P = 0) the pre-score is 1. Source: UltraMemV2, arXiv 2508.18756 (one-neuron experts).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir
import torch
from onnx.defs import OpSchema

from umv2_export.ops.domain import op_schema, parse_body

__all__ = ["NAME", "LookupSignature", "memory_lookup"]

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


@dataclass(frozen=True)
class LookupSignature:
    """What is the same in all MemoryLookup nodes of a model, so that one function body serves them all.

    Attributes:
        shards: number of `rows_*` inputs.
        grouped: groups > 1, with an input `group`.
        pre_values: pre_value_dim > 0, with an input `query`.
        quantized: rows are int8, with an input `row_scales`.
        activation: of the pre-score.
    """

    shards: int
    grouped: bool = False
    pre_values: bool = True
    quantized: bool = False
    activation: Literal["none", "gelu"] = "none"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")

    @property
    def inputs(self) -> list[tuple[str, str]]:
        """(name, type variable) in order; an absent input is left out, for TensorRT-RTX rejects an empty name."""
        optional = [(self.grouped, "group", "I"), (self.pre_values, "query", "T"), (self.quantized, "row_scales", "F")]
        return [
            ("indices", "I"),
            ("scores", "T"),
            *((name, kind) for present, name, kind in optional if present),
            *((f"rows_{s}", "R") for s in range(self.shards)),
        ]

    def schema(self) -> OpSchema:
        """The ONNX schema of this arity."""
        return op_schema(
            NAME,
            "Weighted sum of gathered rows, each weighted by its scores and by its pre-value's product with the query.",
            inputs=self.inputs,
            outputs=[("output", "T")],
            type_constraints={
                "T": ("float", "float16", "bfloat16"),
                "I": ("int64",),
                "R": ("int8",) if self.quantized else ("float", "float16", "bfloat16"),
                **({"F": ("float",)} if self.quantized else {}),
            },
            attributes={
                "pre_value_dim": OpSchema.AttrType.INT,
                "activation": OpSchema.AttrType.STRING,
                "rows_per_shard": OpSchema.AttrType.INT,
            },
            defaults={"groups": 1},
        )

    def function_body(self, *, opset: int) -> ir.Function:
        """The op in standard ONNX ops."""
        parts = [_CONSTANTS, self._gather_text(), self._weight_text(), _GROUPED if self.grouped else _UNGROUPED, _SUM]
        return parse_body(self.schema(), "".join(parts), opset=opset)

    def _gather_text(self) -> str:
        """row_TKX in fp32. Shards are gathered one by one and merged: a Concat would copy the whole table."""
        lines = ["per_shard = Constant <value_int: int = @rows_per_shard> ()", "shard = Div (indices, per_shard)"]
        lines += ["shard_start = Mul (shard, per_shard)", "local = Sub (indices, shard_start)"]
        if self.shards > 1:
            lines += ["shard_TK1 = Unsqueeze (shard, last)"]
        for s in range(self.shards):
            # The last shard may be shorter, and a hit of another shard must still gather something.
            lines += [f"count_{s} = Shape <start = 0, end = 1> (rows_{s})", f"end_{s} = Sub (count_{s}, one)"]
            lines += [f"local_{s} = Min (local, end_{s})"] if self.shards > 1 else []
            local = f"local_{s}" if self.shards > 1 else "indices"
            lines += [f"raw_{s} = Gather <axis = 0> (rows_{s}, {local})", f"shard_{s} = Cast <to = 1> (raw_{s})"]
            if s == 0:
                lines += ["merged_0 = Identity (shard_0)"]
            else:
                lines += [f"number_{s} = Constant <value = int64 {{{s}}}> ()"]
                lines += [f"here_{s} = Equal (shard_TK1, number_{s})"]
                lines += [f"merged_{s} = Where (here_{s}, shard_{s}, merged_{s - 1})"]
        lines += [f"row_TKX = Identity (merged_{self.shards - 1})"]
        return "\n".join(lines) + "\n"

    def _weight_text(self) -> str:
        """weight_TKC, and value_TKV."""
        text = _SPLIT
        if self.quantized:
            text += _SCALE
        if not self.pre_values:
            return text + (
                "weight_TKC = Mul (scores_f, value_scale)\n" if self.quantized else "weight_TKC = Identity (scores_f)\n"
            )
        text += _PRE_SCORE
        text += "pre_TK1 = Mul (dot_TK1, pre_scale)\n" if self.quantized else "pre_TK1 = Identity (dot_TK1)\n"
        text += _GELU if self.activation == "gelu" else "active_TK1 = Identity (pre_TK1)\n"
        text += "active_scores = Mul (scores_f, active_TK1)\n"
        return text + (
            "weight_TKC = Mul (active_scores, value_scale)\n"
            if self.quantized
            else "weight_TKC = Identity (active_scores)\n"
        )


_CONSTANTS = """
    zero = Constant <value = int64[1] {0}> ()
    one = Constant <value = int64[1] {1}> ()
    two = Constant <value = int64[1] {2}> ()
    last = Constant <value = int64[1] {-1}> ()
    end = Constant <value = int64[1] {9223372036854775807}> ()
    pre_value_size = Constant <value_int: int = @pre_value_dim> ()
    pre_value_size1 = Reshape (pre_value_size, one)
    tokens = Shape <start = 0, end = 1> (indices)
    hits = Shape <start = 1, end = 2> (indices)
    core_count = Shape <start = 2, end = 3> (scores)
    scores_f = Cast <to = 1> (scores)
"""

_SPLIT = """
    value_TKV = Slice (row_TKX, pre_value_size1, end, two)
    value_size = Shape <start = 2, end = 3> (value_TKV)
    part_size = Div (value_size, core_count)
"""

_SCALE = """
    scales_TK2 = Gather <axis = 0> (row_scales, indices)
    pre_scale = Slice (scales_TK2, zero, one, two)
    value_scale = Slice (scales_TK2, one, two, two)
"""

_PRE_SCORE = """
    query_f = Cast <to = 1> (query)
    query_TP1 = Unsqueeze (query_f, last)
    pre_value_TKP = Slice (row_TKX, zero, pre_value_size1, two)
    dot_TK1 = MatMul (pre_value_TKP, query_TP1)
"""

_GELU = """
    half = Constant <value = float {0.5}> ()
    one_f = Constant <value = float {1.0}> ()
    sqrt_half = Constant <value = float {0.70710678118654752}> ()
    pre_scaled = Mul (pre_TK1, sqrt_half)
    pre_erf = Erf (pre_scaled)
    pre_erf_1 = Add (pre_erf, one_f)
    pre_half = Mul (pre_TK1, half)
    active_TK1 = Mul (pre_half, pre_erf_1)
"""

_UNGROUPED = """
    group_count = Identity (one)
    weight_TKX = Identity (weight_TKC)
"""

_GROUPED = """
    group_number = Constant <value_int: int = @groups> ()
    group_count = Reshape (group_number, one)
    zero_scalar = Constant <value = int64 {0}> ()
    one_scalar = Constant <value = int64 {1}> ()
    group_range = Range (zero_scalar, group_number, one_scalar)
    group_TK1 = Unsqueeze (group, last)
    chosen = Equal (group_TK1, group_range)
    chosen_TKG = Cast <to = 1> (chosen)
    chosen_TKG1 = Unsqueeze (chosen_TKG, last)
    weight_TK1C = Unsqueeze (weight_TKC, two)
    weight_TKGC = Mul (chosen_TKG1, weight_TK1C)
    weight_columns = Mul (group_count, core_count)
    weight_shape = Concat <axis = 0> (tokens, hits, weight_columns)
    weight_TKX = Reshape (weight_TKGC, weight_shape)
"""

# Every (group, core) column weighs whole values; of the product only part c of core c is kept. That is C times the
# needed multiplications, but no copy of the gathered values, whose traffic is what costs.
_SUM = """
    weight_TXK = Transpose <perm = [0, 2, 1]> (weight_TKX)
    sum_TXV = MatMul (weight_TXK, value_TKV)
    sum_shape = Concat <axis = 0> (tokens, group_count, core_count, core_count, part_size)
    sum_TGCCX = Reshape (sum_TXV, sum_shape)
    square = Concat <axis = 0> (core_count, core_count)
    ones = ConstantOfShape <value = float[1] {1.0}> (square)
    diagonal_CC = EyeLike (ones)
    diagonal_CC1 = Unsqueeze (diagonal_CC, two)
    three = Constant <value = int64[1] {3}> ()
    kept_TGCCX = Mul (sum_TGCCX, diagonal_CC1)
    parts_TGCX = ReduceSum <keepdims = 0> (kept_TGCCX, three)
    columns = Mul (group_count, value_size)
    output_shape = Concat <axis = 0> (tokens, columns)
    output_f = Reshape (parts_TGCX, output_shape)
    output = CastLike (output_f, scores)
"""
