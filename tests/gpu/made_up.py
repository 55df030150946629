"""Folders of kernels that nothing compiled: their index is sound, their files hold a few bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.gpu.stand_in_kernels import write_stand_in_kernels
from umv2_export.gpu.lookup_variants import LookupVariant, lookup_variant
from umv2_export.gpu.topk_variants import topk_variant
from umv2_export.gpu.variants import Variant

__all__ = ["lookup", "made_up_folder", "topk"]


def lookup(**facts: Any) -> LookupVariant:
    """A lookup; what is not named is that of a plain model with pre-values."""
    plain: dict[str, Any] = {
        "scores_dtype": torch.float32,
        "rows_dtype": torch.float32,
        "shards": 1,
        "cores": 2,
        "grouped": False,
        "pre_value_dim": 24,
        "value_dim": 32,
        "gelu": False,
    }
    return lookup_variant(**plain | facts)


def topk(**facts: Any) -> Variant:
    """A top-k; what is not named is that of a plain model."""
    plain: dict[str, Any] = {"scores_dtype": torch.float32, "ranks": 2, "cores": 2, "row_topk": 8, "topk": 8}
    return topk_variant(**plain | facts)


def made_up_folder(folder: Path, variants: Sequence[Variant], capabilities: Sequence[str] = ("8.9",)) -> Path:
    """Write the folder; returns it."""
    write_stand_in_kernels(folder, variants, capabilities)
    return folder
