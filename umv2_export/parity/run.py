"""The parity check: every case, every output, every part, and a verdict."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from umv2_export.bundle import Bundle
from umv2_export.checkpoint import Checkpoint
from umv2_export.config import ModelConfig
from umv2_export.errors import InvalidRequest
from umv2_export.interface import Inner
from umv2_export.names import BUILD_RUNTIMES
from umv2_export.parity.cases import Case, parity_cases
from umv2_export.parity.compare import Tolerance
from umv2_export.parity.coverage import Reached
from umv2_export.parity.near_ties import reconsider
from umv2_export.parity.outputs import check_outputs
from umv2_export.parity.parts import compare_parts, worst_parts
from umv2_export.parity.report import LayerDifference, ParityReport
from umv2_export.parity.stored import compare_stored
from umv2_export.progress import Tracker, silent
from umv2_export.runtimes import EngineChoice, Runtime, StepOutput, open_runtime
from umv2_export.runtimes.base import Array, ShowsParts
from umv2_export.runtimes.device import require_device
from umv2_export.runtimes.torch import TorchRuntime, require_same_model

__all__ = ["check_bundle", "check_parity"]


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
        checks = list(check_outputs(runtime.name, case, expected, plain, tolerance, config))
        if any(check.status == "fail" for check in checks):
            forced = reconsider(checks, plain, reference, runtime, case, tolerance, expected)
            # With swapped rows the streams part where the rows do, which is not an error of a layer.
            if forced is not None and any(check.status == "ambiguous" for check in checks):
                expected = forced
        report.checks += checks
        if layerwise:
            actual = runtime.run(case.step, probe=True)
            report.layers += _layers(runtime.name, case, expected, actual, tolerance, config)
    return report


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
