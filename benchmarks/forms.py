"""Forms of our own kernels against each other: which of them stays is for a GPU to say."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.former_lookup import former_lookup
from benchmarks.former_topk import former_topk
from benchmarks.peers import BATCHES, COLD_BYTES, Comparison
from benchmarks.timing import replay_in_turns
from umv2_export.gpu.launch import launch_lookup, launch_topk

__all__ = ["LOOKUPS", "TOPKS", "compare_lookup_forms", "compare_topk_forms"]

# Of the published models: pre-value, value, hits, cores; keys of a side and the top of them.
LOOKUPS = {"227M/1.2B": (192, 192, 32, 2), "1B/7B": (384, 768, 128, 2)}
TOPKS = {"227M/1.2B": (360, 32), "1B/7B": (528, 128)}

# Calls of a graph, on inputs of their own.
CALLS = 8


def compare_lookup_forms(
    table: torch.Tensor, name: str, *, batches: Sequence[int] = BATCHES, cold_bytes: int = COLD_BYTES
) -> Iterator[Comparison]:
    """Hits split over programs, which is what is launched, against a program a token, and against the former kernel.

    Args:
        table: [rows, P + V] of the model, large against any cache.
        name: of the model, of `LOOKUPS`.
        batches: tokens of a call.
        cold_bytes: that the calls of one graph read together.
    """
    pre_value_dim, _, hits, cores = LOOKUPS[name]
    for tokens in batches:
        calls = max(2, -(-cold_bytes // (tokens * hits * table.shape[1] * table.dtype.itemsize)))
        contenders: list[list[Any]] = [[], [], []]
        for _ in range(calls):
            indices = torch.randint(len(table), (tokens, hits), device=table.device)
            scores = torch.rand(tokens, hits, cores, device=table.device)
            query = torch.randn(tokens, pre_value_dim, device=table.device)
            ours = partial(
                launch_lookup, indices, scores, None, query, None, [table], pre_value_dim, "none", len(table), 1
            )
            contenders[0].append(partial(ours, form="split"))
            contenders[1].append(partial(ours, form="whole"))
            contenders[2].append(partial(former_lookup, indices, scores, query, table, pre_value_dim))
        seconds, *peers = replay_in_turns(contenders)
        for peer_name, peer in zip(("a program a token", "the former kernel"), peers, strict=True):
            yield Comparison(f"lookup of {name} in splits / {peer_name}", tokens, seconds, peer, peer / seconds, 1.0)


def compare_topk_forms(device: str, name: str, *, batches: Sequence[int] = BATCHES) -> Iterator[Comparison]:
    """Programs that share a grid, where few tokens have one, against one program a token, and against sorts.

    Args:
        device: where.
        name: of the model, of `TOPKS`.
        batches: tokens of a call.
    """
    keys, top = TOPKS[name]
    for tokens in batches:
        shapes = ((tokens, 1, keys, 2), (tokens, 1, keys, 2), (1, 2), (1, 2), (2, 1, 2, 2))
        calls: list[tuple[Any, ...]] = [
            (*(torch.randn(shape, device=device) for shape in shapes), top, top) for _ in range(CALLS)
        ]
        runs = (launch_topk, partial(launch_topk, whole=True), former_topk)
        seconds, *peers = replay_in_turns([[partial(run, *call) for call in calls] for run in runs])
        for peer_name, peer in zip(("a program a token", "by sorts"), peers, strict=True):
            yield Comparison(f"top-k of {name} / {peer_name}", tokens, seconds, peer, peer / seconds, 1.0)
