"""The model after the export's folds: constant keys, interleaved rows in shards, one address map or none.

The algebra is exact; `umv2_export.onnx.fold` computes the parameters. This is the model that is traced, and the one
that is rebuilt from a bundle.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from umv2_export.config import MemoryConfig, ModelConfig
from umv2_export.layout import FoldedForm, TableLayout
from umv2_export.model.experts import Experts, ExpertStack
from umv2_export.model.memory import MemoryLayer
from umv2_export.model.transformer import LanguageModel
from umv2_export.ops import key_scores, memory_lookup

__all__ = [
    "FoldedMemoryLayer",
    "KeyMatrix",
    "folded_model",
    "joined_by_rank",
    "key_matrices",
    "query_name",
    "used_chunks",
]


class KeyMatrix(NamedTuple):
    """One score GEMM of a side: the heads and ranks whose keys are scored by the same query.

    Attributes:
        chunk: position of the query among the used chunks of the projection.
        heads, ranks: ranges of heads and Tucker ranks.
    """

    chunk: int
    heads: range
    ranks: range


def used_chunks(memory: MemoryConfig) -> list[int]:
    """The chunks of the query projection that any score needs; the released layout leaves half of them dead."""
    return sorted({chunk for side in memory.query_chunks() for head in side for chunk in head})


def query_name(memory: MemoryConfig) -> str:
    """Of the projection to the used chunks; the checkpoint's name stands for the checkpoint's tensor alone."""
    return "query_proj" if len(used_chunks(memory)) == 2 * memory.queries_per_side else "used_query_proj"


def joined_by_rank(memory: MemoryConfig) -> bool:
    """Each Tucker rank has a query, hence a matrix of keys, of its own; otherwise a matrix holds all ranks."""
    return any(len(set(head)) > 1 for side in memory.query_chunks() for head in side)


def key_matrices(memory: MemoryConfig) -> tuple[list[KeyMatrix], list[KeyMatrix]]:
    """The fewest score GEMMs, of row keys and of column keys; consecutive ones are joined along heads or ranks."""
    position = {chunk: i for i, chunk in enumerate(used_chunks(memory))}
    all_heads, all_ranks = range(memory.heads), range(memory.tucker_rank)
    sides = []
    for chunks in memory.query_chunks():
        if not joined_by_rank(memory):
            firsts = [h for h in all_heads if h == 0 or chunks[h] != chunks[h - 1]]
            ends = [*firsts[1:], memory.heads]
            sides.append(
                [
                    KeyMatrix(position[chunks[first][0]], range(first, end), all_ranks)
                    for first, end in zip(firsts, ends, strict=True)
                ]
            )
        else:
            sides.append([KeyMatrix(position[chunks[0][i]], all_heads, range(i, i + 1)) for i in all_ranks])
    return sides[0], sides[1]


class FoldedPool(nn.Module):
    """The shards that all layers name, when they share their rows."""

    rows: nn.ParameterList

    def __init__(self, layout: TableLayout) -> None:
        super().__init__()
        if not layout.per_layer:
            self.rows = _shards(layout)


class FoldedMemoryLayer(MemoryLayer):
    """One memory layer in the form that runtimes execute: GEMMs and the custom ops."""

    address_map: torch.Tensor
    group_map: torch.Tensor
    rows: nn.ParameterList

    def __init__(self, config: ModelConfig, index: int, *, layout: TableLayout, key_dtype: torch.dtype) -> None:
        super().__init__(config)
        d, m = config.hidden_size, config.memory
        self.layout, self.key_dtype = layout, key_dtype
        chunks = used_chunks(m)
        query_proj = nn.Linear(d, len(chunks) * m.key_dim, bias=False)
        self.query_name = query_name(m)
        self.add_module(self.query_name, query_proj)
        self.row_matrices, self.col_matrices = key_matrices(m)
        self.row_keys = nn.ParameterList(self._key_matrix(matrix) for matrix in self.row_matrices)
        self.col_keys = nn.ParameterList(self._key_matrix(matrix) for matrix in self.col_matrices)
        self.tucker_u = nn.Parameter(torch.zeros(m.heads, m.score_rank, dtype=torch.float32))
        self.tucker_v = nn.Parameter(torch.zeros(m.heads, m.score_rank, dtype=torch.float32))
        cores_shape = (m.tucker_cores, m.heads, m.score_rank, m.score_rank)
        self.tucker_cores = nn.Parameter(torch.zeros(cores_shape, dtype=torch.float32))
        self.pre_values_proj = nn.Linear(d, m.pre_value_dim, bias=False) if m.pre_value_dim else None
        self.values_proj = nn.Linear(m.value_dim * m.value_groups, d, bias=False)
        if m.kind == "memory_plus":
            self.swilu_projection = nn.Linear(d, m.value_dim, bias=False)
        if m.has_address_map:
            self.register_buffer("address_map", torch.zeros(m.stored_side**2, dtype=torch.int32))
            if m.value_groups > 1:
                self.register_buffer("group_map", torch.zeros(m.stored_side**2, dtype=torch.int32))
        if layout.per_layer:
            self.rows = _shards(layout)

    def _key_matrix(self, matrix: KeyMatrix) -> torch.Tensor:
        columns = len(matrix.heads) * self.memory.stored_side * len(matrix.ranks)
        return torch.zeros(self.memory.key_dim, columns, dtype=self.key_dtype)

    def key_scores(self, hidden_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """umv2::KeyScores with the folded keys, which hold both norms' weights."""
        m = self.memory
        matrices = [*self.row_matrices, *self.col_matrices]
        row_THNR, col_THNR = key_scores(
            getattr(self, self.query_name)(hidden_TD),
            [*self.row_keys, *self.col_keys],
            [matrix.chunk for matrix in matrices],
            len(self.row_matrices),
            m.key_dim,
            m.heads,
            m.tucker_rank,
            joined_by_rank(m),
            self.config.norm_eps,
        )
        return row_THNR, col_THNR

    def tucker(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Always fp32: they are a few numbers, and decide which rows win."""
        return self.tucker_u, self.tucker_v, self.tucker_cores

    def lookup(
        self, hidden_TD: torch.Tensor, pool: nn.Module, addresses_TK: torch.Tensor, scores_TKC: torch.Tensor
    ) -> torch.Tensor:
        """umv2::MemoryLookup at physical rows."""
        if not isinstance(pool, FoldedPool):
            raise TypeError(f"the folded model reads a FoldedPool, got {type(pool).__name__}")
        m = self.memory
        indices_TK, group_TK = addresses_TK, None
        if m.has_address_map:
            indices_TK = self._mapped(self.address_map, addresses_TK)
            if m.value_groups > 1:
                group_TK = self._mapped(self.group_map, addresses_TK)
        query_TP = None if self.pre_values_proj is None else self.pre_values_proj(hidden_TD).float()
        output_TX: torch.Tensor = memory_lookup(
            indices_TK,
            scores_TKC,
            group_TK,
            query_TP,
            None,
            list(self.rows if self.layout.per_layer else pool.rows),
            m.pre_value_dim,
            m.activation,
            self.layout.rows_per_shard,
            m.value_groups,
        )
        return output_TX

    @staticmethod
    def _mapped(table_X: torch.Tensor, addresses_TK: torch.Tensor) -> torch.Tensor:
        """table[addresses] as int64; index_select, unlike indexing, becomes one Gather."""
        return table_X.index_select(0, addresses_TK.flatten()).reshape(addresses_TK.shape).to(torch.int64)

    def project(self, output_TX: torch.Tensor, hidden_TD: torch.Tensor) -> torch.Tensor:
        """The output projection."""
        if self.memory.kind == "memory_plus":
            output_TX = output_TX * nn.functional.silu(self.swilu_projection(hidden_TD))
        projected: torch.Tensor = self.values_proj(output_TX)
        return projected


def folded_model(form: FoldedForm) -> LanguageModel:
    """The folded model with zero weights. Build it under a fake or meta device."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(form.dtype)
    try:
        memory_layer = partial(FoldedMemoryLayer, layout=form.layout, key_dtype=form.key_dtype)
        experts = ExpertStack if form.moe_form == "contrib" else Experts
        model = LanguageModel(
            form.config, memory_layer, FoldedPool(form.layout), experts, static_cache=form.cache == "static"
        )
    finally:
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


def _shards(layout: TableLayout) -> nn.ParameterList:
    return nn.ParameterList(
        nn.Parameter(torch.zeros(len(layout.shard_rows(s)), layout.row_size, dtype=layout.dtype), requires_grad=False)
        for s in range(layout.shards)
    )
