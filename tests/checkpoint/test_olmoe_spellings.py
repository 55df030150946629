"""One OLMoE in every spelling that transformers saves or loads: the same tensors, and so the numbers of transformers.

What transformers 4.46 and 5.24 compute from each spelling was compared with `expected.npz` of its case: 3e-6.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command import run_command
from umv2_export.checkpoint import Checkpoint, open_checkpoint
from umv2_export.errors import InputRejected, InvalidRequest, Unsupported
from umv2_export.generation import generate
from umv2_export.model import reference_model
from umv2_export.runtimes.torch import TorchRuntime

DATA = Path(__file__).parents[1] / "data" / "olmoe"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / "plain", tmp_path / "plain"))


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / "clipped", tmp_path / "clipped"))


def edit(checkpoint: Path, **fields: Any) -> None:
    """Set fields of config.json; `...` removes one."""
    config = json.loads((checkpoint / "config.json").read_text()) | fields
    config = {name: value for name, value in config.items() if value is not ...}
    (checkpoint / "config.json").write_text(json.dumps(config))


def generation(checkpoint: Path, **fields: Any) -> None:
    (checkpoint / "generation_config.json").write_text(json.dumps(fields))


def spoil(checkpoint: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(checkpoint / "model.safetensors")), checkpoint / "model.safetensors")


def assert_same_model(found: Checkpoint, case: str) -> None:
    expected = open_checkpoint(DATA / case)
    assert found.config == expected.config
    assert found.tensors.keys() == expected.tensors.keys()
    for name in expected.tensors:
        assert torch.equal(found.read(name), expected.read(name)), name


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": {"rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}, "rope_theta": 10000.0},
        {"rope_parameters": {}},
        {"rope_parameters": None},
        {"rope_parameters": ..., "rope_theta": 10000.0},
        {"rope_parameters": ..., "rope_theta": 10000.0, "rope_scaling": None},
        {"rope_parameters": ..., "rope_scaling": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_parameters": ..., "rope_scaling": {"type": "default"}},
        {"rope_parameters": ..., "rope_scaling": {"type": "default", "rope_type": "default"}},
        {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "factor": None}},
        {"partial_rotary_factor": 1.0},
    ],
    ids=str,
)
def test_plain_rotary_embeddings_have_many_spellings(plain: Path, fields: dict[str, Any]) -> None:
    edit(plain, **fields)
    assert_same_model(open_checkpoint(plain), "plain")


def test_the_base_is_taken_from_where_it_stands(plain: Path) -> None:
    edit(plain, rope_parameters={"rope_type": "default"}, rope_theta=500.0)
    assert open_checkpoint(plain).config.rope_theta == 500.0
    edit(plain, rope_parameters={"rope_theta": 600.0}, rope_theta=...)
    assert open_checkpoint(plain).config.rope_theta == 600.0


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": ..., "torch_dtype": "bfloat16"},
        {"num_experts": ..., "num_local_experts": 6},
        {"num_key_value_heads": None},
        {"hidden_act": "swish", "head_dim": 8, "layer_types": ["full_attention"] * 2, "sliding_window": None},
        {"tie_word_embeddings": ..., "norm_topk_prob": ..., "clip_qkv": ..., "rms_norm_eps": ...},
        {"quantization_config": None},
    ],
    ids=str,
)
def test_older_and_newer_names_mean_the_same_in_silence(plain: Path, fields: dict[str, Any]) -> None:
    edit(plain, **fields)
    found = open_checkpoint(plain)
    assert_same_model(found, "plain")
    assert not found.notes


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_attn_implementation_autoset", True),
        ("_experts_implementation", "grouped_mm"),
        ("unsloth_version", "2025.3.1"),
        ("peft_version", "0.14.0.dev0"),
        ("auto_map", {"AutoConfig": "configuration.Config"}),
        ("temperature", 0.7),
        ("pretraining_tp", 1),
        ("some_feature", None),
    ],
)
def test_fields_that_change_nothing_are_let_through_with_a_note(plain: Path, name: str, value: object) -> None:
    edit(plain, **{name: value})
    result = run_command("inspect", plain, "--json")
    assert result.exit_code == 0
    assert f"note: fields of config.json that no OLMoE computes with: {name}" in result.stderr
    assert_same_model(open_checkpoint(plain), "plain")


def test_an_unknown_field_is_ignored_on_request_and_recorded(plain: Path, tmp_path: Path) -> None:
    edit(plain, my_trainer={"run": 7})
    refused = run_command("convert", plain, "-o", tmp_path / "native")
    assert refused.exit_code == 5
    assert "--ignore-field my_trainer" in refused.stderr
    assert run_command("convert", plain, "-o", tmp_path / "native", "--ignore-field", "my_trainer").exit_code == 0
    assert run_command("inspect", plain, "--ignore-field", "my_trainer").exit_code == 0
    assert open_checkpoint(tmp_path / "native").ignored_fields == ["my_trainer"]
    bundle = tmp_path / "bundle"
    assert run_command("onnx", tmp_path / "native", "-o", bundle, "--no-validate").exit_code == 0
    assert json.loads((bundle / "manifest.json").read_text())["source"]["ignored_fields"] == ["my_trainer"]
    assert_same_model(open_checkpoint(tmp_path / "native"), "plain")


@pytest.mark.parametrize(
    ("fields", "name"),
    [({}, "absent"), ({"attention_bias": True}, "attention_bias"), ({}, "num_experts_per_tok")],
)
def test_what_decides_the_function_cannot_be_ignored(plain: Path, fields: dict[str, Any], name: str) -> None:
    edit(plain, **fields)
    with pytest.raises(InvalidRequest, match=name):
        open_checkpoint(plain, ignore_fields=[name])


def test_a_field_of_another_format_is_ignored_on_request_too(tmp_path: Path) -> None:
    official = Path(shutil.copytree(DATA.parent / "official" / "v2_shared_ring", tmp_path / "official"))
    config = (official / "config.yaml").read_text()
    (official / "config.yaml").write_text(config.replace("model:\n", "model:\n  wandb_group: mine\n"))
    with pytest.raises(Unsupported, match="--ignore-field wandb_group"):
        open_checkpoint(official)
    assert open_checkpoint(official, ignore_fields=["wandb_group"]).ignored_fields == ["wandb_group"]


def fused(tensors: Tensors, layers: range = range(2)) -> Tensors:
    """Experts as transformers 5 keeps them: gate and up of all in one tensor [E, 2I, d]."""
    tensors = dict(tensors)
    for i in layers:
        prefix = f"model.layers.{i}.mlp.experts."
        gate, up, down = (
            [tensors.pop(f"{prefix}{e}.{part}_proj.weight") for e in range(6)] for part in ("gate", "up", "down")
        )
        tensors[f"{prefix}gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
        tensors[f"{prefix}down_proj"] = torch.stack(down)
    return tensors


@pytest.mark.parametrize("layers", [range(2), range(1, 2)], ids=["all layers", "one layer"])
def test_fused_experts_are_those_experts(plain: Path, layers: range) -> None:
    spoil(plain, lambda tensors: fused(tensors, layers))
    assert_same_model(open_checkpoint(plain), "plain")


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_fused_experts_of_another_axis_order_are_refused(plain: Path, name: str) -> None:
    name = f"model.layers.1.mlp.experts.{name}"

    def turned(tensors: Tensors) -> Tensors:
        tensors = fused(tensors)
        return tensors | {name: tensors[name].transpose(1, 2).contiguous()}

    spoil(plain, turned)
    with pytest.raises(InputRejected, match=f"{name}' has shape"):
        open_checkpoint(plain)


def test_an_expert_that_is_stored_twice_is_refused(plain: Path) -> None:
    spoil(plain, lambda tensors: fused(tensors) | {k: v for k, v in tensors.items() if ".experts.0.up_proj" in k})
    with pytest.raises(InputRejected, match="hold the same expert"):
        open_checkpoint(plain)


def test_a_tied_head_that_equals_the_embedding_is_accepted(tied: Path) -> None:
    spoil(tied, lambda tensors: tensors | {HEAD: tensors[EMBEDDING].clone()})
    assert_same_model(open_checkpoint(tied), "clipped")


def test_a_tied_head_in_place_of_the_embedding_is_the_embedding(tied: Path) -> None:
    spoil(tied, lambda tensors: {HEAD if name == EMBEDDING else name: value for name, value in tensors.items()})
    assert_same_model(open_checkpoint(tied), "clipped")


@pytest.mark.parametrize(
    "change", [lambda head: head.index_fill(0, torch.tensor([60]), 0.5), lambda head: head[:60]], ids=["row", "shape"]
)
def test_a_tied_head_that_differs_is_refused(tied: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    spoil(tied, lambda tensors: tensors | {HEAD: change(tensors[EMBEDDING]).clone()})
    with pytest.raises(InputRejected, match=r"lm_head\.weight' differs"):
        open_checkpoint(tied)


def test_tensors_of_the_base_model_lack_its_prefix(tied: Path) -> None:
    spoil(tied, lambda tensors: {name.removeprefix("model."): value for name, value in tensors.items()})
    assert_same_model(open_checkpoint(tied), "clipped")


@pytest.mark.parametrize(
    "wrap",
    [lambda name: f"module._orig_mod.{name}", lambda name: name.replace(".mlp.", "._checkpoint_wrapped_module.mlp.")],
    ids=["whole", "within"],
)
def test_wrappers_in_names_are_read_through_with_a_note(plain: Path, wrap: Callable[[str], str]) -> None:
    spoil(plain, lambda tensors: {wrap(name): value for name, value in tensors.items()})
    found = open_checkpoint(plain)
    assert_same_model(found, "plain")
    assert any("without the wrappers" in note for note in found.notes)


FREQUENCIES = 10000.0 ** (-torch.arange(4) / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["model.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"])
def test_stored_frequencies_that_follow_from_the_base_are_dropped(plain: Path, name: str, dtype: torch.dtype) -> None:
    spoil(plain, lambda tensors: tensors | {name: FREQUENCIES.to(dtype)})
    assert_same_model(open_checkpoint(plain), "plain")


@pytest.mark.parametrize("stored", [FREQUENCIES / 2, 5000.0 ** (-torch.arange(4) / 4), FREQUENCIES[:3]])
def test_stored_frequencies_of_another_base_or_scale_are_refused(plain: Path, stored: torch.Tensor) -> None:
    spoil(plain, lambda tensors: tensors | {"model.rotary_emb.inv_freq": stored.clone()})
    with pytest.raises(InputRejected, match="not the frequencies of rope_theta 10000"):
        open_checkpoint(plain)


def test_one_file_comes_before_a_stale_index(plain: Path) -> None:
    index = {"weight_map": {HEAD: "model-00001-of-00002.safetensors"}}
    (plain / "model.safetensors.index.json").write_text(json.dumps(index))
    found = open_checkpoint(plain)
    assert_same_model(found, "plain")
    assert any("model.safetensors is read" in note for note in found.notes)


def test_several_files_without_their_index_are_named(plain: Path) -> None:
    (plain / "model.safetensors").rename(plain / "model-00001-of-00002.safetensors")
    with pytest.raises(InputRejected, match="model-00001-of-00002"):
        open_checkpoint(plain)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickled_weights_are_refused_with_the_line_that_converts(plain: Path, name: str) -> None:
    (plain / "model.safetensors").rename(plain / name)
    result = run_command("inspect", plain)
    assert result.exit_code == 5
    assert "only safetensors are read" in result.stderr
    assert f"M.from_pretrained('{plain}'" in result.stderr


@pytest.mark.parametrize(
    "fields",
    [{"model_type": "llama"}, {"model_type": ["olmoe"]}, {"model_type": ..., "architectures": ["LlamaForCausalLM"]}],
    ids=str,
)
def test_another_model_of_hugging_face_is_named(plain: Path, fields: dict[str, Any]) -> None:
    edit(plain, **fields)
    with pytest.raises(Unsupported, match=r"'model_type' is|'architectures' is"):
        open_checkpoint(plain)


def test_the_architecture_tells_what_the_type_does_not(plain: Path) -> None:
    edit(plain, model_type=...)
    assert_same_model(open_checkpoint(plain), "plain")


def test_an_adapter_beside_the_weights_is_refused(plain: Path) -> None:
    (plain / "adapter_config.json").write_text("{}")
    with pytest.raises(Unsupported, match="adapter"):
        open_checkpoint(plain)


def greedy(checkpoint: Path) -> list[int]:
    """Our continuation of the prompt of the case, with end tokens."""
    found, expected = open_checkpoint(checkpoint), np.load(checkpoint / "expected.npz")
    runtime = TorchRuntime(reference_model(found))
    return generate(runtime, found.config, [expected["input_ids"][0].tolist()], 8).token_ids[0]


# Greedy, without end tokens: 6 12 6 12 6 5 37 5. What transformers 4.46 and 5.24 stop at is told by each case.
@pytest.mark.parametrize(
    ("fields", "file", "length"),
    [
        ({"eos_token_id": [0, 5]}, None, 6),
        ({"eos_token_id": 12}, None, 2),
        ({"eos_token_id": 12}, {"eos_token_id": [0, 37]}, 7),
        ({"eos_token_id": 12}, {"eos_token_id": 5}, 6),
        ({"eos_token_id": 12}, {"pad_token_id": 1}, 8),
        ({"eos_token_id": 12}, {"eos_token_id": None}, 8),
        ({"eos_token_id": ...}, None, 8),
    ],
)
def test_generation_ends_where_transformers_ends(
    plain: Path, fields: dict[str, Any], file: dict[str, Any] | None, length: int
) -> None:
    edit(plain, **fields)
    if file is not None:
        generation(plain, **file)
    assert greedy(plain) == [6, 12, 6, 12, 6, 5, 37, 5][:length]


def test_all_end_tokens_reach_the_native_format(plain: Path, tmp_path: Path) -> None:
    generation(plain, eos_token_id=[0, 37, 5, 37])
    assert run_command("convert", plain, "-o", tmp_path / "native").exit_code == 0
    config = open_checkpoint(tmp_path / "native").config
    assert config.end_tokens == {0, 37, 5}
    assert config == open_checkpoint(plain).config


def test_one_end_token_is_written_as_before(tmp_path: Path) -> None:
    assert "more_eos_token_ids" not in open_checkpoint(DATA / "plain").config.as_dict()


def test_settings_of_generation_that_greedy_ignores_are_noted(plain: Path) -> None:
    generation(plain, eos_token_id=0, repetition_penalty=1.3, temperature=0.6, num_beams=1)
    (note,) = open_checkpoint(plain).notes
    assert "does not follow repetition_penalty of generation_config.json" in note
