"""Compiles the kernels of all cases of the harness of the TensorRT plugins; no GPU is needed.

python -m tests.plugins.harness_kernels HARNESS FOLDER COMPUTE_CAPABILITY
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from umv2_export.gpu.ahead_of_time import build_kernels
from umv2_export.gpu.archive import ARCHIVE_FILE
from umv2_export.gpu.lookup_variants import lookup_variant, sum_variant
from umv2_export.gpu.topk_variants import topk_variant
from umv2_export.gpu.variants import Variant

__all__ = ["Case", "compile_cases", "harness_cases", "split_variants_of", "variant_of"]

Case = dict[str, Any]
"""Name, op, and what is fixed in the kernel."""


def harness_cases(harness: Path) -> dict[str, Case]:
    """The cases of a harness, by name."""
    listed = subprocess.run([harness, "--list"], capture_output=True, text=True, check=True).stdout.splitlines()
    return {case["name"]: case for case in map(json.loads, listed)}


def variant_of(case: Case) -> Variant:
    """The kernel that serves a case alone."""
    facts = {name: value for name, value in case.items() if name not in ("name", "op")}
    scores = getattr(torch, facts.pop("scores_dtype"))
    if case["op"] == "TuckerTopK":
        return topk_variant(scores, **facts)
    return lookup_variant(scores, getattr(torch, facts.pop("rows_dtype")), **facts)


def split_variants_of(case: Case) -> list[Variant]:
    """The kernels that serve a lookup where the plugin has memory for the sums of splits."""
    if case["op"] == "TuckerTopK":
        return []
    scores = getattr(torch, case["scores_dtype"])
    return [variant_of(case | {"split": True}), sum_variant(scores, value_dim=case["value_dim"])]


def compile_cases(harness: Path, folder: Path, capability: str) -> Path:
    """Compile into a folder; returns the pack."""
    cases = harness_cases(harness).values()
    variants = {variant.name: variant for case in cases for variant in (variant_of(case), *split_variants_of(case))}
    build_kernels(folder, list(variants.values()), [capability], replace_target=True)
    return folder / ARCHIVE_FILE


if __name__ == "__main__":
    print(compile_cases(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
