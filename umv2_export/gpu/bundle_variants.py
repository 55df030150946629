"""The kernels that a bundle calls."""

import torch

from umv2_export.bundle import Bundle
from umv2_export.gpu.variants import Variant, model_variants

__all__ = ["bundle_variants"]


def bundle_variants(bundle: Bundle) -> list[Variant]:
    """The variants that the nodes of a bundle ask for: those of each op.

    Raises:
        Unsupported: its model has no memory layers.
    """
    # Exports compute scores and pre-scores in fp32, whatever their weights are stored in.
    return model_variants(bundle.config, bundle.layout.shards, {torch.float32: (bundle.layout.dtype,)})
