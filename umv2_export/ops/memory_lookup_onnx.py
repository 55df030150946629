"""umv2::MemoryLookup in ONNX: schema and body in standard ops; `umv2_export.ops.memory_lookup` says what it means."""

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir
from onnx.defs import OpSchema

from umv2_export.ops.domain import op_schema, parse_body
from umv2_export.ops.memory_lookup import ACTIVATIONS, NAME

__all__ = ["LookupSignature"]


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
