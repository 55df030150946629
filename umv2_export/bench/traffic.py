"""Bytes that one forward moves, counted from what it really hit.

Weights are counted once a forward, as a batch reads them; rows once for each memory layer and distinct row, experts
once for each block and distinct expert. Source of the uniform expectation: UltraMemV2, arXiv 2508.18756.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from umv2_export.bundle import Bundle
from umv2_export.dtypes import torch_dtype
from umv2_export.errors import InvalidRequest
from umv2_export.interface import Inner
from umv2_export.runtimes.base import Array

__all__ = ["Hits", "Traffic", "count_traffic", "density", "expected_hits", "hits_of"]


@dataclass(frozen=True)
class Traffic:
    """Bytes of one forward, by part.

    Attributes:
        attention: weights of the attention of all blocks.
        dense: weights of FFNs, projections, norms and Tucker cores.
        keys: product keys.
        map: address maps, 4 bytes an entry that is hit.
        rows: distinct rows.
        router: weights of the routers.
        experts: distinct experts.
        embeddings: the head, and the rows of the input embedding.
        kv_cache: keys and values of past positions, read, and those of new ones, written.
        intermediates: what the graph writes to memory and reads again between the gather of rows and their sum, and for
            each block the copy of a growing cache that it returns.
    """

    attention: int
    dense: int
    keys: int
    map: int
    rows: int
    router: int
    experts: int
    embeddings: int
    kv_cache: int
    intermediates: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())

    @property
    def core(self) -> int:
        """What differs between a model of memory layers and one of experts: FFN and memory, or router and experts."""
        return self.dense + self.keys + self.map + self.rows + self.router + self.experts

    @classmethod
    def mean(cls, several: "Sequence[Traffic]") -> "Traffic":
        """Part by part, in whole bytes."""
        parts = [asdict(one) for one in several]
        return cls(**{name: round(sum(part[name] for part in parts) / len(parts)) for name in parts[0]})

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        return {**asdict(self), "core": self.core, "total": self.total}


@dataclass(frozen=True)
class Hits:
    """What one forward hit.

    Attributes:
        tokens: in all, and distinct.
        rows: per memory layer, distinct rows; fractions where it is an expectation.
        experts: per block, distinct experts.
    """

    tokens: int
    distinct_tokens: float
    rows: list[float] = field(default_factory=list)
    experts: list[float] = field(default_factory=list)


def hits_of(bundle: Bundle, token_ids: Array, probes: Mapping[str, Array]) -> Hits:
    """Distinct rows and experts in the probes of a forward.

    Args:
        bundle: the model.
        token_ids: of the tokens that count.
        probes: `addresses.{j}` [T, K] and `router_logits.{i}` [T, E] of those tokens, and of no others.

    Raises:
        InvalidRequest: the probes are of another number of tokens.
    """
    config = bundle.config
    tokens = int(token_ids.size)
    layers = [probes[Inner.ADDRESSES.at(j)] for j in range(config.memory.layers)]
    routers = [probes[Inner.ROUTER_LOGITS.at(i)] for i in range(config.num_layers if config.experts else 0)]
    if any(len(probe) != tokens for probe in (*layers, *routers)):
        raise InvalidRequest(f"probes are not of {tokens} tokens")
    maps = _address_maps(bundle) if config.memory.has_address_map else [None] * len(layers)
    rows = [_distinct(layer if table is None else table[layer]) for layer, table in zip(layers, maps, strict=True)]
    topk = config.experts.topk if config.experts else 0
    experts = [_distinct(np.argsort(-logits, axis=1, kind="stable")[:, :topk]) for logits in routers]
    return Hits(tokens, _distinct(token_ids), rows, experts)


def expected_hits(bundle: Bundle, tokens: int) -> Hits:
    """Expected distinct rows and experts of `tokens` tokens that route uniformly: N * (1 - (1 - k/N)^T)."""
    config = bundle.config

    def distinct(pool: int, chosen: int) -> float:
        return float(pool * (1 - (1 - chosen / pool) ** tokens))

    memory = config.memory
    rows = [distinct(memory.visible_rows, memory.hits) for _ in range(memory.layers)]
    experts = (
        [] if config.experts is None else [distinct(config.experts.count, config.experts.topk)] * config.num_layers
    )
    return Hits(tokens, distinct(config.vocab_size, 1), rows, experts)


def density(bundle: Bundle, hits: Hits) -> float:
    """Share of all rows that layers see, or of all experts, that is hit; 1 in a model that has neither."""
    config = bundle.config
    if config.experts is not None:
        return sum(hits.experts) / (config.num_layers * config.experts.count)
    return sum(hits.rows) / (config.memory.layers * config.memory.visible_rows) if config.memory.layers else 1.0


def count_traffic(bundle: Bundle, hits: Hits, *, batch: int, past: int, native: bool) -> Traffic:
    """Bytes of one forward of `hits.tokens` tokens.

    Args:
        bundle: the model, whose stored dtypes count.
        hits: of the forward, or expected ones.
        batch: sequences.
        past: cached positions of each.
        native: the native ops run, which keep no intermediates of rows.
    """
    config, stored = bundle.config, bundle.manifest.bytes
    item = torch_dtype(bundle.manifest.dtype).itemsize
    d, memory = config.hidden_size, config.memory
    row_bytes = memory.row_size * torch_dtype(bundle.manifest.table_dtype).itemsize
    embedding = config.embedding_size * d * item
    kv_size = config.kv_heads * config.head_size
    attention = config.num_layers * 2 * (d + kv_size) * d * item
    new = hits.tokens // batch
    cache_row = 2 * kv_size * item * config.num_layers * batch
    map_entries = 0 if not memory.has_address_map else hits.tokens * memory.hits * memory.layers
    expert_bytes = 0 if config.experts is None else stored["experts"] / (config.num_layers * config.experts.count)
    # Gathered rows in fp32: written by the gather of each shard, merged shard by shard (two read, one written), cut
    # into pre-value and value (read, written), and read by the products.
    passes = 0 if native else bundle.layout.shards + 3 * (bundle.layout.shards - 1) + 3
    copied = 0 if bundle.manifest.cache == "static" else 2 * cache_row * (past + new)
    gathered = hits.tokens * memory.hits * memory.layers * memory.row_size * 4
    return Traffic(
        attention=attention,
        dense=stored["dense"] - attention - (embedding if config.tie_embeddings else 2 * embedding),
        keys=stored["keys"],
        map=map_entries * 4 * (2 if memory.value_groups > 1 else 1),
        rows=round(sum(hits.rows) * row_bytes),
        router=stored["router"],
        experts=round(sum(hits.experts) * expert_bytes),
        embeddings=embedding + round(hits.distinct_tokens * d * item),
        kv_cache=cache_row * (past + new),
        intermediates=gathered * passes + copied,
    )


def _distinct(values: Array) -> float:
    return float(len(np.unique(values)))


def _address_maps(bundle: Bundle) -> Sequence[Array]:
    """Physical row by virtual address, of each memory layer."""
    weights = bundle.weights()
    names = [f"transformer.mem_blocks.{j}.address_map" for j in range(bundle.config.memory.layers)]
    return [weights[name].numpy() for name in names]
