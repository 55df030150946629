"""A model's configuration: plain data, validated on construction, and as JSON."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from umv2_export.config.bounds import MOST_EXPERTS, require_choice, require_few, require_positive
from umv2_export.config.memory import MemoryConfig
from umv2_export.errors import InputRejected, Unsupported, located
from umv2_export.records.forms import Form, instance, integer, optional, read_as, tuple_of

__all__ = ["ExpertsConfig", "ModelConfig"]

QueryKeyNorm = Literal["head", "full", "none"]


@dataclass(frozen=True)
class ExpertsConfig:
    """The mixture of experts that stands in place of the FFN of every block.

    Attributes:
        count: experts of a block [E].
        topk: experts that a token activates [k].
        inner_size: inner size of the SwiGLU of one expert [I].
        normalize_topk: the weights of the chosen experts are divided by their sum.
    """

    count: int
    topk: int
    inner_size: int
    normalize_topk: bool = False

    def __post_init__(self) -> None:
        for field in ("count", "topk", "inner_size"):
            require_positive("experts." + field, getattr(self, field))
        require_few("experts.count", self.count)
        if self.topk > self.count:
            raise InputRejected(f"experts.topk {self.topk} exceeds the {self.count} experts")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder: attention, and either a dense SwiGLU FFN, beside it memory layers or none, or a mixture of experts.

    Attributes:
        hidden_size: [d].
        num_layers: blocks [L].
        num_heads: attention heads of size hidden_size / num_heads.
        ffn_size: inner size of the SwiGLU FFN [I]; 0 in a model of experts.
        vocab_size: tokens that may be generated.
        embedding_size: rows of the embedding and columns of the logits, padded: >= vocab_size.
        tie_embeddings: the head is the embedding.
        max_sequence_length: length that the model was trained for; the graph itself has no limit.
        memory: the memory layers; `MemoryConfig.absent()` in a model of experts, and in a dense one.
        experts: of a model without memory layers.
        qk_norm: queries and keys are normalised per head, over all heads together, or not at all.
        clip_qkv: queries, keys and values are clipped to this absolute value.
        num_kv_heads: heads of keys and values, each read by num_heads / num_kv_heads heads of queries; None: num_heads.
        logits_scale: the logits are multiplied by it.
        fp32_norm: norms compute in fp32 whatever the dtype; False: in the dtype of their input.
        fp32_rope: likewise rotary embeddings.
        more_eos_token_ids: generation ends after each of these too, not after eos_token_id alone.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_size: int
    vocab_size: int
    embedding_size: int
    tie_embeddings: bool
    max_sequence_length: int
    memory: MemoryConfig
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    experts: ExpertsConfig | None = None
    qk_norm: QueryKeyNorm = "head"
    clip_qkv: float | None = None
    num_kv_heads: int | None = None
    logits_scale: float = 1.0
    fp32_norm: bool = True
    fp32_rope: bool = True
    more_eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_choice("qk_norm", self.qk_norm, get_args(QueryKeyNorm))
        if self.experts is None:
            require_positive("ffn_size", self.ffn_size)
        elif self.memory.layers or self.ffn_size:
            raise Unsupported(
                "experts beside memory layers or a dense FFN", why="a block has either experts, or an FFN and memory"
            )
        elif self.num_layers * self.experts.count > MOST_EXPERTS:
            raise Unsupported(
                f"{self.num_layers} blocks of {self.experts.count} experts, at most {MOST_EXPERTS} in all"
            )
        for field in (
            "hidden_size",
            "num_layers",
            "num_heads",
            "vocab_size",
            "embedding_size",
            "max_sequence_length",
        ):
            require_positive(field, getattr(self, field))
        require_few("num_layers", self.num_layers)
        for field in ("rope_theta", "norm_eps", "clip_qkv", "logits_scale"):
            value = getattr(self, field)
            if value is not None and not 0.0 < value < math.inf:
                raise InputRejected(f"{field} must be a positive number, got {value}")
        if self.hidden_size % self.num_heads or self.head_size % 2:
            raise InputRejected(
                f"hidden_size {self.hidden_size} does not divide into {self.num_heads} heads of even size",
                why="rotary embeddings rotate pairs of channels",
            )
        if self.num_kv_heads is not None:
            require_positive("num_kv_heads", self.num_kv_heads)
            if self.num_heads % self.num_kv_heads:
                raise InputRejected(
                    f"{self.num_heads} heads of queries cannot share {self.num_kv_heads} heads of keys and values"
                )
        if self.embedding_size < self.vocab_size:
            raise InputRejected(f"embedding_size {self.embedding_size} is smaller than vocab_size {self.vocab_size}")
        if self.memory.kind == "memory_plus" and self.memory.value_dim != self.hidden_size:
            raise InputRejected(
                f"memory.value_dim {self.memory.value_dim} is not hidden_size {self.hidden_size}, as in Memory+"
            )
        self._validate_placements()

    def _validate_placements(self) -> None:
        if not self.memory.placements and self.memory.kind != "none":
            raise InputRejected("the model has no memory layer")
        for read, add in self.memory.placements:
            if not 0 <= read <= add < self.num_layers:
                raise InputRejected(
                    f"a memory layer reads at block {read} and is added after block {add}",
                    why=f"it must hold 0 <= read <= add < {self.num_layers}",
                )
        in_order = sorted(self.memory.placements)
        for (read, add), (next_read, _) in itertools.pairwise(in_order):
            if next_read <= add:
                raise Unsupported(
                    f"a memory layer reads at block {next_read}, while the output of the one that reads at block "
                    f"{read} waits to be added after block {add}",
                    why="the authors' code holds one output: it would never add the earlier one",
                    fix="convert the original checkpoint again; the layers that are never added are then left out",
                )

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values, hence of the cache."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens after which generation ends."""
        return frozenset((*(() if self.eos_token_id is None else (self.eos_token_id,)), *self.more_eos_token_ids))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it back."""
        data = dataclasses.asdict(self)
        # Left out where there are none, as in what was written before the field came.
        data["more_eos_token_ids"] = list(self.more_eos_token_ids)
        if not self.more_eos_token_ids:
            del data["more_eos_token_ids"]
        if self.memory.kind == "none":
            return data | {"memory": None}
        data["memory"]["placements"] = [list(pair) for pair in self.memory.placements]
        positions = self.memory.pool_positions
        data["memory"]["pool_positions"] = None if positions is None else list(positions)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: object = None) -> "ModelConfig":
        """Read what `as_dict` wrote, from an untrusted file.

        Raises:
            InputRejected: a field is missing, of the wrong type or out of range.
            Unsupported: a field is unknown.
        """
        # A model of experts may leave it out.
        absent = {} if data.get("experts") is None else {"memory": None}
        with located(where):
            return read_as(_FORM, absent | dict(data))


_PLACEMENTS: Form[Any] = tuple_of(tuple_of(integer(), 2))
_MEMORY = instance(
    MemoryConfig,
    kind=Form("a kind of memory layers", lambda kind: kind != "none"),
    placements=Form("a list of [read block, add block]", lambda pairs: pairs != [], _PLACEMENTS.read),
)
_FORM = instance(
    ModelConfig, memory=optional(_MEMORY, MemoryConfig.absent()), experts=optional(instance(ExpertsConfig))
)
