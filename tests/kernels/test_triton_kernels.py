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
from umv2_export.gpu.lookup_variants import SPLIT_PROGRAMS, lookup_variant
from umv2_export.gpu.topk_variants import part_variant, topk_variant

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


def test_the_hits_of_a_token_are_split_and_added_in_every_dtype_of_rows_and_with_groups() -> None:
    for rows, groups in (("float", 1), ("bfloat16", 3), ("int8", 1)):
        lookup = Lookup(
            tokens=2, hits=70, rows=rows, groups=groups, pre_value_dim=24, value_dim=96, shards=3, activation="gelu"
        )
        variant = lookup_variant(
            torch.float32,
            torch.float32,
            shards=3,
            cores=2,
            grouped=groups > 1,
            pre_value_dim=24,
            value_dim=96,
            gelu=True,
            split=True,
        )
        assert variant.shares(2 * groups, 70)[0] > 3
        found = launched(lookup, form="split")
        np.testing.assert_allclose(found, lookup.by_oracle(), rtol=1e-4, atol=5e-4)
        # The same bits whatever the order in which programs run.
        np.testing.assert_array_equal(found, launched(lookup, form="split"))


def test_shares_cover_all_hits_with_as_many_programs_as_fill_a_gpu() -> None:
    variant = lookup_variant(
        torch.float32,
        torch.float32,
        shards=1,
        cores=1,
        grouped=False,
        pre_value_dim=192,
        value_dim=192,
        gelu=False,
        split=True,
    )
    for programs in (1, 3, 8, 64, 400, 527, 528, 4096):
        for hits in (1, 4, 5, 64, 256, 1000):
            splits, share = variant.shares(programs, hits)
            assert (splits - 1) * share < hits <= splits * share
            assert share % variant.block_k == 0
            # Enough programs, or as many as there are blocks of hits; and no more than scratch memory holds.
            assert programs * splits >= SPLIT_PROGRAMS / 2 or splits == -(-hits // variant.block_k)
            assert splits == 1 or programs * splits < 2 * SPLIT_PROGRAMS
    assert variant.shares(1, 256)[0] == 64
    assert variant.shares(528, 256)[0] == 1


@in_each_form
def test_a_hit_outside_the_table_or_the_groups_adds_nothing(form: Form) -> None:
    lookup = Lookup(tokens=2, hits=70, shards=2, groups=3, pre_value_dim=16, value_dim=32)
    assert lookup.group is not None
    wrong = {3: -1, 8: lookup.count, 20: 2 * 5, 21: 2**40, 69: -(2**63)}
    for place, index in wrong.items():
        lookup.indices[1, place] = index
    lookup.group[1, 5], lookup.group[0, 6] = -1, 3
    found = launched(lookup, form=form)
    for place in wrong:
        lookup.indices[1, place] = 0
        lookup.scores[1, place] = 0
    lookup.group[1, 5], lookup.group[0, 6] = 0, 0
    lookup.scores[1, 5] = lookup.scores[0, 6] = 0
    np.testing.assert_allclose(found, lookup.by_oracle(), rtol=1e-4, atol=5e-4)


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


def topk_launched(feed: dict[str, Any], row_topk: int, topk: int, *, whole: bool = False) -> list[Any]:
    tensors = [torch.from_numpy(feed[name]).to(DEVICE) for name in NAMES]
    outputs = launch_topk(tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], row_topk, topk, whole=whole)
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


def tied_feed(tokens: int, heads: int, keys: int, cores: int) -> dict[str, Any]:
    """Scores of few values, zeros of both signs among them: most of them are equal, and sums are exact."""
    rng = np.random.default_rng(3)
    feed = inputs(tokens=tokens, heads=heads, keys=keys, cores=cores)
    for name in ("row_scores", "col_scores"):
        feed[name] = rng.choice(np.array([-1.0, -0.0, 0.0, 1.0], np.float32), feed[name].shape)
    for name in ("u", "v", "cores"):
        feed[name] = rng.choice(np.array([1.0, 2.0], np.float32), feed[name].shape)
    return feed


def first_of_equals(scores: Any, count: int) -> Any:
    """Places of the highest scores, of equal ones the lowest places, in ascending order."""
    return np.sort(np.lexsort((np.arange(len(scores)), -(scores + 0.0)))[:count])


def lowest_addresses(feed: dict[str, Any], row_topk: int, topk: int) -> Any:
    """The rule, word for word, for scores whose sums are exact: addresses [T, H*K], ascending in each head."""
    tokens, heads, keys, _ = feed["row_scores"].shape
    found = []
    for t in range(tokens):
        for h in range(heads):
            a, b = feed["row_scores"][t, h], feed["col_scores"][t, h]
            rows = first_of_equals(a @ feed["u"][h], row_topk)
            cols = first_of_equals(b @ feed["v"][h], row_topk)
            totals = sum(a[rows] @ core[h] @ b[cols].T for core in feed["cores"])
            cells = first_of_equals(totals.reshape(-1), topk)
            found.append(np.sort(rows[cells // row_topk] * keys + cols[cells % row_topk]))
    return np.array(found).reshape(tokens, heads * topk)


# 600 keys are two blocks of them, 70 rows of the grid are two blocks of it.
@pytest.mark.parametrize(
    ("keys", "row_topk", "topk", "cores"),
    [(9, 3, 4, 1), (40, 17, 40, 2), (600, 70, 90, 1)],
    ids=["few", "some", "many"],
)
def test_of_equal_scores_the_lowest_addresses_win(keys: int, row_topk: int, topk: int, cores: int) -> None:
    feed = tied_feed(tokens=2, heads=1, keys=keys, cores=cores)
    for whole in (False, True):
        addresses, _ = topk_launched(feed, row_topk, topk, whole=whole)
        np.testing.assert_array_equal(np.sort(addresses), lowest_addresses(feed, row_topk, topk))


# Cells of a part: 8 rows of 70 columns, and 6 rows in the last one; 16 rows of 40, 8 in the last, which are fewer hits
# than are chosen in all.
@pytest.mark.parametrize(("row_topk", "topk"), [(70, 90), (40, 400)])
def test_programs_that_share_a_grid_find_what_one_program_finds(row_topk: int, topk: int) -> None:
    whole = topk_variant(torch.float32, ranks=2, cores=2, row_topk=row_topk, topk=topk)
    assert part_variant(whole, retrievals=4, row_topk=row_topk, topk=topk) is not None
    feed = inputs(tokens=2, heads=2, keys=90)
    for ours, one in zip(
        topk_launched(feed, row_topk, topk), topk_launched(feed, row_topk, topk, whole=True), strict=True
    ):
        np.testing.assert_array_equal(ours, one)


def test_a_grid_is_shared_where_few_tokens_have_a_large_one() -> None:
    def parts(row_topk: int, retrievals: int, topk: int = 8) -> int:
        whole = topk_variant(torch.float32, ranks=2, cores=2, row_topk=row_topk, topk=topk)
        shared = part_variant(whole, retrievals=retrievals, row_topk=row_topk, topk=topk)
        return 1 if shared is None else shared[1]

    assert [parts(row_topk, 1) for row_topk in (1, 32, 33, 64, 128, 130)] == [1, 1, 3, 4, 16, 33]
    assert [parts(128, retrievals) for retrievals in (1, 131, 132, 4096)] == [16, 16, 1, 1]
    # Places of all candidates are counted in 16 bits.
    assert [parts(128, 1, topk) for topk in (2048, 2049)] == [16, 1]


def test_nan_ranks_with_minus_infinity() -> None:
    feed = inputs(tokens=1, heads=1, keys=12, ranks=1, cores=1)
    for name in ("u", "v", "cores"):
        feed[name] = np.abs(feed[name])
    feed["row_scores"] = np.arange(1, 13, dtype=np.float32).reshape(1, 1, 12, 1)
    feed["col_scores"] = feed["row_scores"].copy()
    feed["row_scores"][0, 0, 11], feed["row_scores"][0, 0, 3] = np.nan, -np.nan
    addresses, scores = topk_launched(feed, 4, 3)
    # Of the other ten rows, 10 is the highest; of the columns, 11.
    assert sorted(addresses[0].tolist()) == [9 * 12 + 11, 10 * 12 + 10, 10 * 12 + 11]
    assert np.isfinite(scores).all()
    # Only for want of numbers is it returned, and then with its score; and addresses are those of keys.
    feed["row_scores"][:] = np.nan
    addresses, scores = topk_launched(feed, 4, 3)
    assert ((addresses >= 0) & (addresses < 144)).all()
    assert np.isnan(scores).all()


def test_one_core_of_ones_on_the_diagonal_and_one_rank_are_retrieved() -> None:
    """What models without a Tucker decomposition ask for: C = 1, R = 2 with the identity, and R = 1."""
    for ranks in (1, 2):
        feed = inputs(tokens=2, ranks=ranks, cores=1)
        feed["cores"] = np.broadcast_to(np.eye(ranks, dtype=np.float32), feed["cores"].shape).copy()
        truth = oracle.tucker_topk(*feed.values(), row_topk=6, topk=8)
        assert_same_hits(topk_launched(feed, 6, 8), list(truth), 2, ATOL[np.float32])


@pytest.mark.parametrize(("tokens", "heads"), [(0, 2), (3, 0)])
def test_no_tokens_or_no_heads_have_no_hits(tokens: int, heads: int) -> None:
    sides, weights = torch.zeros(tokens, heads, 9, 2), torch.zeros(heads, 2)
    addresses, scores = launch_topk(sides, sides, weights, weights, torch.zeros(2, heads, 2, 2), 3, 4)
    assert addresses.shape == (tokens, heads * 4)
    assert scores.shape == (tokens, heads * 4, 2)
