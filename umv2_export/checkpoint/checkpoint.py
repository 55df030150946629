"""The one view of a checkpoint that the rest of the compiler sees, whatever its format on disk."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from umv2_export.config import ModelConfig, QueryLayout, Role, TensorSpec, checkpoint_tensors
from umv2_export.errors import InputRejected, Unsupported

__all__ = ["Checkpoint", "CheckpointTensor", "ReadOptions", "validate_tensors"]

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# 64 MiB a piece: reading ahead works at full disk rate, and a few pieces in flight stay far below the 2 GB budget.
PIECE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class CheckpointTensor:
    """A tensor of a checkpoint, mapped from its file; nothing is read before it is asked for.

    Attributes:
        name: name in the checkpoint.
        parts: the tensor, or its slices along `axis`: along dim 1 in rank order when every rank saved its own slice,
            along dim 0 where other formats have several tensors for one of ours.
        allow_non_finite: NaN and infinity pass.
        axis: 0 or 1.
        transposed: the one part is stored with its two dimensions exchanged; it is copied when it is read.
    """

    name: str
    parts: Sequence[torch.Tensor]
    allow_non_finite: bool = False
    axis: int = 1
    transposed: bool = False

    def renamed(self, name: str) -> "CheckpointTensor":
        """The same tensor under another name."""
        return replace(self, name=name)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        first = tuple(self.parts[0].shape)
        if len(self.parts) == 1:
            return first[::-1] if self.transposed else first
        joined = sum(part.shape[self.axis] for part in self.parts)
        return (joined, *first[1:]) if self.axis == 0 else (first[0], joined, *first[2:])

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""
        return self.parts[0].dtype

    def read(self) -> torch.Tensor:
        """The whole tensor; mapped, not copied, when it lies in one file.

        Raises:
            InputRejected: it holds NaN or infinity.
        """
        self.check_finite(0, len(self.parts[0]) if self.transposed else self.shape[0])
        return self.joined()

    def joined(self) -> torch.Tensor:
        """The whole tensor without the check: mapped when it lies in one file, else a copy."""
        if self.transposed:
            return self.parts[0].t().contiguous()
        return self.parts[0] if len(self.parts) == 1 else torch.cat(list(self.parts), dim=self.axis)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Copy the rows `index` (int64) of a table, without the check that `check_finite` makes."""
        if self.axis == 1:
            return torch.cat([part.index_select(0, index) for part in self.parts], dim=1)
        rows = self.parts[0].new_empty((len(index), *self.parts[0].shape[1:]))
        first = 0
        for part in self.parts:
            here = (index >= first) & (index < first + len(part))
            rows[here] = part.index_select(0, index[here] - first)
            first += len(part)
        return rows

    def __iter__(self) -> Iterator[torch.Tensor]:
        """The tensor in consecutive slices of rows, checked, each of at most 64 MiB or one row.

        Raises:
            InputRejected: it holds NaN or infinity.
        """
        if self.transposed:
            yield self.read()
            return
        if self.axis == 0 and len(self.parts) > 1:
            for part in self.parts:
                yield from CheckpointTensor(self.name, [part], self.allow_non_finite)
            return
        for start, stop in self._piece_bounds(0, self.shape[0]):
            self.check_finite(start, stop)
            slices = [part[start:stop] for part in self.parts]
            yield slices[0] if len(slices) == 1 else torch.cat(slices, dim=1)

    def check_finite(self, start: int, stop: int) -> None:
        """Refuse NaN and infinity in rows start..stop, naming the first bad row. Reads the rows in file order.

        Raises:
            InputRejected: a value is not finite.
        """
        if self.allow_non_finite or not self.dtype.is_floating_point:
            return
        if self.axis == 0 and len(self.parts) > 1:
            for part in self.parts:
                CheckpointTensor(self.name, [part]).check_finite(0, len(part))
            return
        for first, last in self._piece_bounds(start, stop):
            for part in self.parts:
                piece = part[first:last]
                # aminmax passes NaN on and allocates nothing, unlike isfinite.
                if piece.numel() and not all(bool(torch.isfinite(bound)) for bound in torch.aminmax(piece)):
                    row = int((~torch.isfinite(piece.reshape(len(piece), -1))).any(1).nonzero()[0])
                    kind = "NaN" if bool(torch.isnan(piece[row]).any()) else "infinity"
                    raise InputRejected(
                        f"tensor {self.name!r} holds {kind} in row {first + row}",
                        fix="train or export the checkpoint again; --allow-non-finite lets the values through",
                    )

    def _piece_bounds(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        row_bytes = max(1, self.parts[0][:1].numel() * self.dtype.itemsize * len(self.parts))
        step = max(1, PIECE_BYTES // row_bytes)
        for first in range(start, stop, step):
            yield first, min(stop, first + step)


@dataclass(frozen=True)
class ReadOptions:
    """How a checkpoint is read; see the arguments of `open_checkpoint`."""

    query_layout: QueryLayout | None = None
    row_topk: int | None = None
    allow_non_finite: bool = False
    ignore_fields: Sequence[str] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint: every tensor that the configuration asks for is there, in its shape, and no other.

    Attributes:
        path: the folder.
        format: `official`, `native` or `olmoe`.
        config: the model.
        tensors: name -> tensor; the names are those of `checkpoint_tensors(config)`.
        files: all files that hold configuration and weights, in reading order.
        tokenizer_files: tokenizer files beside them, or those that the user named.
        notes: what a user should know of how it was read, a sentence each.
        never_added: those of the notes that a bundle carries on: memory layers that were left out.
        tokenizer: what the configuration calls its tokenizer, where it names one.
        ignored_fields: unknown fields of the configuration that the user asked to leave out.
    """

    path: Path
    format: str
    config: ModelConfig
    tensors: Mapping[str, CheckpointTensor]
    files: Sequence[Path]
    tokenizer_files: Sequence[Path]
    notes: Sequence[str] = ()
    never_added: Sequence[str] = ()
    tokenizer: str | None = None
    ignored_fields: Sequence[str] = ()

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name`, mapped where possible."""
        return self.tensors[name].read()

    def with_query_layout(self, layout: QueryLayout) -> "Checkpoint":
        """The same checkpoint, its query projection read in another layout."""
        return replace(self, config=replace(self.config, memory=replace(self.config.memory, query_layout=layout)))

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files)


def validate_tensors(config: ModelConfig, tensors: Mapping[str, CheckpointTensor]) -> None:
    """Check names, shapes, dtypes and storage sizes of all tensors, and that permutations are permutations.

    Raises:
        InputRejected: a tensor is missing, or contradicts the configuration or its file.
        Unsupported: a tensor or dtype that is not implemented.
    """
    expected = {spec.name: spec for spec in checkpoint_tensors(config)}
    missing = [name for name in expected if name not in tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputRejected(f"tensor {missing[0]!r}{more} missing", why="the configuration asks for it")
    for name in tensors:
        if name not in expected:
            raise Unsupported(f"unknown tensor {name!r}", why="a tensor that is left out would change what is computed")
    for name, spec in expected.items():
        _validate_tensor(tensors[name], spec)
    for name, spec in expected.items():
        if spec.role is Role.PERMUTATION:
            _validate_permutation(tensors[name])


def _validate_tensor(tensor: CheckpointTensor, spec: TensorSpec) -> None:
    if tensor.shape != spec.shape:
        raise InputRejected(
            f"tensor {tensor.name!r} has shape {list(tensor.shape)}, the configuration says {list(spec.shape)}"
        )
    dtypes = (torch.int64,) if spec.role is Role.PERMUTATION else WEIGHT_DTYPES
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise Unsupported(f"tensor {tensor.name!r} has dtype {tensor.dtype}", fix=f"supported: {names}")
    for part in tensor.parts:
        if not part.is_contiguous() or part.dtype != tensor.dtype:
            raise InputRejected(
                f"tensor {tensor.name!r} is not stored contiguously in one dtype",
                why="a view into a smaller storage could claim more bytes than the file holds",
            )


def _validate_permutation(tensor: CheckpointTensor) -> None:
    index = tensor.read()
    n = index.numel()
    if bool((index < 0).any()) or bool((index >= n).any()) or int(torch.bincount(index, minlength=n).max()) != 1:
        raise InputRejected(f"tensor {tensor.name!r} is not a permutation of 0..{n - 1}")
