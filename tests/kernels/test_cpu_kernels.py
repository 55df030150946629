"""The CPU kernels by themselves, on every target that this processor runs, against the float64 oracle."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import oracle
from tests.kernels import kernel_calls
from tests.kernels.kernel_calls import CPU_TARGETS, runnable_targets
from umv2_export.cpu_kernels import gather

Array = npt.NDArray[Any]

RUNNABLE = runnable_targets()

# fp32 sums of up to 100 products of numbers around 1, in any order.
RTOL, ATOL = 1e-5, 2e-5

targets = pytest.mark.parametrize(
    "target",
    [
        pytest.param(name, marks=[] if name in RUNNABLE else pytest.mark.skip(f"this processor does not run {name}"))
        for name in CPU_TARGETS
    ],
)
each_target = st.sampled_from(RUNNABLE)


def bfloat16_bits(values: Array) -> Array:
    """The upper halves of fp32 numbers."""
    return (np.ascontiguousarray(values, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_bfloat16_bits(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


# Name of a row dtype -> (as stored, as numbers).
ROW_DTYPES: dict[str, Callable[[Array], tuple[Array, Array]]] = {
    "float32": lambda x: (x.astype(np.float32), x.astype(np.float32)),
    "float16": lambda x: (x.astype(np.float16), x.astype(np.float16)),
    "bfloat16": lambda x: (bfloat16_bits(x), from_bfloat16_bits(bfloat16_bits(x))),
    "int8": lambda x: (np.clip(x * 40, -128, 127).astype(np.int8), np.clip(x * 40, -128, 127).astype(np.int8)),
}


def check_lookup(
    target: str,
    *,
    tokens: int,
    hits: int,
    part: int,
    cores: int = 2,
    pre_value_dim: int = 0,
    groups: int = 1,
    gelu: bool = False,
    row_dtype: str = "float32",
    rows: int = 50,
    rows_per_shard: int = 50,
    seed: int = 0,
) -> None:
    """Compare one random lookup with the oracle."""
    rng = np.random.default_rng(seed)
    stored, numbers = ROW_DTYPES[row_dtype](rng.standard_normal((rows, pre_value_dim + part * cores)))
    cuts = range(0, rows, rows_per_shard)
    indices = rng.integers(0, rows, (tokens, hits))
    if hits > 1 and tokens:
        # The edges of the first shard and of the table.
        indices[0, 0], indices[0, -1] = rows - 1, min(rows_per_shard, rows) - 1
    scores = rng.standard_normal((tokens, hits, cores)).astype(np.float32)
    options: dict[str, Any] = {"groups": groups, "pre_value_dim": pre_value_dim}
    options["group"] = rng.integers(0, groups, (tokens, hits)) if groups > 1 else None
    options["query"] = rng.standard_normal((tokens, pre_value_dim)).astype(np.float32) if pre_value_dim else None
    options["row_scales"] = rng.random((rows, 2)).astype(np.float32) / 40 if row_dtype == "int8" else None
    shards = [np.ascontiguousarray(stored[cut : cut + rows_per_shard]) for cut in cuts]
    found = kernel_calls.memory_lookup(target, indices, scores, shards, gelu=gelu, row_dtype=row_dtype, **options)
    expected = oracle.memory_lookup(
        indices,
        scores,
        rows=[numbers[cut : cut + rows_per_shard] for cut in cuts],
        rows_per_shard=rows_per_shard,
        activation="gelu" if gelu else "none",
        **options,
    )
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(found, expected, rtol=RTOL, atol=ATOL * scale)


def check_tucker(
    target: str,
    *,
    tokens: int,
    heads: int,
    keys: int,
    ranks: int = 2,
    cores: int = 2,
    row_topk: int,
    topk: int,
    levels: int = 0,
    seed: int = 0,
) -> None:
    """Compare one random retrieval with the oracle; of few whole numbers (`levels`) many are tied."""
    rng = np.random.default_rng(seed)

    def scores(*shape: int) -> Array:
        drawn = rng.integers(-levels, levels + 1, shape) if levels else rng.standard_normal(shape)
        return drawn.astype(np.float32)

    row, col = scores(tokens, heads, keys, ranks), scores(tokens, heads, keys, ranks)
    u, v = scores(heads, ranks), scores(heads, ranks)
    # Whole numbers, of which every sum is exact, tie in float64 where they tie in fp32.
    core = scores(cores, heads, ranks, ranks)
    addresses, found = kernel_calls.tucker_topk(target, row, col, u, v, core, row_topk=row_topk, topk=topk)
    expected_addresses, expected = oracle.tucker_topk(row, col, u, v, core, row_topk=row_topk, topk=topk)
    assert ((addresses >= 0) & (addresses < keys * keys)).all()
    shape = (tokens, heads, topk)
    totals, expected_totals = (np.sort(x.sum(-1).reshape(shape), axis=-1) for x in (found, expected))
    np.testing.assert_allclose(totals, expected_totals, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(np.sort(addresses.reshape(shape), -1), np.sort(expected_addresses.reshape(shape), -1))


@targets
@pytest.mark.parametrize("row_dtype", sorted(ROW_DTYPES))
@pytest.mark.parametrize("pre_value_dim", [0, 5, 24])
def test_lookup_of_every_row_dtype_agrees_with_the_oracle(target: str, row_dtype: str, pre_value_dim: int) -> None:
    check_lookup(target, tokens=3, hits=9, part=37, pre_value_dim=pre_value_dim, row_dtype=row_dtype)


@targets
@pytest.mark.parametrize(("tokens", "hits", "part"), [(0, 3, 8), (1, 1, 1), (2, 4, 16), (5, 123, 61), (1, 7, 3)])
def test_lookup_serves_awkward_sizes(target: str, tokens: int, hits: int, part: int) -> None:
    check_lookup(target, tokens=tokens, hits=hits, part=part, pre_value_dim=3)


@targets
def test_lookup_reads_shards_whose_last_one_is_shorter(target: str) -> None:
    check_lookup(target, tokens=4, hits=20, part=8, rows=23, rows_per_shard=5)


@targets
def test_lookup_sums_groups_apart(target: str) -> None:
    check_lookup(target, tokens=3, hits=18, part=16, groups=4, rows=40, rows_per_shard=15)


@targets
def test_lookup_applies_the_exact_gelu_to_the_scaled_pre_score(target: str) -> None:
    check_lookup(target, tokens=3, hits=6, part=8, pre_value_dim=16, gelu=True, row_dtype="int8")


@targets
@pytest.mark.parametrize(("row_topk", "topk"), [(1, 1), (3, 9), (8, 8), (40, 64), (40, 1)])
def test_retrieval_agrees_with_the_oracle(target: str, row_topk: int, topk: int) -> None:
    check_tucker(target, tokens=3, heads=2, keys=40, row_topk=row_topk, topk=topk)


@targets
@pytest.mark.parametrize(("ranks", "cores"), [(1, 1), (3, 2), (2, 5)])
def test_retrieval_serves_other_ranks_and_numbers_of_cores(target: str, ranks: int, cores: int) -> None:
    check_tucker(target, tokens=2, heads=1, keys=33, ranks=ranks, cores=cores, row_topk=6, topk=7)


@targets
def test_retrieval_of_the_published_size_agrees_with_the_oracle(target: str) -> None:
    check_tucker(target, tokens=2, heads=1, keys=1024, row_topk=64, topk=64)


@targets
@pytest.mark.parametrize("levels", [1, 8])
@pytest.mark.parametrize(("keys", "row_topk", "topk"), [(50, 9, 20), (360, 19, 200), (1024, 64, 64)])
def test_of_tied_scores_the_lowest_addresses_are_retrieved(
    target: str, keys: int, row_topk: int, topk: int, levels: int
) -> None:
    check_tucker(target, tokens=3, heads=1, keys=keys, row_topk=row_topk, topk=topk, levels=levels)


@targets
def test_negative_zero_ties_with_zero(target: str) -> None:
    row = np.array([[[[0.0], [-0.0], [0.0], [-0.0], [-1.0]]]], dtype=np.float32)
    one = np.ones((1, 1), dtype=np.float32)
    core = np.ones((1, 1, 1, 1), dtype=np.float32)
    addresses, _ = kernel_calls.tucker_topk(target, -row, row, one, one, core, row_topk=2, topk=3)
    # Row keys are the negatives: 1 at key 4, then zeros of which key 0 comes first; of four columns of zero, 0 and 1.
    assert addresses[0].tolist() == [0, 1, 20]


@targets
def test_addresses_of_a_head_ascend(target: str) -> None:
    rng = np.random.default_rng(0)
    row, col = rng.standard_normal((2, 3, 2, 40, 2)).astype(np.float32)
    one, core = np.ones((2, 2), np.float32), rng.standard_normal((2, 2, 2, 2)).astype(np.float32)
    addresses, _ = kernel_calls.tucker_topk(target, row, col, one, one, core, row_topk=8, topk=20)
    assert (np.diff(addresses.reshape(3, 2, 20), axis=-1) > 0).all()


@targets
@pytest.mark.parametrize("place", ["row", "col"])
def test_a_nan_key_is_refused(target: str, place: str) -> None:
    sides = {side: np.zeros((1, 1, 33, 2), np.float32) for side in ("row", "col")}
    sides[place][0, 0, 32, 1] = np.nan
    one, core = np.ones((1, 2), np.float32), np.ones((1, 1, 2, 2), np.float32)
    with pytest.raises(ValueError, match="NaN"):
        kernel_calls.tucker_topk(target, sides["row"], sides["col"], one, one, core, row_topk=2, topk=2)


@targets
def test_nan_of_infinite_keys_ranks_with_minus_infinity(target: str) -> None:
    row = np.array([[[[np.inf, -np.inf], [1.0, 1.0], [2.0, 2.0]]]], dtype=np.float32)
    one, core = np.ones((1, 2), np.float32), np.eye(2, dtype=np.float32)[None, None]
    addresses, _ = kernel_calls.tucker_topk(target, row, np.ones_like(row), one, one, core, row_topk=2, topk=1)
    assert addresses[0].tolist() == [6]


@targets
@pytest.mark.parametrize("hits", [1, 4, 11])
@pytest.mark.parametrize("index", [-1, 7, 2**62])
def test_an_index_outside_the_table_is_refused(target: str, hits: int, index: int) -> None:
    for place in range(hits):
        indices = np.zeros((1, hits), np.int64)
        indices[0, place] = index
        with pytest.raises(ValueError, match="out of range"):
            kernel_calls.memory_lookup(
                target, indices, np.ones((1, hits, 1), np.float32), [np.ones((7, 5), np.float32)]
            )


@targets
@pytest.mark.parametrize("hits", [1, 4, 6])
def test_a_nan_score_is_refused(target: str, hits: int) -> None:
    for place in range(hits):
        scores = np.ones((1, hits, 2), np.float32)
        scores[0, place, 1] = np.nan
        with pytest.raises(ValueError, match="NaN"):
            kernel_calls.memory_lookup(target, np.zeros((1, hits), np.int64), scores, [np.ones((7, 4), np.float32)])


@targets
@pytest.mark.parametrize("size", [1, 3, 13, 64, 77])
def test_the_gather_reads_whole_rows(target: str, size: int) -> None:
    table = np.arange(5 * size, dtype=np.float32).reshape(5, size)
    indices = np.array([4, 0, 4], dtype=np.int64)
    assert gather(target, table, indices) == table[indices].sum()


@targets
def test_every_half_is_widened_exactly(target: str) -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    wide = kernel_calls.widen(target, halves)
    np.testing.assert_array_equal(wide, halves.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(wide), np.signbit(halves))


@targets
def test_floats_are_narrowed_to_the_nearest_half(target: str) -> None:
    drawn = np.random.default_rng(0).integers(0, 2**32, 100_003, dtype=np.uint32).view(np.float32)
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    # The edges of rounding: halfway between neighbours, and a little more or less.
    halves = halves[np.isfinite(halves)]
    middles = (halves[:-1] + halves[1:]) / 2
    values = np.concatenate([drawn, middles, np.nextafter(middles, np.inf), np.nextafter(middles, -np.inf)])
    with np.errstate(over="ignore", invalid="ignore"):
        np.testing.assert_array_equal(kernel_calls.narrow(target, values), values.astype(np.float16))


@targets
def test_minus_infinity_scores_are_never_padding(target: str) -> None:
    row = np.full((1, 1, 5, 1), -np.inf, dtype=np.float32)
    col = np.zeros((1, 1, 5, 1), dtype=np.float32)
    one = np.ones((1, 1), dtype=np.float32)
    addresses, _ = kernel_calls.tucker_topk(
        target, row, col, one, one, np.ones((1, 1, 1, 1), np.float32), row_topk=5, topk=25
    )
    assert sorted(addresses[0].tolist()) == list(range(25))


def check_key_scores(
    target: str,
    *,
    tokens: int,
    key_dim: int,
    keys: int,
    key_dtype: str = "float32",
    joined: int = 1,
    seed: int = 0,
) -> None:
    """Compare random matrices of keys, joined by rank, with their products in float64."""
    rng = np.random.default_rng(seed)
    queries = rng.standard_normal((tokens, joined * key_dim)).astype(np.float32)
    drawn = (rng.standard_normal((key_dim, keys)) * key_dim**-0.5 for _ in range(joined))
    stored, numbers = zip(*(ROW_DTYPES[key_dtype](matrix) for matrix in drawn), strict=True)
    found = kernel_calls.key_scores(target, queries, stored, key_dtype=key_dtype)
    chunks = queries.astype(np.float64).reshape(tokens, joined, key_dim)
    expected = np.stack([chunks[:, r] @ numbers[r].astype(np.float64) for r in range(joined)], axis=-1)
    np.testing.assert_allclose(found, expected, rtol=RTOL, atol=ATOL)


@targets
@pytest.mark.parametrize("key_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 7, 8, 13, 70])
def test_scores_of_keys_in_every_dtype_agree_with_float64(target: str, key_dtype: str, tokens: int) -> None:
    check_key_scores(target, tokens=tokens, key_dim=24, keys=101, key_dtype=key_dtype, joined=2)


@targets
@pytest.mark.parametrize("joined", [1, 2, 3])
@pytest.mark.parametrize("keys", [1, 16, 127, 128, 360])
def test_scores_of_whole_and_broken_panels_agree_with_float64(target: str, keys: int, joined: int) -> None:
    check_key_scores(target, tokens=5, key_dim=16, keys=keys, joined=joined)


@targets
@pytest.mark.parametrize("tokens", [1, 12, 30])
def test_scores_of_keys_of_many_elements_agree_with_float64(target: str, tokens: int) -> None:
    check_key_scores(target, tokens=tokens, key_dim=700, keys=50, joined=2)


@targets
def test_a_token_has_the_same_scores_beside_any_number_of_others(target: str) -> None:
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((70, 600)).astype(np.float32)
    keys = [rng.standard_normal((300, 100)).astype(np.float16) for _ in range(2)]
    together = kernel_calls.key_scores(target, queries, keys, key_dtype="float16")
    for count in range(1, 30):
        alone = kernel_calls.key_scores(target, queries[:count], keys, key_dtype="float16")
        np.testing.assert_array_equal(alone, together[:count])


@targets
@pytest.mark.parametrize("size", [1, 7, 16, 61])
def test_normalised_rows_have_a_mean_square_of_one(target: str, size: int) -> None:
    values = np.random.default_rng(0).standard_normal((3, size)).astype(np.float32)
    found = kernel_calls.normalize(target, values, 1e-5)
    expected = values / np.sqrt((values.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(found, expected, rtol=2e-6)


@settings(max_examples=60, deadline=None)
@given(
    target=each_target,
    tokens=st.integers(0, 20),
    key_dim=st.integers(1, 40),
    keys=st.integers(1, 150),
    key_dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    joined=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_scores_of_random_shapes_agree_with_float64(target: str, **shape: Any) -> None:
    check_key_scores(target, **shape)


@settings(max_examples=60, deadline=None)
@given(
    target=each_target,
    tokens=st.integers(0, 4),
    hits=st.integers(1, 40),
    part=st.integers(1, 40),
    cores=st.integers(1, 3),
    pre_value_dim=st.integers(0, 40),
    groups=st.sampled_from([1, 1, 4]),
    row_dtype=st.sampled_from(sorted(ROW_DTYPES)),
    rows=st.integers(2, 30),
    rows_per_shard=st.integers(1, 30),
    seed=st.integers(0, 1000),
)
def test_lookup_of_random_shapes_agrees_with_the_oracle(target: str, **shape: Any) -> None:
    check_lookup(target, **shape)


@settings(max_examples=60, deadline=None)
@given(
    target=each_target,
    tokens=st.integers(0, 3),
    heads=st.integers(1, 3),
    keys=st.integers(1, 70),
    ranks=st.integers(1, 4),
    cores=st.integers(1, 3),
    levels=st.sampled_from([0, 0, 2]),
    data=st.data(),
    seed=st.integers(0, 1000),
)
def test_retrieval_of_random_shapes_agrees_with_the_oracle(
    target: str, keys: int, data: st.DataObject, **shape: Any
) -> None:
    row_topk = data.draw(st.integers(1, keys))
    topk = data.draw(st.integers(1, min(100, row_topk**2)))
    check_tucker(target, keys=keys, row_topk=row_topk, topk=topk, **shape)
