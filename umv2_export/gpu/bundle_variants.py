"""The kernels that a bundle calls where a node is one launch."""

import torch

from umv2_export.bundle import Bundle
from umv2_export.gpu.variants import LookupVariant, TopkVariant, Variant, model_variants

__all__ = ["bundle_variants"]


def bundle_variants(bundle: Bundle) -> list[Variant]:
    """The variants that the nodes of a bundle ask for: one of each op.

    ONNX Runtime and TensorRT's plugins in Python give a node no memory for the sums of splits, so there are none.

    Raises:
        Unsupported: its model has no memory layers.
    """
    # Exports compute scores and pre-scores in fp32, whatever their weights are stored in.
    variants = model_variants(bundle.config, bundle.layout.shards, {torch.float32: (bundle.layout.dtype,)})
    return [
        variant
        for variant in variants
        if isinstance(variant, TopkVariant) or (isinstance(variant, LookupVariant) and not variant.split)
    ]
