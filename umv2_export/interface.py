"""The contract of an exported graph: its inputs, outputs and inner values, by name and in order.

The model names what it computes so, the tracer puts it out in this order, runtimes feed and read it, and parity and
benchmarks look it up.
"""

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple, TypeVar

from umv2_export.config import ModelConfig

__all__ = [
    "ATTENTION_MASK",
    "INPUT_IDS",
    "LOGITS",
    "GraphValue",
    "Inner",
    "cache_names",
    "cache_of",
    "feed",
    "graph_inputs",
    "graph_outputs",
    "inner_names",
    "named_cache",
    "part_names",
    "probe_names",
]

INPUT_IDS, ATTENTION_MASK, LOGITS = "input_ids", "attention_mask", "logits"
_PAST, _PRESENT = "past_key_values", "present"

# The axis of positions in a cache of fixed length.
_STATIC = "max_length"

# As ONNX calls them.
_ELEMENTS = {"fp32": "float", "fp16": "float16", "bf16": "bfloat16"}

Tensor = TypeVar("Tensor")


class GraphValue(NamedTuple):
    """An input or output of the graph.

    Attributes:
        name: in the graph.
        dtype: element type, as ONNX calls it in lower case.
        axes: sizes; an axis of any size has a name.
    """

    name: str
    dtype: str
    axes: tuple[str | int, ...]


def graph_inputs(config: ModelConfig, dtype: str, cache: str = "growing") -> list[GraphValue]:
    """Inputs of the graph, in order.

    Args:
        config: the model.
        dtype: fp32, fp16 or bf16, of the cache.
        cache: growing, or static for one of fixed length that is written in place.
    """
    ids = GraphValue(INPUT_IDS, "int64", ("batch", "sequence"))
    mask = GraphValue(ATTENTION_MASK, "int64", ("batch", "total_sequence"))
    return [ids, mask, *_cache(config, dtype, _PAST, _STATIC if cache == "static" else "past_sequence")]


def graph_outputs(config: ModelConfig, dtype: str, cache: str = "growing") -> list[GraphValue]:
    """Outputs of the graph, in order; logits are in fp32."""
    logits = GraphValue(LOGITS, "float", ("batch", "sequence", config.embedding_size))
    return [logits, *_cache(config, dtype, _PRESENT, _STATIC if cache == "static" else "past_sequence + sequence")]


def _cache(config: ModelConfig, dtype: str, prefix: str, length: str) -> list[GraphValue]:
    axes = ("batch", config.kv_heads, length, config.head_size)
    return [
        GraphValue(name, _ELEMENTS[dtype], axes) for i in range(config.num_layers) for name in _key_value(prefix, i)
    ]


def _key_value(prefix: str, block: int) -> tuple[str, str]:
    return f"{prefix}.{block}.key", f"{prefix}.{block}.value"


def feed(input_ids: Tensor, attention_mask: Tensor, past: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The inputs of one forward by name; `past` holds keys and values of every block."""
    return {INPUT_IDS: input_ids, ATTENTION_MASK: attention_mask, **_named(_PAST, past)}


def cache_names(blocks: int) -> list[tuple[str, str]]:
    """Past and present of every tensor of the cache: an input and an output that may share a buffer."""
    pairs = (zip(_key_value(_PAST, i), _key_value(_PRESENT, i), strict=True) for i in range(blocks))
    return [pair for block in pairs for pair in block]


def cache_of(outputs: Mapping[str, Tensor], blocks: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every block among the outputs of one forward."""
    names = (_key_value(_PRESENT, i) for i in range(blocks))
    return [(outputs[keys], outputs[values]) for keys, values in names]


def named_cache(present: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The reverse of `cache_of`."""
    return _named(_PRESENT, present)


def _named(prefix: str, cache: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {
        name: tensor for i, pair in enumerate(cache) for name, tensor in zip(_key_value(prefix, i), pair, strict=True)
    }


class Inner(Enum):
    """Kinds of inner values; each is named by its kind and the number of its block or memory layer.

    Attributes:
        HIDDEN: the input of a block; the last is the output of the final norm. [B, S, hidden_size].
        ROW_SCORES, COL_SCORES: of a memory layer, as its retrieval multiplies them; fp32 [B*S, H, N, R].
        ADDRESSES: virtual addresses that a memory layer retrieved; int64 [B*S, hits].
        NORMED: what FFN or experts of a block, and memory layers that read there, read; [B, S, hidden_size].
        ROUTER_LOGITS: of a block of experts; [B*S, E].
        ATTENTION: what the attention of a block adds to the residual stream; [B, S, hidden_size].
        FFN: what FFN or experts of a block add.
        MEMORY: what a memory layer adds.
    """

    HIDDEN = "hidden"
    ROW_SCORES = "row_scores"
    COL_SCORES = "col_scores"
    ADDRESSES = "addresses"
    NORMED = "normed"
    ROUTER_LOGITS = "router_logits"
    ATTENTION = "attention"
    FFN = "ffn"
    MEMORY = "memory"

    def at(self, index: int) -> str:
        """Name of the value of one block or memory layer."""
        return f"{self.value}.{index}"

    @classmethod
    def of(cls, name: str) -> "Inner":
        """Kind of a named value."""
        return cls(name.partition(".")[0])


def probe_names(config: ModelConfig) -> list[str]:
    """Names of inner values by which parity finds the first layer that differs, and benchmarks what was hit."""
    layers, routers = range(config.memory.layers), range(config.num_layers if config.experts else 0)
    return [
        *map(Inner.HIDDEN.at, range(config.num_layers + 1)),
        *(kind.at(j) for j in layers for kind in (Inner.ROW_SCORES, Inner.COL_SCORES, Inner.ADDRESSES)),
        *part_names(config)[0],
        *map(Inner.ROUTER_LOGITS.at, routers),
    ]


def inner_names(config: ModelConfig) -> list[str]:
    """All inner values that have a name: probes, and what attention and the parts of `part_names` add."""
    return [*probe_names(config), *map(Inner.ATTENTION.at, range(config.num_layers)), *part_names(config)[1]]


def part_names(config: ModelConfig) -> tuple[list[str], list[str]]:
    """Names of inner values between which a benchmark cuts out what differs between two models.

    From what every block normed to what its FFN or experts, and each memory layer, add to the residual stream.
    """
    blocks, layers = range(config.num_layers), range(config.memory.layers)
    return [*map(Inner.NORMED.at, blocks)], [*map(Inner.FFN.at, blocks), *map(Inner.MEMORY.at, layers)]
