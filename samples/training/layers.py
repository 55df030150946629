"""The reference layers in a form that gradients flow through.

The retrieval itself passes none: which rows win is a discrete choice, and the scores of the chosen ones are taken again
from the key scores.
"""

from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from umv2_export.config import ModelConfig
from umv2_export.model.experts import Expert, Experts
from umv2_export.model.memory import MemoryPool, ReferenceMemoryLayer, Routing, scores_at
from umv2_export.model.transformer import LanguageModel
from umv2_export.ops import tucker_topk

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["router_losses", "trainable_model"]


def trainable_model(config: ModelConfig, state: dict[str, torch.Tensor]) -> LanguageModel:
    """The model with the given weights."""
    model = LanguageModel(config, TrainedMemoryLayer, MemoryPool(config), TrainedExperts)
    model.load_state_dict(state)
    return model


class TrainedMemoryLayer(ReferenceMemoryLayer):
    """The memory layer, its singular vectors kept up with its cores."""

    def forward(
        self, hidden_TD: torch.Tensor, pool: nn.Module, forced_addresses: torch.Tensor | None
    ) -> tuple[torch.Tensor, Routing]:
        """As `MemoryLayer.forward`."""
        if self.training:
            self._update_vectors()
        row_THNR, col_THNR = self.key_scores(hidden_TD)
        u_HR, v_HR, cores_CHRR = self.tucker()
        if forced_addresses is None:
            with torch.no_grad():
                forced_addresses, _ = tucker_topk(
                    row_THNR, col_THNR, u_HR, v_HR, cores_CHRR, self.memory.row_topk, self.memory.topk
                )
        scores_TKC = scores_at(forced_addresses, row_THNR, col_THNR, cores_CHRR)
        output_TX = self.lookup(hidden_TD, pool, forced_addresses, scores_TKC)
        return self.project(output_TX, hidden_TD), Routing(row_THNR, col_THNR, forced_addresses)

    @torch.no_grad()
    def _update_vectors(self) -> None:
        u_HRR, _, v_HRR = torch.linalg.svd(torch.stack(list(self.tucker_core)).sum(0))
        # The sign of a pair of singular vectors is free; it is kept, so that the keys that win do not jump.
        turn_H = (u_HRR[:, :, 0] * self.tucker_core_u[0, :, 0]).sum(-1, keepdim=True).sign()
        self.tucker_core_u.copy_((u_HRR[:, :, 0] * turn_H)[None, :, None])
        self.tucker_core_v.copy_((v_HRR[:, 0] * turn_H)[None, :, None])


class TrainedExperts(Experts):
    """Each expert on the tokens that chose it, which lie together once they are sorted by expert."""

    def forward(self, hidden_TD: torch.Tensor, router_logits_TE: torch.Tensor) -> torch.Tensor:
        """As `Experts.forward`."""
        weight_TK, chosen_TK = router_logits_TE.softmax(-1).topk(self.config.topk)
        if self.config.normalize_topk:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        order_X = chosen_TK.flatten().argsort()
        token_X = order_X // self.config.topk
        counts = torch.bincount(chosen_TK.flatten(), minlength=self.config.count).tolist()
        outputs = []
        for expert, hidden_XD in zip(cast("Iterable[Expert]", self), hidden_TD[token_X].split(counts), strict=True):
            linear, gate = expert.ff_proj(hidden_XD).chunk(2, -1)
            outputs.append(expert.ff_out(nn.functional.silu(gate) * linear))
        weighted_XD = torch.cat(outputs) * weight_TK.flatten()[order_X, None]
        return torch.zeros_like(hidden_TD).index_add(0, token_X, weighted_XD)


def router_losses(router_logits_TE: torch.Tensor, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The load-balancing and the router z loss of OLMoE, arXiv 2409.02060."""
    count = router_logits_TE.shape[1]
    probability_TE = router_logits_TE.softmax(-1)
    chosen_TK = probability_TE.topk(topk).indices
    share_E = torch.bincount(chosen_TK.flatten(), minlength=count) / len(router_logits_TE)
    balance = count * (share_E * probability_TE.mean(0)).sum()
    return balance, router_logits_TE.logsumexp(-1).square().mean()
