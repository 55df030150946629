"""Model configurations: plain data, validated on construction, and the sizes that follow from them."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from umv2_export.errors import InputRejected, Unsupported, shown

__all__ = [
    "BUFFERS",
    "INT32_MAX",
    "TABLES",
    "ExpertsConfig",
    "MemoryConfig",
    "ModelConfig",
    "ParameterCounts",
    "QueryLayout",
    "count_parameters",
    "tensor_shapes",
]

MemoryKind = Literal["ultramem_v2", "ultramem_v1", "memory_plus", "none"]
QueryLayout = Literal["released", "per_rank"]
Activation = Literal["none", "gelu"]
QueryKeyNorm = Literal["head", "full", "none"]

INT32_MAX = 2**31 - 1

# Far above any published model. A config names one tensor, or makes one list entry, for each of them: without a bound a
# few bytes of an untrusted file would fill the memory.
MOST_REPEATS = 1024
MOST_EXPERTS = 16384

# Last parts of tensor names: buffers are no parameters, tables hold the rows.
BUFFERS = ("tucker_core_u", "tucker_core_v", "shuffle_index")
TABLES = ("values_for_look_up", "pre_values_for_look_up")


@dataclass(frozen=True)
class MemoryConfig:
    """The memory layers of a model. Symbols in brackets are those of the UltraMemV2 paper and the released code.

    Attributes:
        kind: `ultramem_v2` (one pool for all layers), `ultramem_v1` (a table per layer, no pre-values), `memory_plus`
            (one table for all layers, scores added and passed through a softmax, a gated output), or `none` in a model
            without memory layers; see `absent`.
        keys_per_side: nominal number of row keys, and of column keys, per layer [n0, mem_knum].
        key_dim: size of one key [Dk].
        value_dim: size of one value [Dv].
        pre_value_dim: size of one pre-value, 0 without pre-values [Dp].
        heads: retrieval heads [H].
        topk: rows that a head activates per token [m, mem_knn].
        row_topk: row keys, and column keys, that survive stage 1; the released code uses `topk`.
        placements: (read, add) per memory layer: it reads the normed input of block `read`, and its output is added
            after block `add`, before any other layer reads.
        share_ratio: part of the pool that one layer addresses [rho].
        key_expansion: keys per side are `key_expansion` times the visible side; several virtual addresses share a row.
        value_groups: 1, or key_expansion**2: hits are summed per virtual block and concatenated [G].
        query_per_rank: the query projection holds a query for each Tucker rank.
        query_layout: which part of the projection serves which side and rank; see `query_chunks`.
        activation: applied to the pre-score.
        tucker_rank: rank of the score decomposition [r]; 1 in Memory+.
        tucker_cores: number of Tucker cores, hence of scores per hit [c].
        pool_layers: memory layers that the pool of UltraMemV2 was made for; None: as many as there are.
        pool_positions: position of each memory layer among those; None: 0, 1, 2 and so on. Both are set where a
            checkpoint holds layers whose output is never added, which are left out.
        drops_padding_address: the shuffled address that equals the number of rows in the pool contributes nothing, as
            in training with vertical_parallel.
    """

    kind: MemoryKind
    keys_per_side: int
    key_dim: int
    value_dim: int
    pre_value_dim: int
    heads: int
    topk: int
    row_topk: int
    placements: tuple[tuple[int, int], ...]
    share_ratio: float = 1.0
    key_expansion: int = 1
    value_groups: int = 1
    query_per_rank: bool = True
    query_layout: QueryLayout = "per_rank"
    activation: Activation = "none"
    tucker_rank: int = 2
    tucker_cores: int = 2
    pool_layers: int | None = None
    pool_positions: tuple[int, ...] | None = None
    drops_padding_address: bool = False

    @classmethod
    def absent(cls) -> "MemoryConfig":
        """No memory layers, no rows: what runs over layers, keys or rows then runs over none."""
        return cls(
            "none", keys_per_side=0, key_dim=0, value_dim=0, pre_value_dim=0, heads=0, topk=0, row_topk=0, placements=()
        )

    def __post_init__(self) -> None:
        if self.kind != "none":
            self._validate()

    def _validate(self) -> None:
        for field in (
            "keys_per_side",
            "key_dim",
            "value_dim",
            "heads",
            "topk",
            "row_topk",
            "key_expansion",
            "tucker_rank",
            "tucker_cores",
        ):
            _require_positive("memory." + field, getattr(self, field))
        _require_choice("memory.kind", self.kind, ("ultramem_v2", "ultramem_v1", "memory_plus"))
        _require_choice("memory.query_layout", self.query_layout, get_args(QueryLayout))
        _require_choice("memory.activation", self.activation, get_args(Activation))
        if self.pre_value_dim < 0:
            raise InputRejected(f"memory.pre_value_dim must be 0 or more, got {self.pre_value_dim}")
        if not 0.0 < self.share_ratio <= 1.0:
            raise InputRejected(f"memory.share_ratio must be above 0 and at most 1, got {self.share_ratio}")
        if self.value_groups not in (1, self.key_expansion**2):
            raise Unsupported(
                f"memory.value_groups is {self.value_groups} with key_expansion {self.key_expansion}",
                why=f"hits are grouped by virtual block, so there is 1 group or key_expansion**2 = "
                f"{self.key_expansion**2}",
            )
        if self.value_dim % self.tucker_cores:
            raise InputRejected(
                f"memory.value_dim {self.value_dim} is not a multiple of tucker_cores {self.tucker_cores}",
                why="each core scores its own contiguous part of a value",
            )
        self._validate_kind()
        self._validate_pool()
        if self.activation != "none" and not self.pre_value_dim:
            raise Unsupported(f"memory.activation {self.activation!r} without pre-values: there is no pre-score")
        if self.row_topk > self.stored_side:
            raise InputRejected(f"memory.row_topk {self.row_topk} exceeds the {self.stored_side} keys of a side")
        if self.topk > self.row_topk**2:
            raise InputRejected(f"memory.topk {self.topk} exceeds row_topk**2 = {self.row_topk**2} candidates")
        for field in ("heads", "tucker_rank", "tucker_cores", "layers"):
            _require_few("memory." + field, getattr(self, field))
        self.query_chunks()
        if self.pool_rows > INT32_MAX:
            raise Unsupported(
                f"a table of {self.pool_rows} rows", why=f"row addresses are stored in int32, which ends at {INT32_MAX}"
            )

    def _validate_kind(self) -> None:
        if self.kind == "ultramem_v1" and self.heads > 2:
            raise Unsupported(f"memory.heads is {self.heads}: UltraMem V1 has queries for 1 or 2 heads")
        if self.kind == "ultramem_v1" and self.pre_value_dim:
            raise Unsupported(f"memory.pre_value_dim is {self.pre_value_dim}: UltraMem V1 has no pre-values")
        if self.kind != "memory_plus":
            return
        for field, value in (
            ("pre_value_dim", 0),
            ("share_ratio", 1.0),
            ("key_expansion", 1),
            ("value_groups", 1),
            ("tucker_rank", 1),
            ("tucker_cores", 1),
        ):
            if getattr(self, field) != value:
                raise Unsupported(f"memory.{field} is {getattr(self, field)}: in Memory+ it is {value}")

    def _validate_pool(self) -> None:
        if self.pool_layers is None and self.pool_positions is None:
            return
        if self.kind != "ultramem_v2":
            raise InputRejected(f"memory.pool_layers or pool_positions is set: {self.kind} has no pool")
        positions = self.pool_positions or ()
        if (
            self.pool_layers is None
            or not self.layers <= self.pool_layers <= MOST_REPEATS
            or len(positions) != self.layers
            or list(positions) != sorted(set(positions))
            or not all(0 <= position < self.pool_layers for position in positions)
        ):
            raise InputRejected(
                f"memory.pool_positions {list(positions)[:8]} and pool_layers {self.pool_layers} do not fit "
                f"{self.layers} memory layers",
                why="each layer has a position of its own, in ascending order, below pool_layers",
            )

    @property
    def layers(self) -> int:
        """Number of memory layers [M]."""
        return len(self.placements)

    @property
    def layer_rows(self) -> int:
        """Nominal rows of one layer [n0**2]."""
        return self.keys_per_side**2

    @property
    def pool_rows(self) -> int:
        """Rows in the table that a layer indexes: the shared pool in V2 [N_all], the layer's own table in V1.

        In Memory+ all layers index one table of `layer_rows` rows.
        """
        if self.kind == "ultramem_v2":
            return self.layer_rows * (self.layers if self.pool_layers is None else self.pool_layers)
        return self.layer_rows

    @property
    def shares_a_table(self) -> bool:
        """All layers index one table."""
        return self.kind in ("ultramem_v2", "memory_plus")

    @property
    def padding_row(self) -> int | None:
        """The row of zeros behind the pool at which the dropped address points; None where there is none."""
        exists = self.drops_padding_address and self.stored_side**2 > self.pool_rows
        return self.pool_rows if exists else None

    @property
    def visible_side(self) -> int:
        """Side of the square of rows that one layer addresses [n1]."""
        if self.kind != "ultramem_v2":
            return self.keys_per_side
        # Float power, then truncation: the released code's own rounding decides which rows are reachable.
        return int((self.pool_rows * self.share_ratio) ** 0.5)

    @property
    def visible_rows(self) -> int:
        """Rows that one layer addresses [N_l]."""
        return self.visible_side**2

    @property
    def stored_side(self) -> int:
        """Keys per side that are stored [n]."""
        return self.key_expansion * self.visible_side

    @property
    def row_size(self) -> int:
        """Elements of one row, pre-value and value."""
        return self.pre_value_dim + self.value_dim

    @property
    def hits(self) -> int:
        """Rows that one token activates in one layer [K = H * m]."""
        return self.heads * self.topk

    @property
    def queries_per_side(self) -> int:
        """Queries per side in the projection: a Tucker rank's each [qtr], or in Memory+ a head's each."""
        if self.kind == "memory_plus":
            return self.heads
        return self.tucker_rank if self.query_per_rank else 1

    @property
    def normalizes_keys(self) -> bool:
        """Keys pass a norm. The layer of Memory+ has one, and its code then goes on with the keys as they are."""
        return self.kind != "memory_plus"

    @property
    def score_rank(self) -> int:
        """Rank of the scores that the retrieval multiplies.

        Memory+ adds its two scores s and t: [s, 1] . [1, t], with the identity as core.
        """
        return 2 if self.kind == "memory_plus" else self.tucker_rank

    def offset(self, layer: int) -> int:
        """First row of the window of memory layer `layer` in the table that it indexes."""
        if self.kind != "ultramem_v2":
            return 0
        return (layer if self.pool_positions is None else self.pool_positions[layer]) * self.layer_rows

    @property
    def owns_its_rows(self) -> bool:
        """No other layer reads a layer's rows, and each virtual address is one row: rows can be permuted at export."""
        return self.kind != "memory_plus" and self.key_expansion == 1 and self.visible_rows <= self.layer_rows

    @property
    def has_address_map(self) -> bool:
        """Virtual addresses are looked up in a map; else they are the rows, which is so in Memory+ from the start."""
        return bool(self.layers) and self.kind != "memory_plus" and not self.owns_its_rows

    def query_chunks(self) -> tuple[list[list[int]], list[list[int]]]:
        """Which part of the query projection scores which keys.

        The projection yields 2 * queries_per_side chunks of `key_dim` columns.

        Returns:
            (row, column): chunk[h][i] is the query of head h and Tucker rank i.

        Raises:
            Unsupported: the released layout has no chunk for this rank or number of heads.
        """
        heads, ranks = range(self.heads), range(self.tucker_rank)
        if self.kind == "memory_plus":
            return [[2 * h] for h in heads], [[2 * h + 1] for h in heads]
        if not self.query_per_rank:
            return [[0 for _ in ranks] for _ in heads], [[1 for _ in ranks] for _ in heads]
        if self.query_layout == "per_rank":
            return [list(ranks) for _ in heads], [[self.tucker_rank + i for i in ranks] for _ in heads]
        if self.tucker_rank != 2 or self.heads > 4:
            raise Unsupported(
                f"query layout 'released' with Tucker rank {self.tucker_rank} and {self.heads} heads",
                why="the released code takes query group head // 2 of two groups, and rank 2",
                fix="if the model was trained with a query per Tucker rank, pass --query-layout per-rank",
            )
        return [[2 * (h // 2) for _ in ranks] for h in heads], [[2 * (h // 2) + 1 for _ in ranks] for h in heads]


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
            _require_positive("experts." + field, getattr(self, field))
        _require_few("experts.count", self.count)
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
        _require_choice("qk_norm", self.qk_norm, get_args(QueryKeyNorm))
        if self.experts is None:
            _require_positive("ffn_size", self.ffn_size)
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
            _require_positive(field, getattr(self, field))
        _require_few("num_layers", self.num_layers)
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
            _require_positive("num_kv_heads", self.num_kv_heads)
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
        experts = data.get("experts")
        if experts is not None and not isinstance(experts, Mapping):
            raise InputRejected("field 'experts' is not a mapping", where=where)
        memory = data.get("memory")
        if experts is None and ("memory" not in data or not isinstance(memory, Mapping | None)):
            raise InputRejected("field 'memory' is missing or not a mapping", where=where)
        try:
            parts: dict[str, object] = {"experts": None, "memory": MemoryConfig.absent()}
            if experts is not None:
                parts["experts"] = ExpertsConfig(**_checked_fields(ExpertsConfig, experts, "experts.", where))
            if memory is not None:
                parts["memory"] = cls._memory_from(memory, where)
            if "more_eos_token_ids" in data:
                more = data["more_eos_token_ids"]
                if not isinstance(more, list) or not all(_is_int(token) for token in more):
                    raise InputRejected("field 'more_eos_token_ids' must be a list of integers", where=where)
                parts["more_eos_token_ids"] = tuple(more)
            return cls(**_checked_fields(cls, {**data, **parts}, "", where))
        except (InputRejected, Unsupported) as error:
            error.where = error.where or (None if where is None else str(where))
            raise

    @staticmethod
    def _memory_from(memory: object, where: object) -> MemoryConfig:
        if not isinstance(memory, Mapping) or memory.get("kind") == "none":
            raise InputRejected("field 'memory' is not a mapping with a kind of memory layers", where=where)
        placements = memory.get("placements")
        pairs = placements if isinstance(placements, list) else []
        if not pairs or not all(isinstance(p, list) and len(p) == 2 and all(_is_int(i) for i in p) for p in pairs):
            raise InputRejected("field 'memory.placements' must be a list of [read block, add block]", where=where)
        positions = memory.get("pool_positions")
        if positions is not None and not (isinstance(positions, list) and all(_is_int(i) for i in positions)):
            raise InputRejected("field 'memory.pool_positions' must be a list of layers, or null", where=where)
        memory = {
            **memory,
            "placements": tuple((int(read), int(add)) for read, add in pairs),
            "pool_positions": None if positions is None else tuple(positions),
        }
        return MemoryConfig(**_checked_fields(MemoryConfig, memory, "memory.", where))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked_fields(cls: type, data: Mapping[str, Any], prefix: str, where: object) -> dict[str, Any]:
    """The keyword arguments of dataclass `cls` in `data`, names and scalar types checked."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in data:
        if name not in fields:
            raise Unsupported(f"unknown field '{prefix}{name}'", where=where)
    checks: Mapping[str, Callable[[object], bool]] = {
        "int": _is_int,
        "bool": lambda v: isinstance(v, bool),
        "float": _is_real,
        "int | None": lambda v: v is None or _is_int(v),
        "float | None": lambda v: v is None or _is_real(v),
    }
    values = {}
    for name, field in fields.items():
        if name not in data:
            if field.default is dataclasses.MISSING:
                raise InputRejected(f"field '{prefix}{name}' is missing", where=where)
            continue
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
        if kind in checks and not checks[kind](data[name]):
            raise InputRejected(f"field '{prefix}{name}' must be {kind}, got {shown(data[name])}", where=where)
        values[name] = data[name]
    return values


def _is_real(value: object) -> bool:
    """A finite number; an integer beyond the range of floats is none."""
    return (isinstance(value, float) or _is_int(value)) and -1e300 < value < 1e300  # type: ignore[operator]


def _require_positive(name: str, value: int) -> None:
    if not 1 <= value <= INT32_MAX:
        raise InputRejected(f"{name} must be from 1 to {INT32_MAX}, got {value}")


def _require_few(name: str, value: int) -> None:
    if value > MOST_REPEATS:
        raise Unsupported(f"{name} is {value}, at most {MOST_REPEATS} are supported")


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise Unsupported(f"{name} is {value!r}", fix="supported values: " + ", ".join(choices))


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
