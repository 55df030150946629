"""What a bundle stores beside what its checkpoint folds to: every tensor, in bytes.

Test inputs reach few rows of a large table. So each tensor is folded again, piece by piece, and compared with the bytes
to which the graph points.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch

from umv2_export.bundle import Bundle
from umv2_export.checkpoint import Checkpoint
from umv2_export.config import Role
from umv2_export.dtypes import dtype_name
from umv2_export.onnx.fold import FoldedTensor, fold_checkpoint
from umv2_export.parity.compare import UNIT_ROUNDOFF
from umv2_export.progress import Tracker, silent

__all__ = ["StoredCheck", "StoredDifference", "compare_stored"]

# Of a sample: runs of rows as long as that are read at disk rate, and 64 of them in a table spread over it.
SAMPLE_RUNS = 64

# Keys are computed (divided by their RMS, times a weight): another processor sums in another order, which moves the
# result by a step or two. All else is copied or rounded, and has one right value.
KEY_STEPS = 4

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class StoredDifference:
    """A tensor that is not what the checkpoint folds to.

    Attributes:
        tensor: name of the initializer.
        row, column: of the first difference; None where the tensor as a whole differs.
        stored, expected: the values there.
        rows: how many of the compared rows differ.
        note: in a sentence.
    """

    tensor: str
    row: int | None
    column: int | None
    stored: float | None
    expected: float | None
    rows: int
    note: str


@dataclass
class StoredCheck:
    """What was compared, and what differs.

    Attributes:
        tensors: how many.
        bytes: of all tensors of the model.
        compared_bytes: of those that were compared.
        rounded_keys: elements of keys that differ in their last bits, as they do between processors.
        differences: all; empty if the check passed.
    """

    tensors: int = 0
    bytes: int = 0
    compared_bytes: int = 0
    rounded_keys: int = 0
    differences: list[StoredDifference] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Something was compared, and nothing differs."""
        return self.tensors > 0 and not self.differences

    @property
    def share(self) -> float:
        """Of the bytes, that were compared."""
        return self.compared_bytes / self.bytes if self.bytes else 0.0

    def as_dict(self) -> dict[str, object]:
        """For JSON, which has no NaN: a value that is not finite is text."""
        return {
            "passed": self.passed,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "compared_bytes": self.compared_bytes,
            "share": self.share,
            "rounded_keys": self.rounded_keys,
            "differences": [
                {
                    name: str(value) if isinstance(value, float) and not np.isfinite(value) else value
                    for name, value in asdict(one).items()
                }
                for one in self.differences
            ],
        }


def compare_stored(
    bundle: Bundle, checkpoint: Checkpoint, *, sample: float = 1.0, seed: int = 0, track: Tracker = silent
) -> StoredCheck:
    """Fold a checkpoint again and compare it with what a bundle stores.

    Args:
        bundle: what was exported.
        checkpoint: what it was exported from, its query projection read as the bundle's.
        sample: share of the rows of each table that are compared, above 0 and at most 1; all else is compared whole.
        seed: of the rows that are chosen.
        track: progress.
    """
    # NaN and infinity are compared like all else; to refuse them takes another pass over every table.
    tensors = {name: replace(tensor, allow_non_finite=True) for name, tensor in checkpoint.tensors.items()}
    folded = fold_checkpoint(replace(checkpoint, tensors=tensors), bundle.form)
    weights = bundle.weights()
    result = StoredCheck(bytes=sum(tensor.size for tensor in folded))
    for name in sorted(weights.keys() - {tensor.name for tensor in folded}):
        note = "the graph has this tensor, and the checkpoint folds to none of this name"
        result.differences.append(StoredDifference(name, None, None, None, None, len(weights[name]), note))
    rng = np.random.default_rng(seed)
    runs = {tensor.name: _runs(tensor, sample, rng) for tensor in folded}
    advance = track("comparing weights", sum(_row_bytes(one) * sum(map(len, runs[one.name])) for one in folded))
    for tensor in folded:
        result.tensors += 1
        found = weights.get(tensor.name)
        if found is None or tuple(found.shape) != tensor.shape or found.dtype != tensor.dtype:
            is_there = "is missing" if found is None else f"is {dtype_name(found.dtype)} {list(found.shape)}"
            note = f"{is_there} in the bundle, the checkpoint folds to {dtype_name(tensor.dtype)} {list(tensor.shape)}"
            result.differences.append(StoredDifference(tensor.name, None, None, None, None, 0, note))
            continue
        differing, first = 0, None
        for start, piece in _pieces(tensor, runs[tensor.name]):
            theirs = found[start : start + len(piece)]
            wrong = _differing(theirs, piece, tensor, result)
            if wrong is not None:
                differing += int(wrong.flatten(1).any(1).sum()) if wrong.dim() > 1 else int(wrong.sum())
                first = first or _first(tensor.name, start, wrong, theirs, piece)
            size = piece.numel() * piece.element_size()
            result.compared_bytes += size
            advance(size)
        if first is not None:
            result.differences.append(replace(first, rows=differing))
    return result


def _row_bytes(tensor: FoldedTensor) -> int:
    return tensor.size // tensor.shape[0]


def _runs(tensor: FoldedTensor, sample: float, rng: np.random.Generator) -> list[range]:
    """Rows to compare, in order: all, or of a table runs that begin at random."""
    count = tensor.shape[0]
    if tensor.part is None or sample >= 1:
        return [range(count)]
    wanted = max(1, round(count * sample))
    length = -(-wanted // SAMPLE_RUNS)
    starts = np.sort(rng.choice(-(-count // length), min(-(-count // length), -(-wanted // length)), replace=False))
    return [range(int(start) * length, min(count, (int(start) + 1) * length)) for start in starts]


def _pieces(tensor: FoldedTensor, runs: list[range]) -> Iterator[tuple[int, torch.Tensor]]:
    """First row and values of each piece of a tensor."""
    for run in runs:
        start = run.start
        for piece in tensor.pieces() if tensor.part is None else tensor.part(run):
            yield start, piece
            start += len(piece)


def _differing(
    theirs: torch.Tensor, ours: torch.Tensor, tensor: FoldedTensor, result: StoredCheck
) -> torch.Tensor | None:
    """Where two pieces differ, in bytes; None: nowhere."""
    bits = _BITS[ours.element_size()]
    ours, theirs = ours.contiguous(), theirs.contiguous()
    if torch.equal(ours.view(bits), theirs.view(bits)):
        return None
    wrong = ours.view(bits) != theirs.view(bits)
    if tensor.spec.role is Role.KEY:
        step = 2 * UNIT_ROUNDOFF[dtype_name(tensor.dtype)]
        near = (ours.float() - theirs.float()).abs() <= KEY_STEPS * step * ours.float().abs()
        result.rounded_keys += int((wrong & near).sum())
        wrong &= ~near
    return wrong if bool(wrong.any()) else None


def _first(name: str, start: int, wrong: torch.Tensor, theirs: torch.Tensor, ours: torch.Tensor) -> StoredDifference:
    place = wrong.nonzero()[0]
    row, column = int(place[0]), int(place[1]) if len(place) > 1 else 0
    stored, expected = (float(values[tuple(place)]) for values in (theirs, ours))
    note = f"row {start + row}, column {column}: stored is {stored:.8g}, the checkpoint gives {expected:.8g}"
    return StoredDifference(name, start + row, column, stored, expected, 0, note)
