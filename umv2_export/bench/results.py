"""What a benchmark of decode steps and prefill found, and how it is written as JSON."""

from dataclasses import asdict, dataclass, field

from umv2_export.bench.ceilings import Ceilings
from umv2_export.bench.timing import Timing
from umv2_export.bench.traffic import Traffic

__all__ = ["BenchResult", "Pair", "StepResult"]


@dataclass(frozen=True)
class StepResult:
    """One forward of one model.

    Attributes:
        model: name of the bundle's folder.
        runtime: that ran it.
        batch, sequence, past: shape of the forward.
        latency: of the whole forward.
        core_latency: of FFNs and memory layers, or experts, alone; None for prefill.
        traffic: bytes, from traced routing; of prefill expected ones.
        expected: bytes under uniform routing.
        unique_rows, unique_experts: distinct ones that were hit, over all layers.
        density: their share of all rows that layers see, or of all experts; 1 in a model that has neither.
    """

    model: str
    runtime: str
    batch: int
    sequence: int
    past: int
    latency: Timing
    core_latency: Timing | None
    traffic: Traffic
    expected: Traffic
    unique_rows: int
    unique_experts: int
    density: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens."""
        return self.batch * self.sequence / self.latency.p50 * 1e3

    @property
    def gigabytes_per_second(self) -> float:
        """Of all counted bytes."""
        return self.traffic.total / self.latency.p50 / 1e6

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "model": self.model,
            "runtime": self.runtime,
            "batch": self.batch,
            "sequence": self.sequence,
            "past": self.past,
            "latency_ms": asdict(self.latency),
            "core_latency_ms": None if self.core_latency is None else asdict(self.core_latency),
            "tokens_per_second": self.tokens_per_second,
            "bytes": self.traffic.as_dict(),
            "expected_bytes": self.expected.as_dict(),
            "unique_rows": self.unique_rows,
            "unique_experts": self.unique_experts,
            "density": self.density,
            "gigabytes_per_second": self.gigabytes_per_second,
        }


Pair = tuple[StepResult, StepResult | None]


@dataclass
class BenchResult:
    """All of a run.

    Attributes:
        ceilings: of the machine.
        decode: (model, fastest baseline or None) for each batch.
        prefill: likewise, once.
        warnings: what makes a comparison unfair.
    """

    ceilings: Ceilings | None = None
    decode: list[Pair] = field(default_factory=list)
    prefill: list[Pair] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """For JSON; the baseline of a batch is the fastest of all that were given, and says which."""
        fastest = [baseline for _, baseline in self.decode if baseline is not None]
        return {
            "ceilings": None if self.ceilings is None else asdict(self.ceilings),
            "warnings": self.warnings,
            "batches": [model.as_dict() for model, _ in self.decode],
            "baseline": {"batches": [baseline.as_dict() for baseline in fastest]} if fastest else None,
            "ratios": [_ratios(model, baseline) for model, baseline in self.decode if baseline is not None],
            "prefill": [
                {"model": model.as_dict(), "baseline": None if baseline is None else baseline.as_dict()}
                for model, baseline in self.prefill
            ],
        }


def _ratios(model: StepResult, baseline: StepResult) -> dict[str, object]:
    """Baseline over model: above 1 the model is faster, or moves fewer bytes."""
    cores = (model.core_latency, baseline.core_latency)
    return {
        "batch": model.batch,
        "baseline": baseline.model,
        "latency": baseline.latency.p50 / model.latency.p50,
        "core_latency": None if cores[0] is None or cores[1] is None else cores[1].p50 / cores[0].p50,
        "bytes": baseline.traffic.total / model.traffic.total,
        "core_bytes": baseline.traffic.core / model.traffic.core,
        "expected_core_bytes": baseline.expected.core / model.expected.core,
    }
