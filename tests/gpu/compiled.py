"""Kernels of golden models, compiled once for the tests that call them."""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.models import GOLDEN
from umv2_export.checkpoint import open_checkpoint
from umv2_export.gpu.ahead_of_time import build_kernels
from umv2_export.gpu.index import read_index, write_index
from umv2_export.gpu.lookup_variants import lookup_variant
from umv2_export.gpu.variants import model_variants

__all__ = ["CASES", "TOPK_CASE", "Case", "compiled_folder"]

# The golden model whose top-k is compiled: it takes 10 s, a lookup one.
TOPK_CASE = "v2_shared_ring"


@dataclass(frozen=True)
class Case:
    """A golden model's lookup.

    Attributes:
        golden: name of the golden case.
        shards: of its table.
        rows: dtype of its rows.
    """

    golden: str
    shards: int = 1
    rows: torch.dtype = torch.float32

    @property
    def memory(self) -> Any:
        """Its memory configuration."""
        return open_checkpoint(GOLDEN[self.golden]).config.memory


# Together they have every input that a lookup can have.
CASES: Mapping[str, Case] = {
    "query": Case("v2_shared_ring"),
    "shards": Case("v2_shared_ring", shards=3),
    "gelu": Case("v2_glu_two_heads"),
    "groups": Case("v1_skip_layer", shards=2),
    "plain": Case("v2_no_pre_values"),
    "int8": Case("v2_per_rank", shards=2, rows=torch.int8),
}


@functools.cache
def compiled_folder(case: str, capability: str) -> Path:
    """The folder of kernels of a case, as `umv2-export kernels` writes it for one architecture."""
    everything = _everything(capability)
    folder = everything.parent / case
    folder.mkdir()
    variant = _lookup(CASES[case])
    chosen = [kernel for kernel in read_index(everything) if kernel.name == variant.name or kernel.op == "TuckerTopK"]
    for kernel in chosen:
        for name in kernel.sha256:
            shutil.copyfile(everything / name, folder / name)
    write_index(folder, chosen)
    return folder


def _lookup(case: Case) -> Any:
    memory = case.memory
    return lookup_variant(
        torch.float32,
        case.rows,
        shards=case.shards,
        cores=memory.tucker_cores,
        grouped=memory.value_groups > 1,
        pre_value_dim=memory.pre_value_dim,
        value_dim=memory.value_dim,
        gelu=memory.activation == "gelu",
    )


@functools.cache
def _everything(capability: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="kernels-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = open_checkpoint(GOLDEN[TOPK_CASE]).config
    topk = model_variants(config, 1, {torch.float32: ()})
    lookups = {variant.name: variant for variant in map(_lookup, CASES.values())}
    build_kernels(folder / "all", [*topk, *lookups.values()], [capability])
    return folder / "all"
