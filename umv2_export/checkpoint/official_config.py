"""The `model:` section of the authors' config.yaml -> our configuration.

Source: the released training code (an OLMoE fork).
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from umv2_export.checkpoint.insertion import Insertion, read_insertion
from umv2_export.checkpoint.official_fields import check_field_classes
from umv2_export.config import ExpertsConfig, MemoryConfig, ModelConfig, QueryLayout
from umv2_export.errors import InputRejected, Unsupported, shown

__all__ = ["FieldReader", "OfficialModel", "TensorFacts", "read_fields"]

# The paper, and one fork of the released code, let at most this many row keys and column keys survive stage 1; the
# released code lets `mem_knn` survive. Nothing in a checkpoint tells which code trained it.
CAP = 128

KINDS = {"ultramem_v2": "ultramem_v2", "ultramem_v1": "ultramem_v1", "memory_plus": "memory_plus"}


class TensorFacts(NamedTuple):
    """What only the tensors of a memory layer tell.

    Attributes:
        tucker_rank, tucker_cores: of the score decomposition.
        value_groups: of UltraMem V1, whose layer is built with its own default whatever the configuration says.
    """

    tucker_rank: int
    tucker_cores: int
    value_groups: int


class OfficialModel(NamedTuple):
    """What the fields say, before any tensor is read.

    Attributes:
        fields: typed access.
        kind: of the memory layers; `none` without.
        insertion: of the memory layers.
        has_experts: a block holds experts instead of an FFN.
    """

    fields: "FieldReader"
    kind: str
    insertion: Insertion
    has_experts: bool

    @property
    def expert_size(self) -> int:
        """Inner size of an expert."""
        return _ffn_size(self.fields, self.fields.integer("d_model"))

    def check(self, *, query_layout: QueryLayout, row_topk: int | None) -> None:
        """Read every field that `config` will read.

        Raises:
            InputRejected: a field is missing or out of range.
            Unsupported: a value that is not implemented, or that can be read in two ways.
        """
        self._around_memory(MemoryConfig.absent())
        if self.kind != "none":
            _memory_fields(self, query_layout, row_topk)

    def config(
        self, facts: TensorFacts | None, *, query_layout: QueryLayout, row_topk: int | None = None
    ) -> ModelConfig:
        """The configuration.

        Args:
            facts: of the tensors; None without memory layers.
            query_layout: which the file does not tell.
            row_topk: row keys and column keys that survive stage 1; None: as the released code does.

        Raises:
            InputRejected: a field is missing or out of range.
            Unsupported: a value that is not implemented, or that can be read in two ways.
        """
        memory = MemoryConfig.absent() if facts is None else _memory(self, facts, query_layout, row_topk)
        return self._around_memory(memory)

    def _around_memory(self, memory: MemoryConfig) -> ModelConfig:
        read = self.fields
        d, vocab_size = read.integer("d_model"), read.integer("vocab_size")
        both = _ffn_size(read, d)
        experts = None
        if self.has_experts:
            experts = ExpertsConfig(read.integer("moe_num_experts"), read.integer("moe_top_k"), both)
        return ModelConfig(
            hidden_size=d,
            num_layers=read.integer("n_layers"),
            num_heads=read.integer("n_heads"),
            num_kv_heads=_kv_heads(read),
            ffn_size=0 if experts else both,
            vocab_size=vocab_size,
            embedding_size=read.optional_integer("embedding_size") or vocab_size,
            tie_embeddings=read.boolean("weight_tying"),
            max_sequence_length=read.integer("max_sequence_length"),
            rope_theta=read.real("rope_theta"),
            norm_eps=read.real("layer_norm_eps"),
            eos_token_id=read.optional_integer("eos_token_id"),
            pad_token_id=read.optional_integer("pad_token_id"),
            memory=memory,
            experts=experts,
            qk_norm="head" if read.boolean("attention_layer_norm") else "none",
            clip_qkv=read.optional_real("clip_qkv"),
            logits_scale=1 / math.sqrt(d) if read.boolean("scale_logits") else 1.0,
            fp32_norm=read.boolean("convert2fp32"),
            fp32_rope=read.boolean("rope_full_precision"),
        )


def read_fields(fields: Mapping[str, Any]) -> OfficialModel:
    """Check the `model:` section of a config.yaml as far as it goes without tensors.

    Raises:
        InputRejected: a field is missing or out of range.
        Unsupported: an unknown field, or a value that is not implemented.
    """
    check_field_classes(fields)
    read = FieldReader(fields)
    block_type = read.text("block_type")
    if block_type not in ("sequential", "moe"):
        raise Unsupported(f"field 'block_type' is {block_type!r}", fix="supported values: sequential, moe")
    kind = read.text("mem_type")
    if kind not in KINDS:
        raise Unsupported(f"field 'mem_type' is {kind!r}", fix="supported values: " + ", ".join(KINDS))
    insertion = read_insertion(read.text("mem_insert_way"), read.integer("n_layers"))
    if block_type == "moe" and insertion.layers:
        raise Unsupported(
            f"memory layers (mem_insert_way {read.text('mem_insert_way')!r}) beside experts (block_type 'moe')",
            why="the authors' blocks of experts show a memory layer nothing to read",
            fix="mem_insert_way 'no_mem', which is what run_moe.sh sets",
        )
    if insertion.layers and kind != "ultramem_v2" and read.boolean("vertical_parallel"):
        raise Unsupported(f"vertical_parallel with mem_type {kind!r}", why="only UltraMemV2 cuts its tables over ranks")
    return OfficialModel(read, kind if insertion.added else "none", insertion, block_type == "moe")


def _kv_heads(read: "FieldReader") -> int | None:
    """`n_kv_heads`, or one with the deprecated `multi_query_attention`; None where each head has its own."""
    heads, multi_query = read.integer("n_heads"), read.optional_boolean("multi_query_attention")
    stated = read.optional_integer("n_kv_heads")
    implied = None if multi_query is None else 1 if multi_query else heads
    if stated is not None and implied is not None and stated != implied:
        raise InputRejected(
            f"fields 'n_kv_heads' {stated} and 'multi_query_attention' {multi_query} contradict each other",
            why=f"the second asks for {implied}",
        )
    kv_heads = implied if stated is None else stated
    return None if kv_heads == heads else kv_heads


def _memory_fields(model: OfficialModel, query_layout: QueryLayout, row_topk: int | None) -> dict[str, Any]:
    """What the fields say of memory layers, by the names of `MemoryConfig`."""
    read, insertion, topk = model.fields, model.insertion, model.fields.integer("mem_knn")
    if row_topk is None and topk > CAP and model.kind != "memory_plus":
        raise Unsupported(
            f"field 'mem_knn' is {topk}, above {CAP}, and can be read in two ways",
            why=f"the released code keeps {topk} row keys and {topk} column keys in its first stage; the paper, and a "
            f"fork of that code, keep {CAP} of each. The checkpoint does not tell which of them trained it",
            fix=f"pass --row-topk {topk} for the released code, or --row-topk {CAP} for the paper's cap. Where you do "
            "not know, export both and compare the loss on a text: the wrong one is worse",
        )
    common: dict[str, Any] = {
        "kind": model.kind,
        "keys_per_side": read.integer("mem_knum"),
        "key_dim": read.integer("mem_kdim"),
        "value_dim": read.integer("mem_vdim"),
        "heads": read.integer("mem_head"),
        "topk": topk,
        "row_topk": row_topk or topk,
        "placements": insertion.placements,
    }
    # The layers of V1 and Memory+ are handed none of the other fields, whatever the file says of them.
    if model.kind == "memory_plus":
        return common | {"pre_value_dim": 0, "query_per_rank": False}
    common["query_layout"] = query_layout
    if model.kind == "ultramem_v1":
        return common | {"pre_value_dim": 0, "query_per_rank": False}
    read.boolean("vertical_parallel")
    query_per_rank, heads = read.boolean("mem_q_for_each_tucker_rank"), common["heads"]
    if query_layout == "released" and not query_per_rank and heads > 2:
        raise Unsupported(
            f"field 'mem_head' is {heads} without mem_q_for_each_tucker_rank",
            why="head h of the authors' code takes query group h // 2, and there is one group",
        )
    left_out = len(insertion.added) < insertion.layers
    return common | {
        "pre_value_dim": read.integer("mem_pre_vdim", minimum=0),
        "share_ratio": read.real("mem_share_ratio"),
        "query_per_rank": query_per_rank,
        "key_expansion": read.integer("mem_key_expand_time"),
        "value_groups": read.integer("mem_value_expand_time"),
        "activation": "gelu" if read.boolean("mem_use_glu_act") else "none",
        "pool_layers": insertion.layers if left_out else None,
        "pool_positions": insertion.added if left_out else None,
    }


def _memory(model: OfficialModel, facts: TensorFacts, query_layout: QueryLayout, row_topk: int | None) -> MemoryConfig:
    told = _memory_fields(model, query_layout, row_topk)
    told |= {"tucker_rank": facts.tucker_rank, "tucker_cores": facts.tucker_cores}
    if model.kind == "ultramem_v1":
        told |= {"key_expansion": math.isqrt(facts.value_groups), "value_groups": facts.value_groups}
    memory = MemoryConfig(**told)
    if model.kind != "ultramem_v2":
        return memory
    # Their parallel lookup takes the shuffled address N_all for the padding of a rank that has fewer tokens.
    padded = model.fields.boolean("vertical_parallel") and memory.stored_side**2 > memory.pool_rows
    return replace(memory, drops_padding_address=padded)


class FieldReader:
    """Typed access to the fields of an untrusted mapping."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields

    def _value(self, name: str) -> object:
        if name not in self._fields:
            raise InputRejected(f"field '{name}' is missing", fix="take the config.yaml that training wrote")
        return self._fields[name]

    def integer(self, name: str, *, minimum: int = 1) -> int:
        """An integer of at least `minimum`, below 2^31."""
        value = self._value(name)
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value < 2**31:
            problem = f"field '{name}' must be an integer from {minimum} to {2**31 - 1}, got {shown(value)}"
            raise InputRejected(problem)
        return value

    def optional_integer(self, name: str) -> int | None:
        """An integer of 0 or more, or null."""
        return None if self._value(name) is None else self.integer(name, minimum=0)

    def optional_real(self, name: str) -> float | None:
        """A positive number, or null."""
        return None if self._value(name) is None else self.real(name)

    def real(self, name: str) -> float:
        """A positive number."""
        value = self._value(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e300:
            raise InputRejected(f"field '{name}' must be a positive number, got {shown(value)}")
        return float(value)

    def boolean(self, name: str) -> bool:
        """True or false."""
        value = self._value(name)
        if not isinstance(value, bool):
            raise InputRejected(f"field '{name}' must be true or false, got {shown(value)}")
        return value

    def optional_boolean(self, name: str) -> bool | None:
        """True, false or null."""
        return None if self._value(name) is None else self.boolean(name)

    def text(self, name: str) -> str:
        """A string."""
        value = self._value(name)
        if not isinstance(value, str):
            raise InputRejected(f"field '{name}' must be text, got {shown(value)}")
        return value


def _ffn_size(read: FieldReader, hidden_size: int) -> int:
    """Inner FFN size: `mlp_hidden_size`, or `mlp_ratio` * d_model, holds linear and gate part together."""
    both = read.optional_integer("mlp_hidden_size")
    if both is None:
        both = int(read.real("mlp_ratio") * hidden_size)
    if both < 2 or both % 2:
        raise InputRejected(f"the FFN's hidden size {both} must be even: one half is the gate")
    return both // 2
