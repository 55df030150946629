"""umv2::TuckerTopK: the torch op against the float64 oracle, and its ONNX body against the torch op."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import oracle
from tests.ops.bodies import Array, run_body, run_native
from umv2_export.bench.single_op import tucker_model
from umv2_export.ops import tucker_topk

NAMES = ("row_scores", "col_scores", "u", "v", "cores")

# Scores are products of three numbers around 1; fp16 stores the inputs and the result.
ATOL = {np.float32: 2e-5, np.float16: 2e-2}


def inputs(
    *,
    tokens: int,
    heads: int = 2,
    keys: int = 20,
    ranks: int = 2,
    cores: int = 2,
    dtype: Any = np.float32,
    seed: int = 0,
) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    shapes = (
        (tokens, heads, keys, ranks),
        (tokens, heads, keys, ranks),
        (heads, ranks),
        (heads, ranks),
        (cores, heads, ranks, ranks),
    )
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in zip(NAMES, shapes, strict=True)}


def by_torch(feed: dict[str, Array], row_topk: int, topk: int) -> list[Array]:
    outputs = tucker_topk(*(torch.from_numpy(feed[name]) for name in NAMES), row_topk, topk)
    return [output.numpy() for output in outputs]


def assert_same_hits(found: list[Array], reference: list[Array], heads: int, atol: float) -> None:
    """The same rows with the same scores in each head; their order is unspecified."""
    sides = []
    for addresses, scores in (found, reference):
        shape = (len(addresses), heads, addresses.shape[1] // heads)
        order = np.argsort(addresses.reshape(shape), -1)
        by_head = scores.astype(np.float64).reshape(*shape, scores.shape[-1])
        sides.append(
            (np.take_along_axis(addresses.reshape(shape), order, -1), np.take_along_axis(by_head, order[..., None], 2))
        )
    np.testing.assert_array_equal(sides[0][0], sides[1][0])
    np.testing.assert_allclose(sides[0][1], sides[1][1], rtol=1e-5, atol=atol)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("row_topk", "topk"), [(1, 1), (3, 9), (7, 5), (20, 64)])
def test_the_op_agrees_with_the_oracle(dtype: Any, row_topk: int, topk: int) -> None:
    feed = inputs(tokens=3, dtype=dtype)
    truth = oracle.tucker_topk(*feed.values(), row_topk=row_topk, topk=topk)
    assert_same_hits(by_torch(feed, row_topk, topk), list(truth), 2, ATOL[dtype])


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 3),
    heads=st.integers(1, 3),
    keys=st.integers(1, 20),
    ranks=st.integers(1, 3),
    cores=st.integers(1, 3),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_the_op_agrees_with_the_oracle_for_random_shapes(data: st.DataObject, **shape: Any) -> None:
    row_topk = data.draw(st.integers(1, shape["keys"]))
    topk = data.draw(st.integers(1, row_topk**2))
    feed = inputs(**shape)
    truth = oracle.tucker_topk(*feed.values(), row_topk=row_topk, topk=topk)
    assert_same_hits(by_torch(feed, row_topk, topk), list(truth), shape["heads"], 5e-5)


@pytest.mark.parametrize(("row_topk", "topk"), [(1, 1), (5, 9), (12, 100), (30, 17)])
def test_of_tied_scores_the_lowest_addresses_are_retrieved(row_topk: int, topk: int) -> None:
    rng = np.random.default_rng(0)
    feed = inputs(tokens=4, keys=30, cores=2)
    # Whole numbers, of which every sum is exact, and both zeros among them.
    feed = {name: rng.integers(-2, 3, array.shape).astype(np.float32) * np.float32(-1) for name, array in feed.items()}
    exact = np.sort(oracle.tucker_topk(*feed.values(), row_topk=row_topk, topk=topk)[0].reshape(4, 2, topk), -1)
    model = tucker_model(row_topk=row_topk, topk=topk)
    for addresses in (by_torch(feed, row_topk, topk)[0], run_native(model, feed)[0]):
        np.testing.assert_array_equal(addresses.reshape(4, 2, topk), exact)


def test_nan_of_infinite_scores_ranks_with_minus_infinity() -> None:
    feed = inputs(tokens=1, heads=1, keys=3)
    feed["row_scores"][0, 0] = [[np.inf, -np.inf], [1, 1], [2, 2]]
    for name in ("u", "v", "cores", "col_scores"):
        feed[name][...] = 1
    for addresses in (by_torch(feed, 2, 1)[0], run_native(tucker_model(row_topk=2, topk=1), feed)[0]):
        assert addresses.tolist() == [[6]]


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_the_body_gives_what_the_op_gives(opset: int, dtype: Any, tokens: int) -> None:
    feed = inputs(tokens=tokens, dtype=dtype)
    model = tucker_model(row_topk=6, topk=9, scores="float" if dtype is np.float32 else "float16", opset=opset)
    found = run_body(model, feed)
    assert found[1].dtype == dtype
    assert_same_hits(found, by_torch(feed, 6, 9), 2, ATOL[dtype])


@pytest.mark.parametrize(("heads", "ranks", "cores"), [(1, 1, 1), (3, 3, 1), (1, 2, 3)])
def test_the_body_serves_other_heads_ranks_and_cores(heads: int, ranks: int, cores: int) -> None:
    feed = inputs(tokens=2, heads=heads, ranks=ranks, cores=cores)
    assert_same_hits(run_body(tucker_model(row_topk=5, topk=7), feed), by_torch(feed, 5, 7), heads, 2e-5)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 3),
    heads=st.integers(1, 3),
    keys=st.integers(1, 20),
    ranks=st.integers(1, 3),
    cores=st.integers(1, 3),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_the_body_agrees_with_the_oracle_for_random_shapes(data: st.DataObject, **shape: Any) -> None:
    row_topk = data.draw(st.integers(1, shape["keys"]))
    topk = data.draw(st.integers(1, row_topk**2))
    feed = inputs(**shape)
    truth = oracle.tucker_topk(*feed.values(), row_topk=row_topk, topk=topk)
    found = run_body(tucker_model(row_topk=row_topk, topk=topk), feed)
    assert_same_hits(found, list(truth), shape["heads"], 5e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_shape_is_refused(name: str) -> None:
    feed = inputs(tokens=2)
    feed[name] = np.concatenate([feed[name], feed[name]], axis=1)
    with pytest.raises(ValueError, match="must"):
        by_torch(feed, 4, 4)


@pytest.mark.parametrize(("row_topk", "topk"), [(0, 1), (21, 4), (3, 10), (3, 0)])
def test_sizes_of_top_k_out_of_range_are_refused(row_topk: int, topk: int) -> None:
    with pytest.raises(ValueError, match="topk must be from 1"):
        by_torch(inputs(tokens=2), row_topk, topk)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_op_is_a_well_formed_torch_op(dtype: Any) -> None:
    arguments = tuple(torch.from_numpy(array) for array in inputs(tokens=3, dtype=dtype).values())
    torch.library.opcheck(torch.ops.umv2.TuckerTopK.default, (*arguments, 4, 6))
