"""What is timed on a GPU: lookups and their peers, a memory layer and the experts of equal size."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from benchmarks.ceiling import random_row_rate
from benchmarks.timing import replay_in_turns
from umv2_export.config import ModelConfig
from umv2_export.errors import EnvironmentUnfit
from umv2_export.layout import TableLayout
from umv2_export.model.folded import FoldedMemoryLayer, FoldedPool
from umv2_export.ops import memory_lookup

__all__ = ["Comparison", "compare_layers", "compare_lookups", "grouped_experts"]

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
HITS = 64

# What the calls of one graph read together, several times the largest cache: no call finds rows of the round before.
COLD_BYTES = 256 * 2**20

# Layers that take turns; together their tables exceed any cache.
LAYERS = 8

# Read at once to find the card's rate: enough to keep every multiprocessor busy.
FILLING_ROWS = 2**16

Call = Callable[[], object]

# table [rows, V], scores [T, K, 1], indices [T, K] -> a call, its inputs in the form that it wants them.
Contender = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Call]


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


def random_lookup(table: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [T, K, 1] and indices [T, K]."""
    shape = (tokens, HITS)
    return torch.randn((*shape, 1), device=table.device), torch.randint(len(table), shape, device=table.device)


def compare_lookups(
    table: torch.Tensor, *, batches: Sequence[int] = BATCHES, cold_bytes: int = COLD_BYTES
) -> Iterator[Comparison]:
    """Sums of 64 weighted rows a token against the random-row rate of the card and against peers.

    Args:
        table: [rows, width] on the GPU, large against its cache.
        batches: tokens of a call.
        cold_bytes: that the calls of one graph read together.
    """
    rows, width = table.shape
    row_bytes = width * table.dtype.itemsize
    label = f"lookup of {str(table.dtype).removeprefix('torch.')} rows of {width}"
    filling = [torch.randint(rows, (FILLING_ROWS,), device=table.device) for _ in range(4)]
    ceiling = random_row_rate(table, filling)
    contenders: dict[str, Contender] = {
        "ours": our_lookup,
        "torch embedding_bag": torch_embedding_bag,
        "stock ops in a CUDA graph": stock_lookup,
    }
    fbgemm = fbgemm_lookup(table)
    if fbgemm is not None:
        contenders["fbgemm TBE"] = fbgemm
    for tokens in batches:
        calls = max(2, -(-cold_bytes // (tokens * HITS * row_bytes)))
        ours, *peers = replay_in_turns(
            [
                [contender(table, *random_lookup(table, tokens)) for _ in range(calls)]
                for contender in contenders.values()
            ]
        )
        rate = tokens * HITS * row_bytes / ours
        of_rows = f"{label} / {ceiling / 1e9:.0f} GB/s of random rows"
        yield Comparison(of_rows, tokens, ours, None, rate / ceiling, _from_64(tokens, 0.8))
        for name, peer in zip(list(contenders)[1:], peers, strict=True):
            target = _from_64(tokens, 1.5) if name == "torch embedding_bag" else None
            yield Comparison(f"{label} / {name}", tokens, ours, peer, peer / ours, target)


def our_lookup(table: torch.Tensor, scores_TK1: torch.Tensor, indices_TK: torch.Tensor) -> Call:
    """umv2::MemoryLookup."""
    return partial(memory_lookup, indices_TK, scores_TK1, None, None, None, [table], 0, "none", len(table), 1)


def torch_embedding_bag(table: torch.Tensor, scores_TK1: torch.Tensor, indices_TK: torch.Tensor) -> Call:
    """Its weights must have the dtype of the table; offsets are given, or it would make them in every call."""
    return partial(
        functional.embedding_bag,
        indices_TK.flatten(),
        table,
        _offsets(indices_TK),
        mode="sum",
        include_last_offset=True,
        per_sample_weights=scores_TK1.flatten().to(table.dtype),
    )


def stock_lookup(table: torch.Tensor, scores_TK1: torch.Tensor, indices_TK: torch.Tensor) -> Call:
    """The lookup in the ops that every runtime has: gathered rows go to memory and back."""
    scores_T1K, flat = scores_TK1.mT.to(table.dtype), indices_TK.flatten()

    def call() -> torch.Tensor:
        row_TKV = table.index_select(0, flat).unflatten(0, indices_TK.shape)
        return torch.bmm(scores_T1K, row_TKV)[:, 0]

    return call


def fbgemm_lookup(table: torch.Tensor) -> Contender | None:
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

    def lookup(_: torch.Tensor, scores_TK1: torch.Tensor, indices_TK: torch.Tensor) -> Call:
        return partial(bags, indices_TK.flatten().int(), _offsets(indices_TK).int(), scores_TK1.flatten())

    return lookup


def _offsets(indices_TK: torch.Tensor) -> torch.Tensor:
    """Where the indices of each token begin, and where the last ones end."""
    tokens, hits = indices_TK.shape
    return torch.arange(0, (tokens + 1) * hits, hits, device=indices_TK.device)


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
        seconds, peer = replay_in_turns(
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
