"""What a user gets from `umv2-export onnx`, seen through runtimes that know nothing of this project."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml

from tests.command import run_command
from tests.golden import GOLDEN_CASES
from tests.onnx.sessions import greedy_tokens, onnxruntime_step, openvino_step, prefill_feed

GOLDEN = {case.name: case for case in GOLDEN_CASES}
Exported = Callable[..., tuple[Path, dict[str, Any]]]

LOGITS_ATOL = 2e-4
LAYERS, HEADS, HEAD_SIZE, VOCAB_SIZE = 3, 4, 16, 250

# Several shards of the shared pool (768 rows of 56 floats), and of every table of a layer (256 rows).
SMALL_SHARDS = ("--shard-size", "30KB")


def expected(name: str) -> dict[str, Any]:
    with np.load(GOLDEN[name] / "expected.npz") as arrays:
        return dict(arrays)


def graph(bundle: Path) -> onnx.ModelProto:
    return onnx.load(bundle / "model.onnx", load_external_data=False)


def program() -> str:
    return str(Path(sys.executable).with_name("umv2-export"))


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_stock_onnx_runtime_reproduces_the_authors_logits_and_greedy_tokens(name: str, exported: Exported) -> None:
    bundle, _ = exported(name)
    authors = expected(name)
    step = onnxruntime_step(bundle / "model.onnx")
    feed = prefill_feed(authors["input_ids"], LAYERS, HEADS, HEAD_SIZE)
    np.testing.assert_allclose(step(feed)["logits"], authors["logits"], rtol=0, atol=LOGITS_ATOL)
    tokens = greedy_tokens(step, feed, vocab_size=VOCAB_SIZE, count=8)
    np.testing.assert_array_equal(tokens, authors["greedy"])


@pytest.mark.parametrize("name", ["v2_shared_ring", "v1_skip_layer"])
def test_an_inlined_export_runs_in_openvino_with_the_authors_logits(name: str, exported: Exported) -> None:
    bundle, _ = exported(name, "--inline-functions", *SMALL_SHARDS)
    authors = expected(name)
    step = openvino_step(bundle / "model.onnx")
    feed = prefill_feed(authors["input_ids"], LAYERS, HEADS, HEAD_SIZE)
    np.testing.assert_allclose(step(feed)["logits"], authors["logits"], rtol=0, atol=LOGITS_ATOL)
    np.testing.assert_array_equal(greedy_tokens(step, feed, vocab_size=VOCAB_SIZE, count=8), authors["greedy"])


def test_an_inlined_export_holds_standard_ops_only(exported: Exported) -> None:
    bundle, _ = exported("v2_shared_ring", "--inline-functions", *SMALL_SHARDS)
    model = graph(bundle)
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    assert {entry.domain for entry in model.opset_import} == {""}


def test_a_table_is_cut_into_shards_of_at_most_the_given_size(exported: Exported) -> None:
    bundle, result = exported("v2_shared_ring", "--inline-functions", *SMALL_SHARDS)
    shards = sorted(name for name in result["files"] if name.startswith("rows-"))
    assert shards[0] == "rows-00001-of-00006.data"
    assert len(shards) == 6
    assert all((bundle / name).stat().st_size <= 30_000 for name in shards)
    assert sum((bundle / name).stat().st_size for name in shards) == 768 * 56 * 4


def test_inputs_and_outputs_have_the_names_and_axes_of_the_contract(exported: Exported) -> None:
    model = graph(exported("v2_per_rank")[0])

    def axes(value: onnx.ValueInfoProto) -> list[str | int]:
        return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]

    inputs = {value.name: axes(value) for value in model.graph.input}
    outputs = {value.name: axes(value) for value in model.graph.output}
    cache = [f"{i}.{kind}" for i in range(LAYERS) for kind in ("key", "value")]
    assert list(inputs) == ["input_ids", "attention_mask", *(f"past_key_values.{entry}" for entry in cache)]
    assert list(outputs) == ["logits", *(f"present.{entry}" for entry in cache)]
    assert inputs["input_ids"] == ["batch", "sequence"]
    assert inputs["attention_mask"] == ["batch", "total_sequence"]
    assert inputs["past_key_values.0.key"] == ["batch", HEADS, "past_sequence", HEAD_SIZE]
    assert outputs["logits"] == ["batch", "sequence", 256]


@pytest.mark.parametrize("name", ["v2_glu_two_heads", "v1_skip_layer", "v2_no_pre_values"])
def test_custom_nodes_carry_the_plugin_attributes_one_arity_and_no_empty_input(name: str, exported: Exported) -> None:
    model = graph(exported(name)[0])
    nodes = [node for node in model.graph.node if node.domain == "umv2"]
    memory_layers = {"v2_glu_two_heads": 3, "v1_skip_layer": 2, "v2_no_pre_values": 3}[name]
    for op in ("TuckerTopK", "MemoryLookup"):
        chosen = [node for node in nodes if node.op_type == op]
        assert len(chosen) == memory_layers
        assert len({len(node.input) for node in chosen}) == 1
        for node in chosen:
            attributes = {entry.name: entry for entry in node.attribute}
            assert attributes["plugin_namespace"].s == b"umv2"
            assert attributes["plugin_version"].s == b"1"
            assert all(node.input)
    assert {function.name for function in model.functions} == {"KeyScores", "TuckerTopK", "MemoryLookup"}


def test_initializers_that_are_the_checkpoints_tensors_keep_their_names_and_bytes(exported: Exported) -> None:
    bundle, _ = exported("v2_expanded_keys")
    state = torch.load(GOLDEN["v2_expanded_keys"] / "model.pt", weights_only=True)
    model = onnx.load(bundle / "model.onnx")
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    same = [name for name in state if name in stored]
    kept = ("blocks", "wte", "ln_f", "transformer.ff_out", "pre_values_proj", "values_proj")
    assert {name for name in state if any(part in name for part in kept) and "mem_blocks" not in name} <= set(same)
    assert "transformer.mem_blocks.0.values_proj.weight" in same
    for name in same:
        np.testing.assert_array_equal(stored[name], state[name].numpy(), err_msg=name)


def test_two_exports_in_different_processes_and_folders_give_identical_bytes(
    tmp_path: Path, exported: Exported
) -> None:
    bundle, _ = exported("v2_shared_ring")
    (tmp_path / "elsewhere").mkdir()
    subprocess.run(
        [program(), "onnx", GOLDEN["v2_shared_ring"].resolve(), "-o", "other-name", "--no-validate"],
        cwd=tmp_path / "elsewhere",
        env={**os.environ, "PYTHONHASHSEED": "77"},
        check=True,
        capture_output=True,
    )
    other = tmp_path / "elsewhere" / "other-name"
    names = sorted(file.name for file in bundle.iterdir())
    assert sorted(file.name for file in other.iterdir()) == names
    for name in names:
        assert (other / name).read_bytes() == (bundle / name).read_bytes(), name


@pytest.mark.parametrize("moment", ["model.onnx", "manifest.json"])
def test_a_killed_export_leaves_the_old_bundle_and_the_next_one_cleans_up(tmp_path: Path, moment: str) -> None:
    output = tmp_path / "bundle"
    output.mkdir()
    (output / "old").write_text("old")
    command = [program(), "onnx", str(GOLDEN["v2_per_rank"]), "-o", str(output), "--force"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    half = f".umv2-partial-*/new/{moment}"
    while not list(tmp_path.glob(half)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob(half)), "the export was not caught in the act"
    assert [file.name for file in output.iterdir()] == ["old"]
    assert run_command("onnx", GOLDEN["v2_per_rank"], "-o", output, "--force", "--no-validate").exit_code == 0
    assert run_command("verify", output).exit_code == 0
    assert list(tmp_path.iterdir()) == [output]


def test_an_export_that_fails_its_validation_leaves_no_bundle_and_says_how_far_it_is(tmp_path: Path) -> None:
    result = run_command("onnx", GOLDEN["v2_per_rank"], "-o", tmp_path / "out", "--atol", "0", "--rtol", "0")
    assert result.exit_code == 1
    assert list(tmp_path.iterdir()) == []
    assert "does not compute the same" in result.stderr
    assert "would have passed" in result.stderr


def test_json_of_an_export_names_files_parameters_and_parity(exported: Exported) -> None:
    bundle, result = exported("v2_per_rank")
    assert result["bundle"] == str(bundle)
    assert set(result["files"]) | {"manifest.json"} == {file.name for file in bundle.iterdir()}
    state = torch.load(GOLDEN["v2_per_rank"] / "model.pt", weights_only=True)
    buffers = ("shuffle_index", "tucker_core_u", "tucker_core_v")
    total = sum(tensor.numel() for name, tensor in state.items() if not name.endswith(buffers))
    parameters = result["parameters"]
    assert parameters["total"] == total == parameters["dense"] + parameters["keys"] + parameters["rows"]
    assert parameters["activated"] == total - parameters["rows"] + 3 * 8 * 56
    assert result["parity"]["passed"]
    cases = {check["case"] for check in result["parity"]["checks"]}
    assert {"prefill 1x1", "prefill 3x9", "decode 3x1, past 9", "left-padded 3x8"} <= cases


def test_fp16_is_judged_by_the_error_once_both_sides_use_the_same_rows(exported: Exported) -> None:
    bundle, result = exported("v2_shared_ring", "--dtype", "fp16", "--table-dtype", "bf16")
    checks = result["parity"]["checks"]
    swapped = [check for check in checks if check["status"] == "ambiguous"]
    assert swapped, "this model swaps rows in fp16: without the second look the check would fail"
    for check in swapped:
        assert check["max_abs"] > check["atol"] >= check["max_abs_same_rows"]
        assert check["swaps"][0]["only_runtime"] != check["swaps"][0]["only_reference"]
    inputs = {value.name: value.type.tensor_type.elem_type for value in graph(bundle).graph.input}
    assert inputs["past_key_values.0.key"] == onnx.TensorProto.FLOAT16


def test_bf16_tables_with_fp32_arithmetic_pass_the_fp32_tolerance(exported: Exported) -> None:
    bundle, result = exported("v2_per_rank", "--table-dtype", "bf16", "--opset", "23")
    assert {check["status"] for check in result["parity"]["checks"]} == {"pass"}
    assert {entry.domain: entry.version for entry in graph(bundle).opset_import}[""] == 23
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert (manifest["dtype"], manifest["table_dtype"]) == ("fp32", "bf16")


def test_bf16_arithmetic_is_refused_with_the_nearest_alternative(tmp_path: Path) -> None:
    result = run_command("onnx", GOLDEN["v2_per_rank"], "-o", tmp_path / "out", "--dtype", "bf16")
    assert result.exit_code == 5
    assert "--table-dtype bf16" in result.stderr
    assert "--target gpu" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_bf16_bundle_for_gpus_is_written_unvalidated_and_refused_by_the_cpu_runtime(exported: Exported) -> None:
    bundle, result = exported("v2_per_rank", "--dtype", "bf16", "--target", "gpu")
    assert result["parity"] is None
    types = {value.type.tensor_type.elem_type for value in graph(bundle).graph.input[2:]}
    assert types == {onnx.TensorProto.BFLOAT16}
    refused = run_command("generate", bundle, "--prompt-ids", "1,2")
    assert refused.exit_code == 5
    assert "GPU" in refused.stderr


def test_the_query_layout_of_an_official_checkpoint_can_be_overridden(exported: Exported) -> None:
    bundle, result = exported("v2_per_rank", "--query-layout", "per-rank")
    assert result["parity"]["passed"]
    assert json.loads((bundle / "manifest.json").read_text())["query_layout"] == "per_rank"
    authors = expected("v2_per_rank")
    feed = prefill_feed(authors["input_ids"], LAYERS, HEADS, HEAD_SIZE)
    assert np.abs(onnxruntime_step(bundle / "model.onnx")(feed)["logits"] - authors["logits"]).max() > 0.1


def test_dry_run_estimates_and_writes_nothing(tmp_path: Path) -> None:
    result = run_command("onnx", GOLDEN["v2_per_rank"], "-o", tmp_path / "out", "--dry-run", "--json")
    estimate = json.loads(result.stdout)
    weights = (GOLDEN["v2_per_rank"] / "model.pt").stat().st_size
    assert result.exit_code == 0
    assert estimate["disk_bytes"] > weights / 2
    assert estimate["peak_memory_bytes"] > 10**8
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_records_source_config_and_stored_bytes(exported: Exported) -> None:
    bundle, _ = exported("v2_shared_ring")
    manifest = json.loads((bundle / "manifest.json").read_text())
    fields = yaml.safe_load((GOLDEN["v2_shared_ring"] / "config.yaml").read_text())["model"]
    assert manifest["config"]["memory"]["topk"] == fields["mem_knn"]
    assert manifest["source"]["format"] == "official"
    assert manifest["logits_columns"]["size"] == fields["embedding_size"]
    assert manifest["bytes"]["rows"] == 768 * (32 + 24) * 4
    assert manifest["bytes"]["map"] == 3 * 19**2 * 2**2
