"""Folders of kernels that nothing compiled: their index is sound, their files hold a few bytes."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from umv2_export.gpu.index import CompiledKernel, plain_variant, write_index
from umv2_export.gpu.variants import LookupVariant, Variant, lookup_variant, topk_variant

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
    folder.mkdir(exist_ok=True)
    kernels = []
    for variant in variants:
        for capability in capabilities:
            stem = f"{variant.name}_sm{capability.replace('.', '')}"
            files = {f"{stem}.{kind}": f"{kind} of {stem}".encode() for kind in ("ptx", "cubin")}
            for name, content in files.items():
                (folder / name).write_bytes(content)
            kernels.append(
                CompiledKernel(
                    name=variant.name,
                    op=variant.op,
                    variant=plain_variant(variant),
                    compute_capability=capability,
                    target=f"sm_{capability.replace('.', '')}",
                    entry=variant.kernel,
                    arguments=[asdict(argument) for argument in variant.arguments],
                    grid=variant.grid,
                    block=(32 * variant.num_warps, 1, 1),
                    shared_bytes=256,
                    registers=100,
                    spill_bytes=0,
                    vector_loads=4,
                    ptx_version=80,
                    ptx=f"{stem}.ptx",
                    cubin=f"{stem}.cubin",
                    sha256={name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
                )
            )
    write_index(folder, kernels)
    return folder
