"""The memory layers of a model: plain data, validated on construction, and the sizes that follow from them."""

from dataclasses import dataclass
from typing import Literal, get_args

from umv2_export.config.bounds import INT32_MAX, MOST_REPEATS, require_choice, require_few, require_positive
from umv2_export.errors import InputRejected, Unsupported

__all__ = ["Activation", "MemoryConfig", "QueryLayout"]

MemoryKind = Literal["ultramem_v2", "ultramem_v1", "memory_plus", "none"]
QueryLayout = Literal["released", "per_rank"]
Activation = Literal["none", "gelu"]


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
            require_positive("memory." + field, getattr(self, field))
        require_choice("memory.kind", self.kind, ("ultramem_v2", "ultramem_v1", "memory_plus"))
        require_choice("memory.query_layout", self.query_layout, get_args(QueryLayout))
        require_choice("memory.activation", self.activation, get_args(Activation))
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
            require_few("memory." + field, getattr(self, field))
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
