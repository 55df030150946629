"""OLMoE checkpoints of Hugging Face: equal to transformers, and strict about what is not understood."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command import run_command
from tests.onnx.sessions import greedy_tokens, openvino_step, prefill_feed
from umv2_export.checkpoint import open_checkpoint
from umv2_export.checkpoint.own_format import save_checkpoint
from umv2_export.config import ExpertsConfig
from umv2_export.errors import InputRejected, Unsupported
from umv2_export.generation import generate
from umv2_export.model import reference_model
from umv2_export.model.initialization import random_tensors
from umv2_export.presets import PRESETS
from umv2_export.runtimes import StepInput, empty_cache
from umv2_export.runtimes.torch import TorchRuntime

CASES = sorted(path for path in (Path(__file__).parents[1] / "data" / "olmoe").iterdir() if path.is_dir())

each_case = pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)


@each_case
def test_the_reference_computes_what_transformers_computes(case: Path) -> None:
    expected = np.load(case / "expected.npz")
    checkpoint = open_checkpoint(case)
    runtime = TorchRuntime(reference_model(checkpoint))
    ids = expected["input_ids"]
    output = runtime.run(StepInput(ids, np.ones_like(ids), empty_cache(checkpoint.config, len(ids))))
    np.testing.assert_allclose(output.logits, expected["logits"], rtol=0, atol=2e-5)
    found = generate(runtime, checkpoint.config, [ids[0].tolist()], len(expected["greedy"]), stop_at_eos=False)
    assert found.token_ids[0] == expected["greedy"].tolist()


@each_case
@pytest.mark.parametrize("form", ["standard", "contrib"])
def test_both_exported_forms_compute_what_transformers_computes(case: Path, form: str, tmp_path: Path) -> None:
    result = run_command("onnx", case, "-o", tmp_path / "bundle", "--moe-form", form, "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["parity"]["passed"]
    counts = facts["parameters"]
    assert counts["total"] == counts["dense"] + counts["experts"]
    assert counts["activated"] < counts["total"]
    expected = np.load(case / "expected.npz")
    prompt = ",".join(str(token) for token in expected["input_ids"][0])
    generated = run_command("generate", tmp_path / "bundle", "--prompt-ids", prompt, "--max-new-tokens", "8", "--json")
    wanted = expected["greedy"].tolist()
    assert json.loads(generated.stdout)["token_ids"] == wanted[: len(json.loads(generated.stdout)["token_ids"])]


@each_case
def test_experts_in_standard_ops_run_in_openvino(case: Path, tmp_path: Path) -> None:
    export = ("onnx", case, "-o", tmp_path / "bundle", "--inline-functions", "--no-validate")
    assert run_command(*export).exit_code == 0
    expected = np.load(case / "expected.npz")
    step = openvino_step(tmp_path / "bundle" / "model.onnx")
    heads = open_checkpoint(case).config.kv_heads
    feed = prefill_feed(expected["input_ids"][:1], layers=2, heads=heads, head_size=8)
    np.testing.assert_allclose(step(feed)["logits"], expected["logits"][:1], rtol=0, atol=2e-4)
    greedy = greedy_tokens(step, feed, vocab_size=61, count=8)
    np.testing.assert_array_equal(greedy[0], expected["greedy"])


def test_a_converted_checkpoint_is_native_and_the_same_model(tmp_path: Path) -> None:
    # `convert` takes any format: what it writes has each expert by itself too.
    assert run_command("convert", CASES[0], "-o", tmp_path / "native").exit_code == 0
    first, second = open_checkpoint(CASES[0]), open_checkpoint(tmp_path / "native")
    assert (second.format, second.config) == ("native", first.config)
    for name in first.tensors:
        assert torch.equal(first.read(name), second.read(name))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return Path(shutil.copytree(CASES[0], tmp_path / "copy"))


def edit(checkpoint: Path, **fields: Any) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"hidden_act": "gelu"}, Unsupported, "hidden_act"),
        ({"attention_bias": True}, Unsupported, "attention_bias"),
        ({"sliding_window": 4}, Unsupported, "sliding_window"),
        ({"num_key_value_heads": 2}, InputRejected, "shape"),
        ({"num_key_value_heads": 3}, InputRejected, "cannot share 3 heads"),
        ({"num_key_value_heads": "all"}, InputRejected, "must be an integer"),
        ({"rope_parameters": {"rope_type": "yarn"}}, Unsupported, "rope_parameters"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, Unsupported, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear"}}, Unsupported, "rope_scaling"),
        ({"rope_scaling": {"type": "dynamic", "factor": 1.0}}, Unsupported, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "default", "type": "yarn"}}, Unsupported, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "default", "factor": 4.0}}, Unsupported, "'factor' scales"),
        ({"rope_scaling": "default"}, Unsupported, "rope_scaling"),
        ({"rope_scaling": {"rope_type": ["default"]}}, Unsupported, "rope_scaling"),
        ({"rope_scaling": {"rope_theta": 500.0}}, InputRejected, "given twice"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, InputRejected, "must be a number"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, Unsupported, "rope_parameters"),
        ({"rope_theta": 5.0}, InputRejected, "rope_theta"),
        ({"head_dim": 4}, Unsupported, "head_dim"),
        ({"num_local_experts": 5}, InputRejected, "'num_experts' and 'num_local_experts' are 6 and 5"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, Unsupported, "layer_types"),
        ({"pruned_heads": {"0": [1]}}, Unsupported, "pruned_heads"),
        ({"per_layer_config": {"0": {"num_experts_per_tok": 1}}}, Unsupported, "per_layer_config"),
        ({"partial_rotary_factor": 0.5}, Unsupported, "partial_rotary_factor"),
        ({"transformers_weights": "other.safetensors"}, Unsupported, "transformers_weights"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, Unsupported, "'gptq': quantized weights"),
        ({"quantization": {"bits": 4}}, Unsupported, "unknown field 'quantization'"),
        ({"router_version": "v2"}, Unsupported, "unknown field 'router_version'"),
        ({"eos_token_id": "end"}, InputRejected, "eos_token_id"),
        ({"eos_token_id": [0, True]}, InputRejected, "eos_token_id"),
        ({"eos_token_id": list(range(2000))}, InputRejected, "at most 1024"),
        ({"num_experts": 7}, InputRejected, "shape"),
        ({"num_experts": "six"}, InputRejected, "must be an integer"),
        ({"num_experts": 10**9}, Unsupported, "at most"),
        ({"num_experts_per_tok": 9}, InputRejected, "exceeds"),
        ({"intermediate_size": 25}, InputRejected, "shape"),
        ({"clip_qkv": -1.0}, InputRejected, "clip_qkv"),
        ({"clip_qkv": "big"}, InputRejected, "must be a number"),
        ({"norm_topk_prob": 1}, InputRejected, "true or false"),
        ({"num_hidden_layers": 1}, Unsupported, "unknown tensor"),
    ],
    ids=str,
)
def test_what_is_not_understood_is_refused(
    copy: Path, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    edit(copy, **fields)
    with pytest.raises(error, match=message):
        open_checkpoint(copy)


def spoil(copy: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors")


def test_nan_in_one_part_of_a_joined_tensor_is_refused(copy: Path, tmp_path: Path) -> None:
    spoil(copy, lambda tensors: tensors["model.layers.1.mlp.experts.3.gate_proj.weight"].__setitem__((2, 5), np.nan))
    result = run_command("onnx", copy, "-o", tmp_path / "bundle")
    assert result.exit_code == 3
    assert "experts.3.ff_proj.weight' holds NaN" in result.stderr
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("part", "shape"),
    [
        ("mlp.experts.0.up_proj", ()),
        ("mlp.experts.0.gate_proj", (24, 31)),
        ("self_attn.k_proj", (16, 32)),
        ("self_attn.q_proj", (64, 32)),
    ],
)
def test_every_part_of_a_joined_tensor_has_its_own_shape(copy: Path, part: str, shape: tuple[int, ...]) -> None:
    name = f"model.layers.0.{part}.weight"
    spoil(copy, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    with pytest.raises(InputRejected, match=f"{part}.weight' has shape"):
        open_checkpoint(copy)


def test_a_single_expert_is_exported_as_a_matrix_not_as_a_stack(tmp_path: Path) -> None:
    one = replace(PRESETS["moe-tiny-top2"], experts=ExpertsConfig(1, 1, 48))
    save_checkpoint(tmp_path / "one", one, random_tensors(one, seed=0))
    for form in ("standard", "contrib"):
        result = run_command("onnx", tmp_path / "one", "-o", tmp_path / form, "--moe-form", form)
        assert result.exit_code == 0, result.stderr


def test_an_unknown_tensor_is_refused(copy: Path) -> None:
    spoil(copy, lambda tensors: tensors.update({"model.layers.0.mlp.shared_expert.weight": torch.zeros(2)}))
    with pytest.raises(Unsupported, match="shared_expert"):
        open_checkpoint(copy)


def test_experts_are_no_job_of_the_native_ops(tmp_path: Path) -> None:
    run_command("onnx", CASES[0], "-o", tmp_path / "bundle", "--no-validate")
    result = run_command("generate", tmp_path / "bundle", "--prompt-ids", "1", "--runtime", "onnxruntime-native")
    assert result.exit_code == 5
    assert "no memory layers" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--moe-form", "contrib", "--dtype", "fp16"), 5, "fp32 only"),
        (("--moe-form", "contrib", "--inline-functions"), 2, "not a standard op"),
    ],
)
def test_forms_that_cannot_be_are_refused(arguments: tuple[str, ...], code: int, message: str, tmp_path: Path) -> None:
    result = run_command("onnx", CASES[0], "-o", tmp_path / "bundle", *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert not (tmp_path / "bundle").exists()
