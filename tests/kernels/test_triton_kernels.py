"""The GPU kernels against the float64 oracle: on the GPU where there is one, else in Triton's interpreter."""

from typing import Any, get_args

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import oracle
from tests.ops.test_memory_lookup import CASES, Lookup
from tests.ops.test_tucker_topk import ATOL, NAMES, assert_same_hits, inputs
from umv2_export.errors import Unsupported
from umv2_export.gpu.launch import Form, launch_lookup, launch_topk, shares_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Relative and absolute. fp32: sums of up to 40 products of three numbers around 1; 16 bits round the output once more.
TOLERANCES = {
    torch.float32: (1e-5, 5e-5),
    torch.float16: (1e-3, 2e-2),
    torch.bfloat16: (8e-3, 1e-1),
}

in_each_form = pytest.mark.parametrize("form", get_args(Form))


def launched(lookup: Lookup, *, form: Form) -> Any:
    arguments: list[Any] = [
        argument.to(DEVICE) if isinstance(argument, torch.Tensor) else argument for argument in lookup.op_arguments()
    ]
    arguments[5] = [shard.to(DEVICE) for shard in arguments[5]]
    return launch_lookup(*arguments, form=form).float().cpu().numpy()


@in_each_form
@pytest.mark.parametrize("label", sorted(CASES))
def test_lookup_agrees_with_the_oracle(label: str, form: Form) -> None:
    lookup = Lookup(**CASES[label])
    rtol, atol = TOLERANCES[torch.float32]
    np.testing.assert_allclose(launched(lookup, form=form), lookup.by_oracle(), rtol=rtol, atol=atol)


@in_each_form
@pytest.mark.parametrize("scores", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("rows", ["float", "float16", "bfloat16", "int8"])
def test_lookup_in_16_bits_rounds_the_output_only(rows: str, scores: Any, form: Form) -> None:
    lookup = Lookup(rows=rows, scores=scores, pre_value_dim=16, value_dim=32, hits=20)
    rtol, atol = TOLERANCES[torch.float16 if scores is np.float16 else torch.bfloat16]
    np.testing.assert_allclose(launched(lookup, form=form), lookup.by_oracle(), rtol=rtol, atol=atol)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 4),
    hits=st.integers(1, 70),
    shards=st.integers(1, 5),
    rows=st.sampled_from(["float", "bfloat16", "int8"]),
    pre_value_dim=st.integers(0, 40),
    part=st.integers(1, 20),
    cores=st.integers(1, 3),
    groups=st.sampled_from([1, 4]),
    activation=st.sampled_from(["none", "gelu"]),
    form=st.sampled_from(get_args(Form)),
    seed=st.integers(0, 99),
)
def test_lookup_agrees_with_the_oracle_for_awkward_sizes(part: int, form: Form, **shape: Any) -> None:
    if not shape["pre_value_dim"]:
        shape["activation"] = "none"
    lookup = Lookup(value_dim=part * shape["cores"], **shape)
    np.testing.assert_allclose(launched(lookup, form=form), lookup.by_oracle(), rtol=1e-4, atol=5e-4)


def test_lookup_reaches_rows_beyond_32_bits() -> None:
    # 70 000 rows of 32 KB: the last row starts 2.3 GB from the first. Pages that nothing touches cost nothing.
    rows = torch.zeros((70_000, 8192), dtype=torch.float32, device=DEVICE)
    rows[-1, ::4096] = torch.tensor([3.0, 5.0], device=DEVICE)
    indices, scores = torch.tensor([[69_999, 0]], device=DEVICE), torch.ones((1, 2, 2), device=DEVICE)
    output = launch_lookup(indices, scores, None, None, None, [rows], 0, "none", 70_000, 1)
    assert output[0, ::4096].tolist() == [3.0, 5.0]


def test_hits_are_taken_by_row_where_tokens_share_rows() -> None:
    assert not shares_rows(hits=64 * 32, rows=129_600)
    assert shares_rows(hits=32_768 * 32, rows=129_600)


def topk_launched(feed: dict[str, Any], row_topk: int, topk: int) -> list[Any]:
    tensors = [torch.from_numpy(feed[name]).to(DEVICE) for name in NAMES]
    outputs = launch_topk(tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], row_topk, topk)
    return [output.cpu().numpy() for output in outputs]


# The interpreter takes up to 6 s for one token and head: a sort is some thousand calls of numpy.
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("row_topk", "topk"), [(1, 1), (3, 9), (20, 64)])
def test_topk_agrees_with_the_oracle(dtype: Any, row_topk: int, topk: int) -> None:
    feed = inputs(tokens=1, dtype=dtype)
    truth = oracle.tucker_topk(*feed.values(), row_topk=row_topk, topk=topk)
    assert_same_hits(topk_launched(feed, row_topk, topk), list(truth), 2, ATOL[dtype])


@settings(max_examples=6, deadline=None)
@given(
    tokens=st.integers(0, 2),
    heads=st.integers(1, 2),
    keys=st.integers(1, 600),
    ranks=st.integers(1, 3),
    cores=st.integers(1, 3),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_topk_agrees_with_the_oracle_for_awkward_sizes(data: st.DataObject, **shape: Any) -> None:
    row_topk = data.draw(st.integers(1, min(shape["keys"], 24)))
    topk = data.draw(st.integers(1, min(row_topk**2, 40)))
    feed = inputs(**shape)
    truth = oracle.tucker_topk(*feed.values(), row_topk=row_topk, topk=topk)
    assert_same_hits(topk_launched(feed, row_topk, topk), list(truth), shape["heads"], 5e-5)


def test_topk_of_negative_scores_alone() -> None:
    feed = inputs(tokens=2)
    feed["row_scores"], feed["col_scores"] = -np.abs(feed["row_scores"]), np.abs(feed["col_scores"])
    feed["u"], feed["v"], feed["cores"] = np.abs(feed["u"]), np.abs(feed["v"]), np.abs(feed["cores"])
    truth = oracle.tucker_topk(*feed.values(), row_topk=4, topk=6)
    assert_same_hits(topk_launched(feed, 4, 6), list(truth), 2, ATOL[np.float32])


def test_more_keys_than_an_address_has_bits_for_are_refused() -> None:
    feed = inputs(tokens=1, heads=1, keys=46341, ranks=1)
    with pytest.raises(Unsupported, match="46341 keys a side"):
        topk_launched(feed, 3, 4)


def test_of_equal_scores_the_lowest_addresses_win() -> None:
    feed = {name: np.ones_like(array) for name, array in inputs(tokens=1, heads=1, keys=9).items()}
    addresses, _ = topk_launched(feed, 3, 4)
    # The grid of the three first keys, row by row.
    assert sorted(addresses[0].tolist()) == [0, 1, 2, 9]
