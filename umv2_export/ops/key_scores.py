"""umv2::KeyScores: the scores of all keys of a memory layer.

    q = queries / sqrt(mean(queries^2) + epsilon), over each chunk of key_dim
    row_scores[t, h, :, r], col_scores[t, h, :, r] = q[t, chunk] @ keys

Keys are constant and hold the weights of both norms. A side's keys come as matrices, each scored by one chunk of the
queries: joined along heads (a matrix holds some heads and all ranks) or along ranks (all heads and one rank). As one
node, runtimes may read keys of 16 bits with float sums and write the scores in the order in which retrieval reads them;
in standard ops these are 25 nodes and more. Source: UltraMemV2, arXiv 2508.18756.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx.defs import OpSchema

from umv2_export.ops.domain import op_schema, parse_body

__all__ = ["NAME", "KeyScoresSignature", "key_scores"]

NAME = "KeyScores"


@torch.library.custom_op(f"umv2::{NAME}", mutates_args=())
def key_scores(
    queries: torch.Tensor,
    keys: Sequence[torch.Tensor],
    chunks: Sequence[int],
    row_matrices: int,
    key_dim: int,
    heads: int,
    ranks: int,
    by_rank: bool,
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise the queries and multiply them with the keys; eager reference.

    Args:
        queries: [T, chunks * key_dim], fp32, fp16 or bf16.
        keys: matrices [key_dim, heads_i * N * ranks_i] in the dtype of the queries or in 16 bits, row keys first.
        chunks: which chunk of the queries scores each matrix.
        row_matrices: how many matrices hold row keys.
        key_dim: size of a key.
        heads: H.
        ranks: R.
        by_rank: matrices of a side are joined along ranks, not along heads.
        epsilon: of the normalisation.

    Returns:
        row_scores, col_scores: fp32 [T, H, N, R].

    Raises:
        ValueError: shapes and attributes contradict each other.
    """
    for problem in _problems(queries, keys, chunks, row_matrices, key_dim, heads, ranks, by_rank):
        raise ValueError(problem)
    query_TXK = queries.unflatten(1, (-1, key_dim)).float()
    query_TXK = (query_TXK * torch.rsqrt(query_TXK.square().mean(-1, keepdim=True) + epsilon)).to(queries.dtype)
    sides = []
    for side in (range(row_matrices), range(row_matrices, len(keys))):
        parts = []
        for i in side:
            held_heads, held_ranks = _held(keys[i].shape[1], side, keys, heads, ranks, by_rank)
            scores = query_TXK[:, chunks[i]] @ keys[i].to(queries.dtype)
            parts.append(scores.float().unflatten(1, (held_heads, -1, held_ranks)))
        sides.append(torch.cat(parts, dim=3 if by_rank else 1))
    return sides[0].contiguous(), sides[1].contiguous()


@key_scores.register_fake
def _(
    queries: torch.Tensor,
    keys: Sequence[torch.Tensor],
    chunks: Sequence[int],
    row_matrices: int,
    key_dim: int,
    heads: int,
    ranks: int,
    by_rank: bool,
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    keys_per_side = sum(matrix.shape[1] for matrix in keys[:row_matrices]) // (heads * ranks)
    shape = (queries.shape[0], heads, keys_per_side, ranks)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.float32)


def _problems(
    queries: torch.Tensor,
    keys: Sequence[torch.Tensor],
    chunks: Sequence[int],
    row_matrices: int,
    key_dim: int,
    heads: int,
    ranks: int,
    by_rank: bool,
) -> Iterator[str]:
    if queries.dim() != 2 or queries.shape[1] % key_dim:
        yield f"queries {list(queries.shape)} do not divide into chunks of {key_dim}"
    if any(matrix.dim() != 2 or len(matrix) != key_dim for matrix in keys):
        yield f"keys must be matrices of {key_dim} rows, got {[list(matrix.shape) for matrix in keys]}"
    if len(chunks) != len(keys) or not 0 < row_matrices < len(keys):
        yield f"{len(keys)} matrices, {row_matrices} of them row keys, for {len(chunks)} chunks"
    if not all(0 <= chunk < queries.shape[1] // key_dim for chunk in chunks):
        yield f"chunks {list(chunks)} do not all lie within queries of {queries.shape[1]}"
    sides = keys[:row_matrices], keys[row_matrices:]
    row_columns, col_columns = (sum(matrix.shape[1] for matrix in side) for side in sides)
    if row_columns != col_columns or not row_columns or row_columns % (heads * ranks):
        yield f"{row_columns} row keys and {col_columns} column keys for {heads} heads of rank {ranks}"
    of_one_head = row_columns // ranks if by_rank else row_columns // heads
    if any(not matrix.shape[1] or matrix.shape[1] % of_one_head for matrix in keys):
        yield f"matrices of {[matrix.shape[1] for matrix in keys]} keys do not divide into heads and ranks"


def _held(
    columns: int, side: range, keys: Sequence[torch.Tensor], heads: int, ranks: int, by_rank: bool
) -> tuple[int, int]:
    """How many heads and ranks a matrix of `columns` columns holds."""
    if by_rank:
        return heads, 1
    keys_per_side = sum(keys[i].shape[1] for i in side) // (heads * ranks)
    return columns // (keys_per_side * ranks), ranks


@dataclass(frozen=True)
class KeyScoresSignature:
    """What is the same in all KeyScores nodes of a model, so that one function body serves them all.

    Attributes:
        row_chunks, col_chunks: chunk of the queries by matrix.
        row_heads, col_heads: heads that each matrix holds.
        query_chunks: chunks of the queries in all.
        key_dim, keys_per_side, heads, ranks: sizes.
        by_rank: matrices of a side are joined along ranks.
        epsilon: of the normalisation.
    """

    row_chunks: tuple[int, ...]
    col_chunks: tuple[int, ...]
    row_heads: tuple[int, ...]
    col_heads: tuple[int, ...]
    query_chunks: int
    key_dim: int
    keys_per_side: int
    heads: int
    ranks: int
    by_rank: bool
    epsilon: float

    @property
    def matrices(self) -> list[str]:
        """Names of the inputs that hold keys, in order."""
        return [f"row_keys_{i}" for i in range(len(self.row_chunks))] + [
            f"col_keys_{i}" for i in range(len(self.col_chunks))
        ]

    @property
    def attributes(self) -> dict[str, int | float | list[int]]:
        """Attributes of a node."""
        return {
            "chunks": [*self.row_chunks, *self.col_chunks],
            "row_matrices": len(self.row_chunks),
            "key_dim": self.key_dim,
            "heads": self.heads,
            "ranks": self.ranks,
            "by_rank": int(self.by_rank),
            "epsilon": self.epsilon,
        }

    def schema(self) -> OpSchema:
        """The ONNX schema of this arity. No plugin attributes: TensorRT computes it in its own ops."""
        kinds = {int: OpSchema.AttrType.INT, float: OpSchema.AttrType.FLOAT, list: OpSchema.AttrType.INTS}
        return op_schema(
            NAME,
            "Scores of all row keys and all column keys with normalised queries.",
            inputs=[("queries", "T"), *((name, "K") for name in self.matrices)],
            outputs=[("row_scores", "F"), ("col_scores", "F")],
            type_constraints={
                "T": ("float", "float16", "bfloat16"),
                "K": ("float", "float16", "bfloat16"),
                "F": ("float",),
            },
            attributes={name: kinds[type(value)] for name, value in self.attributes.items()},
            plugin=False,
        )

    def function_body(self, *, opset: int) -> ir.Function:
        """The op in standard ONNX ops."""
        text = _NORMALIZE.format(chunks=self.query_chunks, key_dim=self.key_dim, epsilon=f"{self.epsilon:.9e}")
        for side, chunks, heads in (("row", self.row_chunks, self.row_heads), ("col", self.col_chunks, self.col_heads)):
            parts = []
            for i, (chunk, held) in enumerate(zip(chunks, heads, strict=True)):
                name, ranks = f"{side}_{i}", 1 if self.by_rank else self.ranks
                text += _MATRIX.format(
                    name=name, keys=f"{side}_keys_{i}", chunk=chunk, tail=f"{held}, {self.keys_per_side}, {ranks}"
                )
                parts.append(f"{name}_THNR")
            joined = parts[0]
            if len(parts) > 1:
                text += f"{side}_joined = Concat <axis = {3 if self.by_rank else 1}> ({', '.join(parts)})\n"
                joined = f"{side}_joined"
            text += f"{side}_scores = Cast <to = 1> ({joined})\n"
        return parse_body(self.schema(), text, opset=opset)


_NORMALIZE = """
    last = Constant <value = int64[1] {{-1}}> ()
    tokens = Shape <start = 0, end = 1> (queries)
    chunk_tail = Constant <value = int64[2] {{{chunks}, {key_dim}}}> ()
    chunk_shape = Concat <axis = 0> (tokens, chunk_tail)
    split = Reshape (queries, chunk_shape)
    split_f = Cast <to = 1> (split)
    squared = Mul (split_f, split_f)
    mean = ReduceMean <keepdims = 1> (squared, last)
    epsilon_f = Constant <value = float {{{epsilon}}}> ()
    shifted = Add (mean, epsilon_f)
    root = Sqrt (shifted)
    normalized_f = Div (split_f, root)
    normalized = CastLike (normalized_f, queries)
"""

_MATRIX = """
    {name}_chunk = Constant <value = int64 {{{chunk}}}> ()
    {name}_query = Gather <axis = 1> (normalized, {name}_chunk)
    {name}_keys = CastLike ({keys}, queries)
    {name}_flat = MatMul ({name}_query, {name}_keys)
    {name}_tail = Constant <value = int64[3] {{{tail}}}> ()
    {name}_shape = Concat <axis = 0> (tokens, {name}_tail)
    {name}_THNR = Reshape ({name}_flat, {name}_shape)
"""
