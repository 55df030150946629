"""Faults of one part, planted in bundles whose hashes were put right, and the part that parity names."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests.command import run_command
from tests.models import GOLDEN
from tests.parity.spoil import spoiled
from umv2_export.bundle import Bundle
from umv2_export.checkpoint import open_checkpoint
from umv2_export.model import reference_model
from umv2_export.parity import ParityReport, Tolerance, check_parity, parity_cases
from umv2_export.parity.parts import _without_ties
from umv2_export.runtimes import open_runtime
from umv2_export.runtimes.torch import TorchRuntime

Exported = Callable[..., tuple[Path, dict[str, Any]]]
Change = Callable[[torch.Tensor], torch.Tensor]

RING = "v2_shared_ring"
FP16 = ("--dtype", "fp16", "--table-dtype", "bf16")


def exported_ring(exported: Exported, dtype: str) -> Path:
    return exported(RING, *(FP16 if dtype == "fp16" else ()))[0]


def checked(bundle: Bundle, *, calls: int = 2, seed: int = 0, runtime: str = "onnxruntime") -> ParityReport:
    """Parity with the checkpoint in the first calls, outputs and parts alone."""
    reference = TorchRuntime.from_checkpoint(open_checkpoint(GOLDEN[RING]), bundle)
    cases = islice(parity_cases(bundle.config, reference, seed=seed), calls)
    tolerance = Tolerance(dtype=bundle.manifest.dtype, layers=bundle.config.num_layers)
    return check_parity(reference, open_runtime(runtime, bundle), cases, tolerance)


def one_percent_more(value: torch.Tensor) -> torch.Tensor:
    return value * 1.01


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("tensor", "change", "parts"),
    [
        ("mem_blocks.1.values_proj.weight", torch.zeros_like, "memory.1"),
        # A layer's output depends on its scores; those that a wrong score of it leads to are of the same layer.
        ("mem_blocks.0.row_keys.0", torch.neg, "row_scores.0 memory.0"),
        ("mem_blocks.2.values_proj.weight", one_percent_more, "memory.2"),
        ("blocks.1.ff_out.weight", one_percent_more, "ffn.1"),
        ("blocks.0.attn_out.weight", one_percent_more, "attention.0"),
        ("blocks.2.ff_norm.weight", one_percent_more, "normed.2"),
        ("ln_f.weight", one_percent_more, "hidden.3"),
    ],
)
def test_a_fault_of_one_part_is_found_and_no_other_is_blamed(
    tensor: str, change: Change, parts: str, dtype: str, exported: Exported, tmp_path: Path
) -> None:
    bundle = spoiled(exported_ring(exported, dtype), tmp_path / "bundle", f"transformer.{tensor}", change)
    found = checked(bundle)
    assert not found.passed
    assert {check.part for check in found.failed_parts} == set(parts.split())


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_sound_bundle_passes_whatever_the_seed(dtype: str, exported: Exported) -> None:
    bundle = Bundle(exported_ring(exported, dtype))
    for seed in (1, 2):
        found = checked(bundle, calls=8, seed=seed, runtime="onnxruntime-native")
        assert found.passed, [*found.failed_parts, *(check for check in found.checks if check.note)]
        assert max(check.excess for check in found.parts) < 0.6, "less slack than the comment on the bound says"


def test_every_part_of_every_layer_is_compared(exported: Exported) -> None:
    bundle = Bundle(exported_ring(exported, "fp32"))
    compared = {check.part for check in checked(bundle, calls=1).parts}
    layers = range(bundle.config.num_layers)
    parts = ("attention", "ffn", "normed", "hidden", "memory", "addresses", "row_scores", "col_scores")
    assert {f"{part}.{i}" for part in parts for i in layers} <= compared
    assert {"logits", "hidden.3", "present.0.key", "present.2.value"} <= compared


def test_a_graph_that_does_not_name_its_parts_is_compared_in_the_others_and_says_so(
    exported: Exported, tmp_path: Path
) -> None:
    bundle = spoiled(exported_ring(exported, "fp32"), tmp_path / "bundle", "transformer.ln_f.weight", torch.clone)
    graph = onnx.load(bundle.model_file, load_external_data=False)
    for node in graph.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = "renamed" if name == "attention.1" else name
    data = graph.SerializeToString()
    bundle.model_file.write_bytes(data)
    manifest = json.loads((bundle.path / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"]["model.onnx"]["size"] = len(data)
    (bundle.path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    result = run_command("parity", bundle.path, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0, result.stderr
    assert report["not_shown"] == {"onnxruntime": ["attention.1"]}
    assert "attention.1" not in {part["part"] for part in report["parts"]}
    assert "attention.0" in {part["part"] for part in report["parts"]}


def test_a_sound_model_with_large_logits_passes(exported: Exported, tmp_path: Path) -> None:
    """The tolerance follows what is compared: logits 300 times larger have errors 300 times larger."""
    larger = spoiled(
        exported_ring(exported, "fp32"), tmp_path / "bundle", "transformer.ln_f.weight", lambda value: value * 300
    )
    result = run_command("parity", larger.path, "--json")
    assert result.exit_code == 0, result.stderr
    logits = [check for check in json.loads(result.stdout)["checks"] if check["output"] == "logits"]
    assert max(check["max_abs"] for check in logits) > 2e-4
    assert {check["status"] for check in logits} == {"pass"}


def test_small_logits_hide_no_error_of_5_percent() -> None:
    checkpoint = open_checkpoint(GOLDEN[RING])
    reference, wrong = (TorchRuntime(reference_model(checkpoint)) for _ in range(2))
    for runtime, scale in ((reference, 1e-3), (wrong, 1.05e-3)):
        norm = runtime.model.transformer.ln_f
        norm.weight.data = norm.weight.data * scale  # both models map one file
    found = check_parity(reference, wrong, islice(parity_cases(checkpoint.config, reference), 2), Tolerance(layers=3))
    logits = [check for check in found.checks if check.output == "logits"]
    assert max(check.max_abs or 0 for check in logits) < 2e-3
    assert {check.status for check in logits} == {"fail"}


def test_router_logits_that_are_equal_are_parted_in_the_order_given_and_others_keep_theirs() -> None:
    logits = np.array([[0.5, 1.0, 1.0, 1.0, 1.0009766]], dtype=np.float32)
    by_index = _without_ties(logits, -np.arange(5)[None])
    by_value = _without_ties(logits, np.array([[0.0, 1.0, 3.0, 2.0, 0.0]]))
    assert np.argsort(-by_index[0]).tolist() == [4, 1, 2, 3, 0]
    assert np.argsort(-by_value[0]).tolist() == [4, 2, 3, 1, 0]
    assert np.abs(by_value - logits).max() < 1e-5
