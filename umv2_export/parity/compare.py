"""Comparison of two outputs: how far apart they are, and what may be tolerated."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from umv2_export.runtimes.base import Array

__all__ = [
    "SMALLEST_STEP",
    "UNIT_ROUNDOFF",
    "Check",
    "Difference",
    "Status",
    "Tolerance",
    "difference",
    "root_mean_square",
    "worst",
]

Status = Literal["pass", "fail", "ambiguous"]

# Half the distance of 1.0 to the next number.
UNIT_ROUNDOFF = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}

# Half the distance of 0 to the next number: no error of a sum is smaller. It counts in fp16 alone.
SMALLEST_STEP = {"fp32": 2.0**-150, "fp16": 2.0**-25, "bf16": 2.0**-134}

# The residual stream of one layer passes about six roundings: two norms, attention, FFN, memory, their sum.
ROUNDINGS_PER_LAYER = 6

# Elements that are squared at a time.
PIECE = 2**20

# A random walk of that many roundings, times 8: the largest of the 13 000 logits of a test lies at 4 standard
# deviations. Measured on three golden models in fp16, 6 seeds: at most 0.033, where this gives 0.066.
SIGMAS = 8

# RMS and median of the errors, in the same unit: where the maximum lies at 4 standard deviations, they lie at one.
BROAD_SIGMAS = 2

# In fp32 nothing is rounded between the steps, but each step is a sum of some hundred products in another order, whose
# error is that many units.
SUMMATION = {"fp32": 16.0, "fp16": 1.0, "bf16": 1.0}


# A deep model whose memory layers add more than its stream holds amplifies rounding: 12 random layers in fp16 moved the
# worst of 65 000 logits by 14 of these units, of which SIGMAS allows 8, and their RMS by 1.0. How far a model does so
# is measured where it matters, on the reference with rounded products. Those are half of the roundings: the sums of the
# residual stream, and norms, are not among them.
AMPLIFIED_FACTOR = 4.0


@dataclass(frozen=True)
class Tolerance:
    """How far an output may be from the reference.

    Attributes:
        atol, rtol: |a - b| <= atol + rtol * |b|; None derives the tolerance from the dtype and the size of the output.
        dtype: that the runtime computes in.
        layers: of the model.
    """

    atol: float | None = None
    rtol: float | None = None
    dtype: str = "fp32"
    layers: int = 1

    def __post_init__(self) -> None:
        if any(value is not None and not value >= 0 for value in (self.atol, self.rtol)):
            raise ValueError(f"tolerances must be 0 or more, got atol {self.atol} and rtol {self.rtol}")

    @property
    def relative_rounding(self) -> float:
        """Largest error to be expected from rounding, relative to the root mean square of a tensor."""
        return SIGMAS * self._standard_deviation

    def bounds(self, reference: Array) -> tuple[float, float]:
        """(atol, rtol) for an output whose reference is given.

        The default follows the size of the output: a fixed number would be loose for one model and wrong for another.
        """
        atol = self.relative_rounding * root_mean_square(reference) + SMALLEST_STEP[self.dtype]
        return (atol if self.atol is None else self.atol), (0.0 if self.rtol is None else self.rtol)

    def broad_bound(self, reference: Array) -> float:
        """Most that RMS and median of the errors may be; unlimited where the user gave an absolute tolerance."""
        if self.atol is not None:
            return math.inf
        return BROAD_SIGMAS * self._standard_deviation * root_mean_square(reference) + SMALLEST_STEP[self.dtype]

    def difference(self, value: Array, reference: Array, rounded: Array | None = None) -> "Difference":
        """How far an output is from its reference, and whether that is tolerated.

        Args:
            value: of the runtime.
            reference: of the same shape.
            rounded: the reference's output with products rounded to 16 bits; the tolerance then covers what that moves.
        """
        (atol, rtol), broad = self.bounds(reference), self.broad_bound(reference)
        if rounded is not None and np.isfinite(rounded).all():
            moved = self.moved(rounded, reference)
            atol, broad = max(atol, float(moved.max(initial=0.0))), max(broad, root_mean_square(moved))
        return difference(value, reference, (atol, rtol), broad)

    def moved(self, rounded: Array, reference: Array) -> Array:
        """What rounding explains of each value, from the reference with products rounded to 16 bits.

        Rounding of fp32 is not made but estimated from that of bf16, in proportion to the unit.
        """
        unit = "bf16" if self.dtype == "fp32" else self.dtype
        moved = np.abs(rounded.astype(np.float64) - reference)
        return np.asarray(moved * (AMPLIFIED_FACTOR * self._unit / UNIT_ROUNDOFF[unit]))

    @property
    def _standard_deviation(self) -> float:
        return self._unit * math.sqrt(ROUNDINGS_PER_LAYER * self.layers)

    @property
    def _unit(self) -> float:
        return UNIT_ROUNDOFF[self.dtype] * SUMMATION[self.dtype]


def root_mean_square(array: Array) -> float:
    """Root mean square of all elements, 0 for none; summed in float64, piece by piece."""
    flat = array.reshape(-1)
    pieces = (flat[start : start + PIECE] for start in range(0, flat.size, PIECE))
    return math.sqrt(sum(float(np.square(piece, dtype=np.float64).sum()) for piece in pieces) / max(1, flat.size))


@dataclass(frozen=True)
class Difference:
    """How far a value is from its reference.

    Attributes:
        max_abs, max_rel, median_abs, rms: of |a - b|; None where a value is NaN or infinite.
        required_atol: the absolute tolerance that would have passed beside the relative one.
        atol, rtol: the tolerance.
        broad: most that RMS and median may be.
    """

    max_abs: float | None
    max_rel: float | None
    median_abs: float | None
    rms: float | None
    required_atol: float | None
    atol: float
    rtol: float
    broad: float

    @property
    def within(self) -> bool:
        """The tolerance holds, for the largest error, the RMS and the median."""
        return self.excess <= 1

    @property
    def excess(self) -> float:
        """The largest of the three in units of what is allowed: above 1 it is not."""
        if self.required_atol is None or self.rms is None or self.median_abs is None:
            return math.inf
        pairs = [(self.required_atol, self.atol), (max(self.rms, self.median_abs), self.broad)]
        return max(0.0 if error == 0 else math.inf if allowed == 0 else error / allowed for error, allowed in pairs)

    @property
    def problem(self) -> str | None:
        """What is not tolerated, in a sentence, or None."""
        if self.within:
            return None
        if self.required_atol is None or self.rms is None:
            return "NaN, infinity or another shape"
        if self.required_atol > self.atol:
            return "outside the tolerance"
        return f"the root mean square of the errors is {self.rms:.3g}, rounding explains {self.broad:.3g}"


def difference(value: Array, reference: Array, bounds: tuple[float, float], broad: float = math.inf) -> Difference:
    """Compare two arrays of one shape; NaN or infinity on either side is never within a tolerance.

    Args:
        value: of any shape.
        reference: likewise.
        bounds: (atol, rtol).
        broad: most that RMS and median of the errors may be.
    """
    atol, rtol = bounds
    if value.shape != reference.shape or not (np.isfinite(value).all() and np.isfinite(reference).all()):
        return Difference(None, None, None, None, None, atol, rtol, broad)
    if not value.size:
        return Difference(0.0, 0.0, 0.0, 0.0, 0.0, atol, rtol, broad)
    # In the dtype of the values: 256 tokens of a vocabulary of 50,000 in float64, several times over, took 1 GB.
    error, size = np.abs(value - reference), np.abs(reference)
    # Not rtol * size alone: an unlimited rtol times 0 is NaN.
    beyond = error - np.where(size > 0, rtol * size, 0.0) if rtol else error
    required = max(0.0, float(beyond.max()))
    relative = np.divide(error, np.maximum(size, np.finfo(np.float32).tiny, out=size), out=size)
    rms, median = root_mean_square(error), float(np.median(error))
    return Difference(float(error.max()), float(relative.max()), median, rms, required, atol, rtol, broad)


def worst(differences: Iterable[Difference]) -> tuple[Difference, float | None]:
    """The one that exceeds its tolerance most, and the absolute tolerance that would have passed all of them."""
    several = list(differences)
    needed = [one.required_atol for one in several if one.required_atol is not None]
    return max(several, key=lambda one: one.excess), max(needed) if len(needed) == len(several) else None


@dataclass
class Check:
    """One line of a parity report.

    Attributes:
        runtime, case, output: what was compared.
        status: `ambiguous` passes: rows were swapped at near ties, and with the same rows the output agrees.
        max_abs, max_rel, median_abs, rms: see `Difference`; of the cache, those of the tensor that is worst.
        required_atol: the absolute tolerance that would have passed, for all tensors of the cache.
        atol, rtol: the tolerance.
        allowed_rms: most that RMS and median of the errors may be.
        argmax_agreement: share of positions with the same best token; None for other outputs than logits.
        max_abs_same_rows, required_atol_same_rows: the error, and the tolerance that would have passed, once both sides
            use the runtime's rows; None where that was not needed.
        note: why, in a sentence.
    """

    runtime: str
    case: str
    output: str
    status: Status
    max_abs: float | None
    max_rel: float | None
    median_abs: float | None
    rms: float | None
    required_atol: float | None
    atol: float
    rtol: float
    allowed_rms: float
    argmax_agreement: float | None = None
    max_abs_same_rows: float | None = None
    required_atol_same_rows: float | None = None
    note: str | None = None
    swaps: list[dict[str, object]] = field(default_factory=list)
