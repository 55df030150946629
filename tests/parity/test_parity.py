"""The parity check, tried on runtimes that are wrong in known ways: each wraps the golden reference."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch

from tests.command import run_command
from tests.models import GOLDEN
from umv2_export.checkpoint import open_checkpoint
from umv2_export.model import reference_model
from umv2_export.ops import tucker_topk
from umv2_export.parity import ParityReport, Tolerance, check_parity, parity_cases
from umv2_export.parity.compare import difference
from umv2_export.runtimes import StepInput, StepOutput
from umv2_export.runtimes.base import Array
from umv2_export.runtimes.torch import TorchRuntime

if TYPE_CHECKING:
    from umv2_export.model.memory import ReferenceMemoryLayer

Change = Callable[[StepInput, StepOutput], StepOutput]

REFERENCE = TorchRuntime(reference_model(open_checkpoint(GOLDEN["v2_per_rank"])))
CONFIG = REFERENCE.model.config
MEMORY_LAYERS = cast("list[ReferenceMemoryLayer]", list(cast("Any", REFERENCE.model.transformer.mem_blocks)))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices of these models are too small to share: on a busy machine two threads took four times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Spoiled:
    """The reference with a change of its outputs."""

    name = "spoiled"

    def __init__(self, change: Change) -> None:
        self._change = change

    def run(self, step: StepInput, *, probe: bool = False) -> StepOutput:
        del probe
        return self._change(step, REFERENCE.run(step, probe=True))


class Rerouted:
    """The reference, made to retrieve other addresses, which are computed from its probes."""

    name = "rerouted"

    def __init__(
        self, reroute: Callable[[Mapping[str, Array], int], Array], reference: TorchRuntime = REFERENCE
    ) -> None:
        self._reroute = reroute
        self._reference = reference

    def run(self, step: StepInput, *, probe: bool = False) -> StepOutput:
        del probe
        addresses: list[Array] = []
        unforced = self._reference.run(step, probe=True).probes
        own = [unforced[f"addresses.{j}"] for j in range(CONFIG.memory.layers)]
        for layer in range(CONFIG.memory.layers):
            # Layer by layer: what a layer sees depends on what the layers before it retrieved.
            # The addresses given for this layer and the later ones do not reach its key scores.
            probes = self._reference.run_forced(step, [*addresses, *own[layer:]]).probes
            best = self._best(probes, layer)
            addresses.append(self._reroute({**probes, f"addresses.{layer}": best}, layer))
        return self._reference.run_forced(step, addresses)

    def _best(self, probes: Mapping[str, Array], layer: int) -> Array:
        """What the layer retrieves from these key scores."""
        memory_layer = cast("ReferenceMemoryLayer", cast("Any", self._reference.model.transformer.mem_blocks)[layer])
        scores = (torch.from_numpy(probes[f"{side}_scores.{layer}"]) for side in ("row", "col"))
        memory = memory_layer.memory
        return np.asarray(tucker_topk(*scores, *memory_layer.tucker(), memory.row_topk, memory.topk)[0])


class Noisy:
    """The reference with keys that differ by rounding of fp16; it retrieves what is best by its own scores."""

    name = "noisy"

    def run(self, step: StepInput, *, probe: bool = False) -> StepOutput:
        del probe
        rng = np.random.default_rng(step.input_ids.size)  # a runtime rounds the same way each time it runs a call
        kept = [layer.keys.data.clone() for layer in MEMORY_LAYERS]
        for layer in MEMORY_LAYERS:
            signs = torch.from_numpy(rng.choice([-1.0, 1.0], tuple(layer.keys.shape)).astype(np.float32))
            layer.keys.data *= 1 + signs * 2**-11
        output = REFERENCE.run(step, probe=True)
        for layer, value in zip(MEMORY_LAYERS, kept, strict=True):
            layer.keys.data.copy_(value)
        return output


def report(
    runtime: Any,
    tolerance: Tolerance | None = None,
    *,
    layerwise: bool = False,
    reference: TorchRuntime = REFERENCE,
) -> ParityReport:
    cases = parity_cases(CONFIG, reference)
    return check_parity(reference, runtime, cases, tolerance or Tolerance(), layerwise=layerwise)


def logits_plus(amount: float) -> Spoiled:
    return Spoiled(lambda _, output: replace(output, logits=output.logits + np.float32(amount)))


def failed(found: ParityReport) -> set[str]:
    return {check.case for check in found.checks if check.status == "fail"}


def totals(probes: Mapping[str, Array], layer: int) -> Array:
    """Scores of all cells of one layer, [T, n * n]: every row and column key survives nowhere but in this test."""
    row, col = probes[f"row_scores.{layer}"][:, 0], probes[f"col_scores.{layer}"][:, 0]
    cores: Array = MEMORY_LAYERS[layer].tucker()[2].sum(0)[0].numpy()
    cells: Array = np.einsum("tnr,rs,tms->tnm", row, cores, col)
    return cells.reshape(len(row), -1)


def reference_with_twin_keys(row_topk: int) -> TorchRuntime:
    """A reference whose keys are equal in pairs, so that rows are tied exactly."""
    config = replace(CONFIG, memory=replace(CONFIG.memory, row_topk=row_topk))
    twins = TorchRuntime(reference_model(replace(open_checkpoint(GOLDEN["v2_per_rank"]), config=config)))
    for layer in cast("list[ReferenceMemoryLayer]", list(cast("Any", twins.model.transformer.mem_blocks))):
        layer.keys.data[:, :, 1::2] = layer.keys.data[:, :, 0::2].clone()
    return twins


def worst_for_best_unused(probes: Mapping[str, Array], layer: int) -> Array:
    """The addresses with the first hit replaced by the worst cell of all."""
    addresses: Array = probes[f"addresses.{layer}"].copy()
    if layer == 1:
        addresses[:, 0] = totals(probes, layer).argmin(-1)
    return addresses


def test_the_reference_passes_against_itself_with_no_error_at_all() -> None:
    found = report(Spoiled(lambda _, output: output))
    assert found.passed
    assert {check.max_abs for check in found.checks} == {0.0}


def test_the_order_of_hits_does_not_matter() -> None:
    found = report(Rerouted(lambda probes, layer: probes[f"addresses.{layer}"][:, ::-1].copy()))
    assert {check.status for check in found.checks} == {"pass"}


def test_an_error_beyond_the_tolerance_fails_and_tells_what_would_have_passed() -> None:
    found = report(logits_plus(1e-3))
    assert not found.passed
    logits = [check for check in found.checks if check.output == "logits"]
    assert {check.status for check in logits} == {"fail"}
    assert all(5e-4 < (check.required_atol or 0) < 1.1e-3 for check in logits)
    assert {check.status for check in found.checks if check.output == "present"} == {"pass"}
    assert report(logits_plus(1e-3), Tolerance(atol=2e-3)).passed


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_never_pass(value: float) -> None:
    def spoil(_: StepInput, output: StepOutput) -> StepOutput:
        logits = output.logits.copy()
        logits[0, 0, 0] = value
        return replace(output, logits=logits)

    found = report(Spoiled(spoil), Tolerance(atol=math.inf, rtol=math.inf))
    assert failed(found) == {check.case for check in found.checks}


def test_nan_in_the_cache_never_passes() -> None:
    def spoil(_: StepInput, output: StepOutput) -> StepOutput:
        keys, values = output.present[2]
        spoiled = values.copy()
        spoiled[0, 0, -1, 0] = math.nan
        return replace(output, present=[*output.present[:2], (keys, spoiled)])

    assert not report(Spoiled(spoil), Tolerance(atol=math.inf)).passed


def test_another_shape_fails() -> None:
    assert not report(Spoiled(lambda _, output: replace(output, logits=output.logits[..., :-1]))).passed


def test_an_error_at_past_positions_only_is_caught_by_the_calls_with_a_past() -> None:
    def spoil(step: StepInput, output: StepOutput) -> StepOutput:
        return replace(output, logits=output.logits + (0.1 if step.past[0][0].shape[2] else 0.0))

    cases = failed(report(Spoiled(spoil)))
    assert cases == {"decode 3x1, past 9", "chunk 3x4, past 9", "decode after padding"}


def test_an_error_in_padded_batches_only_is_caught() -> None:
    def spoil(step: StepInput, output: StepOutput) -> StepOutput:
        return replace(output, logits=output.logits + (0.0 if step.attention_mask.all() else 0.1))

    assert failed(report(Spoiled(spoil))) == {"left-padded 3x8", "decode after padding"}


def test_what_a_runtime_computes_at_padding_does_not_matter() -> None:
    def spoil(step: StepInput, output: StepOutput) -> StepOutput:
        padding = step.attention_mask[:, -step.input_ids.shape[1] :] == 0
        return replace(output, logits=np.where(padding[..., None], 7.0, output.logits))

    assert report(Spoiled(spoil)).passed


def test_rows_swapped_at_a_near_tie_are_ambiguous_and_listed() -> None:
    found = report(Noisy(), Tolerance(dtype="fp16", layers=3))
    ambiguous = [check for check in found.checks if check.status == "ambiguous"]
    assert found.passed
    assert ambiguous
    for check in ambiguous:
        assert (check.max_abs or 0) > check.atol >= (check.max_abs_same_rows or 0)
        swap = check.swaps[0]
        assert swap["only_reference"] != swap["only_runtime"]
        assert isinstance(swap["gap"], float)
        assert 0 <= swap["gap"] < 0.01
        assert "near ties" in (check.note or "")


def test_a_row_that_is_clearly_worse_fails_even_if_everything_else_is_consistent() -> None:
    found = report(Rerouted(worst_for_best_unused), Tolerance(dtype="fp16", layers=3))
    notes = {check.note for check in found.checks if check.status == "fail"}
    assert not found.passed
    assert any("did not retrieve the best rows" in (note or "") for note in notes)


def test_a_row_that_is_clearly_worse_fails_where_keys_are_tied_in_stage_1_too() -> None:
    """Keys are equal in pairs and an odd number survives: either of the last pair may, which excuses no other row."""
    tied = reference_with_twin_keys(row_topk=7)
    assert report(tied, reference=tied).passed
    assert not report(Rerouted(worst_for_best_unused, tied), reference=tied).passed


@pytest.mark.parametrize("repeats", [2, 8])
def test_the_best_row_retrieved_more_than_once_fails(repeats: int) -> None:
    """No chosen row is worse than one that is left out, but a row may count only once."""

    def repeat_best(probes: Mapping[str, Array], layer: int) -> Array:
        cells, addresses = totals(probes, layer), probes[f"addresses.{layer}"]
        order = np.argsort(-np.take_along_axis(cells, addresses, 1), 1)
        ranked: Array = np.take_along_axis(addresses, order, 1)
        if layer == 1:
            ranked[:, ranked.shape[1] - repeats + 1 :] = ranked[:, :1]
        return ranked

    found = report(Rerouted(repeat_best))
    assert not found.passed
    assert "ambiguous" not in {check.status for check in found.checks}


def test_a_row_retrieved_twice_in_place_of_its_twin_fails() -> None:
    """Twins have one score, but each has a row of its own."""
    twins = reference_with_twin_keys(row_topk=8)

    def repeat_twin(probes: Mapping[str, Array], layer: int) -> Array:
        addresses: Array = probes[f"addresses.{layer}"].copy()
        if layer == 1:
            order = np.argsort(-np.take_along_axis(totals(probes, layer), addresses, 1), 1, kind="stable")
            best, second = (np.arange(len(addresses)), order[:, 0]), (np.arange(len(addresses)), order[:, 1])
            addresses[second] = addresses[best]
        return addresses

    assert report(twins, reference=twins).passed
    assert not report(Rerouted(repeat_twin, twins), reference=twins).passed


def test_a_runtime_that_lets_one_key_too_few_into_stage_2_fails() -> None:
    """The last key let in is no tie as long as no other key comes near it."""

    def too_few(probes: Mapping[str, Array], layer: int) -> Array:
        scores = (torch.from_numpy(probes[f"{side}_scores.{layer}"]) for side in ("row", "col"))
        memory = CONFIG.memory
        return np.asarray(tucker_topk(*scores, *MEMORY_LAYERS[layer].tucker(), memory.row_topk - 1, memory.topk)[0])

    found = report(Rerouted(too_few))
    assert not found.passed
    assert "ambiguous" not in {check.status for check in found.checks}


def test_swaps_at_near_ties_do_not_excuse_an_error_beside_them() -> None:
    class NoisyAndWrong(Noisy):
        def run(self, step: StepInput, *, probe: bool = False) -> StepOutput:
            output = super().run(step, probe=probe)
            return replace(output, logits=output.logits + np.float32(1.0))

    logits = [c for c in report(NoisyAndWrong(), Tolerance(dtype="fp16", layers=3)).checks if c.output == "logits"]
    assert {check.status for check in logits} == {"fail"}
    assert any("swapped" in (c.note or "") and "the output still differs" in (c.note or "") for c in logits)


def test_an_error_that_is_gone_when_the_graph_is_probed_still_fails() -> None:
    """More outputs keep a runtime from fusing nodes: what users run is the graph without probes."""

    class WrongUnlessProbed(Noisy):
        def run(self, step: StepInput, *, probe: bool = False) -> StepOutput:
            output = super().run(step, probe=probe)
            return output if probe else replace(output, logits=output.logits + np.float32(100.0))

    found = report(WrongUnlessProbed(), Tolerance(dtype="fp16", layers=3))
    assert {check.status for check in found.checks if check.output == "logits"} == {"fail"}


def test_a_runtime_that_does_not_show_its_rows_gets_no_second_look() -> None:
    noisy = Noisy()

    class Closed:
        name = "closed"

        def run(self, step: StepInput, *, probe: bool = False) -> StepOutput:
            return replace(noisy.run(step, probe=probe), probes={})

    found = report(Closed(), Tolerance(dtype="fp16", layers=3))
    assert not found.passed
    assert {check.status for check in found.checks} == {"pass", "fail"}


def test_key_scores_that_rounding_does_not_explain_fail() -> None:
    def spoil(_: StepInput, output: StepOutput) -> StepOutput:
        probes = dict(output.probes)
        probes["row_scores.1"] = probes["row_scores.1"] * 1.1
        return replace(output, probes=probes, logits=output.logits + 1.0)

    found = report(Spoiled(spoil))
    assert not found.passed
    assert any("row scores differ" in (check.note or "") for check in found.checks)


def test_layerwise_names_the_first_layer_that_differs() -> None:
    def spoil(_: StepInput, output: StepOutput) -> StepOutput:
        probes = {
            name: value + (0.01 if name in ("hidden.2", "hidden.3") else 0.0)
            for name, value in output.probes.items()
            if name.startswith("hidden")
        }
        return replace(output, probes=probes)

    found = report(Spoiled(spoil), layerwise=True)
    assert [layer.layer for layer in found.layers if layer.differs and layer.case == "prefill 1x17"] == [2, 3]


def test_the_json_of_a_report_has_the_documented_fields_and_no_nan() -> None:
    document = json.loads(json.dumps(report(logits_plus(math.nan)).as_dict(), allow_nan=False))
    assert document["passed"] is False
    fields = {"runtime", "output", "status", "max_abs", "max_rel", "required_atol", "argmax_agreement"}
    assert fields <= set(document["checks"][0])
    assert document["checks"][0]["max_abs"] is None


def test_the_json_of_a_report_is_valid_with_an_infinite_tolerance() -> None:
    json.dumps(report(REFERENCE, Tolerance(atol=math.inf)).as_dict(), allow_nan=False)


def test_a_report_without_checks_did_not_pass() -> None:
    assert not check_parity(REFERENCE, REFERENCE, [], Tolerance()).passed


def test_argmax_agreement_is_the_share_of_positions_with_the_same_best_token() -> None:
    def spoil(step: StepInput, output: StepOutput) -> StepOutput:
        logits = output.logits.copy()
        if step.input_ids.shape == (3, 9):
            other = (logits[:2, :, : CONFIG.vocab_size].argmax(-1)[0, 0] + 1) % CONFIG.vocab_size
            logits[0, :3, :] = 0.0
            logits[0, :3, other] = 1.0
            logits[1:, :, CONFIG.vocab_size :] = 1e3  # padding columns are no tokens
        return replace(output, logits=logits)

    agreement = {
        check.case: check.argmax_agreement for check in report(Spoiled(spoil)).checks if check.output == "logits"
    }
    best = REFERENCE.run(next(c.step for c in parity_cases(CONFIG, REFERENCE) if c.name == "prefill 3x9")).logits
    tokens = best[..., : CONFIG.vocab_size].argmax(-1)
    wrong = int((tokens[0, :3] != (tokens[0, 0] + 1) % CONFIG.vocab_size).sum())
    assert wrong > 0
    assert agreement.pop("prefill 3x9") == pytest.approx(1 - wrong / 27)
    assert set(agreement.values()) == {1.0}


def test_a_difference_gives_the_absolute_tolerance_that_is_needed_beside_the_relative_one() -> None:
    reference, value = np.array([100.0, -1.0, 0.5]), np.array([101.0, -1.25, 0.5])
    found = difference(value, reference, (0.2, 0.01))
    assert found.max_abs == pytest.approx(1.0)
    assert found.max_rel == pytest.approx(0.25)
    assert found.median_abs == pytest.approx(0.25)
    assert found.required_atol == pytest.approx(0.25 - 0.01)
    assert not found.within
    assert difference(value, reference, (0.25, 0.01)).within


@pytest.mark.parametrize(("layers", "dtype"), [(3, "fp16"), (20, "fp16"), (3, "bf16"), (3, "fp32"), (20, "fp32")])
def test_the_tolerance_grows_with_depth_roundoff_and_the_size_of_the_output(layers: int, dtype: str) -> None:
    reference = np.full((4, 4), 3.0)
    # In fp32 the error is that of sums of some hundred products in another order: 16 units.
    unit = {"fp16": 2**-11, "bf16": 2**-8, "fp32": 16 * 2**-24}[dtype]
    atol, rtol = Tolerance(dtype=dtype, layers=layers).bounds(reference)
    assert atol == pytest.approx(8 * unit * math.sqrt(6 * layers) * 3.0, rel=1e-4)
    assert rtol == 0.0
    assert Tolerance(dtype=dtype, layers=layers).bounds(reference * 300)[0] == pytest.approx(300 * atol, rel=1e-4)


def test_each_part_of_the_tolerance_can_be_replaced() -> None:
    reference = np.full(3, 1e4)
    default = Tolerance(layers=50).bounds(reference)
    assert Tolerance(layers=50, atol=0.5).bounds(reference) == (0.5, default[1])
    assert Tolerance(layers=50, rtol=0.25).bounds(reference) == (default[0], 0.25)


def test_keys_in_16_bits_pass_at_the_tolerance_of_fp32(
    exported: Callable[..., tuple[Path, dict[str, Any]]],
) -> None:
    bundle, facts = exported("v2_per_rank", "--key-dtype", "fp16")
    assert facts["bytes"]["keys"] * 2 == exported("v2_per_rank")[1]["bytes"]["keys"]
    result = run_command("parity", bundle, "--reference", GOLDEN["v2_per_rank"], "--runtime", "onnxruntime-native")
    assert result.exit_code == 0, result.stdout
