"""What a bundle stores of a model: below the model, which computes with it, and the bundle, which names the files."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from umv2_export.config import INT32_MAX, MemoryConfig, ModelConfig
from umv2_export.errors import InvalidRequest

__all__ = ["MOST_SHARDS", "FoldedForm", "Shard", "TableLayout"]

# Every shard is a file and an input of every lookup.
MOST_SHARDS = 1024


@dataclass(frozen=True)
class TableLayout:
    """How the rows of a model lie in files.

    Attributes:
        per_layer: each memory layer has a table of its own; otherwise all share the pool.
        rows: rows of one table.
        row_size: elements of a row, pre-value and value.
        rows_per_shard: rows of every shard but the last.
        dtype: of the rows.
    """

    per_layer: bool
    rows: int
    row_size: int
    rows_per_shard: int
    dtype: torch.dtype

    @property
    def shards(self) -> int:
        """Shards of one table."""
        return -(-self.rows // self.rows_per_shard)

    def shard_rows(self, shard: int) -> range:
        """Rows of a table that lie in shard `shard`."""
        return range(shard * self.rows_per_shard, min(self.rows, (shard + 1) * self.rows_per_shard))

    @classmethod
    def of(cls, memory: MemoryConfig, dtype: torch.dtype, shard_bytes: int) -> "TableLayout":
        """The layout with the fewest shards of at most `shard_bytes` bytes, of equal size but the last.

        Raises:
            InvalidRequest: not even one row fits into a shard.
        """
        if not memory.layers:
            return cls(per_layer=True, rows=0, row_size=0, rows_per_shard=1, dtype=dtype)
        row_size = memory.row_size
        row_bytes = row_size * dtype.itemsize
        # TensorRT refuses tensors of 2^31 elements or more.
        most = min(shard_bytes // row_bytes, INT32_MAX // row_size)
        if most < 1:
            raise InvalidRequest(
                f"a shard of {shard_bytes} bytes holds no row: one row has {row_bytes} bytes",
                fix="raise --shard-size; the default is 2GB",
            )
        per_layer = memory.owns_its_rows or not memory.shares_a_table
        rows = memory.visible_rows if memory.owns_its_rows else memory.pool_rows
        if memory.padding_row is not None:
            rows = memory.padding_row + 1
        shards = -(-rows // most)
        if shards > MOST_SHARDS:
            raise InvalidRequest(
                f"shards of {shard_bytes} bytes would cut a table of {rows * row_bytes} bytes into {shards}, at most "
                f"{MOST_SHARDS} are supported",
                fix="raise --shard-size; the default is 2GB",
            )
        return cls(per_layer, rows, row_size, -(-rows // shards), dtype)


class Shard(NamedTuple):
    """A part of a table that is one tensor, and one file.

    Attributes:
        name: of the parameter of the folded model, and of the initializer.
        layer: the memory layer whose own table it is of; None: of the pool.
        rows: of the table.
    """

    name: str
    layer: int | None
    rows: range


@dataclass(frozen=True)
class FoldedForm:
    """Which folded model an export makes of a checkpoint.

    Attributes:
        config: the model.
        layout: of its tables.
        dtype: of dense weights and cache; Tucker cores and vectors stay fp32.
        key_dtype: of the keys.
        moe_form: of experts: standard (each expert by itself) or contrib (stacks).
        cache: growing, or static: of fixed length and written in place.
    """

    config: ModelConfig
    layout: TableLayout
    dtype: torch.dtype
    key_dtype: torch.dtype
    moe_form: str = "standard"
    cache: str = "growing"

    def shards(self) -> list[Shard]:
        """Every part of every table, in the order of the files."""
        layers = range(self.config.memory.layers)
        tables: list[tuple[str, int | None]] = [("full_memory_layer", None)]
        if self.layout.per_layer:
            tables = [(f"mem_blocks.{j}", j) for j in layers]
        return [
            Shard(f"transformer.{table}.rows.{s}", layer, self.layout.shard_rows(s))
            for table, layer in tables
            for s in range(self.layout.shards)
        ]
