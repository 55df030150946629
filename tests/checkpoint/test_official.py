"""The authors' format: what is read, and that nothing is guessed, executed or copied."""

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.variants import (
    GOLDEN,
    PRE_VALUES,
    VALUES,
    changed_tensors,
    copy_golden,
    load_golden,
    mapped_file,
    read_fields,
    remove_field,
    set_fields,
    split_into_ranks,
)
from tests.limits import resident_bytes, within_limits
from umv2_export.checkpoint import checkpoint as checkpoint_module
from umv2_export.checkpoint import open_checkpoint
from umv2_export.checkpoint.official_fields import IGNORED, REQUIRED
from umv2_export.errors import InputRejected, Unsupported

FULL = ((0, 0), (1, 1), (2, 2))

# By hand from config.yaml: visible side n1 = int(sqrt(n0^2 * M * rho)), stored side n = e * n1, offset = layer * n0^2.
DERIVED_SIZES = {
    "v1_skip_layer": {
        "kind": "ultramem_v1",
        "placements": ((0, 1), (2, 2)),
        "pool_rows": 400,
        "visible_side": 20,
        "stored_side": 40,
        "offsets": [0, 0],
        "value_groups": 4,
        "heads": 2,
        "queries_per_side": 1,
        "owns_its_rows": False,
    },
    "v2_expanded_keys": {
        "placements": FULL,
        "pool_rows": 768,
        "visible_side": 22,
        "stored_side": 44,
        "offsets": [0, 256, 512],
        "owns_its_rows": False,
    },
    "v2_glu_two_heads": {
        "placements": FULL,
        "visible_side": 16,
        "stored_side": 16,
        "heads": 2,
        "hits": 12,
        "activation": "gelu",
        "owns_its_rows": True,
    },
    "v2_insert_map": {
        "placements": ((0, 0), (2, 2)),
        "pool_rows": 512,
        "visible_side": 16,
        "stored_side": 16,
        "offsets": [0, 256],
        "owns_its_rows": True,
    },
    "v2_no_pre_values": {"placements": FULL, "pre_value_dim": 0, "visible_side": 16, "owns_its_rows": True},
    "v2_per_rank": {
        "kind": "ultramem_v2",
        "placements": FULL,
        "visible_side": 16,
        "queries_per_side": 2,
        "query_layout": "released",
        "tucker_rank": 2,
        "tucker_cores": 2,
        "owns_its_rows": True,
    },
    "v2_shared_ring": {
        "placements": FULL,
        "pool_rows": 768,
        "visible_side": 19,
        "visible_rows": 361,
        "stored_side": 19,
        "offsets": [0, 256, 512],
        "row_topk": 12,
        "topk": 12,
        "owns_its_rows": False,
    },
}


@pytest.mark.parametrize("name", DERIVED_SIZES)
def test_sizes_follow_from_the_config_as_in_the_released_code(name: str) -> None:
    memory = open_checkpoint(GOLDEN[name]).config.memory
    derived = {
        key: [memory.offset(layer) for layer in range(memory.layers)] if key == "offsets" else getattr(memory, key)
        for key in DERIVED_SIZES[name]
    }
    assert derived == DERIVED_SIZES[name]


def test_every_golden_case_has_its_sizes_worked_out() -> None:
    assert set(DERIVED_SIZES) == set(GOLDEN)


def test_sizes_outside_the_memory_are_those_of_the_config() -> None:
    config = open_checkpoint(GOLDEN["v2_expanded_keys"]).config
    assert (config.hidden_size, config.num_layers, config.num_heads, config.head_size) == (64, 3, 4, 16)
    assert (config.vocab_size, config.embedding_size, config.tie_embeddings) == (250, 256, False)
    assert (config.max_sequence_length, config.rope_theta, config.norm_eps) == (256, 10000.0, 1e-5)
    assert (config.eos_token_id, config.pad_token_id) == (0, 1)


def test_the_ffn_size_is_half_of_mlp_hidden_size() -> None:
    assert open_checkpoint(GOLDEN["v2_shared_ring"]).config.ffn_size == 80


def test_the_ffn_size_follows_from_mlp_ratio_where_mlp_hidden_size_is_null(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    set_fields(official, mlp_hidden_size=None, mlp_ratio=2.5)
    assert open_checkpoint(official).config.ffn_size == 80


def test_v1_ignores_the_fields_that_only_v2_reads(tmp_path: Path) -> None:
    official = copy_golden(tmp_path, "v1_skip_layer")
    set_fields(official, mem_share_ratio=0.25, mem_key_expand_time=3, mem_q_for_each_tucker_rank=False)
    assert open_checkpoint(official).config == open_checkpoint(GOLDEN["v1_skip_layer"]).config


@pytest.mark.parametrize("name", GOLDEN)
def test_every_tensor_is_the_one_that_torch_reads(name: str) -> None:
    checkpoint = open_checkpoint(GOLDEN[name])
    expected = load_golden(name)
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(checkpoint.read(key), tensor) for key, tensor in expected.items())


def test_the_query_layout_can_be_chosen() -> None:
    memory = open_checkpoint(GOLDEN["v2_per_rank"], query_layout="per_rank").config.memory
    assert memory.query_layout == "per_rank"


# Fields.


@pytest.mark.parametrize("field", sorted(REQUIRED))
def test_a_required_field_with_another_value_is_refused_by_name(tmp_path: Path, field: str) -> None:
    official = copy_golden(tmp_path)
    allowed = REQUIRED[field][0]
    set_fields(official, **{field: not allowed if isinstance(allowed, bool) else 7})
    with pytest.raises(Unsupported, match=rf"field '{field}' is (True|False|7)"):
        open_checkpoint(official)


@pytest.mark.parametrize(("field", "value"), [("alibi", 0), ("rope", 1), ("block_group_size", True), ("rope", "true")])
def test_a_required_field_with_the_right_value_in_another_type_is_refused(
    tmp_path: Path, field: str, value: object
) -> None:
    official = copy_golden(tmp_path)
    set_fields(official, **{field: value})
    with pytest.raises(Unsupported, match=f"field '{field}'"):
        open_checkpoint(official)


@pytest.mark.parametrize("field", sorted(REQUIRED))
def test_a_missing_required_field_is_refused_by_name(tmp_path: Path, field: str) -> None:
    official = copy_golden(tmp_path)
    remove_field(official, field)
    with pytest.raises(InputRejected, match=f"field '{field}' is missing"):
        open_checkpoint(official)


@pytest.mark.parametrize(
    "field",
    [
        *("d_model", "n_layers", "n_heads", "mlp_hidden_size", "vocab_size", "weight_tying", "rope_theta"),
        *("max_sequence_length", "mem_type", "mem_knum", "mem_kdim", "mem_vdim", "mem_pre_vdim", "mem_knn", "mem_head"),
        *("mem_insert_way", "mem_share_ratio", "mem_value_expand_time", "mem_key_expand_time"),
        *("mem_q_for_each_tucker_rank", "mem_use_glu_act"),
    ],
)
def test_a_missing_size_is_refused_by_name(tmp_path: Path, field: str) -> None:
    official = copy_golden(tmp_path)
    remove_field(official, field)
    with pytest.raises(InputRejected, match=f"field '{field}' is missing"):
        open_checkpoint(official)


def test_a_field_in_no_class_is_refused_by_name(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    set_fields(official, mem_softmax_scores=True)
    with pytest.raises(Unsupported, match="unknown field 'mem_softmax_scores'"):
        open_checkpoint(official)


def test_fields_of_training_do_not_matter(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    set_fields(official, **dict.fromkeys(IGNORED, "anything"))
    assert open_checkpoint(official).config == open_checkpoint(GOLDEN["v2_shared_ring"]).config


def test_fields_of_training_may_be_missing(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    for field in IGNORED & read_fields(official).keys():
        remove_field(official, field)
    assert open_checkpoint(official).config == open_checkpoint(GOLDEN["v2_shared_ring"]).config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mem_knum", 0),
        ("mem_knum", -3),
        ("mem_knum", True),
        ("mem_knum", "16"),
        ("mem_knum", 16.0),
        ("mem_knum", None),
        ("mem_share_ratio", 1.5),
        ("mem_share_ratio", float("nan")),
        ("mem_share_ratio", float("inf")),
        ("rope_theta", 0),
        ("rope_theta", 10**400),
        ("weight_tying", 1),
        ("mem_insert_way", "0:0/"),
        ("mem_insert_way", "all"),
        ("mem_insert_way", 7),
        ("mem_pre_vdim", -1),
        ("n_heads", 5),
        ("embedding_size", 249),
        ("mlp_hidden_size", 161),
    ],
    ids=lambda part: str(part)[:20],
)
def test_a_value_out_of_range_is_rejected(tmp_path: Path, field: str, value: object) -> None:
    official = copy_golden(tmp_path)
    set_fields(official, **{field: value})
    with pytest.raises(InputRejected):
        open_checkpoint(official)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("v2_shared_ring", "mem_type", "peer"),
        ("v2_shared_ring", "mem_value_expand_time", 3),
        ("v2_no_pre_values", "mem_use_glu_act", True),
        ("v2_shared_ring", "mem_head", 5),
    ],
)
def test_a_value_that_is_not_implemented_is_unsupported(tmp_path: Path, name: str, field: str, value: object) -> None:
    official = copy_golden(tmp_path, name)
    set_fields(official, **{field: value})
    with pytest.raises(Unsupported):
        open_checkpoint(official)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, 2]",
        "model: 7",
        "model: {1: 2}",
        "model: {",
        "model: !!python/object/apply:os.getcwd []",
        "when: 2024-13-45",
        "when: !!bool maybe",
        "when: !!int x",
        "when: !!timestamp x",
        "seed: " + "9" * 5000,
        "deep: " + "[" * 5000,
        "\0",
    ],
    ids=lambda text: text[:24],
)
def test_a_config_that_is_no_mapping_with_a_model_section_is_rejected(tmp_path: Path, text: str) -> None:
    official = copy_golden(tmp_path)
    (official / "config.yaml").write_text(text)
    with pytest.raises(InputRejected):
        open_checkpoint(official)


def test_a_config_that_is_no_text_is_rejected(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    (official / "config.yaml").write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(InputRejected):
        open_checkpoint(official)


def test_a_config_that_is_a_folder_is_rejected(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    (official / "config.yaml").unlink()
    (official / "config.yaml").mkdir()
    with pytest.raises(InputRejected):
        open_checkpoint(official)


def test_a_config_of_more_than_a_mebibyte_is_not_read(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    os.truncate(official / "config.yaml", 2**20 + 1)
    with pytest.raises(InputRejected, match="larger than 1048576 bytes"):
        open_checkpoint(official)


def test_a_value_of_nested_aliases_does_not_blow_up_the_message(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    bomb = "b0: &b0 [x,x,x,x,x,x,x,x,x,x]\n"
    bomb += "".join(f"b{i}: &b{i} [{','.join([f'*b{i - 1}'] * 10)}]\n" for i in range(1, 5))
    text = (official / "config.yaml").read_text()
    (official / "config.yaml").write_text(bomb + text.replace("d_model: 64", "d_model: *b4"))
    with pytest.raises(InputRejected) as caught:
        open_checkpoint(official)
    assert len(caught.value.message()) < 10_000


@pytest.mark.parametrize(
    "fields",
    [
        {"mem_knum": 2**31},
        {"mem_knum": 2**31 - 1},
        {"mem_knum": 40_000},
        {"mem_key_expand_time": 2**31 - 1},
        {"mem_vdim": 2**31 - 2},
        {"mem_knn": 2**31 - 1},
        {"mem_head": 2**31 - 1},
        {"mem_head": 2**31 - 1, "mem_q_for_each_tucker_rank": False},
        {"n_layers": 2**31 - 1},
        {"n_layers": 2**31 - 1, "mem_insert_way": "0:0/1:1/2:2"},
        {"d_model": 2**31 - 1},
        {"vocab_size": 2**31 - 1, "embedding_size": 2**31 - 1},
    ],
    ids=str,
)
def test_an_absurd_size_is_refused_before_anything_is_allocated(tmp_path: Path, fields: dict[str, object]) -> None:
    official = copy_golden(tmp_path)
    set_fields(official, **fields)
    with within_limits(), pytest.raises((InputRejected, Unsupported)):
        open_checkpoint(official)


# Tensors.


def test_a_tensor_that_the_config_does_not_ask_for_is_refused_by_name(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    with changed_tensors(official) as state:
        state["transformer.blocks.0.attn_norm.bias"] = torch.zeros(64)
    with pytest.raises(Unsupported, match=r"unknown tensor 'transformer\.blocks\.0\.attn_norm\.bias'"):
        open_checkpoint(official)


@pytest.mark.parametrize(
    "name", [VALUES, PRE_VALUES, "transformer.mem_blocks.1.shuffle_index", "transformer.mem_blocks.0.keys"]
)
def test_a_missing_tensor_is_refused_by_name(tmp_path: Path, name: str) -> None:
    official = copy_golden(tmp_path)
    with changed_tensors(official) as state:
        del state[name]
    with pytest.raises(InputRejected, match=f"tensor '{name}' missing"):
        open_checkpoint(official)


@pytest.mark.parametrize("leaf", ["tucker_core_uv", "tucker_core_stacked"])
def test_derived_copies_of_the_cores_are_ignored(tmp_path: Path, leaf: str) -> None:
    official = copy_golden(tmp_path)
    with changed_tensors(official) as state:
        for layer in range(3):
            state[f"transformer.mem_blocks.{layer}.{leaf}"] = torch.zeros(5)
    assert open_checkpoint(official).tensors.keys() == load_golden().keys()


def test_a_shape_that_contradicts_the_config_names_tensor_and_both_shapes(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    with changed_tensors(official) as state:
        state[VALUES] = torch.zeros(768, 31)
    with pytest.raises(InputRejected, match=rf"'{VALUES}' has shape \[768, 31\], the configuration says \[768, 32\]"):
        open_checkpoint(official)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str
)
def test_a_dtype_that_is_not_implemented_names_the_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    official = copy_golden(tmp_path)
    with changed_tensors(official) as state:
        state[VALUES] = state[VALUES].to(dtype)
    with pytest.raises(Unsupported, match=f"'{VALUES}' has dtype {dtype}"):
        open_checkpoint(official)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_of_two_bytes_are_read_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    official = copy_golden(tmp_path)
    with changed_tensors(official) as state:
        state[VALUES] = state[VALUES].to(dtype)
    assert torch.equal(open_checkpoint(official).read(VALUES), load_golden()[VALUES].to(dtype))


@pytest.mark.parametrize(
    ("position", "value"), [(0, -1), (0, 361), (5, 2**62), (None, 0)], ids=["negative", "past the end", "huge", "twice"]
)
def test_a_shuffle_index_that_is_no_permutation_is_rejected(tmp_path: Path, position: int | None, value: int) -> None:
    official = copy_golden(tmp_path)
    name = "transformer.mem_blocks.2.shuffle_index"
    with changed_tensors(official) as state:
        if position is None:
            state[name][0] = state[name][1]
        else:
            state[name][position] = value
    with pytest.raises(InputRejected, match=rf"'{name}' is not a permutation of 0\.\.360"):
        open_checkpoint(official)


def test_an_expanded_tensor_that_claims_more_bytes_than_its_storage_is_rejected(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    with changed_tensors(official) as state:
        state[VALUES] = torch.zeros(1, 1).expand(768, 32)
    with pytest.raises(InputRejected, match=VALUES):
        open_checkpoint(official)


@pytest.mark.parametrize("kind", ["transposed", "sparse", "meta", "negated", "nested"])
def test_a_tensor_that_is_no_plain_array_is_rejected(tmp_path: Path, kind: str) -> None:
    official = copy_golden(tmp_path)
    with changed_tensors(official) as state:
        plain = state[VALUES]
        state[VALUES] = {
            "transposed": lambda: plain.t().contiguous().t(),
            "sparse": plain.to_sparse,
            "meta": lambda: plain.to("meta"),
            "negated": lambda: torch._neg_view(plain),
            "nested": lambda: {"weight": plain},
        }[kind]()
    with pytest.raises((InputRejected, Unsupported)):
        open_checkpoint(official)


def test_a_parameter_is_read_like_a_tensor(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    with changed_tensors(official) as state:
        state[VALUES] = torch.nn.Parameter(state[VALUES])
    assert torch.equal(open_checkpoint(official).read(VALUES), load_golden()[VALUES])


# Files.


def test_tables_are_mapped_from_the_file() -> None:
    checkpoint = open_checkpoint(GOLDEN["v2_shared_ring"])
    assert mapped_file(checkpoint.read(VALUES)) == (GOLDEN["v2_shared_ring"] / "model.pt").resolve()


def test_reading_a_table_of_64_mib_takes_no_memory(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    set_fields(official, mem_vdim=2**25 // 768 // 2 * 2)
    with changed_tensors(official) as state:
        size = 2**25 // 768 // 2 * 2
        state[VALUES] = torch.zeros(768, size, dtype=torch.float16)
        for layer in range(3):
            state[f"transformer.mem_blocks.{layer}.values_proj.weight"] = torch.zeros(64, size)
    del state
    open_checkpoint(GOLDEN["v2_shared_ring"]).read(VALUES)
    before = resident_bytes()
    table = open_checkpoint(official).read(VALUES)
    assert table.nbytes > 60 * 2**20
    assert resident_bytes() - before < 16 * 2**20


def test_a_folder_without_weights_is_rejected(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    (official / "model.pt").unlink()
    with pytest.raises(InputRejected, match=r"neither model\.pt nor rank_0/model\.pt is there"):
        open_checkpoint(official)


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_rejected(tmp_path: Path, part: float) -> None:
    official = copy_golden(tmp_path)
    file = official / "model.pt"
    os.truncate(file, int(part * file.stat().st_size))
    with pytest.raises(InputRejected, match="truncated"):
        open_checkpoint(official)


def test_a_file_of_noise_is_rejected(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    (official / "model.pt").write_bytes(bytes(range(256)) * 100)
    with pytest.raises(InputRejected, match="not a torch checkpoint"):
        open_checkpoint(official)


def test_a_flipped_byte_in_the_pickle_is_rejected(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    data = bytearray((official / "model.pt").read_bytes())
    data[data.index(b"_rebuild_tensor_v2")] ^= 1
    (official / "model.pt").write_bytes(data)
    with pytest.raises(InputRejected):
        open_checkpoint(official)


def test_a_pickle_of_torch_before_1_6_says_to_save_it_again(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    torch.save(load_golden(), official / "model.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(InputRejected, match="must be saved again with a newer torch"):
        open_checkpoint(official)


def test_a_compressed_entry_is_rejected_by_name(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    with (
        zipfile.ZipFile(GOLDEN["v2_shared_ring"] / "model.pt") as plain,
        zipfile.ZipFile(official / "model.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.namelist():
            packed.writestr(entry, plain.read(entry))
    with pytest.raises(InputRejected, match=r"entry 'model/data\.pkl' is compressed"):
        open_checkpoint(official)


def test_a_file_that_is_no_dictionary_is_rejected(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    torch.save(list(load_golden().values()), official / "model.pt")
    with pytest.raises(InputRejected, match="not a state dict of named tensors"):
        open_checkpoint(official)


class Attack:
    """Unpickled, it runs a shell command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
def test_code_in_the_file_is_not_run(tmp_path: Path, as_zip: bool) -> None:
    official, marker = copy_golden(tmp_path), tmp_path / "pwned"
    attack = {**load_golden(), "attack": Attack(f"touch {marker}")}
    torch.save(attack, official / "model.pt", _use_new_zipfile_serialization=as_zip)
    torch.load(official / "model.pt", weights_only=False)
    assert marker.exists(), "the attack itself does not work"
    marker.unlink()
    with pytest.raises(InputRejected) as caught:
        open_checkpoint(official)
    assert not marker.exists()
    assert not as_zip or caught.value.what == "the file holds more than tensors"


# NaN and infinity.


@pytest.mark.parametrize(("value", "word"), [("nan", "NaN"), ("inf", "infinity"), ("-inf", "infinity")])
def test_a_value_that_is_not_finite_is_reported_with_tensor_and_row(tmp_path: Path, value: str, word: str) -> None:
    official = copy_golden(tmp_path)
    with changed_tensors(official) as state:
        state[VALUES][[300, 512], 7] = float(value)
    with pytest.raises(InputRejected, match=f"tensor '{VALUES}' holds {word} in row 300"):
        open_checkpoint(official).read(VALUES)


@pytest.mark.parametrize("piece_bytes", [1, 1000, 2**20])
def test_the_row_is_the_same_however_the_table_is_cut_into_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(checkpoint_module, "PIECE_BYTES", piece_bytes)
    official = copy_golden(tmp_path)
    with changed_tensors(official) as state:
        state[PRE_VALUES][767, 23] = float("nan")
    with pytest.raises(InputRejected, match="holds NaN in row 767"):
        list(open_checkpoint(official).tensors[PRE_VALUES])


def test_a_value_that_is_not_finite_passes_where_the_user_allows_it(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    with changed_tensors(official) as state:
        state[VALUES][300, 7] = float("nan")
    table = open_checkpoint(official, allow_non_finite=True).read(VALUES)
    assert torch.isnan(table).nonzero().tolist() == [[300, 7]]


# Vertical-parallel runs.


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_slices_of_all_ranks_make_the_unsharded_tensors(tmp_path: Path, ranks: int) -> None:
    official = copy_golden(tmp_path)
    split_into_ranks(official, ranks)
    checkpoint = open_checkpoint(official)
    expected = load_golden()
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in expected.items())


def test_the_pieces_and_rows_of_a_sharded_table_are_those_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_module, "PIECE_BYTES", 5000)
    official = copy_golden(tmp_path)
    split_into_ranks(official)
    table, expected = open_checkpoint(official).tensors[VALUES], load_golden()[VALUES]
    index = torch.tensor([5, 0, 767, 5])
    assert torch.equal(torch.cat(list(table)), expected)
    assert torch.equal(table.rows(index), expected[index])


def test_the_slices_of_all_ranks_are_mapped(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    split_into_ranks(official)
    files = [mapped_file(part) for part in open_checkpoint(official).tensors[VALUES].parts]
    assert files == [official / "rank_0" / "model.pt", official / "rank_1" / "model.pt"]


def test_all_rank_files_are_files_of_the_checkpoint(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    split_into_ranks(official)
    names = [str(file.relative_to(official)) for file in open_checkpoint(official).files]
    assert names == ["config.yaml", "rank_0/model.pt", "rank_1/model.pt"]


def test_copies_of_the_slices_on_further_ranks_are_left_alone(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    split_into_ranks(official)
    (official / "rank_2").mkdir()
    (official / "rank_2" / "model.pt").write_bytes(b"not read")
    assert torch.equal(open_checkpoint(official).read(VALUES), load_golden()[VALUES])


def test_a_missing_rank_is_refused_by_name(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    split_into_ranks(official)
    (official / "rank_1" / "model.pt").unlink()
    with pytest.raises(InputRejected, match=r"rank_1/model\.pt is missing"):
        open_checkpoint(official)


def test_fewer_ranks_than_slices_are_refused(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    split_into_ranks(official, 4)
    set_fields(official, mem_parallel_size=2)
    with pytest.raises(InputRejected, match=r"has shape \[768, 16\], the configuration says \[768, 32\]"):
        open_checkpoint(official)


@pytest.mark.parametrize("absurd", [0, 2**31 - 1, 2**40, "2", None])
def test_an_absurd_number_of_ranks_is_refused(tmp_path: Path, absurd: object) -> None:
    official = copy_golden(tmp_path)
    split_into_ranks(official)
    set_fields(official, mem_parallel_size=absurd)
    with within_limits(), pytest.raises(InputRejected, match="mem_parallel_size"):
        open_checkpoint(official)


@pytest.mark.parametrize("shape", [(767, 16), (768, 15), (768,), (768, 16, 1)], ids=str)
def test_a_slice_that_does_not_fit_the_others_is_refused_by_tensor(tmp_path: Path, shape: tuple[int, ...]) -> None:
    official = copy_golden(tmp_path)
    split_into_ranks(official)
    with changed_tensors(official / "rank_1") as state:
        state[VALUES] = torch.zeros(shape)
    with pytest.raises(InputRejected, match=VALUES):
        open_checkpoint(official)


def test_a_slice_of_another_dtype_is_refused_by_tensor(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    split_into_ranks(official)
    with changed_tensors(official / "rank_1") as state:
        state[VALUES] = state[VALUES].half()
    with pytest.raises(InputRejected, match=VALUES):
        open_checkpoint(official)


def test_a_rank_without_its_slice_is_refused_by_tensor(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    split_into_ranks(official)
    with changed_tensors(official / "rank_1") as state:
        del state[PRE_VALUES]
    with pytest.raises(InputRejected, match=PRE_VALUES):
        open_checkpoint(official)


def test_a_value_that_is_not_finite_is_found_in_any_slice(tmp_path: Path) -> None:
    official = copy_golden(tmp_path)
    split_into_ranks(official)
    with changed_tensors(official / "rank_1") as state:
        state[VALUES][44, 0] = float("nan")
    with pytest.raises(InputRejected, match=f"tensor '{VALUES}' holds NaN in row 44"):
        open_checkpoint(official).read(VALUES)
