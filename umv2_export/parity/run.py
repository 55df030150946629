"""The parity check: every case, every output, and a verdict."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from umv2_export.bundle import Bundle
from umv2_export.checkpoint import Checkpoint
from umv2_export.config import ModelConfig
from umv2_export.errors import InvalidRequest
from umv2_export.names import BUILD_RUNTIMES
from umv2_export.parity.cases import Case, parity_cases
from umv2_export.parity.compare import Check, Difference, Tolerance, difference
from umv2_export.parity.routing import RowSwap, judge_routing
from umv2_export.runtimes import EngineChoice, Runtime, StepOutput, open_runtime
from umv2_export.runtimes.base import Array
from umv2_export.runtimes.torch import TorchRuntime

__all__ = ["LayerDifference", "ParityReport", "check_bundle", "check_parity"]

# Swaps listed per output; all are counted.
LISTED_SWAPS = 20


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
    """All checks of all runtimes."""

    checks: list[Check] = field(default_factory=list)
    layers: list[LayerDifference] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Every check passed; near ties that were explained count as passed."""
        return bool(self.checks) and all(check.status != "fail" for check in self.checks)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        checks = [{name: _finite(value) for name, value in asdict(check).items()} for check in self.checks]
        result: dict[str, object] = {"passed": self.passed, "checks": checks}
        if self.layers:
            result["layerwise"] = [asdict(layer) for layer in self.layers]
        return result


def _finite(value: object) -> object:
    """JSON has no infinity: an unlimited tolerance is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_bundle(
    bundle: Bundle,
    checkpoint: Checkpoint | None,
    runtimes: Sequence[str],
    *,
    atol: float | None = None,
    rtol: float | None = None,
    seed: int = 0,
    text: Array | None = None,
    layerwise: bool = False,
    engine: EngineChoice | None = None,
) -> ParityReport:
    """Compare a bundle in each runtime with the literal reference of a checkpoint.

    Without a checkpoint the reference is the folded model rebuilt from the bundle's own weights: that checks the graph
    and the runtime, but not the folds.

    Args:
        bundle: what was exported.
        checkpoint: what it was exported from.
        runtimes: names.
        atol: replaces the absolute tolerance of the bundle's dtype.
        rtol: likewise.
        seed: of the test inputs.
        text: token ids [tokens] whose pieces are the test inputs; None: random tokens.
        layerwise: compare the residual stream too.
        engine: of the bundle, for a runtime that runs engines.

    Raises:
        InputRejected: the bundle was made from another model, or is refused by a runtime, or its engine is.
        InvalidRequest: the text is too short, torch would be compared with itself, or an engine layer by layer.
        EnvironmentUnfit: a runtime is not installed, or lacks a GPU.
    """
    # A second run would tell nothing, and plugins register once in a process.
    runtimes = list(dict.fromkeys(runtimes))
    engines = [name for name in runtimes if name in BUILD_RUNTIMES]
    if layerwise and engines:
        raise InvalidRequest(
            f"--layerwise looks into a graph, and {engines[0]} runs an engine",
            why="an engine puts out logits and cache only; what lies between was fused when it was built",
            fix="leave out --layerwise; --runtime onnxruntime compares the layers of the bundle itself",
        )
    if checkpoint is None:
        if "torch" in runtimes:
            raise InvalidRequest(
                "the runtime torch would be compared with itself", fix="pass --reference CHECKPOINT, or another runtime"
            )
        reference = TorchRuntime.from_bundle(bundle)
    else:
        reference = TorchRuntime.from_checkpoint(checkpoint, bundle)
    tolerance = Tolerance(atol, rtol, bundle.manifest.dtype, bundle.config.num_layers)
    report = ParityReport()
    for name in runtimes:
        runtime = open_runtime(name, bundle, engine=engine)
        cases = parity_cases(bundle.config, reference, seed=seed, text=text)
        found = check_parity(reference, runtime, cases, tolerance, layerwise=layerwise)
        report.checks += found.checks
        report.layers += found.layers
    return report


def check_parity(
    reference: TorchRuntime,
    runtime: Runtime,
    cases: Iterable[Case],
    tolerance: Tolerance,
    *,
    layerwise: bool = False,
) -> ParityReport:
    """Run both sides on every case and compare logits and caches.

    Where an output differs, the reference runs once more with the rows that the runtime retrieved. If the outputs then
    agree, and every swap is one that rounding explains, the check is `ambiguous`; otherwise it fails.
    """
    report = ParityReport()
    config = reference.model.config
    for case in cases:
        expected = reference.run(case.step, probe=layerwise)
        actual = runtime.run(case.step, probe=layerwise)
        checks = list(_checks(runtime.name, case, expected, actual, tolerance, config))
        if any(check.status == "fail" for check in checks):
            forced = _reconsider(checks, actual, reference, runtime, case, tolerance)
            # With swapped rows the streams part where the rows do, which is no error of a layer.
            if forced is not None and any(check.status == "ambiguous" for check in checks):
                expected = forced
        report.checks += checks
        if layerwise:
            report.layers += _layers(runtime.name, case, expected, actual, tolerance, config)
    return report


def _outputs(case: Case, output: StepOutput) -> dict[str, Array]:
    """What is compared, padding left out: logits [tokens, columns], and all keys and values of the cache."""
    attended = case.step.attention_mask > 0
    cache = [tensor.transpose(0, 2, 1, 3)[attended].ravel() for pair in output.present for tensor in pair]
    return {"logits": output.logits[case.real_tokens], "present": np.concatenate(cache)}


def _checks(
    name: str, case: Case, expected: StepOutput, actual: StepOutput, tolerance: Tolerance, config: ModelConfig
) -> Iterator[Check]:
    ours, theirs = _outputs(case, expected), _outputs(case, actual)
    for output, reference in ours.items():
        bounds = tolerance.bounds(reference)
        found = difference(theirs[output], reference, bounds)
        agreement = None
        if output == "logits" and theirs[output].shape == reference.shape:
            best = [array[:, : config.vocab_size].argmax(-1) for array in (theirs[output], reference)]
            agreement = float(np.mean(best[0] == best[1]))
        yield Check(
            runtime=name,
            case=case.name,
            output=output,
            status="pass" if found.within else "fail",
            max_abs=found.max_abs,
            max_rel=found.max_rel,
            median_abs=found.median_abs,
            required_atol=found.required_atol,
            atol=bounds[0],
            rtol=bounds[1],
            argmax_agreement=agreement,
            note=_failure_note(found),
        )


def _failure_note(found: Difference) -> str | None:
    if found.within:
        return None
    return "NaN, infinity or another shape" if found.max_abs is None else "outside the tolerance"


def _reconsider(
    checks: list[Check],
    plain: StepOutput,
    reference: TorchRuntime,
    runtime: Runtime,
    case: Case,
    tolerance: Tolerance,
) -> StepOutput | None:
    """Tell swaps at near ties from errors, and mark what they explain; returns the reference on the runtime's rows."""
    if any(check.max_abs is None for check in checks):
        return None
    actual = runtime.run(case.step, probe=True)
    layers = range(reference.model.config.memory.layers)
    if not all(f"addresses.{j}" in actual.probes for j in layers):
        for check in checks:
            if check.status == "fail":
                check.note = (
                    f"{check.note}; {runtime.name} does not show the rows that it retrieved, so this may be an error, "
                    "or rows that were swapped at near ties"
                )
        return None
    forced = reference.run_forced(case.step, [actual.probes[f"addresses.{j}"] for j in layers])
    real = case.real_tokens.ravel()
    swaps, problem = judge_routing(reference.model, forced.probes, actual.probes, tolerance, real)
    # The outputs of the run without probes: they are what users get, and probes may keep a runtime from fusing nodes.
    ours, theirs = _outputs(case, forced), _outputs(case, plain)
    for check in checks:
        if check.status == "pass":
            continue
        same_rows = difference(theirs[check.output], ours[check.output], tolerance.bounds(ours[check.output]))
        check.max_abs_same_rows, check.required_atol_same_rows = same_rows.max_abs, same_rows.required_atol
        check.swaps = [swap.as_dict() for swap in swaps[:LISTED_SWAPS]]
        check.note = _verdict(same_rows, swaps, problem)
        if same_rows.within and swaps and problem is None:
            check.status = "ambiguous"
    return forced


def _verdict(same_rows: Difference, swaps: list[RowSwap], problem: str | None) -> str:
    if problem is not None:
        return problem
    if not swaps:
        return "outside the tolerance, with the same rows on both sides"
    closest = max(swaps, key=lambda swap: swap.gap)
    text = (
        f"{len(swaps)} lookups swapped rows at near ties (largest gap {closest.gap:.2g} at a score of "
        f"{closest.threshold:.3g}, memory layer {closest.layer})"
    )
    if not same_rows.within:
        return text + ", but with the same rows the output still differs"
    return text + f"; with the same rows it differs by {same_rows.max_abs:.2g}"


def _layers(
    name: str, case: Case, expected: StepOutput, actual: StepOutput, tolerance: Tolerance, config: ModelConfig
) -> Iterator[LayerDifference]:
    for layer in range(config.num_layers + 1):
        key = f"hidden.{layer}"
        if key not in actual.probes:
            return
        reference = expected.probes[key][case.real_tokens]
        found = difference(actual.probes[key][case.real_tokens], reference, tolerance.bounds(reference))
        yield LayerDifference(name, case.name, layer, found.max_abs, not found.within)
