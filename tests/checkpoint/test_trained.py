"""Checkpoints as the authors' trainer writes them, against the outputs of the authors' own modules."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.checkpoint.variants import changed_tensors, copy_golden, set_fields
from tests.command import run_command
from tests.golden import TRAINED_CASES
from umv2_export.checkpoint import Checkpoint, open_checkpoint
from umv2_export.checkpoint.official_fields import IGNORED, REQUIRED, SUPPORTED
from umv2_export.config import count_parameters
from umv2_export.errors import InputRejected, Unsupported
from umv2_export.model import reference_model
from umv2_export.model.transformer import empty_past

TRAINED = {case.name: case for case in TRAINED_CASES}
DOCS = Path(__file__).parents[2] / "docs" / "checkpoints.md"

# The authors' fp32 and ours differ by 1e-6; a wrong row moves a logit by 1e-2 and more.
ATOL = 1e-5

CAP = {"rowcol_cap_128": 128}


def opened(name: str) -> Checkpoint:
    return open_checkpoint(TRAINED[name], row_topk=CAP.get(name))


def copied(folder: Path, name: str, **fields: object) -> Path:
    checkpoint = copy_golden(folder, TRAINED[name])
    set_fields(checkpoint, **fields)
    return checkpoint


@pytest.mark.parametrize("name", sorted(TRAINED))
def test_the_reference_computes_what_the_authors_code_computes(name: str) -> None:
    model = reference_model(opened(name))
    with np.load(TRAINED[name] / "expected.npz") as arrays:
        authors = dict(arrays)
    ids = torch.from_numpy(authors["input_ids"])
    with torch.inference_mode():
        output = model(ids, torch.ones_like(ids), empty_past(model.config, len(ids)))
        np.testing.assert_allclose(output.logits, authors["logits"], rtol=0, atol=ATOL)
        tokens, length = [], ids.shape[1]
        for _ in range(8):
            tokens.append(output.logits[:, -1, : model.config.vocab_size].argmax(-1, keepdim=True))
            length += 1
            output = model(tokens[-1], torch.ones((len(ids), length), dtype=torch.int64), output.present)
    np.testing.assert_array_equal(torch.cat(tokens, 1), authors["greedy"])


def test_a_memory_layer_that_is_never_added_is_left_out_and_named() -> None:
    checkpoint = opened("insert_overlap")
    memory = checkpoint.config.memory
    assert (memory.placements, memory.pool_positions, memory.pool_layers) == (((1, 1),), (1,), 2)
    assert memory.offset(0) == 400
    assert memory.pool_rows == 800
    assert not [name for name in checkpoint.tensors if name.startswith("transformer.mem_blocks.1.")]
    (note,) = checkpoint.notes
    assert note.startswith("memory layer 0 is never added: it reads at block 0 and waits for block 2")


def test_inspect_and_the_export_say_which_memory_layer_is_never_added(tmp_path: Path) -> None:
    said = "memory layer 0 is never added"
    assert said in run_command("inspect", TRAINED["insert_overlap"]).stdout
    dry = run_command("onnx", TRAINED["insert_overlap"], "-o", tmp_path / "bundle", "--dry-run", "--json")
    assert said in dry.stderr


def test_a_converted_checkpoint_still_says_which_memory_layer_is_never_added(tmp_path: Path) -> None:
    assert run_command("convert", TRAINED["insert_overlap"], "-o", tmp_path / "native").exit_code == 0
    checkpoint = open_checkpoint(tmp_path / "native")
    assert list(checkpoint.never_added) == list(opened("insert_overlap").never_added)
    assert list(checkpoint.notes) == list(checkpoint.never_added)


@pytest.mark.parametrize(
    ("way", "added"),
    [
        ("0:1/1:1/2:2", (1, 2)),  # the second reads before the first is added, at the very block
        ("0:0/1:2/2:2", (0, 2)),
        ("2:2/0:1", (0, 1)),
        ("1:0/2:2", (1,)),  # added before it was read
        ("0:7/1:1", (1,)),  # added after a block that is not there
        ("5:5/1:1", (1,)),
        ("0:2/1:7", ()),
    ],
)
def test_one_output_waits_at_a_time(tmp_path: Path, way: str, added: tuple[int, ...]) -> None:
    from umv2_export.checkpoint.insertion import read_insertion

    insertion = read_insertion(way, 3)
    assert insertion.added == added
    assert len(insertion.notes) == insertion.layers - len(added)


def test_two_layers_that_read_at_one_block_are_refused() -> None:
    from umv2_export.checkpoint.insertion import read_insertion

    with pytest.raises(Unsupported, match="two memory layers read at one block"):
        read_insertion("0:0/0:1", 3)


def test_a_model_none_of_whose_memory_layers_is_added_is_dense(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(copied(tmp_path, "insert_overlap", mem_insert_way="0:7/1:0"))
    assert checkpoint.config.memory.kind == "none"
    assert count_parameters(checkpoint.config).rows == 0


def test_our_own_configuration_holds_no_output_that_is_never_added() -> None:
    config = opened("insert_overlap").config
    overlapping = replace(config.memory, placements=((0, 2), (1, 1)), pool_layers=None, pool_positions=None)
    with pytest.raises(Unsupported, match="it would never add the earlier one"):
        replace(config, memory=overlapping)


def test_the_padding_address_exists_only_with_vertical_parallel_and_more_addresses_than_rows(tmp_path: Path) -> None:
    assert opened("vp_padding_address").config.memory.padding_row == 108
    assert opened("gqa").config.memory.padding_row is None
    plain = copied(tmp_path, "vp_padding_address", mem_key_expand_time=1)
    # Its tensors do not fit any more; what matters is read before them.
    with pytest.raises(InputRejected, match="has shape"):
        open_checkpoint(plain)


def test_more_than_128_rows_need_a_choice_between_two_readings() -> None:
    with pytest.raises(Unsupported) as caught:
        open_checkpoint(TRAINED["rowcol_cap_128"])
    message = caught.value.message()
    for part in ("field 'mem_knn' is 200", "--row-topk 200", "--row-topk 128", "loss on a text"):
        assert part in message


def test_parity_takes_the_reading_that_the_bundle_records(tmp_path: Path) -> None:
    exported = run_command(
        "onnx", TRAINED["rowcol_cap_128"], "-o", tmp_path / "b", "--row-topk", "128", "--no-validate"
    )
    assert exported.exit_code == 0, exported.stderr
    result = run_command("parity", tmp_path / "b", "--reference", TRAINED["rowcol_cap_128"])
    assert result.exit_code == 0, result.stderr


def test_parity_compares_a_cap_that_the_checkpoint_tells(tmp_path: Path) -> None:
    exported = run_command("onnx", TRAINED["gqa"], "-o", tmp_path / "b", "--row-topk", "4", "--no-validate")
    assert exported.exit_code == 0, exported.stderr
    against = ("parity", tmp_path / "b", "--reference", TRAINED["gqa"])
    refused = run_command(*against)
    assert refused.exit_code == 3
    assert "was not made from this checkpoint" in refused.stderr
    assert run_command(*against, "--row-topk", "4").exit_code == 0


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("gqa", {"block_type": "llama"}, "field 'block_type' is 'llama'"),
        ("gqa", {"alibi": True, "rope": False}, "field 'alibi' is True"),
        ("gqa", {"include_bias": True}, "field 'include_bias' is True"),
        ("gqa", {"layer_norm_type": "default"}, "field 'layer_norm_type' is 'default'"),
        ("gqa", {"norm_after": True}, "field 'norm_after' is True"),
        ("gqa", {"mem_type": "peer"}, "field 'mem_type' is 'peer'"),
        ("gqa", {"moe_interleave": True}, "field 'moe_interleave' is True"),
        ("moe_baseline", {"moe_shared_expert": True}, "field 'moe_shared_expert' is True"),
        ("moe_baseline", {"moe_dropless": False}, "field 'moe_dropless' is False"),
        ("moe_baseline", {"mem_insert_way": "full"}, "memory layers .* beside experts"),
        ("memory_plus", {"vertical_parallel": True}, "vertical_parallel with mem_type 'memory_plus'"),
        ("v1_script", {"vertical_parallel": True}, "vertical_parallel with mem_type 'ultramem_v1'"),
        ("rowcol_cap_128", {}, "field 'mem_knn' is 200, above 128"),
        ("readme_n_kv_heads", {"mem_head": 4}, "field 'mem_head' is 4 without mem_q_for_each_tucker_rank"),
    ],
)
def test_what_is_not_implemented_is_named_before_any_tensor_is_read(
    tmp_path: Path, name: str, fields: dict[str, object], said: str
) -> None:
    checkpoint = copied(tmp_path, name, **fields)
    (checkpoint / "model.pt").write_bytes(b"no tensors here")
    with pytest.raises(Unsupported, match=said):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("gqa", "n_kv_heads", 3),
        ("gqa", "clip_qkv", -1),
        ("gqa", "mem_vdim", None),
        ("gqa", "mem_share_ratio", "half"),
        ("v1_script", "mem_vdim", None),
        ("memory_plus", "mem_kdim", 0),
        ("moe_baseline", "moe_num_experts", None),
        ("moe_baseline", "moe_top_k", 9),
    ],
)
def test_a_field_out_of_range_is_named_with_its_file_before_any_tensor_is_read(
    tmp_path: Path, name: str, field: str, value: object
) -> None:
    checkpoint = copied(tmp_path, name, **{field: value})
    (checkpoint / "model.pt").write_bytes(b"no tensors here")
    with pytest.raises(InputRejected) as caught:
        open_checkpoint(checkpoint)
    assert str(caught.value.where) == str(checkpoint / "config.yaml")


EXPERTS = "transformer.blocks.1.ffn.experts.mlp."


@pytest.mark.parametrize("name", [EXPERTS + "w2", "transformer.blocks.1.ffn.router.layer.weight"])
def test_a_tensor_of_experts_that_is_missing_or_cut_is_called_by_the_authors_name(tmp_path: Path, name: str) -> None:
    checkpoint = copied(tmp_path, "moe_baseline")
    with changed_tensors(checkpoint) as state:
        state[name] = state[name][: len(state[name]) // 2].clone()
    with pytest.raises(InputRejected, match=re.escape(f"'{name}' has shape")):
        open_checkpoint(checkpoint)
    with changed_tensors(checkpoint) as state:
        del state[name]
    with pytest.raises(InputRejected, match=re.escape(f"'{name}' missing")):
        open_checkpoint(checkpoint)


def test_a_further_matrix_of_experts_is_refused(tmp_path: Path) -> None:
    checkpoint = copied(tmp_path, "moe_baseline")
    with changed_tensors(checkpoint) as state:
        state[EXPERTS + "w3"] = state[EXPERTS + "w1"].clone()
    with pytest.raises(Unsupported, match=re.escape(f"unknown tensor '{EXPERTS}w3'")):
        open_checkpoint(checkpoint)


def test_inspect_takes_the_reading_that_its_refusal_asks_for() -> None:
    result = run_command("inspect", TRAINED["rowcol_cap_128"], "--row-topk", "128", "--json")
    assert json.loads(result.stdout)["config"]["memory"]["row_topk"] == 128


def test_heads_of_keys_and_multi_query_attention_may_not_contradict(tmp_path: Path) -> None:
    with pytest.raises(InputRejected, match="contradict each other"):
        open_checkpoint(copied(tmp_path, "gqa", multi_query_attention=True))


@pytest.mark.parametrize("name", ["insert_overlap", "memory_plus", "moe_baseline", "vp_padding_address"])
def test_a_converted_checkpoint_is_the_same_model(tmp_path: Path, name: str) -> None:
    result = run_command("convert", TRAINED[name], "-o", tmp_path / "native")
    assert result.exit_code == 0, result.stderr
    converted, original = open_checkpoint(tmp_path / "native"), opened(name)
    assert converted.config == original.config
    assert converted.tensors.keys() == original.tensors.keys()
    for tensor, read in original.tensors.items():
        assert torch.equal(converted.read(tensor), read.read()), tensor


@pytest.mark.parametrize("field", ["convert2fp32", "rope_full_precision"])
def test_sixteen_bits_are_refused_where_the_authors_code_would_compute_in_them(tmp_path: Path, field: str) -> None:
    checkpoint = copied(tmp_path, "clip_qkv", **{field: False})
    result = run_command("onnx", checkpoint, "-o", tmp_path / "bundle", "--dtype", "fp16")
    assert result.exit_code == 5
    assert f"{field}: false" in result.stderr
    assert "--dtype fp32" in result.stderr


def documented_fields() -> dict[str, str]:
    """Field -> the rest of its row, of the table of fields in the docs."""
    section = DOCS.read_text(encoding="utf-8").partition("### Fields that are read")[2].partition("\n#")[0]
    rows = re.findall(r"^\| `([a-z0-9_`, ]+)` \|(.*)$", section, re.MULTILINE)
    return {name.strip("` "): rest for names, rest in rows for name in names.split(",")}


def test_every_field_that_is_read_names_cases_that_the_suite_holds() -> None:
    documented = documented_fields()
    assert sorted(SUPPORTED - documented.keys()) == []
    known = {case.name for case in TRAINED_CASES} | {
        p.name for p in (TRAINED_CASES[0].parents[1] / "official").iterdir()
    }
    for field in SUPPORTED:
        cases = re.findall(r"`([a-z0-9_]+)`", documented[field].rpartition("|")[0].rpartition("|")[2])
        assert cases, field
        assert set(cases) <= known, field


def test_every_field_of_a_trained_configuration_belongs_to_a_class() -> None:
    fields = yaml.safe_load((TRAINED["gqa"] / "config.yaml").read_text())["model"]
    experts = {"moe_interleave", "moe_dropless", "moe_mlp_impl", "moe_shared_expert"}
    assert fields.keys() - SUPPORTED - IGNORED - REQUIRED.keys() == experts
