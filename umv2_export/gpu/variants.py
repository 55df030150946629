"""The variants of the GPU kernels that a model calls.

Plain data, with no compiler and no runtime in sight: PyTorch, the ahead-of-time build and the plugins all take the
constants, the order of arguments and the grid from here.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch

from umv2_export.config import ModelConfig
from umv2_export.errors import Unsupported
from umv2_export.gpu.lookup_variants import LookupVariant, SumVariant, is_gelu, lookup_variant, sum_variant
from umv2_export.gpu.topk_variants import TopkVariant, topk_variant

__all__ = ["Variant", "model_variants", "node_variants", "without_splits"]

Variant = LookupVariant | SumVariant | TopkVariant

# Row dtypes that an export can store beside scores of each dtype.
ROW_DTYPES = {
    torch.float32: (torch.float32, torch.float16, torch.bfloat16, torch.int8),
    torch.float16: (torch.float16, torch.int8),
    torch.bfloat16: (torch.bfloat16, torch.int8),
}


def model_variants(
    config: ModelConfig, shards: int, dtypes: Mapping[torch.dtype, Sequence[torch.dtype]] = ROW_DTYPES
) -> list[Variant]:
    """All variants that nodes of a model can ask for.

    Args:
        config: of the model.
        shards: of its tables.
        dtypes: of scores -> of rows.

    Raises:
        Unsupported: it has no memory layers.
    """
    m = config.memory
    if m.kind == "none":
        raise Unsupported("the model has no memory layers, so no GPU kernels of ours")
    variants: list[Variant] = []
    for scores_dtype, rows_dtypes in dtypes.items():
        variants += [
            lookup_variant(
                scores_dtype,
                rows_dtype,
                shards=shards,
                cores=m.tucker_cores,
                grouped=m.value_groups > 1,
                pre_value_dim=m.pre_value_dim,
                value_dim=m.value_dim,
                gelu=is_gelu(m.activation),
                split=split,
            )
            for rows_dtype in rows_dtypes
            for split in (False, True)
        ]
        variants.append(sum_variant(scores_dtype, value_dim=m.value_dim))
        variants.append(
            topk_variant(scores_dtype, ranks=m.score_rank, cores=m.tucker_cores, row_topk=m.row_topk, topk=m.topk)
        )
    return variants


def node_variants(config: ModelConfig, shards: int, rows_dtype: torch.dtype) -> list[Variant]:
    """The variants that the nodes of an export ask for, lookups in splits among them.

    Args:
        config: of the model.
        shards: of its tables.
        rows_dtype: of their rows.

    Raises:
        Unsupported: it has no memory layers.
    """
    # Exports compute scores and pre-scores in fp32, whatever their weights are stored in.
    return model_variants(config, shards, {torch.float32: (rows_dtype,)})


def without_splits(variants: Iterable[Variant]) -> list[Variant]:
    """Those of nodes that are one launch each: for runtimes that give a node no memory for the sums of splits."""
    return [
        variant
        for variant in variants
        if isinstance(variant, TopkVariant) or (isinstance(variant, LookupVariant) and not variant.split)
    ]
