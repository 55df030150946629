"""The mixture of experts of a block, as the checkpoint has it and as the export writes it."""

import torch
from torch import nn

from umv2_export.config import ExpertsConfig, ModelConfig
from umv2_export.ops import experts

__all__ = ["Expert", "ExpertStack", "Experts"]


class Expert(nn.Module):
    """The parameters of one SwiGLU expert."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.ff_proj = nn.Linear(hidden_size, 2 * inner_size, bias=False)
        self.ff_out = nn.Linear(inner_size, hidden_size, bias=False)


class Experts(nn.ModuleList):
    """Each expert by itself: the form of checkpoints, and of exports in standard ops."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = _experts_of(config)
        super().__init__(Expert(config.hidden_size, self.config.inner_size) for _ in range(self.config.count))

    def forward(self, hidden_TD: torch.Tensor, router_logits_TE: torch.Tensor) -> torch.Tensor:
        """umv2::Experts."""
        each = [expert for expert in self if isinstance(expert, Expert)]
        output_TD: torch.Tensor = experts(
            hidden_TD,
            router_logits_TE,
            [expert.ff_proj.weight for expert in each],
            [expert.ff_out.weight for expert in each],
            self.config.topk,
            self.config.normalize_topk,
        )
        return output_TD


class ExpertStack(nn.Module):
    """All experts in two tensors: the form of com.microsoft::MoE, rows of gate and linear part interleaved."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = _experts_of(config)
        count, inner, d = self.config.count, self.config.inner_size, config.hidden_size
        self.ff_proj = nn.Parameter(torch.zeros(count, 2 * inner, d))
        self.ff_out = nn.Parameter(torch.zeros(count, d, inner))

    def forward(self, hidden_TD: torch.Tensor, router_logits_TE: torch.Tensor) -> torch.Tensor:
        """umv2::Experts."""
        output_TD: torch.Tensor = experts(
            hidden_TD, router_logits_TE, [self.ff_proj], [self.ff_out], self.config.topk, self.config.normalize_topk
        )
        return output_TD


def _experts_of(config: ModelConfig) -> ExpertsConfig:
    if config.experts is None:
        raise TypeError("the model has no experts")
    return config.experts
