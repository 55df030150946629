"""What a parity run found, in one place for a person, for JSON and for the exit code."""

import math
from dataclasses import asdict, dataclass, field

from umv2_export.parity.compare import Check
from umv2_export.parity.coverage import Coverage
from umv2_export.parity.parts import PartCheck, worst_parts
from umv2_export.parity.stored import StoredCheck

__all__ = ["LayerDifference", "ParityReport"]


@dataclass(frozen=True)
class LayerDifference:
    """How far the residual stream of a runtime is from the reference's at the input of one block.

    Attributes:
        runtime, case: of the call.
        layer: block, or the number of blocks for the output of the final norm.
        max_abs: largest difference; None where a value is not finite.
        differs: beyond the tolerance.
    """

    runtime: str
    case: str
    layer: int
    max_abs: float | None
    differs: bool


@dataclass
class ParityReport:
    """All of a run.

    Attributes:
        checks: outputs of every call.
        parts: of every runtime and part, the call in which it was worst.
        not_shown: runtime -> inner values that it does not show; where it lacks the input of a part, none was compared.
        layers: the residual stream, where it was asked for.
        stored: the bundle's tensors beside the checkpoint's; None without a reference.
        coverage: what the inputs reached; None where nothing ran.
    """

    checks: list[Check] = field(default_factory=list)
    parts: list[PartCheck] = field(default_factory=list)
    not_shown: dict[str, list[str]] = field(default_factory=dict)
    layers: list[LayerDifference] = field(default_factory=list)
    stored: StoredCheck | None = None
    coverage: Coverage | None = None

    @property
    def passed(self) -> bool:
        """Outputs were compared, and every check passed; near ties that were explained count as passed."""
        failed = [*self.failed_parts, *(check for check in self.checks if check.status == "fail")]
        return bool(self.checks) and not failed and (self.stored is None or self.stored.passed)

    @property
    def failed_parts(self) -> list[PartCheck]:
        """Parts that are wrong by themselves."""
        return [part for part in self.parts if part.status == "fail"]

    def add(self, other: "ParityReport") -> None:
        """Take in what another runtime, or another call, gave."""
        self.checks += other.checks
        self.layers += other.layers
        self.parts = worst_parts([*self.parts, *other.parts])
        self.not_shown |= other.not_shown

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        checks = [{name: _finite(value) for name, value in asdict(check).items()} for check in self.checks]
        result: dict[str, object] = {
            "passed": self.passed,
            "checks": checks,
            "parts": [part.as_dict() for part in self.parts],
            "not_shown": self.not_shown,
            "stored": None if self.stored is None else self.stored.as_dict(),
            "coverage": None if self.coverage is None else self.coverage.as_dict(),
        }
        if self.layers:
            result["layerwise"] = [asdict(layer) for layer in self.layers]
        return result


def _finite(value: object) -> object:
    """JSON has no infinity: an unlimited tolerance is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
