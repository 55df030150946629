"""Comparison of two outputs: how far apart they are, and what may be tolerated."""

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from umv2_export.runtimes.base import Array

__all__ = ["Check", "Difference", "Status", "Tolerance", "difference"]

Status = Literal["pass", "fail", "ambiguous"]

# Half the distance of 1.0 to the next number.
UNIT_ROUNDOFF = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}

# The residual stream of one layer passes about six roundings: two norms, attention, FFN, memory, their sum.
ROUNDINGS_PER_LAYER = 6

# A random walk of that many roundings, times 8: the largest of the 13 000 logits of a test lies at 4 standard
# deviations. Measured on three golden models in fp16, 6 seeds: at most 0.033, where this gives 0.066.
SIGMAS = 8


@dataclass(frozen=True)
class Tolerance:
    """How far an output may be from the reference.

    Attributes:
        atol, rtol: |a - b| <= atol + rtol * |b|; None derives the tolerance from the dtype.
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
        return SIGMAS * UNIT_ROUNDOFF[self.dtype] * math.sqrt(ROUNDINGS_PER_LAYER * self.layers)

    def bounds(self, reference: Array) -> tuple[float, float]:
        """(atol, rtol) for an output whose reference is given.

        In fp32 the default is 2e-4 absolute and 1e-5 relative. In 16 bits it grows with depth and with the size of the
        output: a fixed number would be loose for one model and wrong for another.
        """
        if self.dtype == "fp32":
            atol, rtol = 2e-4, 1e-5
        else:
            atol, rtol = self.relative_rounding * root_mean_square(reference), 0.0
        return (atol if self.atol is None else self.atol), (rtol if self.rtol is None else self.rtol)


def root_mean_square(array: Array) -> float:
    """Root mean square of all elements, 0 for none."""
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64)))) if array.size else 0.0


@dataclass(frozen=True)
class Difference:
    """How far a value is from its reference.

    Attributes:
        max_abs, max_rel, median_abs: of |a - b|; None where a value is NaN or infinite.
        required_atol: the absolute tolerance that would have passed beside the relative one.
        within: whether the tolerance holds.
    """

    max_abs: float | None
    max_rel: float | None
    median_abs: float | None
    required_atol: float | None
    within: bool


def difference(value: Array, reference: Array, bounds: tuple[float, float]) -> Difference:
    """Compare two arrays of one shape; NaN or infinity on either side is never within a tolerance."""
    if value.shape != reference.shape:
        return Difference(None, None, None, None, within=False)
    if not (np.isfinite(value).all() and np.isfinite(reference).all()):
        return Difference(None, None, None, None, within=False)
    if not value.size:
        return Difference(0.0, 0.0, 0.0, 0.0, within=True)
    atol, rtol = bounds
    error = np.abs(value.astype(np.float64) - reference)
    size = np.abs(reference.astype(np.float64))
    # Not rtol * size alone: an unlimited rtol times 0 is NaN.
    required = max(0.0, float((error - np.where(size > 0, rtol * size, 0.0)).max()))
    relative = error / np.maximum(size, np.finfo(np.float32).tiny)
    return Difference(float(error.max()), float(relative.max()), float(np.median(error)), required, required <= atol)


@dataclass
class Check:
    """One line of a parity report.

    Attributes:
        runtime, case, output: what was compared.
        status: `ambiguous` passes: rows were swapped at near ties, and with the same rows the output agrees.
        max_abs, max_rel, median_abs, required_atol: see `Difference`.
        atol, rtol: the tolerance.
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
    required_atol: float | None
    atol: float
    rtol: float
    argmax_agreement: float | None = None
    max_abs_same_rows: float | None = None
    required_atol_same_rows: float | None = None
    note: str | None = None
    swaps: list[dict[str, object]] = field(default_factory=list)
