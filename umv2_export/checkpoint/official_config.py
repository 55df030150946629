"""The `model:` section of the authors' config.yaml -> our configuration.

Source: the released training code (an OLMoE fork).
"""

import re
from collections.abc import Mapping
from typing import Any

from umv2_export.checkpoint.official_fields import check_field_classes
from umv2_export.config import MOST_REPEATS, MemoryConfig, ModelConfig, QueryLayout
from umv2_export.errors import InputRejected, Unsupported, shown

__all__ = ["FieldReader", "model_config"]


def model_config(
    fields: Mapping[str, Any], *, rank_and_cores: tuple[int, int], query_layout: QueryLayout = "released"
) -> ModelConfig:
    """Translate the `model:` section of a config.yaml.

    Args:
        fields: the section.
        rank_and_cores: Tucker rank and number of cores, which only the tensors tell.
        query_layout: which the file does not tell either.

    Raises:
        InputRejected: a field is missing or out of range.
        Unsupported: an unknown field, or a value that is not implemented.
    """
    check_field_classes(fields)
    read = FieldReader(fields)
    kind = read.text("mem_type")
    if kind not in ("ultramem_v2", "ultramem_v1"):
        raise Unsupported(f"mem_type is {kind!r}", fix="supported values: ultramem_v2, ultramem_v1")
    d, layers = read.integer("d_model"), read.integer("n_layers")
    groups = read.integer("mem_value_expand_time")
    topk = read.integer("mem_knn")
    v1 = kind == "ultramem_v1"
    expansion = round(groups**0.5) if v1 else read.integer("mem_key_expand_time")
    if v1 and expansion**2 != groups:
        raise Unsupported(f"mem_value_expand_time is {groups}: UltraMem V1 needs a square")
    memory = MemoryConfig(
        kind="ultramem_v1" if v1 else "ultramem_v2",
        keys_per_side=read.integer("mem_knum"),
        key_dim=read.integer("mem_kdim"),
        value_dim=read.integer("mem_vdim"),
        pre_value_dim=read.integer("mem_pre_vdim", minimum=0),
        heads=read.integer("mem_head"),
        topk=topk,
        row_topk=topk,
        placements=_placements(read.text("mem_insert_way"), layers),
        # V1 has a table per layer and one query for both ranks, whatever these two fields say.
        share_ratio=1.0 if v1 else read.real("mem_share_ratio"),
        query_per_rank=False if v1 else read.boolean("mem_q_for_each_tucker_rank"),
        key_expansion=expansion,
        value_groups=groups,
        query_layout=query_layout,
        activation="gelu" if read.boolean("mem_use_glu_act") else "none",
        tucker_rank=rank_and_cores[0],
        tucker_cores=rank_and_cores[1],
    )
    vocab_size = read.integer("vocab_size")
    return ModelConfig(
        hidden_size=d,
        num_layers=layers,
        num_heads=read.integer("n_heads"),
        ffn_size=_ffn_size(read, d),
        vocab_size=vocab_size,
        embedding_size=vocab_size if fields.get("embedding_size") is None else read.integer("embedding_size"),
        tie_embeddings=read.boolean("weight_tying"),
        max_sequence_length=read.integer("max_sequence_length"),
        rope_theta=read.real("rope_theta"),
        norm_eps=1e-5,
        eos_token_id=read.optional_integer("eos_token_id"),
        pad_token_id=read.optional_integer("pad_token_id"),
        memory=memory,
    )


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


def _placements(insert_way: str, layers: int) -> tuple[tuple[int, int], ...]:
    """`full`, or `read:add` pairs separated by `/`."""
    if layers > MOST_REPEATS:
        raise Unsupported(f"n_layers is {layers}, at most {MOST_REPEATS} are supported")
    if insert_way == "full":
        return tuple((i, i) for i in range(layers))
    if not re.fullmatch(r"\d{1,6}:\d{1,6}(/\d{1,6}:\d{1,6})*", insert_way):
        raise InputRejected(f"mem_insert_way is {insert_way!r}", fix="expected 'full' or pairs such as '0:1/2:2'")
    pairs = (pair.split(":") for pair in insert_way.split("/"))
    return tuple((int(read), int(add)) for read, add in pairs)
