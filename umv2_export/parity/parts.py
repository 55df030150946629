"""Each part of a model by itself: what it puts out for the input that it really got, beside the reference's.

An error of one part is lost in the logits of a deep model, among the rounding of all others. So the reference computes
every part from the runtime's own inner values: what then differs is the error of this part alone, a few roundings.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import torch

from umv2_export.dtypes import torch_dtype
from umv2_export.interface import LOGITS, Inner, named_cache
from umv2_export.parity.cases import Case
from umv2_export.parity.compare import SMALLEST_STEP, UNIT_ROUNDOFF, Tolerance, root_mean_square
from umv2_export.parity.routing import retrieval_problems
from umv2_export.runtimes import StepOutput
from umv2_export.runtimes.base import Array
from umv2_export.runtimes.torch import TorchRuntime

if TYPE_CHECKING:
    from umv2_export.model.transformer import Block

__all__ = ["PartCheck", "compare_parts", "routing_of", "worst_parts"]

# Error of one part, relative to the RMS of what it puts out, in units of roundoff.
#
# 16 bits: two to six roundings of 0.4 units each, in sequence or side by side: 1 to 1.5. Measured over five golden and
# three trained models in stock ONNX Runtime, one of them in the native ops too: RMS 1.6, median 1.6, maximum 12; random
# models of 12 layers whose memory outweighs their stream: RMS 2.7;
# an FFN or a projection that is 1 % off is off by 20.5 in fp16 (in bf16 by 2.6: it does not show).
# fp32: sums of some hundred products in another order; measured: RMS 9.4, median 14, maximum 45. 1 % is 168 000.
ALLOWED_UNITS = {"fp32": 512.0, "fp16": 4.0, "bf16": 4.0}

# A sharp softmax or a sum that cancels turns rounding inside a part into more. In 16 bits it is measured: the reference
# computes the part once more with matrix products rounded to the dtype, and from norms that are nudged. Measured of the
# products: the runtime's error is at most 2.9 times as large where that is below ALLOWED_UNITS, 1.5 times elsewhere.
ROUNDED_FACTOR = 3.0

# One nudge may come to nothing by chance, where all values of a part move together.
NUDGES = 4

# The largest of some ten thousand errors, which also grows with the value that is rounded.
MAX_FACTOR = 10.0

# Errors are compared with the median of what is put out too, so that a few huge channels hide nothing; but a part that
# puts out hardly anything else is judged by those.
LEAST_MEDIAN = 0.05

# What the reference needs to see of a runtime: a part begins at one of these.
_INPUTS = (Inner.HIDDEN, Inner.NORMED, Inner.ROUTER_LOGITS, Inner.ADDRESSES)

# Between two logits that are equal: above the steps of a softmax in fp32, below those of logits in fp16.
_TIE_STEP = 1e-6


@dataclass(frozen=True)
class PartCheck:
    """One part, in the call in which it was worst.

    Attributes:
        runtime, part, case: what was compared; names as in `umv2_export.interface.probe_names`.
        status: pass or fail.
        rms, median, maximum: of the errors, relative to the RMS (median: to the median) of the part's output; None
            where a value is not finite, or nothing is measured.
        allowed: most that the RMS may be, and the median of a part that does not amplify rounding; the maximum may be
            10 times that of an output and of the RMS together.
        excess: the worst of the three in units of what is allowed.
        note: why it failed.
    """

    runtime: str
    part: str
    case: str
    status: Literal["pass", "fail"]
    rms: float | None
    median: float | None
    maximum: float | None
    allowed: float | None
    excess: float
    note: str | None = None

    def as_dict(self) -> dict[str, object]:
        """For JSON, which has no infinity."""
        facts = asdict(self)
        del facts["excess"]
        return facts


def compare_parts(
    reference: TorchRuntime, runtime: str, case: Case, expected: StepOutput, actual: StepOutput, tolerance: Tolerance
) -> tuple[list[PartCheck], list[str]]:
    """Compare all parts of one call.

    Args:
        reference: computes the parts.
        runtime: name.
        case: the call.
        expected: the reference's own output with probes, for the shapes that values must have.
        actual: the runtime's, with probes.
        tolerance: its dtype is that of the runtime; where the user chose an absolute tolerance, outputs of the graph
            are judged by that alone.

    Returns:
        checks, and names of inner values that the runtime does not show; without the inputs of parts, no checks.
    """
    hidden = [name for name in expected.probes if name not in actual.probes]
    if any(Inner.of(name) in _INPUTS for name in hidden):
        return [], hidden
    problems = unusable(reference, expected.probes, actual.probes)
    if problems:
        return [_failed(runtime, part, case, note) for part, note in problems.items()], hidden
    theirs = _values(case, actual)
    dtype = tolerance.dtype

    def computed(*, unrounded: bool, seed: int | None = None) -> dict[str, Array]:
        addresses, given = routing_of(reference, actual.probes, unrounded=unrounded)
        given |= {name: value for name, value in actual.probes.items() if name not in given and not _is_routing(name)}
        if seed is not None:
            given |= _nudged(given, reference.model.config.num_layers, dtype, seed)
        found = _values(case, reference.run_forced(case.step, addresses, given))
        return found if tolerance.atol is None else {name: found[name] for name in found if name in expected.probes}

    ours = computed(unrounded=True)
    checks = {
        name: _compare(runtime, name, case, theirs[name], value, None, dtype)
        for name, value in ours.items()
        if name in theirs
    }
    failed = [name for name, check in checks.items() if check.status == "fail"]
    if failed and reference.model.config.experts is not None:
        other = computed(unrounded=False)
        for name in failed:
            check = _compare(runtime, name, case, theirs[name], other[name], None, dtype)
            checks[name] = min(checks[name], check, key=lambda one: one.excess)
        failed = [name for name in failed if checks[name].status == "fail"]
    if failed and dtype != "fp32":
        # Only then: it takes another forward, whose products of 16 bits are slow on a CPU.
        with torch.autocast(reference.device.type, dtype=torch_dtype(dtype)):
            several = [computed(unrounded=True)]
        several += [computed(unrounded=True, seed=seed) for seed in range(NUDGES)]
        for name in failed:
            moved, *nudged = (np.square(values[name] - ours[name].astype(np.float64)) for values in several)
            moved = np.sqrt(moved + np.mean(nudged, 0))
            checks[name] = _compare(runtime, name, case, theirs[name], ours[name], moved, dtype)
    wrong = retrieval_problems(reference.model, actual.probes, case.real_tokens.ravel())
    for j in range(reference.model.config.memory.layers):
        name = Inner.ADDRESSES.at(j)
        checks[name] = (
            _failed(runtime, name, case, wrong[j])
            if j in wrong
            else PartCheck(runtime, name, case.name, "pass", None, None, None, None, 0.0)
        )
    return list(checks.values()), hidden


def worst_parts(checks: list[PartCheck]) -> list[PartCheck]:
    """Of each runtime and part, the call in which it was worst."""
    found: dict[tuple[str, str], PartCheck] = {}
    for check in checks:
        key = (check.runtime, check.part)
        if key not in found or check.excess > found[key].excess:
            found[key] = check
    return list(found.values())


def unusable(reference: TorchRuntime, expected: Mapping[str, Array], actual: Mapping[str, Array]) -> dict[str, str]:
    """Inner values that the reference cannot go on from: another shape, NaN, or addresses that do not exist."""
    memory = reference.model.config.memory
    problems = {}
    for name, value in actual.items():
        if name in expected and value.shape != expected[name].shape:
            problems[name] = f"has shape {list(value.shape)}, the model's is {list(expected[name].shape)}"
        elif not np.isfinite(value).all():
            problems[name] = "NaN or infinity"
        elif Inner.of(name) is Inner.ADDRESSES and not _exist(value, memory.stored_side**2):
            problems[name] = f"addresses from {value.min()} to {value.max()}, the layer has {memory.stored_side**2}"
    return problems


def _exist(addresses: Array, count: int) -> bool:
    return not addresses.size or 0 <= addresses.min() <= addresses.max() < count


def routing_of(
    reference: TorchRuntime, probes: Mapping[str, Array], *, unrounded: bool
) -> tuple[list[Array], dict[str, Array]]:
    """The runtime's choice of rows and of experts, for `TorchRuntime.run_forced`.

    Router logits that are equal, as in 16 bits some are, do not tell which expert was chosen. The standard op TopK
    takes the lower index. But ONNX Runtime on a CPU drops the pair of casts between router and experts, and takes the
    larger one of the logits before they were rounded.

    Args:
        reference: computes these.
        probes: of the runtime.
        unrounded: part equal logits by what they were before rounding, not by their index.
    """
    addresses = [probes[Inner.ADDRESSES.at(j)].astype(np.int64) for j in range(reference.model.config.memory.layers)]
    routers = {}
    for i, block in enumerate(cast("Iterable[Block]", reference.model.transformer.blocks)):
        if block.router is not None:
            logits_TE = probes[Inner.ROUTER_LOGITS.at(i)].astype(np.float32)
            order_TE = np.broadcast_to(-np.arange(logits_TE.shape[1]), logits_TE.shape)
            if unrounded:
                normed_TD = probes[Inner.NORMED.at(i)].reshape(len(logits_TE), -1).astype(np.float32)
                order_TE = normed_TD @ block.router.weight.cpu().numpy().T
            routers[Inner.ROUTER_LOGITS.at(i)] = _without_ties(logits_TE, order_TE)
    return addresses, routers


def _without_ties(logits_TE: Array, order_TE: Array) -> Array:
    larger_TEE = order_TE[:, None, :] > order_TE[:, :, None]
    rank_TE = ((logits_TE[:, :, None] == logits_TE[:, None, :]) & larger_TEE).sum(-1)
    return np.asarray(logits_TE - np.float32(_TIE_STEP) * rank_TE, dtype=np.float32)


def _nudged(given: Mapping[str, Array], layers: int, dtype: str, seed: int) -> dict[str, Array]:
    """What norms put out, each value up or down by a unit: a runtime may go on from more digits than it shows.

    ONNX Runtime on a CPU drops the pair of casts between a norm and a product. Where rows of the head are much alike,
    as of tokens that training hardly saw, that moves all logits of a token together: in the trained sample by 2.6 units
    of their RMS, which is 9 of their median.
    """
    rng = np.random.default_rng(seed)
    steps = UNIT_ROUNDOFF[dtype] * np.array([-1.0, 1.0], dtype=np.float32)
    return {
        name: value * (1 + rng.choice(steps, value.shape))
        for name, value in given.items()
        if Inner.of(name) is Inner.NORMED or name == Inner.HIDDEN.at(layers)
    }


def _is_routing(name: str) -> bool:
    return Inner.of(name) in (Inner.ADDRESSES, Inner.ROW_SCORES, Inner.COL_SCORES)


def _values(case: Case, output: StepOutput) -> dict[str, Array]:
    """Every part's output by name, padding left out."""
    real, attended = case.real_tokens.ravel(), case.step.attention_mask > 0
    values = {name: value.reshape(len(real), -1)[real] for name, value in output.probes.items()}
    values = {name: value for name, value in values.items() if Inner.of(name) is not Inner.ADDRESSES}
    values |= {name: value.transpose(0, 2, 1, 3)[attended] for name, value in named_cache(output.present).items()}
    return values | {LOGITS: output.logits.reshape(len(real), -1)[real]}


def _compare(
    runtime: str, name: str, case: Case, value: Array, reference: Array, moved: Array | None, dtype: str
) -> PartCheck:
    if value.shape != reference.shape or not (np.isfinite(value).all() and np.isfinite(reference).all()):
        return _failed(runtime, name, case, "NaN, infinity or another shape")
    error, size = np.abs(value - reference), np.abs(reference)
    scale, middle = root_mean_square(reference), float(np.median(size))
    middle = max(middle, LEAST_MEDIAN * scale)
    allowed = allowed_median = ALLOWED_UNITS[dtype] * UNIT_ROUNDOFF[dtype]
    step = SMALLEST_STEP[dtype]
    if moved is not None and np.isfinite(moved).all() and scale > 0:
        allowed = max(allowed, ROUNDED_FACTOR * root_mean_square(moved) / scale)
        allowed_median = max(allowed, ROUNDED_FACTOR * float(np.median(moved)) / middle)
    rms, median, maximum = root_mean_square(error), float(np.median(error)), float(error.max())
    excess = max(
        rms / (allowed * scale + step),
        median / (allowed_median * middle + step),
        float((error / (MAX_FACTOR * (allowed * (scale + size) + step))).max()),
    )
    pairs = ((rms, scale), (median, middle), (maximum, scale))
    of_rms, of_median, of_max = (0.0 if unit == 0 else found / unit for found, unit in pairs)
    note = None
    if not excess <= 1:
        note = f"off by {of_rms:.2g} of its own size (RMS), rounding of this part explains {allowed:.2g}"
        if rms <= allowed * scale + step:
            note = f"its largest error is {of_max:.2g} of its own RMS, the median {of_median:.2g} of its median"
    status: Literal["pass", "fail"] = "pass" if note is None else "fail"
    return PartCheck(runtime, name, case.name, status, of_rms, of_median, of_max, allowed, excess, note)


def _failed(runtime: str, part: str, case: Case, note: str) -> PartCheck:
    return PartCheck(runtime, part, case.name, "fail", None, None, None, None, float("inf"), note)
