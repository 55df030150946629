"""A second look at outputs that differ: do they agree once the reference takes the rows and experts of the runtime?"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from umv2_export.config import ModelConfig
from umv2_export.interface import Inner
from umv2_export.parity.cases import Case
from umv2_export.parity.compare import Check, Difference, Tolerance, root_mean_square
from umv2_export.parity.outputs import outputs_of, worst_difference
from umv2_export.parity.parts import routing_of, unusable
from umv2_export.parity.routing import RowSwap, judge_routing
from umv2_export.runtimes import Runtime, StepOutput
from umv2_export.runtimes.base import Array
from umv2_export.runtimes.torch import TorchRuntime

__all__ = ["reconsider"]

# Swaps listed per output; all are counted.
LISTED_SWAPS = 20


def reconsider(
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
    ours, theirs = outputs_of(case, forced), outputs_of(case, plain)
    for check in checks:
        if check.status != "fail":
            continue
        same_rows, required = worst_difference(ours[check.output], theirs[check.output], tolerance)
        if not same_rows.within and problem is None and tolerance.atol is None:
            rounded = rounded or _rounded(reference, case, addresses, experts, tolerance)
            moved = outputs_of(case, rounded)[check.output]
            same_rows, required = worst_difference(ours[check.output], theirs[check.output], tolerance, moved)
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
