"""Configurations: what is refused, what follows from the sizes, and the published parameter counts."""

import json
from dataclasses import replace
from typing import Any

import pytest

from tests.limits import within_limits
from umv2_export.config import MemoryConfig, ModelConfig, count_parameters, tensor_shapes
from umv2_export.errors import InputRejected, Umv2Error, Unsupported
from umv2_export.presets import PRESETS

TINY = PRESETS["umv2-tiny"]
PUBLISHED = PRESETS["umv2-227m-1.2b"]


def memory(**changes: Any) -> MemoryConfig:
    """The memory of the tiny preset (16 keys a side, 3 layers, topk 8), changed."""
    return replace(TINY.memory, **changes)


def from_json(*path: str, value: object) -> ModelConfig:
    """The tiny preset, read from JSON in which one field was set."""
    data = json.loads(json.dumps(TINY.as_dict()))
    section = data
    for name in path[:-1]:
        section = section[name]
    section[path[-1]] = value
    return ModelConfig.from_dict(json.loads(json.dumps(data)))


# What is refused.


@pytest.mark.parametrize(
    "field",
    [
        *("keys_per_side", "key_dim", "value_dim", "heads", "topk", "row_topk", "key_expansion"),
        *("tucker_rank", "tucker_cores"),
    ],
)
@pytest.mark.parametrize("value", [0, -1, 2**31])
def test_a_size_of_the_memory_is_from_1_to_the_end_of_int32(field: str, value: int) -> None:
    with pytest.raises(InputRejected, match=rf"memory\.{field} must be from 1 to 2147483647, got {value}"):
        memory(**{field: value})


@pytest.mark.parametrize(
    "field",
    [
        *("hidden_size", "num_layers", "num_heads", "ffn_size", "vocab_size", "embedding_size"),
        "max_sequence_length",
    ],
)
@pytest.mark.parametrize("value", [0, -1, 2**31])
def test_a_size_of_the_model_is_from_1_to_the_end_of_int32(field: str, value: int) -> None:
    with pytest.raises(InputRejected, match=f"{field} must be from 1 to 2147483647, got {value}"):
        replace(TINY, **{field: value})  # type: ignore[arg-type] # the field is one of those of type int


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk": 10, "row_topk": 3}, r"topk 10 exceeds row_topk\*\*2 = 9"),
        ({"row_topk": 17, "topk": 17}, "row_topk 17 exceeds the 16 keys of a side"),
        ({"pre_value_dim": -1}, "pre_value_dim must be 0 or more, got -1"),
        ({"share_ratio": 0.0}, "share_ratio must be above 0 and at most 1, got 0.0"),
        ({"share_ratio": 1.01}, "share_ratio must be above 0 and at most 1, got 1.01"),
        ({"share_ratio": float("nan")}, "share_ratio must be above 0 and at most 1, got nan"),
        ({"share_ratio": 1e-9}, "row_topk 8 exceeds the 0 keys of a side"),
        ({"value_dim": 33}, "value_dim 33 is not a multiple of tucker_cores 2"),
    ],
)
def test_sizes_of_the_memory_that_contradict_each_other_are_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputRejected, match=message):
        memory(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "peer"}, "memory.kind is 'peer'"),
        ({"query_layout": "interleaved"}, "memory.query_layout is 'interleaved'"),
        ({"activation": "relu"}, "memory.activation is 'relu'"),
        ({"activation": "gelu", "pre_value_dim": 0}, "there is no pre-score"),
        ({"value_groups": 2}, "value_groups is 2 with key_expansion 1"),
        ({"value_groups": 2, "key_expansion": 2}, "value_groups is 2 with key_expansion 2"),
        ({"kind": "ultramem_v1"}, "UltraMem V1 has no pre-values"),
        ({"keys_per_side": 30_000}, "a table of 2700000000 rows"),
        ({"query_layout": "released", "tucker_rank": 3}, "'released' with Tucker rank 3 and 1 heads"),
        ({"query_layout": "released", "heads": 5}, "'released' with Tucker rank 2 and 5 heads"),
    ],
)
def test_what_is_not_implemented_is_unsupported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        memory(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "hidden_size 64 does not divide into 5 heads"),
        ({"num_heads": 64}, "hidden_size 64 does not divide into 64 heads of even size"),
        ({"embedding_size": 249}, "embedding_size 249 is smaller than vocab_size 250"),
        ({"memory": memory(placements=((0, 0), (2, 3)))}, "reads at block 2 and is added after block 3"),
        ({"memory": memory(placements=((0, 0), (2, 1)))}, "reads at block 2 and is added after block 1"),
        ({"memory": memory(placements=((0, 0), (-1, 1)))}, "reads at block -1 and is added after block 1"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"norm_eps": -1e-5}, "norm_eps"),
    ],
)
def test_sizes_of_the_model_that_contradict_each_other_are_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputRejected, match=message):
        replace(TINY, **changes)


def test_a_model_without_memory_layers_is_rejected() -> None:
    with pytest.raises(InputRejected, match="the model has no memory layer"):
        replace(PRESETS["umv1-tiny"], memory=replace(PRESETS["umv1-tiny"].memory, placements=()))


# Plain data.


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_comes_back_from_json(name: str) -> None:
    assert ModelConfig.from_dict(json.loads(json.dumps(PRESETS[name].as_dict()))) == PRESETS[name]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("hidden_size",), "64"),
        (("hidden_size",), 64.0),
        (("hidden_size",), True),
        (("hidden_size",), None),
        (("tie_embeddings",), 1),
        (("rope_theta",), "10000"),
        (("rope_theta",), float("inf")),
        (("rope_theta",), 10**400),
        (("norm_eps",), float("nan")),
        (("eos_token_id",), 1.5),
        (("memory",), 3),
        (("memory", "share_ratio"), float("nan")),
        (("memory", "share_ratio"), 10**400),
        (("memory", "query_per_rank"), "yes"),
        (("memory", "placements"), []),
        (("memory", "placements"), [[0, 0, 0]]),
        (("memory", "placements"), [["0", "0"]]),
        (("memory", "placements"), [[True, True]]),
        (("memory", "placements"), "full"),
        (("memory", "placements"), [7]),
    ],
    ids=lambda part: str(part)[:40],
)
def test_a_field_of_another_type_is_rejected(path: tuple[str, ...], value: object) -> None:
    with pytest.raises(InputRejected, match=path[-1]):
        from_json(*path, value=value)


@pytest.mark.parametrize("value", [[], {}, 7, None, "V2"], ids=str)
def test_a_kind_that_is_none_is_unsupported(value: object) -> None:
    with pytest.raises(Unsupported, match=r"memory\.kind"):
        from_json("memory", "kind", value=value)


@pytest.mark.parametrize(("path", "name"), [(("gate",), "gate"), (("memory", "gate"), "memory.gate")])
def test_an_unknown_field_is_refused_by_name(path: tuple[str, ...], name: str) -> None:
    with pytest.raises(Unsupported, match=f"unknown field '{name}'"):
        from_json(*path, value=1)


def test_a_missing_field_is_refused_by_name() -> None:
    data = TINY.as_dict()
    del data["memory"]["topk"]
    data["memory"]["placements"] = [[0, 0]]
    with pytest.raises(InputRejected, match=r"field 'memory\.topk' is missing"):
        ModelConfig.from_dict(data)


def test_an_error_says_which_file_it_is_in() -> None:
    with pytest.raises(Umv2Error) as caught:
        ModelConfig.from_dict({**TINY.as_dict(), "hidden_size": 0}, where="checkpoint/config.json")
    assert caught.value.where == "checkpoint/config.json"


@pytest.mark.parametrize(
    "path",
    [
        *((name,) for name in ("hidden_size", "num_layers", "num_heads", "ffn_size", "vocab_size", "embedding_size")),
        *(("memory", name) for name in ("keys_per_side", "key_dim", "value_dim", "pre_value_dim", "heads", "topk")),
        *(("memory", name) for name in ("row_topk", "key_expansion", "value_groups", "tucker_rank", "tucker_cores")),
    ],
    ids=".".join,
)
def test_a_model_of_an_absurd_size_costs_nothing_to_look_at(path: tuple[str, ...]) -> None:
    """Names and shapes are made before any tensor is read, from whatever sizes an untrusted file names."""
    with within_limits():
        try:
            config = from_json(*path, value=2**31 - 2)
            tensor_shapes(config)
        except (InputRejected, Unsupported):
            return


def test_an_absurd_number_of_tucker_cores_costs_nothing_to_look_at() -> None:
    data = TINY.as_dict()
    data["memory"] |= {"value_dim": 2**31 - 2, "tucker_cores": 2**31 - 2}
    with within_limits():
        try:
            tensor_shapes(ModelConfig.from_dict(data))
        except (InputRejected, Unsupported):
            return


# Sizes.


def test_the_visible_side_is_truncated_and_the_offset_is_not() -> None:
    shared = memory(share_ratio=0.5)
    # sqrt(3 * 256 * 0.5) = 19.6
    assert (shared.visible_side, shared.visible_rows, shared.stored_side) == (19, 361, 19)
    assert [shared.offset(layer) for layer in range(3)] == [0, 256, 512]


def test_key_expansion_multiplies_the_keys_that_are_stored() -> None:
    expanded = memory(share_ratio=0.5, key_expansion=2)
    assert (expanded.visible_side, expanded.stored_side) == (19, 38)


@pytest.mark.parametrize("name", ["umv2-227m-1.2b", "umv2-1b-7b"])
def test_without_sharing_a_layer_sees_its_nominal_rows(name: str) -> None:
    model = PRESETS[name].memory
    assert model.visible_side == model.keys_per_side
    assert model.owns_its_rows


@pytest.mark.parametrize(
    ("changes", "owns"),
    [({}, True), ({"share_ratio": 0.2}, True), ({"share_ratio": 0.5}, False), ({"key_expansion": 2}, False)],
)
def test_a_layer_owns_its_rows_where_no_other_layer_and_no_other_address_reads_them(
    changes: dict[str, Any], owns: bool
) -> None:
    assert memory(**changes).owns_its_rows is owns


def test_a_v1_layer_has_a_table_of_its_own() -> None:
    model = PRESETS["umv1-tiny"].memory
    assert (model.layers, model.pool_rows, model.visible_side, model.stored_side) == (2, 256, 16, 32)
    assert [model.offset(layer) for layer in range(2)] == [0, 0]


def test_a_token_activates_topk_rows_for_each_head() -> None:
    assert memory(heads=3, topk=5).hits == 15


# The projection q[g, i, :], flattened: chunk 2 * g + i for rank 2.


@pytest.mark.parametrize(
    ("heads", "rows", "columns"),
    [
        (1, [[0, 0]], [[1, 1]]),
        (2, [[0, 0], [0, 0]], [[1, 1], [1, 1]]),
        (4, [[0, 0], [0, 0], [2, 2], [2, 2]], [[1, 1], [1, 1], [3, 3], [3, 3]]),
    ],
)
def test_the_released_layout_takes_both_queries_of_a_heads_group(
    heads: int, rows: list[list[int]], columns: list[list[int]]
) -> None:
    assert memory(query_layout="released", heads=heads).query_chunks() == (rows, columns)


def test_the_per_rank_layout_takes_group_0_for_rows_and_group_1_for_columns() -> None:
    assert memory(heads=2).query_chunks() == ([[0, 1], [0, 1]], [[2, 3], [2, 3]])
    assert memory(tucker_rank=3).query_chunks() == ([[0, 1, 2]], [[3, 4, 5]])


@pytest.mark.parametrize("layout", ["released", "per_rank"])
def test_one_query_a_side_serves_all_ranks_in_either_layout(layout: Any) -> None:
    assert memory(query_per_rank=False, query_layout=layout).query_chunks() == ([[0, 0]], [[1, 1]])


# Shapes and counts.


def test_shapes_of_the_published_model_are_those_of_its_state_dict() -> None:
    shapes = tensor_shapes(PUBLISHED)
    memory_layer, block = "transformer.mem_blocks.19.", "transformer.blocks.19."
    expected = {
        "transformer.wte.weight": (50304, 768),
        "transformer.ln_f.weight": (768,),
        block + "attn_norm.weight": (768,),
        block + "ff_norm.weight": (768,),
        block + "q_norm.weight": (64,),
        block + "k_norm.weight": (64,),
        block + "att_proj.weight": (2304, 768),
        block + "attn_out.weight": (768, 768),
        block + "ff_proj.weight": (4992, 768),
        block + "ff_out.weight": (768, 2496),
        memory_layer + "query_proj.weight": (768, 768),
        memory_layer + "query_norm.weight": (192,),
        memory_layer + "keys_norm.weight": (192,),
        memory_layer + "keys": (1, 2, 360, 192, 2),
        memory_layer + "tucker_core.0": (1, 2, 2),
        memory_layer + "tucker_core.1": (1, 2, 2),
        memory_layer + "tucker_core_u": (1, 1, 1, 2),
        memory_layer + "tucker_core_v": (1, 1, 1, 2),
        memory_layer + "values_proj.weight": (768, 192),
        memory_layer + "pre_values_proj.weight": (192, 768),
        memory_layer + "shuffle_index": (129600,),
        "transformer.full_memory_layer.values_for_look_up": (2592000, 192),
        "transformer.full_memory_layer.pre_values_for_look_up": (2592000, 192),
    }
    assert {name: shapes[name] for name in expected} == expected
    assert len(shapes) == 2 + 2 + 20 * (8 + 11)


def test_an_untied_head_is_a_tensor() -> None:
    untied = tensor_shapes(replace(TINY, tie_embeddings=False))
    assert untied.keys() - tensor_shapes(TINY).keys() == {"transformer.ff_out.weight"}
    assert untied["transformer.ff_out.weight"] == (256, 64)


def test_the_published_model_activates_224_3_million_parameters() -> None:
    assert count_parameters(PUBLISHED).activated / 1e6 == pytest.approx(224.3, abs=0.05)


def test_the_published_model_has_1_181_billion_parameters_without_its_embedding() -> None:
    assert (count_parameters(PUBLISHED).total - 50304 * 768) / 1e9 == pytest.approx(1.181, abs=0.0005)


def test_keys_and_rows_are_counted_apart() -> None:
    counts = count_parameters(PUBLISHED)
    assert counts.keys == 20 * 2 * 360 * 192 * 2
    assert counts.rows == 20 * 360**2 * (192 + 192)
    assert counts.total == counts.dense + counts.keys + counts.rows


def test_of_an_untied_input_embedding_a_token_activates_one_row() -> None:
    tied, untied = count_parameters(TINY), count_parameters(replace(TINY, tie_embeddings=False))
    assert untied.total - tied.total == 256 * 64
    assert untied.activated - tied.activated == 64


def test_a_token_activates_its_hits_in_every_layer_and_no_buffer_is_counted() -> None:
    counts = count_parameters(TINY)
    assert counts.activated == counts.dense + counts.keys + 3 * 8 * (24 + 32)
    block = 64 + 3 * 64 * 64 + 2 * 16 + 64 * 64 + 64 + 2 * 80 * 64 + 64 * 80
    memory_layer = 2 * 2 * 32 * 64 + 2 * 32 + 2 * 4 + 24 * 64 + 64 * 32
    assert counts.dense == 256 * 64 + 64 + 3 * (block + memory_layer)
