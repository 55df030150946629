"""The memory layer, literally as specified: scores, two-stage retrieval, ring addressing, one-neuron experts.

Source: UltraMemV2, arXiv 2508.18756; UltraMem V1, arXiv 2411.12364; Memory+ as the baseline of UltraMemV2's authors has
it, after Memory Layers at Scale, arXiv 2412.09764. Shape suffixes: see `umv2_export.ops`.
"""

from typing import NamedTuple, cast

import torch
from torch import nn

from umv2_export.config import MemoryConfig, ModelConfig
from umv2_export.model.norm import RMSNorm, rms_normalize
from umv2_export.ops import tucker_topk

__all__ = ["MemoryLayer", "MemoryPool", "ReferenceMemoryLayer", "Routing", "adding_tucker", "folded_keys", "scores_at"]


class Routing(NamedTuple):
    """What one memory layer retrieved.

    Attributes:
        row_scores: [T, H, N, R] fp32, as the retrieval multiplies them.
        col_scores: likewise.
        addresses: virtual addresses int64 [T, hits].
    """

    row_scores: torch.Tensor
    col_scores: torch.Tensor
    addresses: torch.Tensor


class MemoryLayer(nn.Module):
    """The steps that the reference and the folded layer share; they differ in where scores and rows come from."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.memory = config.memory

    def forward(
        self, hidden_TD: torch.Tensor, pool: nn.Module, forced_addresses: torch.Tensor | None
    ) -> tuple[torch.Tensor, Routing]:
        """The layer's output [T, D] for the normed input [T, D], and its routing."""
        row_THNR, col_THNR = self.key_scores(hidden_TD)
        if self.memory.kind == "memory_plus":
            row_THNR = torch.cat([row_THNR, torch.ones_like(row_THNR)], -1)
            col_THNR = torch.cat([torch.ones_like(col_THNR), col_THNR], -1)
        u_HR, v_HR, cores_CHRR = self.tucker()
        if forced_addresses is None:
            addresses_TK, scores_TKC = tucker_topk(
                row_THNR, col_THNR, u_HR, v_HR, cores_CHRR, self.memory.row_topk, self.memory.topk
            )
        else:
            addresses_TK = forced_addresses
            scores_TKC = scores_at(addresses_TK, row_THNR, col_THNR, cores_CHRR)
        if self.memory.kind == "memory_plus":
            scores_TKC = scores_TKC.unflatten(1, (self.memory.heads, -1)).softmax(2).flatten(1, 2)
        output_TX = self.lookup(hidden_TD, pool, addresses_TK, scores_TKC)
        projected_TD = self.project(output_TX.to(hidden_TD.dtype), hidden_TD)
        return projected_TD, Routing(row_THNR, col_THNR, addresses_TK)

    def key_scores(self, hidden_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of all row keys and of all column keys, [T, H, N, R] in fp32."""
        raise NotImplementedError

    def tucker(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Vectors u [H, R] and v [H, R], and cores [C, H, R, R] in fp32."""
        raise NotImplementedError

    def lookup(
        self, hidden_TD: torch.Tensor, pool: nn.Module, addresses_TK: torch.Tensor, scores_TKC: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sums of the rows at virtual addresses: [T, G*V] in fp32."""
        raise NotImplementedError

    def project(self, output_TX: torch.Tensor, hidden_TD: torch.Tensor) -> torch.Tensor:
        """From [T, G*V] to [T, D]; Memory+ gates with the normed input."""
        raise NotImplementedError


def adding_tucker(memory: MemoryConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U [H, 2], v [H, 2] and cores [1, H, 2, 2] with which the retrieval adds the scores of [s, 1] and [1, t]."""
    u_HR, v_HR = (torch.eye(2)[side].repeat(memory.heads, 1) for side in (0, 1))
    return u_HR, v_HR, torch.eye(2).repeat(1, memory.heads, 1, 1)


def folded_keys(
    memory: MemoryConfig,
    keys: torch.Tensor,
    keys_norm: torch.Tensor,
    query_norm: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Keys [H, ..., N, Dk, R], or [H, ..., N, Dk] of Memory+, with the weights [Dk] of both norms in them, in fp32."""
    if not memory.normalizes_keys:
        return keys.float() * query_norm
    # The weights first: another order could round a key to its neighbour in 16 bits.
    scale = keys_norm * query_norm
    return rms_normalize(keys.float(), eps, dim=-2) * scale[:, None]


class MemoryPool(nn.Module):
    """The tables that all layers share, of UltraMemV2 and of Memory+; empty for UltraMem V1."""

    values_for_look_up: nn.Parameter
    pre_values_for_look_up: nn.Parameter

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        memory = config.memory
        if memory.shares_a_table:
            self.values_for_look_up = nn.Parameter(torch.zeros(memory.pool_rows, memory.value_dim))
            if memory.pre_value_dim:
                self.pre_values_for_look_up = nn.Parameter(torch.zeros(memory.pool_rows, memory.pre_value_dim))


class ReferenceMemoryLayer(MemoryLayer):
    """One memory layer with the parameters of the checkpoint, nothing folded.

    Args:
        config: the model.
        index: of the memory layer, from 0.
        key_dtype: round the keys to it, with the weights of both norms in them, as an export in 16 bits stores them.
        table_dtype: round rows to it when they are read.
    """

    tucker_core_u: torch.Tensor
    tucker_core_v: torch.Tensor
    shuffle_index: torch.Tensor

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        key_dtype: torch.dtype = torch.float32,
        table_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config)
        d, m = config.hidden_size, config.memory
        self.index, self.key_dtype, self.table_dtype = index, key_dtype, table_dtype
        self.query_proj = nn.Linear(d, 2 * m.queries_per_side * m.key_dim, bias=False)
        self.query_norm = RMSNorm(m.key_dim, config.norm_eps)
        self.keys_norm = RMSNorm(m.key_dim, config.norm_eps)
        self.pre_values_proj = nn.Linear(d, m.pre_value_dim, bias=False) if m.pre_value_dim else None
        self.values_proj = nn.Linear(m.value_dim * m.value_groups, d, bias=False)
        if m.kind == "memory_plus":
            self.keys = nn.Parameter(torch.zeros(m.heads, 2, m.stored_side, m.key_dim))
            self.swilu_projection = nn.Linear(d, m.value_dim, bias=False)
            return
        self.keys = nn.Parameter(torch.zeros(m.heads, 2, m.stored_side, m.key_dim, m.tucker_rank))
        self.tucker_core = nn.ParameterList(
            torch.zeros(m.heads, m.tucker_rank, m.tucker_rank) for _ in range(m.tucker_cores)
        )
        # The stored vectors, never a fresh SVD: its signs differ, and the stored ones lag the cores by one step.
        self.register_buffer("tucker_core_u", torch.zeros(1, m.heads, 1, m.tucker_rank))
        self.register_buffer("tucker_core_v", torch.zeros(1, m.heads, 1, m.tucker_rank))
        self.register_buffer("shuffle_index", torch.zeros(m.stored_side**2, dtype=torch.int64))
        if m.kind == "ultramem_v1":
            self.values_for_look_up = nn.Parameter(torch.zeros(m.pool_rows, m.value_dim))

    def key_scores(self, hidden_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """S[t, h, :, i] = K[h, side, :, :, i] @ q[t, chunk of (side, h, i)]."""
        queries_TXK = self.query_proj(hidden_TD).unflatten(1, (-1, self.memory.key_dim))
        if self.key_dtype == torch.float32:
            query_TXK, keys_HSNKR = self.query_norm(queries_TXK), cast("torch.Tensor", self.keys)
            if self.memory.normalizes_keys:
                keys_HSNKR = self.keys_norm(keys_HSNKR.transpose(3, 4)).transpose(3, 4)
        else:
            query_TXK = rms_normalize(queries_TXK, self.config.norm_eps)
            keys_HSNKR = folded_keys(
                self.memory, self.keys, self.keys_norm.weight, self.query_norm.weight, self.config.norm_eps
            )
            keys_HSNKR = keys_HSNKR.to(self.key_dtype).float()
        if keys_HSNKR.dim() == 4:
            keys_HSNKR = keys_HSNKR[..., None]
        row_chunks, col_chunks = self.memory.query_chunks()
        row_THRK, col_THRK = query_TXK[:, torch.tensor(row_chunks)], query_TXK[:, torch.tensor(col_chunks)]
        row_THNR = torch.einsum("hnkr,thrk->thnr", keys_HSNKR[:, 0], row_THRK)
        col_THNR = torch.einsum("hnkr,thrk->thnr", keys_HSNKR[:, 1], col_THRK)
        return row_THNR.contiguous(), col_THNR.contiguous()

    def tucker(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The stored singular vectors and cores."""
        if self.memory.kind == "memory_plus":
            return adding_tucker(self.memory)
        return self.tucker_core_u[0, :, 0], self.tucker_core_v[0, :, 0], torch.stack(list(self.tucker_core))

    def lookup(
        self, hidden_TD: torch.Tensor, pool: nn.Module, addresses_TK: torch.Tensor, scores_TKC: torch.Tensor
    ) -> torch.Tensor:
        """Shuffle, find the physical row in the ring, and sum the one-neuron experts per virtual block."""
        if not isinstance(pool, MemoryPool):
            raise TypeError(f"the reference reads a MemoryPool, got {type(pool).__name__}")
        m = self.memory
        shuffled_TK = addresses_TK if m.kind == "memory_plus" else self.shuffle_index[addresses_TK]
        block_TK = shuffled_TK // m.visible_rows
        row_TK = (shuffled_TK % m.visible_rows + m.offset(self.index)) % m.pool_rows
        tables = self if m.kind == "ultramem_v1" else pool
        value_TKV = self._rounded(tables.values_for_look_up[row_TK])
        weight_TKC = scores_TKC
        if self.pre_values_proj is not None:
            query_TP = self.pre_values_proj(hidden_TD)
            pre_value_TKP = self._rounded(pool.pre_values_for_look_up[row_TK])
            pre_score_TK = torch.einsum("tkp,tp->tk", pre_value_TKP, query_TP)
            if m.activation == "gelu":
                pre_score_TK = nn.functional.gelu(pre_score_TK)
            weight_TKC = scores_TKC * pre_score_TK[..., None]
        if m.padding_row is not None:
            weight_TKC = torch.where((shuffled_TK == m.padding_row)[..., None], 0.0, weight_TKC)
        expert_TKCX = weight_TKC[..., None] * value_TKV.unflatten(2, (m.tucker_cores, -1))
        sums = [
            (expert_TKCX * (block_TK == group)[:, :, None, None]).sum(1).flatten(1)
            if m.value_groups > 1
            else expert_TKCX.sum(1).flatten(1)
            for group in range(m.value_groups)
        ]
        return torch.cat(sums, 1)

    def _rounded(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.float() if self.table_dtype is None else rows.to(self.table_dtype).float()

    def project(self, output_TX: torch.Tensor, hidden_TD: torch.Tensor) -> torch.Tensor:
        """The output projection."""
        if self.memory.kind == "memory_plus":
            output_TX = output_TX * nn.functional.silu(self.swilu_projection(hidden_TD))
        projected: torch.Tensor = self.values_proj(output_TX)
        return projected


def scores_at(
    addresses_TK: torch.Tensor, row_THNR: torch.Tensor, col_THNR: torch.Tensor, cores_CHRR: torch.Tensor
) -> torch.Tensor:
    """Tucker scores [T, K, C] of given virtual addresses; K is head-major."""
    heads, keys_per_side, ranks = row_THNR.shape[1:]
    addresses_THK = addresses_TK.unflatten(1, (heads, -1))
    row_index = (addresses_THK // keys_per_side)[..., None].expand(-1, -1, -1, ranks)
    col_index = (addresses_THK % keys_per_side)[..., None].expand(-1, -1, -1, ranks)
    row_THKR, col_THKR = row_THNR.gather(2, row_index), col_THNR.gather(2, col_index)
    return torch.einsum("thkr,chrs,thks->thkc", row_THKR, cores_CHRR, col_THKR).flatten(1, 2)
