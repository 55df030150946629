"""Which tensors a model of a configuration has, and how many parameters they hold."""

import dataclasses
import math
from dataclasses import dataclass
from enum import Enum

from umv2_export.config.model import ModelConfig

__all__ = [
    "TABLES",
    "ParameterCounts",
    "Role",
    "TensorSpec",
    "checkpoint_tensors",
    "count_parameters",
    "tensor_shapes",
]

# Last parts of the names of tables, in files whose configuration was not read yet.
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


class Role(Enum):
    """What a tensor is: by it, and never by its name, it is initialised, rounded, folded and counted.

    Attributes:
        LINEAR: a weight of the decoder, the embedding included.
        NORM: the weight of a norm in the residual stream, or of one of attention's.
        ROUTER, EXPERT: of a block of experts.
        QUERY: projection to the queries of a memory layer.
        KEY: product keys.
        KEY_NORM: weights of the norms of queries and keys; the export folds them into the keys.
        CORE: a Tucker core, or all of a layer's.
        ROW_VECTOR, COL_VECTOR: leading singular vectors of the summed cores.
        PERMUTATION: from virtual addresses to shuffled ones.
        PRE_VALUE_QUERY: projection to what pre-values are multiplied with.
        GATE: of the output of Memory+.
        OUTPUT: projection from values.
        PRE_VALUE, VALUE: tables.
        MAP, ROW: what the export makes of permutations and tables.
    """

    LINEAR = "linear"
    NORM = "norm"
    ROUTER = "router"
    EXPERT = "expert"
    QUERY = "query"
    KEY = "key"
    KEY_NORM = "key_norm"
    CORE = "core"
    ROW_VECTOR = "row_vector"
    COL_VECTOR = "col_vector"
    PERMUTATION = "permutation"
    PRE_VALUE_QUERY = "pre_value_query"
    GATE = "gate"
    OUTPUT = "output"
    PRE_VALUE = "pre_value"
    VALUE = "value"
    MAP = "map"
    ROW = "row"

    @property
    def is_table(self) -> bool:
        """Holds rows, which stay mapped."""
        return self in (Role.PRE_VALUE, Role.VALUE)

    @property
    def is_buffer(self) -> bool:
        """Is not a parameter: nothing trains it."""
        return self in (Role.ROW_VECTOR, Role.COL_VECTOR, Role.PERMUTATION)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor, without its elements.

    Attributes:
        name: in the checkpoint, or of the parameter of the folded model and hence in the graph.
        shape: of it.
        dtype: by its name on the command line; of a checkpoint, that of one in full precision.
        role: what it is.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: Role


# Name of the tensor within its block or layer -> role and shape.
_Specs = dict[str, tuple[Role, tuple[int, ...]]]


def checkpoint_tensors(config: ModelConfig) -> list[TensorSpec]:
    """Every tensor of a checkpoint, in the order of the forward pass.

    The names are those of the released state dict: our native format, the reference model and the exported graph use
    them too.
    """
    d, kv_size = config.hidden_size, config.kv_heads * config.head_size
    specs: _Specs = {"wte.weight": (Role.LINEAR, (config.embedding_size, d))}
    for i in range(config.num_layers):
        block = f"blocks.{i}."
        specs |= {
            block + "attn_norm.weight": (Role.NORM, (d,)),
            block + "att_proj.weight": (Role.LINEAR, (d + 2 * kv_size, d)),
            **_within(block, _query_key_norms(config)),
            block + "attn_out.weight": (Role.LINEAR, (d, d)),
            block + "ff_norm.weight": (Role.NORM, (d,)),
        }
        if config.experts is None:
            specs |= _within(block, _swiglu(Role.LINEAR, d, config.ffn_size))
            continue
        specs[block + "router.weight"] = (Role.ROUTER, (config.experts.count, d))
        for e in range(config.experts.count):
            specs |= _within(f"{block}experts.{e}.", _swiglu(Role.EXPERT, d, config.experts.inner_size))
    for j in range(config.memory.layers):
        specs |= _within(f"mem_blocks.{j}.", _memory_layer(config))
    if config.memory.shares_a_table:
        pool, rows = "full_memory_layer.", config.memory.pool_rows
        specs[pool + "values_for_look_up"] = (Role.VALUE, (rows, config.memory.value_dim))
        if config.memory.pre_value_dim:
            specs[pool + "pre_values_for_look_up"] = (Role.PRE_VALUE, (rows, config.memory.pre_value_dim))
    specs["ln_f.weight"] = (Role.NORM, (d,))
    if not config.tie_embeddings:
        specs["ff_out.weight"] = (Role.LINEAR, (config.embedding_size, d))
    return [
        TensorSpec(f"transformer.{name}", shape, "int64" if role is Role.PERMUTATION else "fp32", role)
        for name, (role, shape) in specs.items()
    ]


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a checkpoint, in the order of `checkpoint_tensors`."""
    return {spec.name: spec.shape for spec in checkpoint_tensors(config)}


def _within(prefix: str, specs: _Specs) -> _Specs:
    return {prefix + name: spec for name, spec in specs.items()}


def _query_key_norms(config: ModelConfig) -> _Specs:
    if config.qk_norm == "none":
        return {}
    query_heads, key_heads = (1, 1) if config.qk_norm == "head" else (config.num_heads, config.kv_heads)
    sizes = {"q_norm.weight": query_heads * config.head_size, "k_norm.weight": key_heads * config.head_size}
    return {name: (Role.NORM, (size,)) for name, size in sizes.items()}


def _swiglu(role: Role, d: int, inner: int) -> _Specs:
    """The first half of `ff_proj` is the linear part, the second the gate."""
    return {"ff_proj.weight": (role, (2 * inner, d)), "ff_out.weight": (role, (d, inner))}


def _memory_layer(config: ModelConfig) -> _Specs:
    d, m = config.hidden_size, config.memory
    ranks = () if m.kind == "memory_plus" else (m.tucker_rank,)
    specs: _Specs = {
        "query_proj.weight": (Role.QUERY, (2 * m.queries_per_side * m.key_dim, d)),
        "query_norm.weight": (Role.KEY_NORM, (m.key_dim,)),
        "keys": (Role.KEY, (m.heads, 2, m.stored_side, m.key_dim, *ranks)),
        "keys_norm.weight": (Role.KEY_NORM, (m.key_dim,)),
    }
    if m.kind == "memory_plus":
        specs["swilu_projection.weight"] = (Role.GATE, (m.value_dim, d))
    else:
        core, vector = (m.heads, m.tucker_rank, m.tucker_rank), (1, m.heads, 1, m.tucker_rank)
        specs |= {
            **{f"tucker_core.{k}": (Role.CORE, core) for k in range(m.tucker_cores)},
            "tucker_core_u": (Role.ROW_VECTOR, vector),
            "tucker_core_v": (Role.COL_VECTOR, vector),
            "shuffle_index": (Role.PERMUTATION, (m.stored_side**2,)),
        }
    if m.pre_value_dim:
        specs["pre_values_proj.weight"] = (Role.PRE_VALUE_QUERY, (m.pre_value_dim, d))
    if m.kind == "ultramem_v1":
        specs["values_for_look_up"] = (Role.VALUE, (m.pool_rows, m.value_dim))
    specs["values_proj.weight"] = (Role.OUTPUT, (d, m.value_dim * m.value_groups))
    return specs


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Count the parameters of a model of this configuration."""
    dense = keys = rows = experts = 0
    for spec in checkpoint_tensors(config):
        count = math.prod(spec.shape)
        if spec.role.is_table:
            rows += count
        elif spec.role is Role.KEY:
            keys += count
        elif spec.role is Role.EXPERT:
            experts += count
        elif not spec.role.is_buffer:
            dense += count
    memory = config.memory
    unused_embedding = 0 if config.tie_embeddings else (config.embedding_size - 1) * config.hidden_size
    activated = dense - unused_embedding + keys + memory.layers * memory.hits * memory.row_size
    if config.experts is not None:
        activated += experts // config.experts.count * config.experts.topk
    return ParameterCounts(dense=dense, keys=keys, rows=rows, experts=experts, activated=activated)
