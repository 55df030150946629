"""Which tensors a model of a configuration has, and how many parameters they hold."""

import dataclasses
import math
from dataclasses import dataclass

from umv2_export.config.model import ModelConfig

__all__ = ["BUFFERS", "TABLES", "ParameterCounts", "count_parameters", "tensor_shapes"]

# Last parts of tensor names. Buffers are not parameters: the permutation of a layer's addresses, and the vectors that
# merge ranks in stage 1. Tables hold the rows.
BUFFERS = ("shuffle_index", "tucker_core_u", "tucker_core_v")
TABLES = ("values_for_look_up", "pre_values_for_look_up")


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters; buffers (permutations, singular vectors) are not counted.

    Attributes:
        dense: embeddings, attention, FFN, projections, norms, cores.
        keys: product keys of all layers.
        rows: values and pre-values of all tables.
        experts: all experts of all blocks.
        activated: what one token uses: all keys, H*topk rows a memory layer, topk experts a block, all dense parameters
            but an untied input embedding, of which it reads one row.
    """

    dense: int
    keys: int
    rows: int
    experts: int
    activated: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.dense + self.keys + self.rows + self.experts

    def as_dict(self) -> dict[str, int]:
        """The counts under the names of the manifest."""
        return {"total": self.total, **dataclasses.asdict(self)}


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a checkpoint, in the order of the forward pass.

    The names are those of the released state dict: our native format, the reference model and the exported graph use
    them too.
    """
    d, kv_size = config.hidden_size, config.kv_heads * config.head_size
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (config.embedding_size, d)}
    for i in range(config.num_layers):
        block = f"transformer.blocks.{i}."
        shapes |= {
            block + "attn_norm.weight": (d,),
            block + "att_proj.weight": (d + 2 * kv_size, d),
            **{block + name: shape for name, shape in _query_key_norm_shapes(config).items()},
            block + "attn_out.weight": (d, d),
            block + "ff_norm.weight": (d,),
        }
        if config.experts is None:
            shapes |= {block + name: shape for name, shape in _swiglu_shapes(d, config.ffn_size).items()}
            continue
        shapes[block + "router.weight"] = (config.experts.count, d)
        for e in range(config.experts.count):
            expert = _swiglu_shapes(d, config.experts.inner_size)
            shapes |= {f"{block}experts.{e}.{name}": shape for name, shape in expert.items()}
    for j in range(config.memory.layers):
        shapes |= {f"transformer.mem_blocks.{j}.{k}": shape for k, shape in _memory_layer_shapes(config).items()}
    if config.memory.shares_a_table:
        pool = "transformer.full_memory_layer."
        shapes[pool + "values_for_look_up"] = (config.memory.pool_rows, config.memory.value_dim)
        if config.memory.pre_value_dim:
            shapes[pool + "pre_values_for_look_up"] = (config.memory.pool_rows, config.memory.pre_value_dim)
    shapes["transformer.ln_f.weight"] = (d,)
    if not config.tie_embeddings:
        shapes["transformer.ff_out.weight"] = (config.embedding_size, d)
    return shapes


def _query_key_norm_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    if config.qk_norm == "none":
        return {}
    query_heads, key_heads = (1, 1) if config.qk_norm == "head" else (config.num_heads, config.kv_heads)
    return {"q_norm.weight": (query_heads * config.head_size,), "k_norm.weight": (key_heads * config.head_size,)}


def _swiglu_shapes(d: int, inner: int) -> dict[str, tuple[int, ...]]:
    """The first half of `ff_proj` is the linear part, the second the gate."""
    return {"ff_proj.weight": (2 * inner, d), "ff_out.weight": (d, inner)}


def _memory_layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    d, m = config.hidden_size, config.memory
    if m.kind == "memory_plus":
        return {
            "query_proj.weight": (2 * m.queries_per_side * m.key_dim, d),
            "query_norm.weight": (m.key_dim,),
            "keys": (m.heads, 2, m.stored_side, m.key_dim),
            "keys_norm.weight": (m.key_dim,),
            "swilu_projection.weight": (m.value_dim, d),
            "values_proj.weight": (d, m.value_dim),
        }
    shapes: dict[str, tuple[int, ...]] = {
        "query_proj.weight": (2 * m.queries_per_side * m.key_dim, d),
        "query_norm.weight": (m.key_dim,),
        "keys": (m.heads, 2, m.stored_side, m.key_dim, m.tucker_rank),
        "keys_norm.weight": (m.key_dim,),
        **{f"tucker_core.{k}": (m.heads, m.tucker_rank, m.tucker_rank) for k in range(m.tucker_cores)},
        "tucker_core_u": (1, m.heads, 1, m.tucker_rank),
        "tucker_core_v": (1, m.heads, 1, m.tucker_rank),
        "shuffle_index": (m.stored_side**2,),
    }
    if m.pre_value_dim:
        shapes["pre_values_proj.weight"] = (m.pre_value_dim, d)
    if m.kind == "ultramem_v1":
        shapes["values_for_look_up"] = (m.pool_rows, m.value_dim)
    shapes["values_proj.weight"] = (d, m.value_dim * m.value_groups)
    return shapes


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Count the parameters of a model of this configuration."""
    dense = keys = rows = experts = 0
    for name, shape in tensor_shapes(config).items():
        leaf = name.rpartition(".")[2]
        if leaf in TABLES:
            rows += math.prod(shape)
        elif leaf == "keys":
            keys += math.prod(shape)
        elif ".experts." in name:
            experts += math.prod(shape)
        elif leaf not in BUFFERS:
            dense += math.prod(shape)
    memory = config.memory
    unused_embedding = 0 if config.tie_embeddings else (config.embedding_size - 1) * config.hidden_size
    activated = dense - unused_embedding + keys + memory.layers * memory.hits * memory.row_size
    if config.experts is not None:
        activated += experts // config.experts.count * config.experts.topk
    return ParameterCounts(dense=dense, keys=keys, rows=rows, experts=experts, activated=activated)
