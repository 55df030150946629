"""Random attributes and shapes: an op answers as the oracle does or refuses in its own words, and touches nothing else.

`make test-native` runs this with a library that AddressSanitizer watches.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import oracle
from umv2_export import native_library
from umv2_export.bench.single_op import key_scores_model, lookup_model, tucker_model, with_constants
from umv2_export.ops import KeyScoresSignature, LookupSignature

Array = npt.NDArray[Any]

# Zero, signs, what 32 bits and 64 bits wrap around at, and factors of it.
EDGES = [0, -1, 1, 2, 3, 2**15, 2**23 + 1, 2**31, 2**32, 2**61, 2**62, 2**62 + 4, 2**63 - 1, -(2**63)]

edges = st.sampled_from(EDGES)
small = st.integers(0, 5)

many = settings(max_examples=100, deadline=None)


def run(model: onnx.ModelProto, feed: dict[str, Array], attributes: dict[str, int]) -> list[Array] | None:
    """Outputs of the only node with these attributes; None where the op refuses."""
    for attribute in model.graph.node[0].attribute:
        if attribute.name in attributes:
            attribute.i = attributes[attribute.name]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(os.environ.get("UMV2_KERNEL_LIBRARY") or native_library())
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return [np.asarray(output) for output in session.run(None, feed)]
    except Exception as error:  # the runtime's exceptions share no base
        if "umv2::" not in str(error):
            raise
        return None


def truth(reference: Callable[[], Any]) -> Any:
    """What the oracle answers; None where it refuses, too."""
    try:
        return reference()
    except (ValueError, IndexError, ZeroDivisionError):
        return None


def drawn_shapes(data: st.DataObject, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes, in half of all cases with an axis of one of them replaced."""
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from(sorted(shapes)))
        axis = data.draw(st.integers(0, len(shapes[name]) - 1))
        shapes[name] = (*shapes[name][:axis], data.draw(small), *shapes[name][axis + 1 :])
    return shapes


def drawn_attributes(data: st.DataObject, attributes: dict[str, int]) -> dict[str, Any]:
    """The attributes, in half of all cases with one of them replaced by a number that wraps around."""
    if data.draw(st.booleans()):
        attributes[data.draw(st.sampled_from(sorted(attributes)))] = data.draw(edges)
    return attributes


@many
@given(data=st.data(), grouped=st.booleans(), pre_values=st.booleans(), quantized=st.booleans())
def test_a_lookup_of_random_attributes_and_shapes_is_right_or_refused(
    data: st.DataObject, grouped: bool, pre_values: bool, quantized: bool
) -> None:
    shards = data.draw(st.integers(1, 3))
    signature = LookupSignature(shards, grouped, pre_values, quantized)
    t, k, c, part, per_shard = (data.draw(small) for _ in range(5))
    p = data.draw(st.integers(1, 5)) if pre_values else 0
    groups = data.draw(st.integers(2, 4)) if grouped else 1
    rows = per_shard * shards
    shapes = drawn_shapes(
        data,
        {"indices": (t, k), "scores": (t, k, c)}
        | ({"group": (t, k)} if grouped else {})
        | ({"query": (t, p)} if pre_values else {})
        | ({"row_scales": (rows, 2)} if quantized else {})
        | {f"rows_{s}": (per_shard, p + part * c) for s in range(shards)},
    )
    attributes = drawn_attributes(data, {"pre_value_dim": p, "rows_per_shard": per_shard, "groups": groups})
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    ends = {"indices": max(1, rows + data.draw(st.integers(0, 1))), "group": groups}
    feed: dict[str, Array] = {
        name: rng.integers(0, ends[name], shape) if name in ends else rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    table = [feed[f"rows_{s}"] for s in range(shards)]
    if quantized:
        table = [(shard * 40).clip(-128, 127).astype(np.int8) for shard in table]
    feed |= {f"rows_{s}": shard for s, shard in enumerate(table)}
    model = lookup_model(signature, pre_value_dim=p, rows_per_shard=per_shard, groups=groups)
    for value in model.graph.input:
        if quantized and value.name.startswith("rows_"):
            value.type.tensor_type.elem_type = onnx.TensorProto.INT8
    found = run(model, feed, attributes)
    expected = truth(
        lambda: oracle.memory_lookup(
            feed["indices"],
            feed["scores"],
            rows=table,
            group=feed.get("group"),
            query=feed.get("query"),
            row_scales=feed.get("row_scales"),
            **attributes,
        )
    )
    if found is not None and expected is not None:
        np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-3)


@many
@given(data=st.data())
def test_a_retrieval_of_random_attributes_and_shapes_is_right_or_refused(data: st.DataObject) -> None:
    t, h, n, r, c = (data.draw(small) for _ in range(5))
    shapes = drawn_shapes(
        data, {"row_scores": (t, h, n, r), "col_scores": (t, h, n, r), "u": (h, r), "v": (h, r), "cores": (c, h, r, r)}
    )
    attributes = drawn_attributes(data, {"row_topk": data.draw(small), "topk": data.draw(st.integers(0, 26))})
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    # Whole numbers: ties are the rule, and sums are exact.
    feed: dict[str, Array] = {name: rng.integers(-2, 3, shape).astype(np.float32) for name, shape in shapes.items()}
    found = run(tucker_model(row_topk=1, topk=1), feed, attributes)
    expected = truth(lambda: oracle.tucker_topk(*feed.values(), **attributes))
    if found is not None and expected is not None:
        addresses, exact = (answer[0].reshape(t, h, attributes["topk"]) for answer in (found, expected))
        np.testing.assert_array_equal(addresses, np.sort(exact, -1))


@many
@given(data=st.data(), by_rank=st.booleans(), constant=st.booleans())
def test_key_scores_of_random_attributes_and_shapes_are_right_or_refused(
    data: st.DataObject, by_rank: bool, constant: bool
) -> None:
    heads, ranks, key_dim = (data.draw(st.integers(1, 3)) for _ in range(3))
    t, n = data.draw(small), data.draw(st.integers(1, 40))
    matrices = ranks if by_rank else heads
    chunks = tuple(range(2 * matrices))
    held = ((heads if by_rank else 1),) * matrices
    rows, cols = chunks[:matrices], chunks[matrices:]
    signature = KeyScoresSignature(rows, cols, held, held, len(chunks), key_dim, n, heads, ranks, by_rank, 1e-5)
    columns = heads * n if by_rank else n * ranks
    matrix: tuple[int, ...] = (key_dim, columns)
    shapes = drawn_shapes(data, dict.fromkeys(signature.matrices, matrix) | {"queries": (t, len(chunks) * key_dim)})
    names = {"key_dim": key_dim, "heads": heads, "ranks": ranks, "row_matrices": matrices, "by_rank": int(by_rank)}
    attributes = drawn_attributes(data, dict(names))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    feed: dict[str, Array] = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    model, given_feed = key_scores_model(signature), dict(feed)
    if constant:
        model = with_constants(model, {name: given_feed.pop(name) for name in signature.matrices})
    found = run(model, given_feed, attributes)
    if found is None or attributes != names:
        return
    keys = [feed[name] for name in signature.matrices]
    options: dict[str, Any] = {"key_dim": key_dim, "heads": heads, "ranks": ranks, "by_rank": by_rank, "epsilon": 1e-5}
    expected = truth(lambda: oracle.key_scores(feed["queries"], keys[:matrices], keys[matrices:], chunks, **options))
    assert expected is not None
    for side, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(side, exact, rtol=1e-4, atol=1e-4)
