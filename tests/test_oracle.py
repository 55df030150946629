"""The oracle against the golden files of the released code, and its ops against numbers worked out by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml

from tests import oracle
from tests.golden import GOLDEN_CASES

# The golden files are fp32: this bounds the released code's own rounding (largest seen: 2.1e-5, logits of v2_per_rank).
GOLDEN_ATOL = 5e-5

Array = npt.NDArray[Any]


def load(case: Path) -> tuple[dict[str, Any], dict[str, Array], dict[str, Array]]:
    """The model config, the state dict and the expected arrays of one golden directory."""
    config: dict[str, Any] = yaml.safe_load((case / "config.yaml").read_text())["model"]
    state = torch.load(case / "model.pt", weights_only=True)
    with np.load(case / "expected.npz") as expected:
        return config, {name: tensor.numpy() for name, tensor in state.items()}, dict(expected)


def named(name: str) -> pytest.MarkDecorator:
    """Run a test on one golden case; without the golden files pytest skips it."""
    return pytest.mark.parametrize(
        "case", [case for case in GOLDEN_CASES if case.name == name], ids=lambda case: case.name
    )


@pytest.mark.parametrize("case", GOLDEN_CASES, ids=lambda case: case.name)
def test_reproduces_logits_and_hidden_states_of_the_released_code(case: Path) -> None:
    config, tensors, expected = load(case)
    logits, hidden_states = oracle.forward(config, tensors, expected["input_ids"])
    assert len(hidden_states) == config["n_layers"] + 1
    for i, hidden in enumerate(hidden_states):
        assert hidden.dtype == np.float64
        np.testing.assert_allclose(hidden, expected[f"hidden_{i}"], rtol=0, atol=GOLDEN_ATOL, err_msg=f"hidden_{i}")
    assert logits.dtype == np.float64
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=GOLDEN_ATOL, err_msg="logits")


@named("v2_per_rank")
def test_query_layouts_pick_the_documented_queries(case: Path) -> None:
    """One model, its query projections a, b, c, d rearranged.

    From (a, b, c, d), released ranks 0 and 1 get the row queries a, a and the column queries b, b; per_rank ranks get
    a, b and c, d. From a single query (a, b), both ranks get a and b.
    """
    config, tensors, expected = load(case)
    ids = expected["input_ids"][:1, :7]

    def logits(blocks: list[int], layout: str) -> Array:
        chosen = dict(tensors)
        for layer in range(config["n_layers"]):
            name = f"transformer.mem_blocks.{layer}.query_proj.weight"
            projections = np.split(tensors[name], 4)
            chosen[name] = np.concatenate([projections[block] for block in blocks])
        per_rank = {"mem_q_for_each_tucker_rank": len(blocks) == 4}
        return oracle.forward({**config, **per_rank}, chosen, ids, query_layout=layout)[0]

    single = logits([0, 1], "released")
    np.testing.assert_array_equal(logits([0, 1], "per_rank"), single)
    np.testing.assert_array_equal(logits([0, 1, 2, 3], "released"), single)
    np.testing.assert_array_equal(logits([0, 0, 1, 1], "per_rank"), single)
    for blocks in ([0, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 1]):
        assert np.abs(logits(blocks, "per_rank") - single).max() > 1e-2


@named("v2_glu_two_heads")
def test_released_layout_serves_heads_0_and_1_from_group_0(case: Path) -> None:
    config, tensors, expected = load(case)
    ids = expected["input_ids"][:1, :7]
    group_1_dead = dict(tensors)
    for layer in range(config["n_layers"]):
        name = f"transformer.mem_blocks.{layer}.query_proj.weight"
        group_1_dead[name] = tensors[name].copy()
        group_1_dead[name][2 * config["mem_kdim"] :] = 0.0
    np.testing.assert_array_equal(oracle.forward(config, group_1_dead, ids)[0], oracle.forward(config, tensors, ids)[0])


@named("v2_glu_two_heads")
def test_released_layout_serves_heads_2_and_3_from_group_1(case: Path) -> None:
    """Moving a pair of heads together with its query group changes nothing, moving the heads alone does."""
    config, tensors, expected = load(case)
    ids = expected["input_ids"][:1, :7]

    def logits(head_order: list[int], group_order: list[int]) -> Array:
        chosen = dict(tensors)
        for layer in range(config["n_layers"]):
            prefix = f"transformer.mem_blocks.{layer}."
            # Heads 2 and 3 are heads 0 and 1 with their row and column keys exchanged.
            keys = np.concatenate([tensors[prefix + "keys"], tensors[prefix + "keys"][:, ::-1]])
            chosen[prefix + "keys"] = keys[head_order]
            for name in ("tucker_core.0", "tucker_core.1"):
                chosen[prefix + name] = np.tile(tensors[prefix + name], (2, 1, 1))[head_order]
            for name in ("tucker_core_u", "tucker_core_v"):
                chosen[prefix + name] = np.tile(tensors[prefix + name], (1, 2, 1, 1))[:, head_order]
            groups = np.split(tensors[prefix + "query_proj.weight"], 2)
            chosen[prefix + "query_proj.weight"] = np.concatenate([groups[group] for group in group_order])
        return oracle.forward({**config, "mem_head": 4}, chosen, ids)[0]

    plain = logits([0, 1, 2, 3], [0, 1])
    np.testing.assert_allclose(logits([2, 3, 0, 1], [1, 0]), plain, rtol=0, atol=1e-10)
    np.testing.assert_allclose(logits([1, 0, 3, 2], [0, 1]), plain, rtol=0, atol=1e-10)
    assert np.abs(logits([2, 3, 0, 1], [0, 1]) - plain).max() > 1e-2


@named("v2_expanded_keys")
def test_value_groups_with_equal_projections_equal_one_group(case: Path) -> None:
    config, tensors, expected = load(case)
    ids = expected["input_ids"][:1, :7]
    grouped = dict(tensors)
    for layer in range(config["n_layers"]):
        name = f"transformer.mem_blocks.{layer}.values_proj.weight"
        grouped[name] = np.tile(tensors[name], (1, 4))
    np.testing.assert_allclose(
        oracle.forward({**config, "mem_value_expand_time": 4}, grouped, ids)[0],
        oracle.forward(config, tensors, ids)[0],
        rtol=0,
        atol=1e-12,
    )


@named("v2_per_rank")
def test_row_topk_defaults_to_mem_knn_and_changes_the_result(case: Path) -> None:
    config, tensors, expected = load(case)
    ids = expected["input_ids"][:1, :7]
    default = oracle.forward(config, tensors, ids)[0]
    np.testing.assert_array_equal(oracle.forward(config, tensors, ids, row_topk=config["mem_knn"])[0], default)
    assert np.abs(oracle.forward(config, tensors, ids, row_topk=3)[0] - default).max() > 1e-3


@named("v2_per_rank")
@pytest.mark.parametrize(
    ("field", "value"), [("norm_after", True), ("alibi", True), ("n_kv_heads", 2), ("mem_insert_way", 62)]
)
def test_refuses_what_the_specification_does_not_define(case: Path, field: str, value: object) -> None:
    config, tensors, expected = load(case)
    with pytest.raises(ValueError, match=field):
        oracle.forward({**config, field: value}, tensors, expected["input_ids"])


def test_tucker_topk_selects_keys_by_merged_scores_and_cells_by_the_sum_over_cores() -> None:
    """Merged rows are [1, 5, 4], merged columns [3, 2, 6]: rows 1, 2 and columns 2, 0 survive.

    Core 0, the identity: [[2*6, 2*1], [4*6, 4*1]] + [[3*0, 3*2], [0*0, 0*2]] = [[12, 8], [24, 4]].
    Core 1, minus row rank 0 times column rank 1: [[0, -4], [0, -8]]. Sum: [[12, 4], [24, -4]].
    """
    row_scores = np.array([[[[1.0, 0.0], [2.0, 3.0], [4.0, 0.0]]]])
    col_scores = np.array([[[[1.0, 2.0], [0.0, 2.0], [6.0, 0.0]]]])
    ones = np.ones((1, 2))
    cores = np.array([[[[1.0, 0.0], [0.0, 1.0]]], [[[0.0, -1.0], [0.0, 0.0]]]])
    addresses, scores = oracle.tucker_topk(row_scores, col_scores, ones, ones, cores, row_topk=2, topk=3)
    np.testing.assert_array_equal(addresses, [[2 * 3 + 2, 1 * 3 + 2, 1 * 3 + 0]])
    np.testing.assert_array_equal(scores, [[[24.0, 0.0], [12.0, 0.0], [8.0, -4.0]]])
    assert addresses.dtype == np.int64


def test_tucker_topk_merges_rows_with_u_and_columns_with_v() -> None:
    scores = np.array([[[[1.0, 0.0], [0.0, 1.0]]]])
    u, v = np.array([[1.0, -1.0]]), np.array([[-1.0, 1.0]])
    addresses, raw = oracle.tucker_topk(
        scores, scores, u, v, np.array([[[[0.0, -7.0], [0.0, 0.0]]]]), row_topk=1, topk=1
    )
    np.testing.assert_array_equal(addresses, [[0 * 2 + 1]])  # u keeps row 0, v keeps column 1.
    np.testing.assert_array_equal(raw, [[[-7.0]]])  # a raw score keeps its sign.


def test_tucker_topk_concatenates_heads_and_keeps_tokens_apart() -> None:
    """Rank 1: a cell's score is row * column * core. Head 1 has the core 10."""
    row_scores = np.array([[[[1.0], [2.0]], [[2.0], [1.0]]], [[[3.0], [0.0]], [[0.0], [3.0]]]])
    col_scores = np.array([[[[5.0], [4.0]], [[4.0], [5.0]]], [[[1.0], [2.0]], [[1.0], [2.0]]]])
    ones = np.ones((2, 1))
    cores = np.array([[[[1.0]], [[10.0]]]])
    addresses, scores = oracle.tucker_topk(row_scores, col_scores, ones, ones, cores, row_topk=2, topk=2)
    np.testing.assert_array_equal(addresses, [[2, 3, 1, 0], [1, 0, 3, 2]])
    np.testing.assert_array_equal(scores[..., 0], [[10.0, 8.0, 100.0, 80.0], [6.0, 3.0, 60.0, 30.0]])


def test_tucker_topk_breaks_ties_by_the_lower_index() -> None:
    scores, ones = np.ones((1, 1, 3, 1)), np.ones((1, 1))
    addresses, _ = oracle.tucker_topk(scores, scores, ones, ones, np.ones((1, 1, 1, 1)), row_topk=2, topk=3)
    np.testing.assert_array_equal(addresses, [[0, 1, 3]])


def test_tucker_topk_refuses_more_keys_or_cells_than_there_are() -> None:
    scores, ones, cores = np.ones((1, 1, 3, 1)), np.ones((1, 1)), np.ones((1, 1, 1, 1))
    with pytest.raises(ValueError, match="row_topk"):
        oracle.tucker_topk(scores, scores, ones, ones, cores, row_topk=4, topk=1)
    with pytest.raises(ValueError, match="topk"):
        oracle.tucker_topk(scores, scores, ones, ones, cores, row_topk=2, topk=5)


# Three rows of a pre-value of size 1 and a value of size 2, in shards of two rows.
SHARDS = [np.array([[2.0, 1.0, 10.0], [-1.0, 3.0, 30.0]]), np.array([[0.5, 5.0, 50.0]])]


def test_memory_lookup_weighs_each_value_part_with_its_own_score() -> None:
    output = oracle.memory_lookup(
        np.array([[0, 2]]),
        np.array([[[1.0, 0.1], [2.0, 0.2]]]),
        rows=SHARDS,
        pre_value_dim=1,
        rows_per_shard=2,
        query=np.array([[4.0]]),
    )
    # Row 0: p = 8, [8*1*1, 8*0.1*10]; row 2: p = 2, [2*2*5, 2*0.2*50].
    np.testing.assert_allclose(output, [[8.0 + 20.0, 8.0 + 20.0]], rtol=1e-15)


def test_memory_lookup_applies_the_exact_gelu_to_the_pre_score_only() -> None:
    output = oracle.memory_lookup(
        np.array([[0]]),
        np.array([[[-3.0]]]),
        rows=SHARDS,
        pre_value_dim=1,
        rows_per_shard=2,
        activation="gelu",
        query=np.array([[0.5]]),
    )
    # gelu(1) = Phi(1) = 0.8413447460685429; the tanh approximation gives 0.84119.
    np.testing.assert_allclose(output, [[-3.0 * 0.8413447460685429, -30.0 * 0.8413447460685429]], rtol=1e-14)


def test_memory_lookup_without_pre_values_has_the_factor_one() -> None:
    indices, scores = np.array([[1]]), np.array([[[2.0]]])
    for activation in ("none", "gelu"):
        output = oracle.memory_lookup(
            indices, scores, rows=SHARDS, pre_value_dim=0, rows_per_shard=2, activation=activation
        )
        np.testing.assert_array_equal(output, [[-2.0, 6.0, 60.0]])


def test_memory_lookup_sums_each_group_apart_and_puts_groups_first() -> None:
    output = oracle.memory_lookup(
        np.array([[0, 1, 0]]),
        np.array([[[1.0], [1.0], [10.0]]]),
        rows=[np.array([[1.0, 2.0], [3.0, 4.0]])],
        pre_value_dim=0,
        rows_per_shard=2,
        groups=3,
        group=np.array([[2, 0, 2]]),
    )
    np.testing.assert_array_equal(output, [[3.0, 4.0, 0.0, 0.0, 11.0, 22.0]])


def test_memory_lookup_scales_int8_pre_values_and_values_by_row() -> None:
    output = oracle.memory_lookup(
        np.array([[1]]),
        np.array([[[1.0]]]),
        rows=[np.array([[1, 1]], dtype=np.int8), np.array([[-128, 127]], dtype=np.int8)],
        pre_value_dim=1,
        rows_per_shard=1,
        query=np.array([[2.0]]),
        row_scales=np.array([[9.0, 9.0], [0.25, 0.5]], dtype=np.float32),
    )
    np.testing.assert_array_equal(output, [[(-128 * 0.25 * 2.0) * (127 * 0.5)]])


@pytest.mark.parametrize("index", [-1, -2, 3, 4])
def test_memory_lookup_refuses_a_row_outside_the_table(index: int) -> None:
    with pytest.raises(ValueError, match="outside the table"):
        oracle.memory_lookup(np.array([[index]]), np.ones((1, 1, 1)), rows=SHARDS, pre_value_dim=0, rows_per_shard=2)


@pytest.mark.parametrize(
    ("name", "misuse"),
    [
        ("group", {"groups": 2}),
        ("group", {"group": np.zeros((1, 1), dtype=np.int64)}),
        ("query", {"pre_value_dim": 1}),
        ("query", {"query": np.ones((1, 1))}),
        ("row_scales", {"rows": [np.ones((2, 3), dtype=np.int8)]}),
        ("row_scales", {"row_scales": np.ones((3, 2))}),
        ("activation", {"activation": "relu"}),
    ],
)
def test_memory_lookup_refuses_inputs_that_its_attributes_do_not_announce(name: str, misuse: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"rows": SHARDS, "pre_value_dim": 0, "rows_per_shard": 2}
    with pytest.raises(ValueError, match=name):
        oracle.memory_lookup(np.array([[0]]), np.ones((1, 1, 1)), **(arguments | misuse))
