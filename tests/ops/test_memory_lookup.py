"""umv2::MemoryLookup: the torch op against the float64 oracle, and its ONNX body against the torch op."""

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import oracle
from tests.ops.bodies import Array, run_body
from umv2_export.bench.single_op import lookup_model
from umv2_export.ops import LookupSignature, memory_lookup

ROW_TYPES: dict[str, Any] = {
    "float": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int8": np.int8,
}

# Sums of some tens of products of three numbers around 1.
RTOL, ATOL = 1e-5, 5e-5


class Lookup:
    """Random inputs of one call, for the op, the body and the oracle."""

    def __init__(
        self,
        *,
        tokens: int = 3,
        hits: int = 8,
        shards: int = 1,
        rows: str = "float",
        pre_value_dim: int = 6,
        value_dim: int = 12,
        cores: int = 2,
        groups: int = 1,
        activation: Any = "none",
        scores: Any = np.float32,
        rows_per_shard: int = 5,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.count = rows_per_shard * shards - (1 if shards > 1 and rows_per_shard > 1 else 0)
        table = rng.standard_normal((self.count, pre_value_dim + value_dim))
        table = np.clip(table * 40, -128, 127) if rows == "int8" else table
        table = table.astype(ROW_TYPES[rows])
        self.signature = LookupSignature(shards, groups > 1, pre_value_dim > 0, rows == "int8", activation)
        self.attributes: dict[str, Any] = {
            "pre_value_dim": pre_value_dim,
            "rows_per_shard": rows_per_shard,
            "groups": groups,
        }
        self.types: dict[str, Any] = {"rows": rows, "scores": "float" if scores is np.float32 else "float16"}
        self.indices = rng.integers(0, self.count, (tokens, hits))
        if tokens and self.count:
            edges = [0, self.count - 1, min(rows_per_shard, self.count) - 1, min(rows_per_shard, self.count - 1)]
            self.indices[0, : min(hits, 4)] = edges[: min(hits, 4)]
        self.scores = rng.standard_normal((tokens, hits, cores)).astype(scores)
        self.group = rng.integers(0, groups, (tokens, hits)) if groups > 1 else None
        self.query = rng.standard_normal((tokens, pre_value_dim)).astype(scores) if pre_value_dim else None
        self.row_scales = rng.random((self.count, 2)).astype(np.float32) / 40 if rows == "int8" else None
        self.rows = [table[s * rows_per_shard : (s + 1) * rows_per_shard] for s in range(shards)]

    def op_arguments(self) -> tuple[Any, ...]:
        def tensor(array: Array | None) -> torch.Tensor | None:
            if array is not None and array.dtype == ml_dtypes.bfloat16:
                return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            return None if array is None else torch.from_numpy(array)

        optional = (tensor(array) for array in (self.group, self.query, self.row_scales))
        return (
            tensor(self.indices),
            tensor(self.scores),
            *optional,
            [tensor(shard) for shard in self.rows],
            self.attributes["pre_value_dim"],
            self.signature.activation,
            self.attributes["rows_per_shard"],
            self.attributes["groups"],
        )

    def by_op(self) -> Array:
        return np.asarray(memory_lookup(*self.op_arguments()))

    def by_oracle(self) -> Array:
        return np.asarray(
            oracle.memory_lookup(
                self.indices,
                self.scores,
                rows=self.rows,
                activation=self.signature.activation,
                group=self.group,
                query=self.query,
                row_scales=self.row_scales,
                **self.attributes,
            )
        )

    def by_body(self, *, opset: int = 18) -> Array:
        feed = {
            "indices": self.indices,
            "scores": self.scores,
            "group": self.group,
            "query": self.query,
            "row_scales": self.row_scales,
        }
        feed |= {f"rows_{s}": shard for s, shard in enumerate(self.rows)}
        model = lookup_model(self.signature, opset=opset, **self.attributes, **self.types)
        if self.types["rows"] == "bfloat16":
            # numpy cannot feed bfloat16: the rows become initializers, as they are in a bundle.
            for s, shard in enumerate(self.rows):
                name = f"rows_{s}"
                model.graph.initializer.append(
                    onnx.TensorProto(
                        name=name, data_type=onnx.TensorProto.BFLOAT16, dims=shard.shape, raw_data=shard.tobytes()
                    )
                )
                model.graph.input.remove(next(value for value in model.graph.input if value.name == name))
                del feed[name]
        return run_body(model, {name: array for name, array in feed.items() if array is not None})[0]


CASES: dict[str, dict[str, Any]] = {
    "plain": {"pre_value_dim": 0},
    "pre-values": {},
    "one token, one hit": {"tokens": 1, "hits": 1},
    "no token": {"tokens": 0},
    "one core": {"cores": 1},
    "three cores": {"cores": 3},
    "two shards": {"shards": 2},
    "three shards": {"shards": 3},
    "shards of one row": {"shards": 3, "rows_per_shard": 1},
    "gelu": {"activation": "gelu"},
    "groups": {"groups": 4, "pre_value_dim": 0},
    "half rows": {"rows": "float16"},
    "bfloat rows": {"rows": "bfloat16", "shards": 2},
    "int8 rows": {"rows": "int8"},
    "everything": {"rows": "int8", "shards": 3, "groups": 4, "activation": "gelu"},
}


@pytest.mark.parametrize("label", sorted(CASES))
def test_the_op_agrees_with_the_oracle(label: str) -> None:
    lookup = Lookup(**CASES[label])
    np.testing.assert_allclose(lookup.by_op(), lookup.by_oracle(), rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("label", sorted(CASES))
def test_the_body_gives_what_the_op_gives(label: str, opset: int) -> None:
    lookup = Lookup(**CASES[label])
    np.testing.assert_allclose(lookup.by_body(opset=opset), lookup.by_op(), rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("label", sorted(CASES))
def test_half_precision_scores_give_a_half_precision_output(label: str) -> None:
    lookup = Lookup(scores=np.float16, **CASES[label])
    for found in (lookup.by_op(), lookup.by_body()):
        assert found.dtype == np.float16
        np.testing.assert_allclose(found.astype(np.float64), lookup.by_oracle(), rtol=1e-3, atol=2e-3)


random_shapes = st.fixed_dictionaries(
    {
        "tokens": st.integers(0, 4),
        "hits": st.integers(1, 12),
        "shards": st.integers(1, 4),
        "rows": st.sampled_from(sorted(ROW_TYPES)),
        "pre_value_dim": st.integers(0, 7),
        "value_dim": st.sampled_from([6, 12]),
        "cores": st.integers(1, 3),
        "groups": st.sampled_from([1, 2, 4]),
        "activation": st.sampled_from(["none", "gelu"]),
        "rows_per_shard": st.integers(1, 7),
        "seed": st.integers(0, 99),
    }
)


@settings(max_examples=60, deadline=None)
@given(shape=random_shapes)
def test_the_op_agrees_with_the_oracle_for_random_shapes(shape: dict[str, Any]) -> None:
    lookup = Lookup(**shape)
    np.testing.assert_allclose(lookup.by_op(), lookup.by_oracle(), rtol=RTOL, atol=ATOL)


def test_half_precision_inputs_are_summed_in_fp32() -> None:
    """Terms of 1 on top of 4096: in fp16, each would be rounded away."""
    lookup = Lookup(tokens=1, hits=65, pre_value_dim=0, value_dim=1, cores=1, rows="float16", scores=np.float16)
    lookup.rows = [np.full_like(lookup.rows[0], 1.0)]
    lookup.scores[:] = 1.0
    lookup.scores[0, 0] = 4096.0
    for found in (lookup.by_op(), lookup.by_body()):
        np.testing.assert_array_equal(found, [[4160.0]])


@settings(max_examples=25, deadline=None)
@given(shape=random_shapes)
def test_the_body_agrees_with_the_oracle_for_random_shapes(shape: dict[str, Any]) -> None:
    lookup = Lookup(**shape)
    np.testing.assert_allclose(lookup.by_body(), lookup.by_oracle(), rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("index", [-1, 9, 2**40])
def test_an_index_outside_the_table_is_refused(index: int) -> None:
    lookup = Lookup(shards=2)
    lookup.indices[1, 1] = index
    with pytest.raises(IndexError, match="rows 0 to 8"):
        lookup.by_op()


@pytest.mark.parametrize("name", ["scores", "query", "row_scales", "group"])
def test_a_wrong_shape_is_refused(name: str) -> None:
    lookup = Lookup(rows="int8", groups=4)
    setattr(lookup, name, np.concatenate([getattr(lookup, name)] * 2))
    with pytest.raises(ValueError, match=r"must be|expected|is 4"):
        lookup.by_op()


@pytest.mark.parametrize("name", ["query", "row_scales", "group"])
def test_an_input_that_the_attributes_ask_for_may_not_be_left_out(name: str) -> None:
    lookup = Lookup(rows="int8", groups=4)
    setattr(lookup, name, None)
    with pytest.raises(ValueError, match="missing"):
        lookup.by_op()


def test_shards_that_do_not_fit_are_refused() -> None:
    lookup = Lookup(shards=3)
    lookup.rows[0] = lookup.rows[0][:-1]
    with pytest.raises(ValueError, match="rows_per_shard 5"):
        lookup.by_op()


def test_scores_of_no_core_are_refused() -> None:
    lookup = Lookup()
    lookup.scores = lookup.scores[:, :, :0]
    with pytest.raises(ValueError, match="parts"):
        lookup.by_op()


def test_shards_of_different_types_are_refused() -> None:
    lookup = Lookup(shards=2)
    lookup.rows[1] = lookup.rows[1].astype(np.int8)
    with pytest.raises(ValueError, match="rows"):
        lookup.by_op()


def test_an_unknown_activation_is_refused() -> None:
    arguments = list(Lookup().op_arguments())
    arguments[7] = "relu"
    with pytest.raises(ValueError, match="relu"):
        memory_lookup(*arguments)


@pytest.mark.parametrize("label", ["plain", "pre-values", "three shards", "everything", "bfloat rows"])
def test_the_op_is_a_well_formed_torch_op(label: str) -> None:
    torch.library.opcheck(torch.ops.umv2.MemoryLookup.default, Lookup(**CASES[label]).op_arguments())
