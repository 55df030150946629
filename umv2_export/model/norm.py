"""Root-mean-square normalisation."""

import torch
from torch import nn

__all__ = ["RMSNorm", "rms_normalize"]


def rms_normalize(x: torch.Tensor, eps: float, dim: int = -1) -> torch.Tensor:
    """Compute x / sqrt(mean(x^2) + eps) over one dimension, in fp32, and cast back."""
    x_f = x.float()
    return (x_f * torch.rsqrt(x_f.square().mean(dim, keepdim=True) + eps)).to(x.dtype)


class RMSNorm(nn.Module):
    """Normalise the last dimension in fp32, cast back, then scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape whose last dimension is `size`."""
        return rms_normalize(x, self.eps) * self.weight
