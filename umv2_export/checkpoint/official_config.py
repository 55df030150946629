"""The `model:` section of the authors' config.yaml -> our configuration.

Source: the released training code (an OLMoE fork).
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from umv2_export.checkpoint.insertion import Insertion, read_insertion
from umv2_export.checkpoint.official_fields import check_field_classes
from umv2_export.config import INT32_MAX, ExpertsConfig, MemoryConfig, ModelConfig, QueryLayout
from umv2_export.errors import InputRejected, Unsupported
from umv2_export.records.forms import Fields, Form, flag, integer, optional, positive, text

__all__ = ["SIZE", "OfficialModel", "TensorFacts", "read_fields"]

# The paper, and one fork of the released code, let at most this many row keys and column keys survive stage 1; the
# released code lets `mem_knn` survive. Nothing in a checkpoint tells which code trained it.
CAP = 128

SIZE = integer(1, INT32_MAX)
COUNT = integer(0, INT32_MAX)
# As long as 1024 layers make it.
WAY: Form[str] = Form("text", lambda value: isinstance(value, str))

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

    fields: Fields
    kind: str
    insertion: Insertion
    has_experts: bool

    @property
    def expert_size(self) -> int:
        """Inner size of an expert."""
        return _ffn_size(self.fields, self.fields.read("d_model", SIZE))

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
        fields, read = self.fields, self.fields.read
        d, vocab_size = read("d_model", SIZE), read("vocab_size", SIZE)
        both = _ffn_size(fields, d)
        experts = None
        if self.has_experts:
            experts = ExpertsConfig(read("moe_num_experts", SIZE), read("moe_top_k", SIZE), both)
        return ModelConfig(
            hidden_size=d,
            num_layers=read("n_layers", SIZE),
            num_heads=read("n_heads", SIZE),
            num_kv_heads=_kv_heads(fields),
            ffn_size=0 if experts else both,
            vocab_size=vocab_size,
            embedding_size=read("embedding_size", optional(COUNT)) or vocab_size,
            tie_embeddings=read("weight_tying", flag),
            max_sequence_length=read("max_sequence_length", SIZE),
            rope_theta=read("rope_theta", positive),
            norm_eps=read("layer_norm_eps", positive),
            eos_token_id=read("eos_token_id", optional(COUNT)),
            pad_token_id=read("pad_token_id", optional(COUNT)),
            memory=memory,
            experts=experts,
            qk_norm="head" if read("attention_layer_norm", flag) else "none",
            clip_qkv=read("clip_qkv", optional(positive)),
            logits_scale=1 / math.sqrt(d) if read("scale_logits", flag) else 1.0,
            fp32_norm=read("convert2fp32", flag),
            fp32_rope=read("rope_full_precision", flag),
        )


def read_fields(fields: Mapping[str, Any]) -> OfficialModel:
    """Check the `model:` section of a config.yaml as far as it goes without tensors.

    Raises:
        InputRejected: a field is missing or out of range.
        Unsupported: an unknown field, or a value that is not implemented.
    """
    check_field_classes(fields)
    reader = Fields(fields, fix="take the config.yaml that training wrote")
    read = reader.read
    block_type = read("block_type", text)
    if block_type not in ("sequential", "moe"):
        raise Unsupported(f"field 'block_type' is {block_type!r}", fix="supported values: sequential, moe")
    kind = read("mem_type", text)
    if kind not in KINDS:
        raise Unsupported(f"field 'mem_type' is {kind!r}", fix="supported values: " + ", ".join(KINDS))
    insertion = read_insertion(read("mem_insert_way", WAY), read("n_layers", SIZE))
    if block_type == "moe" and insertion.layers:
        raise Unsupported(
            f"memory layers (mem_insert_way {read('mem_insert_way', WAY)!r}) beside experts (block_type 'moe')",
            why="the authors' blocks of experts show a memory layer nothing to read",
            fix="mem_insert_way 'no_mem', which is what run_moe.sh sets",
        )
    if insertion.layers and kind != "ultramem_v2" and read("vertical_parallel", flag):
        raise Unsupported(f"vertical_parallel with mem_type {kind!r}", why="only UltraMemV2 cuts its tables over ranks")
    return OfficialModel(reader, kind if insertion.added else "none", insertion, block_type == "moe")


def _kv_heads(fields: Fields) -> int | None:
    """`n_kv_heads`, or one with the deprecated `multi_query_attention`; None where each head has its own."""
    heads, multi_query = fields.read("n_heads", SIZE), fields.read("multi_query_attention", optional(flag))
    stated = fields.read("n_kv_heads", optional(COUNT))
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
    read, insertion, topk = model.fields.read, model.insertion, model.fields.read("mem_knn", SIZE)
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
        "keys_per_side": read("mem_knum", SIZE),
        "key_dim": read("mem_kdim", SIZE),
        "value_dim": read("mem_vdim", SIZE),
        "heads": read("mem_head", SIZE),
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
    read("vertical_parallel", flag)
    query_per_rank, heads = read("mem_q_for_each_tucker_rank", flag), common["heads"]
    if query_layout == "released" and not query_per_rank and heads > 2:
        raise Unsupported(
            f"field 'mem_head' is {heads} without mem_q_for_each_tucker_rank",
            why="head h of the authors' code takes query group h // 2, and there is one group",
        )
    left_out = len(insertion.added) < insertion.layers
    return common | {
        "pre_value_dim": read("mem_pre_vdim", COUNT),
        "share_ratio": read("mem_share_ratio", positive),
        "query_per_rank": query_per_rank,
        "key_expansion": read("mem_key_expand_time", SIZE),
        "value_groups": read("mem_value_expand_time", SIZE),
        "activation": "gelu" if read("mem_use_glu_act", flag) else "none",
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
    padded = model.fields.read("vertical_parallel", flag) and memory.stored_side**2 > memory.pool_rows
    return replace(memory, drops_padding_address=padded)


def _ffn_size(fields: Fields, hidden_size: int) -> int:
    """Inner FFN size: `mlp_hidden_size`, or `mlp_ratio` * d_model, holds linear and gate part together."""
    both = fields.read("mlp_hidden_size", optional(COUNT))
    if both is None:
        both = int(fields.read("mlp_ratio", positive) * hidden_size)
    if both < 2 or both % 2:
        raise InputRejected(f"the FFN's hidden size {both} must be even: one half is the gate")
    return both // 2
