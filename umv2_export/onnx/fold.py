"""The constant folds of the export: from the tensors of a checkpoint to those of the folded model, piece by piece.

Exact algebra (float rounding aside): the weights of query_norm and keys_norm go into the keys; shuffle, modulo and
offset go into one map of virtual addresses, or, where a layer owns its rows, into their order.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from umv2_export.checkpoint import Checkpoint
from umv2_export.config import ModelConfig, Role, TensorSpec, checkpoint_tensors
from umv2_export.dtypes import dtype_name, torch_dtype
from umv2_export.errors import InputRejected
from umv2_export.layout import FoldedForm, Shard
from umv2_export.model.folded import KeyMatrix, folded_model, key_matrices, query_name, used_chunks
from umv2_export.model.memory import adding_tucker, folded_keys

__all__ = ["KINDS", "FoldedTensor", "fold_checkpoint"]

# Rows gathered at a time: 32 MiB, small against the 2 GB budget and large against the cost of a call.
PIECE_BYTES = 32 * 2**20

# What the bytes of a bundle count as, by role; what is not among these is dense.
_KINDS = {Role.KEY: "keys", Role.MAP: "map", Role.ROW: "rows", Role.ROUTER: "router", Role.EXPERT: "experts"}
KINDS = ("dense", *_KINDS.values())


@dataclass(frozen=True)
class FoldedTensor:
    """A parameter of the folded model, computed when its pieces are asked for.

    Attributes:
        spec: its name, shape and dtype, as the folded model declares them, and its role.
        pieces: makes its slices along dim 0, in order, in its dtype.
        part: of rows, makes the slices of a range of them.
    """

    spec: TensorSpec
    pieces: Callable[[], Iterator[torch.Tensor]]
    part: Callable[[range], Iterator[torch.Tensor]] | None = None

    @property
    def name(self) -> str:
        """Of the parameter, and of the initializer in the graph."""
        return self.spec.name

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""
        return self.spec.shape

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        return torch_dtype(self.spec.dtype)

    @property
    def kind(self) -> str:
        """What its bytes count as; one of `KINDS`."""
        return _KINDS.get(self.spec.role, "dense")

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class _Fold:
    """How a parameter of the folded model is made of the checkpoint.

    Attributes:
        role: what it is.
        pieces: makes its slices along dim 0, in the dtype of the checkpoint or already in its own.
        part: of rows, makes the slices of a range of them.
    """

    role: Role
    pieces: Callable[[], Iterator[torch.Tensor]]
    part: Callable[[range], Iterator[torch.Tensor]] | None = None


def fold_checkpoint(checkpoint: Checkpoint, form: FoldedForm) -> list[FoldedTensor]:
    """All parameters of the folded model of a checkpoint, dense ones first, then the tables shard by shard."""
    with torch.device("meta"):
        declared = folded_model(form).state_dict()
    config = form.config
    layers: dict[str, _Fold] = {}
    if config.experts is not None and form.moe_form == "contrib":
        for i in range(config.num_layers):
            layers |= _stack_experts(checkpoint, f"transformer.blocks.{i}.experts.", config.experts.count)
    for j in range(config.memory.layers):
        layers |= _fold_layer(checkpoint, j)
    roles = {spec.name: spec.role for spec in checkpoint_tensors(config)}
    # In the order of the checkpoint's files.
    folds = {
        name: _whole(roles[name], partial(checkpoint.read, name))
        for name in checkpoint.tensors
        if name in declared and name not in layers
    }
    folds |= layers
    for shard in form.shards():
        pieces = partial(_table_pieces, checkpoint, form, shard.layer, shard.rows)
        folds[shard.name] = _Fold(Role.ROW, pieces, partial(_table_part, checkpoint, form, shard))
    if folds.keys() != declared.keys():
        raise AssertionError(f"model and fold disagree on {sorted(folds.keys() ^ declared.keys())}")
    tensors = []
    for name, fold in folds.items():
        spec = TensorSpec(name, tuple(declared[name].shape), dtype_name(declared[name].dtype), fold.role)
        tensors.append(FoldedTensor(spec, partial(_stored, fold, spec), fold.part))
    return tensors


def _stored(fold: _Fold, spec: TensorSpec) -> Iterator[torch.Tensor]:
    """The pieces in the dtype that is stored."""
    rows = 0
    for piece in fold.pieces():
        rows += len(piece)
        if tuple(piece.shape[1:]) != spec.shape[1:] or rows > spec.shape[0]:
            raise AssertionError(f"{spec.name}: the model has shape {spec.shape}, the fold makes {tuple(piece.shape)}")
        yield _cast(piece, torch_dtype(spec.dtype), spec.name)


def _whole(role: Role, compute: Callable[[], torch.Tensor]) -> _Fold:
    """Made as a whole."""

    def pieces() -> Iterator[torch.Tensor]:
        yield compute()

    return _Fold(role, pieces)


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


def _stack_experts(checkpoint: Checkpoint, prefix: str, count: int) -> dict[str, _Fold]:
    """The experts of a block in two tensors, made expert by expert."""

    def stacked(name: str, arrange: Callable[[torch.Tensor], torch.Tensor]) -> _Fold:
        def pieces() -> Iterator[torch.Tensor]:
            for e in range(count):
                yield arrange(checkpoint.read(f"{prefix}{e}.{name}.weight"))[None]

        return _Fold(Role.EXPERT, pieces)

    def interleaved(ff_proj: torch.Tensor) -> torch.Tensor:
        linear, gate = ff_proj.chunk(2)
        return torch.stack([gate, linear], dim=1).flatten(0, 1)

    return {
        prefix + "ff_proj": stacked("ff_proj", interleaved),
        prefix + "ff_out": stacked("ff_out", lambda ff_out: ff_out),
    }


def _fold_layer(checkpoint: Checkpoint, j: int) -> dict[str, _Fold]:
    d, m = checkpoint.config.hidden_size, checkpoint.config.memory
    prefix = f"transformer.mem_blocks.{j}."

    def queries() -> torch.Tensor:
        weight = checkpoint.read(prefix + "query_proj.weight")
        return weight.reshape(-1, m.key_dim, d)[used_chunks(m)].reshape(-1, d)

    folds = {f"{query_name(m)}.weight": _whole(Role.QUERY, queries)}
    for side, matrices in enumerate(key_matrices(m)):
        for i, matrix in enumerate(matrices):
            compute = partial(_key_matrix, checkpoint, j, side, matrix)
            folds[f"{('row_keys', 'col_keys')[side]}.{i}"] = _whole(Role.KEY, compute)
    u, v, cores = _tucker(checkpoint, j)
    folds["tucker_u"], folds["tucker_v"] = _whole(Role.ROW_VECTOR, u), _whole(Role.COL_VECTOR, v)
    folds["tucker_cores"] = _whole(Role.CORE, cores)
    kept = {"values_proj.weight": Role.OUTPUT}
    if m.pre_value_dim:
        kept = {"pre_values_proj.weight": Role.PRE_VALUE_QUERY, **kept}
    if m.kind == "memory_plus":
        kept["swilu_projection.weight"] = Role.GATE
    folds |= {leaf: _whole(role, partial(checkpoint.read, prefix + leaf)) for leaf, role in kept.items()}
    if m.has_address_map:
        folds["address_map"] = _whole(Role.MAP, partial(_address_map, checkpoint, j))
        if m.value_groups > 1:
            folds["group_map"] = _whole(Role.MAP, partial(_group_map, checkpoint, j))
    return {prefix + leaf: fold for leaf, fold in folds.items()}


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


def _table_pieces(checkpoint: Checkpoint, form: FoldedForm, layer: int | None, rows: range) -> Iterator[torch.Tensor]:
    """Interleaved rows [pre-value | value] of one shard."""
    config, layout, m = form.config, form.layout, form.config.memory
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


def _table_part(checkpoint: Checkpoint, form: FoldedForm, shard: Shard, part: range) -> Iterator[torch.Tensor]:
    """Rows of a part of a shard, counted from its first."""
    return _table_pieces(checkpoint, form, shard.layer, shard.rows[part.start : part.stop])
