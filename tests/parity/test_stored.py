"""Stored tensors beside those of the checkpoint, and what the test inputs reach."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.command import run_command
from tests.models import GOLDEN
from tests.parity.spoil import spoiled
from umv2_export.bundle import Bundle
from umv2_export.checkpoint import open_checkpoint
from umv2_export.parity.cases import Case
from umv2_export.parity.coverage import Reached
from umv2_export.parity.stored import compare_stored
from umv2_export.runtimes import StepInput, empty_cache
from umv2_export.system.output import HashedFile

Exported = Callable[..., tuple[Path, dict[str, Any]]]

RING = "v2_shared_ring"
ROWS = "transformer.full_memory_layer.rows.0"


def scale_row_5(value: torch.Tensor) -> torch.Tensor:
    changed = value.clone()
    changed[5] *= 2
    return changed


def change_last(value: torch.Tensor) -> torch.Tensor:
    changed = value.clone()
    changed.view(-1)[-1] = changed.view(-1)[0] + 1
    return changed


def test_one_scaled_row_fails_and_its_tensor_row_and_values_are_named(exported: Exported, tmp_path: Path) -> None:
    bundle = spoiled(exported(RING)[0], tmp_path / "bundle", ROWS, scale_row_5)
    result = run_command("parity", bundle.path, "--reference", GOLDEN[RING], "--json")
    assert result.exit_code == 1
    stored = json.loads(result.stdout)["stored"]
    assert (stored["passed"], stored["share"]) == (False, 1.0)
    (difference,) = stored["differences"]
    assert (difference["tensor"], difference["row"], difference["column"], difference["rows"]) == (ROWS, 5, 0, 1)
    assert difference["stored"] == pytest.approx(2 * difference["expected"])
    pre_values = open_checkpoint(GOLDEN[RING]).read("transformer.full_memory_layer.pre_values_for_look_up")
    assert difference["expected"] == float(pre_values[5, 0])


@pytest.mark.parametrize(
    "tensor",
    [
        "wte.weight",
        "blocks.1.ff_norm.weight",
        "mem_blocks.0.address_map",
        "mem_blocks.1.col_keys.0",
        "mem_blocks.2.tucker_cores",
        "full_memory_layer.rows.0",
    ],
)
@pytest.mark.parametrize("options", [(), ("--dtype", "fp16", "--table-dtype", "bf16")])
def test_one_changed_value_of_any_kind_of_tensor_is_found(
    tensor: str, options: tuple[str, ...], exported: Exported, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(GOLDEN[RING])
    sound = exported(RING, *options)[0]
    assert compare_stored(Bundle(sound), checkpoint).passed
    bundle = spoiled(sound, tmp_path / "bundle", f"transformer.{tensor}", change_last)
    found = compare_stored(bundle, checkpoint)
    assert not found.passed
    assert [one.tensor for one in found.differences] == [f"transformer.{tensor}"]


def test_keys_may_differ_in_their_last_bits_as_they_do_between_processors(exported: Exported, tmp_path: Path) -> None:
    bundle = spoiled(
        exported(RING)[0], tmp_path / "bundle", "transformer.mem_blocks.1.col_keys.0", lambda value: value * (1 + 2e-7)
    )
    found = compare_stored(bundle, open_checkpoint(GOLDEN[RING]))
    assert found.passed
    assert found.rounded_keys > 0


def test_a_sample_compares_that_share_of_the_rows_and_all_else_whole(exported: Exported, tmp_path: Path) -> None:
    sound = Bundle(exported(RING)[0])
    found = compare_stored(sound, open_checkpoint(GOLDEN[RING]), sample=0.25)
    rows = sound.manifest.bytes["rows"]
    assert found.passed
    assert found.bytes - found.compared_bytes == rows - rows // 4
    everywhere = spoiled(sound.path, tmp_path / "bundle", ROWS, lambda value: value + 1)
    assert not compare_stored(everywhere, open_checkpoint(GOLDEN[RING]), sample=0.01).passed


def test_a_sample_without_a_reference_is_refused(exported: Exported) -> None:
    result = run_command("parity", exported(RING)[0], "--sample", "10%")
    assert result.exit_code == 2
    assert "--reference" in result.stderr


def test_an_export_reads_its_own_files_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte that changes behind the writer's back; in bf16, which no runtime here computes."""
    close = HashedFile.__exit__

    def damage(out: HashedFile, *arguments: Any) -> None:
        close(out, *arguments)
        if out.path.name.startswith("rows-"):
            with out.path.open("r+b") as file:
                file.seek(-1, 2)
                last = file.read(1)[0]
                file.seek(-1, 2)
                file.write(bytes([last ^ 1]))

    monkeypatch.setattr(HashedFile, "__exit__", damage)
    options = ("--dtype", "bf16", "--target", "gpu")
    result = run_command("onnx", GOLDEN[RING], "-o", tmp_path / "out", *options)
    assert result.exit_code == 1
    assert ROWS in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_of_bf16_was_compared_with_its_checkpoint(exported: Exported) -> None:
    facts = exported("v2_per_rank", "--dtype", "bf16", "--target", "gpu")[1]
    assert facts["parity"] is None
    assert facts["stored"]["passed"]
    assert facts["stored"]["share"] == 1.0


def test_reached_shares_are_counted_by_layer_and_in_all(exported: Exported) -> None:
    bundle = Bundle(exported("v2_per_rank")[0])
    memory, side = bundle.config.memory, bundle.config.memory.stored_side
    ids, mask = np.array([[3, 4]]), np.array([[0, 1]])
    case = Case("made up", StepInput(ids, mask, empty_cache(bundle.config, 1)))
    reached = Reached(bundle)
    probes = {f"addresses.{j}": np.array([[side * side - 1] * 8, range(8)]) for j in range(memory.layers)}
    probes["addresses.2"] = np.array([[0] * 8, [0] * 8])
    reached.add(case, probes)
    coverage = reached.coverage()
    assert coverage.tokens == 1 / bundle.config.vocab_size, "padding reaches nothing"
    assert [layer.rows for layer in coverage.layers] == [8 / side**2, 8 / side**2, 1 / side**2]
    assert [layer.keys for layer in coverage.layers] == [9 / (2 * side), 9 / (2 * side), 2 / (2 * side)]
    assert coverage.rows == pytest.approx(17 / (3 * side**2))
    assert (coverage.blocks, coverage.experts) == (None, None)


def test_the_report_says_what_the_inputs_reached(exported: Exported) -> None:
    _, facts = exported("v1_skip_layer")
    coverage = facts["parity"]["coverage"]
    assert 0.5 < coverage["rows"] <= 1.0
    assert coverage["blocks"] == 1.0
    assert len(coverage["layers"]) == 2


def test_a_tensor_of_another_shape_is_a_difference(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle(exported(RING)[0])
    weights = {**bundle.weights(), "transformer.wte.weight": torch.zeros(300, 64)}
    monkeypatch.setattr(bundle, "weights", lambda: weights)
    (difference,) = compare_stored(bundle, open_checkpoint(GOLDEN[RING])).differences
    assert difference.tensor == "transformer.wte.weight"
    assert "[300, 64]" in difference.note
