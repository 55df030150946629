"""The parity check: every case, every output, every part, and a verdict."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from umv2_export.bundle import Bundle
from umv2_export.checkpoint import Checkpoint
from umv2_export.config import ModelConfig
from umv2_export.errors import InvalidRequest
from umv2_export.interface import LOGITS, Inner, named_cache
from umv2_export.names import BUILD_RUNTIMES
from umv2_export.parity.cases import Case, parity_cases
from umv2_export.parity.compare import Check, Difference, Tolerance, root_mean_square, worst
from umv2_export.parity.coverage import Reached
from umv2_export.parity.parts import compare_parts, routing_of, unusable, worst_parts
from umv2_export.parity.report import LayerDifference, ParityReport
from umv2_export.parity.routing import RowSwap, judge_routing
from umv2_export.parity.stored import compare_stored
from umv2_export.progress import Tracker, silent
from umv2_export.runtimes import EngineChoice, Runtime, StepOutput, open_runtime
from umv2_export.runtimes.base import Array, ShowsParts
from umv2_export.runtimes.device import require_device
from umv2_export.runtimes.torch import TorchRuntime, require_same_model

__all__ = ["check_bundle", "check_parity"]

# Swaps listed per output; all are counted.
LISTED_SWAPS = 20


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
    sample: float = 1.0,
    track: Tracker = silent,
    device: str = "cpu",
) -> ParityReport:
    """Compare a bundle in each runtime with the literal reference of a checkpoint, and its tensors with the folded.

    Without a checkpoint the reference is the folded model rebuilt from the bundle's own weights: that checks the graph
    and the runtime, but not the folds, and no stored value.

    Args:
        bundle: what was exported.
        checkpoint: what it was exported from.
        runtimes: names; none: only what is stored is compared.
        atol: replaces the absolute tolerance of the bundle's dtype.
        rtol: likewise.
        seed: of the test inputs.
        text: token ids [tokens] whose pieces are the test inputs; None: random tokens.
        layerwise: compare the residual stream too.
        engine: of the bundle, for a runtime that runs engines.
        sample: share of the rows of each table that are folded again and compared.
        track: progress of that comparison.
        device: where torch computes: cpu or cuda.

    Raises:
        InputRejected: the bundle was made from another model, or is refused by a runtime, or its engine is.
        InvalidRequest: the text is too short, torch would be compared with itself, or an engine layer by layer.
        EnvironmentUnfit: a runtime is not installed, or lacks a GPU.
    """
    require_device(device, bundle.config)
    # A second run would tell nothing, and plugins register once in a process.
    runtimes = list(dict.fromkeys(runtimes))
    engines = [name for name in runtimes if name in BUILD_RUNTIMES]
    if layerwise and engines:
        raise InvalidRequest(
            f"--layerwise looks into a graph, and {engines[0]} runs an engine",
            why="an engine puts out logits and cache only; what lies between was fused when it was built",
            fix="leave out --layerwise; --runtime onnxruntime compares the layers of the bundle itself",
        )
    report = ParityReport()
    if checkpoint is not None:
        checkpoint = checkpoint.with_query_layout(bundle.config.memory.query_layout)
        require_same_model(bundle, checkpoint)
        report.stored = compare_stored(bundle, checkpoint, sample=sample, seed=seed, track=track)
    if not runtimes:
        return report
    if checkpoint is None:
        if "torch" in runtimes:
            raise InvalidRequest(
                "the runtime torch would be compared with itself", fix="pass --reference CHECKPOINT, or another runtime"
            )
        reference = TorchRuntime.from_bundle(bundle, device)
    else:
        reference = TorchRuntime.from_checkpoint(checkpoint, bundle, device)
    tolerance = Tolerance(atol, rtol, bundle.manifest.dtype, bundle.config.num_layers)
    reached = Reached(bundle)
    for name in runtimes:
        runtime = open_runtime(name, bundle, engine=engine, device=device)
        # The shapes of an engine's profile may end below those of the wide call.
        wide = name not in BUILD_RUNTIMES
        cases = parity_cases(bundle.config, reference, seed=seed, text=text, wide=wide)
        report.add(check_parity(reference, runtime, cases, tolerance, layerwise=layerwise, reached=reached))
    report.coverage = reached.coverage()
    return report


def check_parity(
    reference: TorchRuntime,
    runtime: Runtime,
    cases: Iterable[Case],
    tolerance: Tolerance,
    *,
    layerwise: bool = False,
    reached: Reached | None = None,
) -> ParityReport:
    """Run both sides on every case and compare logits and caches, then every part by itself.

    Where an output differs, the reference runs once more with the rows that the runtime retrieved. If the outputs then
    agree, and every swap is one that rounding explains, the check is `ambiguous`; otherwise it fails. The outputs are
    those of a run without probes: they are what users get, and probes may keep a runtime from fusing nodes. Parts are
    compared in a run with probes.

    Args:
        reference: computes what is right.
        runtime: is checked.
        cases: the calls.
        tolerance: of the outputs; parts have their own.
        layerwise: compare the residual stream too.
        reached: notes what the calls reach.
    """
    report = ParityReport()
    config = reference.model.config
    for case in cases:
        expected = reference.run(case.step, probe=True)
        plain = runtime.run(case.step)
        probed = runtime.run_parts(case.step) if isinstance(runtime, ShowsParts) else replace(plain, probes={})
        if reached is not None:
            reached.add(case, expected.probes)
        parts, hidden = compare_parts(reference, runtime.name, case, expected, probed, tolerance)
        report.parts = worst_parts([*report.parts, *parts])
        if hidden:
            report.not_shown[runtime.name] = hidden
        checks = list(_checks(runtime.name, case, expected, plain, tolerance, config))
        if any(check.status == "fail" for check in checks):
            forced = _reconsider(checks, plain, reference, runtime, case, tolerance, expected)
            # With swapped rows the streams part where the rows do, which is no error of a layer.
            if forced is not None and any(check.status == "ambiguous" for check in checks):
                expected = forced
        report.checks += checks
        if layerwise:
            actual = runtime.run(case.step, probe=True)
            report.layers += _layers(runtime.name, case, expected, actual, tolerance, config)
    return report


def _outputs(case: Case, output: StepOutput) -> dict[str, dict[str, Array]]:
    """What is compared, padding left out: logits [tokens, columns], and each tensor of the cache.

    Tensor by tensor, because each is judged by its own size: keys are normalised, values are not.
    """
    attended = case.step.attention_mask > 0
    cache = {name: tensor.transpose(0, 2, 1, 3)[attended] for name, tensor in named_cache(output.present).items()}
    return {LOGITS: {LOGITS: output.logits[case.real_tokens]}, "present": cache}


def _differences(
    ours: Mapping[str, Array],
    theirs: Mapping[str, Array],
    tolerance: Tolerance,
    rounded: Mapping[str, Array] | None = None,
) -> tuple[Difference, float | None]:
    """The tensor that exceeds its tolerance most, and the absolute tolerance that would have passed all.

    Args:
        ours: the reference's tensors by name.
        theirs: the runtime's.
        tolerance: of both.
        rounded: the reference's with rounding, which shows how much a model amplifies it.
    """
    return worst(
        tolerance.difference(theirs[name], reference, None if rounded is None else rounded[name])
        for name, reference in ours.items()
    )


def _checks(
    name: str, case: Case, expected: StepOutput, actual: StepOutput, tolerance: Tolerance, config: ModelConfig
) -> Iterator[Check]:
    ours, theirs = _outputs(case, expected), _outputs(case, actual)
    for output, references in ours.items():
        found, required = _differences(references, theirs[output], tolerance)
        agreement = None
        if output == LOGITS and theirs[output][output].shape == references[output].shape:
            sides = (theirs[output][output], references[output])
            best = [array[:, : config.vocab_size].argmax(-1) for array in sides]
            agreement = float(np.mean(best[0] == best[1]))
        yield Check(
            runtime=name,
            case=case.name,
            output=output,
            status="pass" if found.within else "fail",
            max_abs=found.max_abs,
            max_rel=found.max_rel,
            median_abs=found.median_abs,
            rms=found.rms,
            required_atol=required,
            atol=found.atol,
            rtol=found.rtol,
            allowed_rms=found.broad,
            argmax_agreement=agreement,
            note=found.problem,
        )


def _reconsider(
    checks: list[Check],
    plain: StepOutput,
    reference: TorchRuntime,
    runtime: Runtime,
    case: Case,
    tolerance: Tolerance,
    expected: StepOutput,
) -> StepOutput | None:
    """Tell swaps at near ties from errors, and mark what they explain; returns the reference on the runtime's routing.

    Args:
        checks: of the case; changed.
        plain: the runtime's output without probes.
        reference: computes again, with the runtime's rows.
        runtime: shows its rows.
        case: the call.
        tolerance: of the outputs.
        expected: the reference's own output, with probes.
    """
    if any(check.max_abs is None for check in checks):
        return None
    # Without the outputs of parts: the rows must be those of the plain run, so nothing may be fused otherwise.
    actual = runtime.run(case.step, probe=True)
    routers = [name for name in expected.probes if Inner.of(name) is Inner.ROUTER_LOGITS]
    addresses = [name for name in expected.probes if Inner.of(name) is Inner.ADDRESSES]
    if not all(name in actual.probes for name in (*addresses, *routers)):
        for check in checks:
            if check.status == "fail":
                check.note = (
                    f"{check.note}; {check.runtime} does not show the rows that it retrieved, so this may be an error, "
                    "or rows that were swapped at near ties"
                )
        return None
    if unusable(reference, expected.probes, actual.probes):
        return None
    forced = expected
    for unrounded in (True, False) if routers else (True,):
        forced = _on_the_same_routing(checks, plain, actual, reference, case, tolerance, expected, unrounded=unrounded)
        if all(check.status != "fail" for check in checks):
            break
    return forced


def _on_the_same_routing(
    checks: list[Check],
    plain: StepOutput,
    actual: StepOutput,
    reference: TorchRuntime,
    case: Case,
    tolerance: Tolerance,
    expected: StepOutput,
    *,
    unrounded: bool,
) -> StepOutput:
    """Judge the checks that fail with the reference on the runtime's routing, which is returned; see `routing_of`."""
    addresses, experts = routing_of(reference, actual.probes, unrounded=unrounded)
    forced = reference.run_forced(case.step, addresses, experts)
    real = case.real_tokens.ravel()
    swaps, problem = judge_routing(reference.model, forced.probes, actual.probes, tolerance, real)
    problem = problem or _router_problem(list(experts), forced, actual, tolerance, real)
    rounded: StepOutput | None = None
    if problem is not None and tolerance.atol is None:
        rounded = _rounded(reference, case, addresses, experts, tolerance)
        swaps, problem = judge_routing(reference.model, forced.probes, actual.probes, tolerance, real, rounded.probes)
        problem = problem or _router_problem(list(experts), forced, actual, tolerance, real, rounded)
    changed = _swapped_experts(experts, expected, real, reference.model.config)
    ours, theirs = _outputs(case, forced), _outputs(case, plain)
    for check in checks:
        if check.status != "fail":
            continue
        same_rows, required = _differences(ours[check.output], theirs[check.output], tolerance)
        if not same_rows.within and problem is None and tolerance.atol is None:
            rounded = rounded or _rounded(reference, case, addresses, experts, tolerance)
            moved = _outputs(case, rounded)[check.output]
            same_rows, required = _differences(ours[check.output], theirs[check.output], tolerance, moved)
            check.atol, check.allowed_rms = same_rows.atol, same_rows.broad
        check.max_abs_same_rows, check.required_atol_same_rows = same_rows.max_abs, required
        check.swaps = [swap.as_dict() for swap in swaps[:LISTED_SWAPS]]
        check.note = _verdict(same_rows, swaps, changed, problem)
        if same_rows.within and problem is None:
            # Without a swap it was the size of the error alone, and this model amplifies rounding by as much.
            check.status = "ambiguous" if swaps or changed else "pass"
    return forced


def _rounded(
    reference: TorchRuntime, case: Case, addresses: list[Array], experts: Mapping[str, Array], tolerance: Tolerance
) -> StepOutput:
    """The reference on the same routing, its matrix products rounded to 16 bits."""
    with torch.autocast(reference.device.type, dtype=torch.float16 if tolerance.dtype == "fp16" else torch.bfloat16):
        return reference.run_forced(case.step, addresses, experts)


def _router_problem(
    routers: Sequence[str],
    forced: StepOutput,
    actual: StepOutput,
    tolerance: Tolerance,
    real_tokens: Array,
    rounded: StepOutput | None = None,
) -> str | None:
    """Router logits that rounding does not explain."""
    for name in routers:
        ours, theirs = forced.probes[name][real_tokens], actual.probes[name][real_tokens]
        error, allowed = float(np.abs(theirs - ours).max()), tolerance.relative_rounding * root_mean_square(ours)
        if rounded is not None:
            moved = tolerance.moved(rounded.probes[name], forced.probes[name])[real_tokens]
            allowed = max(allowed, float(moved.max(initial=0.0)))
        if not error <= allowed:
            return f"{name}: logits differ by {error:.3g}, rounding explains {allowed:.3g}"
    return None


def _swapped_experts(chosen: Mapping[str, Array], expected: StepOutput, real_tokens: Array, config: ModelConfig) -> int:
    """Tokens and blocks in which the reference by itself chose other experts."""
    count = 0
    for name, logits in chosen.items():
        topk = 0 if config.experts is None else config.experts.topk
        sides = [np.argsort(-side[real_tokens], 1, "stable")[:, :topk] for side in (expected.probes[name], logits)]
        ours, theirs = (np.sort(side, 1) for side in sides)
        count += int((ours != theirs).any(1).sum())
    return count


def _verdict(same_rows: Difference, swaps: list[RowSwap], experts: int, problem: str | None) -> str:
    if problem is not None:
        return problem
    if not swaps and not experts and same_rows.within:
        return (
            f"the reference with rounded products is off as far: this model amplifies rounding to {same_rows.atol:.2g}"
        )
    if not swaps and not experts:
        return f"{same_rows.problem}, with the same rows on both sides"
    if swaps:
        closest = max(swaps, key=lambda swap: swap.gap)
        text = (
            f"{len(swaps)} lookups swapped rows at near ties (largest gap {closest.gap:.2g} at a score of "
            f"{closest.threshold:.3g}, memory layer {closest.layer})"
        )
    else:
        text = f"{experts} tokens swapped experts at near ties"
    if not same_rows.within:
        return text + ", but with the same rows the output still differs"
    return text + f"; with the same rows it differs by {same_rows.max_abs:.2g}"


def _layers(
    name: str, case: Case, expected: StepOutput, actual: StepOutput, tolerance: Tolerance, config: ModelConfig
) -> Iterator[LayerDifference]:
    for layer in range(config.num_layers + 1):
        key = Inner.HIDDEN.at(layer)
        if key not in actual.probes:
            return
        reference = expected.probes[key][case.real_tokens]
        found = tolerance.difference(actual.probes[key][case.real_tokens], reference)
        yield LayerDifference(name, case.name, layer, found.max_abs, not found.within)
