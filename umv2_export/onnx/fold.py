"""The constant folds of the export: from the tensors of a checkpoint to those of the folded model, piece by piece.

Exact algebra (float rounding aside): the weights of query_norm and keys_norm go into the keys; shuffle, modulo and
offset go into one map of virtual addresses, or, where a layer owns its rows, into their order.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from umv2_export.checkpoint import Checkpoint
from umv2_export.config import ModelConfig
from umv2_export.dtypes import dtype_name
from umv2_export.errors import InputRejected
from umv2_export.layout import TableLayout
from umv2_export.model.folded import KeyMatrix, key_matrices, used_chunks
from umv2_export.model.memory import adding_tucker, folded_keys

__all__ = ["FoldedTensor", "Kind", "fold_checkpoint"]

Kind = Literal["dense", "keys", "map", "rows", "router", "experts"]

# Rows gathered at a time: 32 MiB, small against the 2 GB budget and large against the cost of a call.
PIECE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class FoldedTensor:
    """A parameter of the folded model, computed when its pieces are asked for.

    Attributes:
        name: parameter name in the folded model, and initializer name in the graph.
        shape, dtype: as stored.
        kind: what its bytes count as.
        pieces: makes its slices along dim 0, in order, in `dtype`.
        part: of rows, makes the slices of a range of them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Kind
    pieces: Callable[[], Iterator[torch.Tensor]]
    part: Callable[[range], Iterator[torch.Tensor]] | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def fold_checkpoint(
    checkpoint: Checkpoint, layout: TableLayout, dtype: torch.dtype, key_dtype: torch.dtype, moe_form: str
) -> list[FoldedTensor]:
    """All parameters of the folded model of a checkpoint, dense ones first, then the tables shard by shard.

    Args:
        checkpoint: the model.
        layout: of its tables.
        dtype: of dense weights; Tucker cores and vectors stay fp32.
        key_dtype: of the keys.
        moe_form: standard (each expert by itself) or contrib (stacks).
    """
    config = checkpoint.config
    tensors = []
    for name, tensor in checkpoint.tensors.items():
        kind: Kind = "experts" if ".experts." in name else "router" if ".router." in name else "dense"
        if name.startswith(("transformer.mem_blocks.", "transformer.full_memory_layer.")):
            continue
        if kind != "experts" or moe_form == "standard":
            tensors.append(_folded(name, tensor.shape, dtype, kind, partial(checkpoint.read, name)))
    if config.experts is not None and moe_form == "contrib":
        for i in range(config.num_layers):
            tensors += _stack_experts(checkpoint, f"transformer.blocks.{i}.experts.", dtype)
    for j in range(config.memory.layers):
        tensors += _fold_layer(checkpoint, j, dtype, key_dtype)
    tables: list[int | None] = list(range(config.memory.layers)) if layout.per_layer else [None]
    for layer in tables:
        prefix = "transformer.full_memory_layer" if layer is None else f"transformer.mem_blocks.{layer}"
        for s in range(layout.shards):
            rows = layout.shard_rows(s)
            pieces = partial(_table_pieces, checkpoint, layout, layer, rows)
            part = partial(_table_part, checkpoint, layout, layer, rows)
            shape = (len(rows), layout.row_size)
            tensors.append(FoldedTensor(f"{prefix}.rows.{s}", shape, layout.dtype, "rows", pieces, part))
    return tensors


def _folded(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, kind: Kind, compute: Callable[[], torch.Tensor]
) -> FoldedTensor:
    """A tensor that is computed as a whole."""

    def pieces() -> Iterator[torch.Tensor]:
        yield _cast(compute(), dtype, name)

    return FoldedTensor(name, shape, dtype, kind, pieces)


def _cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Convert, refusing finite values that become infinite.

    Raises:
        InputRejected: a value is outside the range of `dtype`.
    """
    if tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if dtype.is_floating_point and bool((torch.isinf(result) & torch.isfinite(tensor)).any()):
        largest = float(tensor[torch.isfinite(tensor)].abs().max())
        raise InputRejected(
            f"tensor {name!r} reaches {largest:.3g}, {dtype_name(dtype)} ends at {torch.finfo(dtype).max:g}",
            fix="export in a dtype of wider range",
        )
    return result


def _stack_experts(checkpoint: Checkpoint, prefix: str, dtype: torch.dtype) -> list[FoldedTensor]:
    """The experts of a block in two tensors, made expert by expert."""

    def stacked(name: str, arrange: Callable[[torch.Tensor], torch.Tensor]) -> FoldedTensor:
        count = sum(other.startswith(prefix) and other.endswith(f".{name}.weight") for other in checkpoint.tensors)

        def pieces() -> Iterator[torch.Tensor]:
            for e in range(count):
                yield _cast(arrange(checkpoint.read(f"{prefix}{e}.{name}.weight"))[None], dtype, prefix + name)

        shape = (count, *checkpoint.tensors[f"{prefix}0.{name}.weight"].shape)
        return FoldedTensor(prefix + name, shape, dtype, "experts", pieces)

    def interleaved(ff_proj: torch.Tensor) -> torch.Tensor:
        linear, gate = ff_proj.chunk(2)
        return torch.stack([gate, linear], dim=1).flatten(0, 1)

    return [stacked("ff_proj", interleaved), stacked("ff_out", lambda ff_out: ff_out)]


def _fold_layer(checkpoint: Checkpoint, j: int, dtype: torch.dtype, key_dtype: torch.dtype) -> list[FoldedTensor]:
    config, m = checkpoint.config, checkpoint.config.memory
    prefix = f"transformer.mem_blocks.{j}."

    def read(leaf: str) -> torch.Tensor:
        return checkpoint.read(prefix + leaf)

    def folded(
        leaf: str, shape: tuple[int, ...], kind: Kind, compute: Callable[[], torch.Tensor], to: torch.dtype = dtype
    ) -> FoldedTensor:
        return _folded(prefix + leaf, shape, to, kind, compute)

    d, chunks = config.hidden_size, used_chunks(m)
    query_name = "query_proj" if len(chunks) == 2 * m.queries_per_side else "used_query_proj"

    def queries() -> torch.Tensor:
        return read("query_proj.weight").reshape(-1, m.key_dim, d)[chunks].reshape(-1, d)

    tensors = [folded(f"{query_name}.weight", (len(chunks) * m.key_dim, d), "dense", queries)]
    for side, matrices in enumerate(key_matrices(m)):
        for i, matrix in enumerate(matrices):
            shape = (m.key_dim, len(matrix.heads) * m.stored_side * len(matrix.ranks))
            compute = partial(_key_matrix, checkpoint, j, side, matrix)
            tensors.append(folded(f"{('row_keys', 'col_keys')[side]}.{i}", shape, "keys", compute, key_dtype))
    vectors, cores = (m.heads, m.score_rank), (m.tucker_cores, m.heads, m.score_rank, m.score_rank)
    names, shapes = ("tucker_u", "tucker_v", "tucker_cores"), (vectors, vectors, cores)
    for leaf, tucker_shape, stored in zip(names, shapes, _tucker(checkpoint, j), strict=True):
        tensors.append(folded(leaf, tucker_shape, "dense", stored, torch.float32))
    if m.pre_value_dim:
        tensors.append(
            folded("pre_values_proj.weight", (m.pre_value_dim, d), "dense", lambda: read("pre_values_proj.weight"))
        )
    tensors.append(
        folded("values_proj.weight", (d, m.value_dim * m.value_groups), "dense", lambda: read("values_proj.weight"))
    )
    if m.kind == "memory_plus":
        gate = "swilu_projection.weight"
        tensors.append(folded(gate, (m.value_dim, d), "dense", lambda: read(gate)))
    if m.has_address_map:
        virtual = (m.stored_side**2,)
        tensors.append(folded("address_map", virtual, "map", partial(_address_map, checkpoint, j), torch.int32))
        if m.value_groups > 1:
            tensors.append(folded("group_map", virtual, "map", partial(_group_map, checkpoint, j), torch.int32))
    return tensors


def _tucker(checkpoint: Checkpoint, j: int) -> tuple[Callable[[], torch.Tensor], ...]:
    """The vectors u and v [H, R], and the cores [C, H, R, R], as stored; Memory+ stores none, it adds its scores."""
    m, prefix = checkpoint.config.memory, f"transformer.mem_blocks.{j}."
    if m.kind == "memory_plus":
        u_HR, v_HR, cores_CHRR = adding_tucker(m)
        return lambda: u_HR, lambda: v_HR, lambda: cores_CHRR
    return (
        lambda: checkpoint.read(prefix + "tucker_core_u")[0, :, 0],
        lambda: checkpoint.read(prefix + "tucker_core_v")[0, :, 0],
        lambda: torch.stack([checkpoint.read(f"{prefix}tucker_core.{k}") for k in range(m.tucker_cores)]),
    )


def _key_matrix(checkpoint: Checkpoint, j: int, side: int, matrix: KeyMatrix) -> torch.Tensor:
    """The keys that one query scores, normalised and scaled: [Dk, heads * N * ranks]."""
    prefix, eps = f"transformer.mem_blocks.{j}.", checkpoint.config.norm_eps
    keys_norm, query_norm = (checkpoint.read(f"{prefix}{name}_norm.weight").float() for name in ("keys", "query"))
    keys = checkpoint.read(prefix + "keys")[:, side]
    folded_HNKR = folded_keys(checkpoint.config.memory, keys, keys_norm, query_norm, eps)
    folded_HNKR = folded_HNKR if folded_HNKR.dim() == 4 else folded_HNKR[..., None]
    chosen = folded_HNKR[matrix.heads.start : matrix.heads.stop, :, :, matrix.ranks.start : matrix.ranks.stop]
    return chosen.permute(2, 0, 1, 3).flatten(1)


def _physical_rows(config: ModelConfig, shuffle_index: torch.Tensor, j: int) -> torch.Tensor:
    """Physical row of every virtual address of layer j."""
    m = config.memory
    rows = (shuffle_index % m.visible_rows + m.offset(j)) % m.pool_rows
    return rows if m.padding_row is None else torch.where(shuffle_index == m.padding_row, m.padding_row, rows)


def _address_map(checkpoint: Checkpoint, j: int) -> torch.Tensor:
    """Physical row of every virtual address."""
    shuffle_index = checkpoint.read(f"transformer.mem_blocks.{j}.shuffle_index")
    return _physical_rows(checkpoint.config, shuffle_index, j).to(torch.int32)


def _group_map(checkpoint: Checkpoint, j: int) -> torch.Tensor:
    """Virtual block, hence group, of every virtual address."""
    shuffle_index = checkpoint.read(f"transformer.mem_blocks.{j}.shuffle_index")
    return (shuffle_index // checkpoint.config.memory.visible_rows).to(torch.int32)


def _table_pieces(
    checkpoint: Checkpoint, layout: TableLayout, layer: int | None, rows: range
) -> Iterator[torch.Tensor]:
    """Interleaved rows [pre-value | value] of one shard."""
    config, m = checkpoint.config, checkpoint.config.memory
    table = "transformer.full_memory_layer." if m.shares_a_table else f"transformer.mem_blocks.{layer}."
    parts = [checkpoint.tensors[table + "values_for_look_up"]]
    if m.pre_value_dim:
        parts.insert(0, checkpoint.tensors[table + "pre_values_for_look_up"])
    order = torch.arange(layout.rows)
    checked = rows
    if layer is not None and m.owns_its_rows:
        order = _physical_rows(config, checkpoint.read(f"transformer.mem_blocks.{layer}.shuffle_index"), layer)
        # A permuted table is checked as a whole with its first shard, since any shard may hold any row of it. In file
        # order: the random gather below then finds its pages in memory.
        checked = range(int(order.min()), int(order.max()) + 1) if rows.start == 0 else range(0)
    if m.padding_row is not None:
        checked = range(rows.start, min(rows.stop, m.padding_row))
    for part in parts:
        part.check_finite(checked.start, checked.stop)
    order = order[checked.start : checked.stop] if m.padding_row is not None else order[rows.start : rows.stop]
    step = max(1, PIECE_BYTES // (layout.row_size * layout.dtype.itemsize))
    for index in order.split(step):
        yield torch.cat([_cast(part.rows(index), layout.dtype, part.name) for part in parts], dim=1)
    if m.padding_row in rows:
        yield torch.zeros(1, layout.row_size, dtype=layout.dtype)


def _table_part(
    checkpoint: Checkpoint, layout: TableLayout, layer: int | None, shard: range, part: range
) -> Iterator[torch.Tensor]:
    """Rows of a part of a shard, counted from its first."""
    return _table_pieces(checkpoint, layout, layer, shard[part.start : part.stop])
