"""What is timed on a GPU: lookups and their peers, a memory layer and the experts of equal size."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from samples.gpu.ceiling import random_row_rate
from samples.gpu.timing import alternate
from umv2_export.config import ModelConfig
from umv2_export.errors import EnvironmentUnfit
from umv2_export.model.folded import FoldedMemoryLayer, FoldedPool, TableLayout
from umv2_export.ops import memory_lookup

__all__ = ["Comparison", "compare_layers", "compare_lookups", "grouped_experts"]

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
HITS = 64

# Calls of one CUDA graph, and layers that take turns: together their tables exceed any cache.
CALLS = 16
LAYERS = 8

# Read at once to find the card's rate: enough to keep every multiprocessor busy.
FILLING_ROWS = 2**16

# table [rows, V], scores [T, K, 1], indices [T, K] -> [T, V].
Lookup = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Comparison:
    """One line of the report.

    Attributes:
        measure: what is compared, and with what.
        batch: tokens.
        seconds: of ours.
        peer_seconds: of the peer; None where the peer is a rate.
        ratio: time of the peer over ours, or our share of the rate.
        target: what the project aims at, or None.
    """

    measure: str
    batch: int
    seconds: float
    peer_seconds: float | None
    ratio: float
    target: float | None


def random_lookups(table: torch.Tensor, tokens: int, calls: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Indices [T, K] for each call, and scores [T, K, 1] for all."""
    shape = (tokens, HITS)
    indices = [torch.randint(len(table), shape, device=table.device) for _ in range(calls)]
    return indices, torch.randn((*shape, 1), device=table.device)


def compare_lookups(
    table: torch.Tensor, *, batches: Sequence[int] = BATCHES, calls: int = CALLS
) -> Iterator[Comparison]:
    """Sums of 64 weighted rows a token against the random-row rate of the card and against peers.

    Args:
        table: [rows, width] on the GPU, large against its cache.
        batches: tokens of a call.
        calls: of one graph.
    """
    rows, width = table.shape
    dtype = str(table.dtype).removeprefix("torch.")
    filling = [torch.randint(rows, (FILLING_ROWS,), device=table.device) for _ in range(calls)]
    ceiling = random_row_rate(table, filling)
    fbgemm = fbgemm_lookup(table)
    for tokens in batches:
        # A call of thousands of tokens reads more than any cache holds by itself.
        indices, scores = random_lookups(table, tokens, max(2, min(calls, 2**14 // tokens)))
        contenders: dict[str, Lookup] = {
            "ours": our_lookup,
            "torch embedding_bag": torch_embedding_bag,
            "stock ops in a CUDA graph": stock_lookup,
        }
        if fbgemm is not None:
            contenders["fbgemm TBE"] = fbgemm
        ours, *peers = alternate(
            [[partial(lookup, table, scores, index) for index in indices] for lookup in contenders.values()]
        )
        rate = tokens * HITS * width * table.dtype.itemsize / ours
        label = f"lookup of {dtype} rows of {width}"
        of_rows = f"{label} / {ceiling / 1e9:.0f} GB/s of random rows"
        yield Comparison(of_rows, tokens, ours, None, rate / ceiling, _from_64(tokens, 0.8))
        for name, peer in zip(list(contenders)[1:], peers, strict=True):
            target = _from_64(tokens, 1.5) if name == "torch embedding_bag" else None
            yield Comparison(f"{label} / {name}", tokens, ours, peer, peer / ours, target)


def our_lookup(table: torch.Tensor, scores_TK1: torch.Tensor, indices_TK: torch.Tensor) -> torch.Tensor:
    """umv2::MemoryLookup."""
    output: torch.Tensor = memory_lookup(indices_TK, scores_TK1, None, None, None, [table], 0, "none", len(table), 1)
    return output


def torch_embedding_bag(table: torch.Tensor, scores_TK1: torch.Tensor, indices_TK: torch.Tensor) -> torch.Tensor:
    """Its weights must have the dtype of the table."""
    weights = scores_TK1[..., 0].to(table.dtype)
    return functional.embedding_bag(indices_TK, table, mode="sum", per_sample_weights=weights)


def stock_lookup(table: torch.Tensor, scores_TK1: torch.Tensor, indices_TK: torch.Tensor) -> torch.Tensor:
    """The lookup in the ops that every runtime has: gathered rows go to memory and back."""
    row_TKV = table.index_select(0, indices_TK.flatten()).unflatten(0, indices_TK.shape)
    return torch.bmm(scores_TK1.mT.to(table.dtype), row_TKV)[:, 0]


def fbgemm_lookup(table: torch.Tensor) -> Lookup | None:
    """The table-batched embedding of fbgemm for inference, on a table of its own, where it is installed."""
    kinds = {torch.float32: "FP32", torch.float16: "FP16"}
    if importlib.util.find_spec("fbgemm_gpu") is None or table.dtype not in kinds:
        return None
    try:
        from fbgemm_gpu.split_embedding_configs import SparseType  # noqa: PLC0415 - an optional package
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation  # noqa: PLC0415
        from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (  # noqa: PLC0415
            IntNBitTableBatchedEmbeddingBagsCodegen,
        )
    except OSError as error:
        raise EnvironmentUnfit(
            "fbgemm_gpu is installed and does not load",
            why=str(error),
            fix="install the version that was built for this PyTorch, or uninstall it",
        ) from error

    rows, width = table.shape
    kind = SparseType[kinds[table.dtype]]
    place = EmbeddingLocation.DEVICE if table.is_cuda else EmbeddingLocation.HOST
    bags = IntNBitTableBatchedEmbeddingBagsCodegen(
        [("rows", rows, width, kind, place)], device=table.device, output_dtype=kind
    )
    bags.fill_random_weights()

    def lookup(_: torch.Tensor, scores_TK1: torch.Tensor, indices_TK: torch.Tensor) -> torch.Tensor:
        tokens, hits = indices_TK.shape
        offsets = torch.arange(0, (tokens + 1) * hits, hits, dtype=torch.int32, device=table.device)
        output: torch.Tensor = bags(indices_TK.flatten().int(), offsets, scores_TK1.flatten())
        return output

    return lookup


def compare_layers(
    memory: ModelConfig,
    experts: ModelConfig,
    device: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    batches: Sequence[int] = BATCHES,
    layers: int = LAYERS,
) -> Iterator[Comparison]:
    """A memory layer against router and experts in grouped GEMMs, of models of equal size.

    Args:
        memory: a model whose layers own their rows.
        experts: the other model.
        device: where.
        dtype: of weights and rows.
        batches: tokens of a call.
        layers: that take turns, each with weights of its own.
    """
    ours = [random_memory_layer(memory, index, device, dtype) for index in range(layers)]
    peers = [RandomExperts(experts, device, dtype) for _ in range(layers)]
    pool = FoldedPool(ours[0].layout)
    for tokens in batches:
        hidden = torch.randn(tokens, memory.hidden_size, device=device, dtype=dtype)
        seconds, peer = alternate(
            [[partial(layer, hidden, pool, None) for layer in ours], [partial(layer, hidden) for layer in peers]]
        )
        yield Comparison(
            "memory layer / router and experts", tokens, seconds, peer, peer / seconds, 4.0 if tokens == 64 else None
        )


def random_memory_layer(config: ModelConfig, index: int, device: str, dtype: torch.dtype) -> FoldedMemoryLayer:
    """A memory layer of a model with random weights."""
    layout = TableLayout.of(config.memory, dtype, 2 * 10**9)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            layer = FoldedMemoryLayer(config, index, layout=layout, key_dtype=dtype).requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    for parameter in layer.parameters():
        parameter.normal_(std=0.05)
    return layer


class RandomExperts:
    """Router and experts of a block with random weights, in the layout of grouped GEMMs."""

    def __init__(self, config: ModelConfig, device: str, dtype: torch.dtype) -> None:
        if config.experts is None:
            raise ValueError("the model has no experts")
        self.topk = config.experts.topk
        count, inner, d = config.experts.count, config.experts.inner_size, config.hidden_size
        shapes = ((d, count), (count, d, 2 * inner), (count, inner, d))
        self.router_DE, self.ff_proj_EDI, self.ff_out_EID = (
            torch.randn(shape, device=device, dtype=dtype) * 0.05 for shape in shapes
        )

    def __call__(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """[T, D] for [T, D]."""
        return grouped_experts(hidden_TD, hidden_TD @ self.router_DE, self.ff_proj_EDI, self.ff_out_EID, self.topk)


def grouped_experts(
    hidden_TD: torch.Tensor,
    router_logits_TE: torch.Tensor,
    ff_proj_EDI: torch.Tensor,
    ff_out_EID: torch.Tensor,
    topk: int,
) -> torch.Tensor:
    """SwiGLU experts over tokens sorted by expert: two grouped GEMMs, which read each expert that is hit once.

    Args:
        hidden_TD: bf16 [T, D].
        router_logits_TE: [T, E].
        ff_proj_EDI: [E, D, 2I], linear part first.
        ff_out_EID: [E, I, D].
        topk: experts of a token.
    """
    weight_TK, chosen_TK = router_logits_TE.float().softmax(-1).topk(topk)
    expert_X, order_X = chosen_TK.flatten().sort()
    experts = torch.arange(len(ff_proj_EDI), device=hidden_TD.device)
    ends_E = torch.searchsorted(expert_X, experts, right=True).int()
    token_X = order_X // topk
    linear, gate = functional.grouped_mm(hidden_TD[token_X], ff_proj_EDI, offs=ends_E).chunk(2, -1)
    output_XD = functional.grouped_mm(functional.silu(gate) * linear, ff_out_EID, offs=ends_E)
    weighted_XD = output_XD.float() * weight_TK.flatten()[order_X, None]
    output_TD = torch.zeros(hidden_TD.shape, dtype=torch.float32, device=hidden_TD.device)
    return output_TD.index_add(0, token_X, weighted_XD).to(hidden_TD.dtype)


def _from_64(tokens: int, target: float) -> float | None:
    return target if tokens >= 64 else None
