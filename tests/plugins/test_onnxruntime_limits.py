"""What a model file, the environment or a second runtime may say to the op library: answered or refused."""

import ctypes
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.ops.bodies import Array, run_body, run_native
from umv2_export import cuda_library, native_library
from umv2_export.bench.single_op import lookup_model, tucker_model
from umv2_export.ops import LookupSignature

# Places of functions in the table of a runtime, as the library has them.
ABI = (Path(__file__).parents[2] / "plugins" / "onnxruntime" / "ort_abi.h").read_text()
SLOTS = {name: int(place) for name, place in re.findall(r"^  (k\w+) = (\d+),$", ABI, re.MULTILINE)}

# Tables of runtimes that were registered: the library may call them until the process ends.
KEPT: list[Any] = []

PLAIN = LookupSignature(shards=1, pre_values=False)
GROUPED = LookupSignature(shards=1, grouped=True, pre_values=False)


def lookup(signature: LookupSignature = PLAIN, **attributes: int) -> onnx.ModelProto:
    """A lookup in a table of 7 rows of 4 elements, its attributes replaced afterwards."""
    groups = 2 if signature.grouped else 1
    return changed(lookup_model(signature, pre_value_dim=0, rows_per_shard=7, groups=groups), **attributes)


def changed(model: onnx.ModelProto, **attributes: int) -> onnx.ModelProto:
    for attribute in model.graph.node[0].attribute:
        if attribute.name in attributes:
            attribute.i = attributes[attribute.name]
    return model


def without(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    kept = [attribute for attribute in model.graph.node[0].attribute if attribute.name != name]
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.extend(kept)
    return model


def lookup_feed(*, group: int | None = None) -> dict[str, Array]:
    feed: dict[str, Array] = {"indices": np.array([[0, 6]]), "scores": np.ones((1, 2, 2), np.float32)}
    if group is not None:
        feed["group"] = np.full((1, 2), group)
    return {**feed, "rows_0": np.arange(28, dtype=np.float32).reshape(7, 4)}


def tucker_feed(**sizes: int) -> dict[str, Array]:
    t, h, n, r, c = ({"t": 2, "h": 1, "n": 9, "r": 2, "c": 1} | sizes).values()
    shapes = {"row_scores": (t, h, n, r), "col_scores": (t, h, n, r), "u": (h, r), "v": (h, r), "cores": (c, h, r, r)}
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def failure(model: onnx.ModelProto, feed: dict[str, Array]) -> str:
    """What the op says."""
    with pytest.raises(Exception, match="umv2::") as caught:  # the runtime's exceptions share no base
        run_native(model, feed)
    return str(caught.value)


@pytest.mark.parametrize("groups", [2**62, 2**62 + 4, 2**63 - 1, 2**40, -1, 0])
def test_groups_whose_product_with_a_value_overflows_are_refused(groups: int) -> None:
    assert f"groups {groups} is out of range" in failure(lookup(GROUPED, groups=groups), lookup_feed(group=0))


@pytest.mark.parametrize(("name", "value"), [("pre_value_dim", 2**62), ("pre_value_dim", -1), ("rows_per_shard", 0)])
def test_attributes_of_a_lookup_out_of_range_are_refused_by_name(name: str, value: int) -> None:
    assert f"{name} {value} is out of range" in failure(lookup(PLAIN, **{name: value}), lookup_feed())


@pytest.mark.parametrize("row_topk", [0, -1, 2**32, 2**62])
def test_a_row_topk_whose_square_overflows_is_refused(row_topk: int) -> None:
    model = changed(tucker_model(row_topk=4, topk=4), row_topk=row_topk)
    assert f"row_topk {row_topk} is out of range" in failure(model, tucker_feed())


@pytest.mark.parametrize("topk", [0, 17, 2**62])
def test_a_topk_beyond_the_grid_is_refused(topk: int) -> None:
    assert "topk must be from 1" in failure(changed(tucker_model(row_topk=4, topk=4), topk=topk), tucker_feed())


def test_more_tokens_than_memory_are_an_error_before_any_is_written() -> None:
    feed = lookup_feed() | {"indices": np.zeros((2**45, 0), np.int64), "scores": np.zeros((2**45, 0, 2), np.float32)}
    assert "is out of range: 35184372088832 * 4" in failure(lookup(), feed)


def test_a_lookup_without_groups_has_one() -> None:
    for run in (run_native, run_body):
        np.testing.assert_array_equal(run(without(lookup(), "groups"), lookup_feed())[0], [[24, 26, 28, 30]])


def test_groups_of_another_type_are_an_error_not_the_default() -> None:
    model = lookup()
    attribute = next(entry for entry in model.graph.node[0].attribute if entry.name == "groups")
    attribute.ClearField("i")
    attribute.type, attribute.f = onnx.AttributeProto.FLOAT, 4.0
    assert "ONNX Runtime failed: groups" in failure(model, lookup_feed())


def test_an_attribute_that_has_no_default_is_missed_by_name() -> None:
    message = failure(without(lookup(), "rows_per_shard"), lookup_feed())
    assert "rows_per_shard" in message


def test_one_core_and_one_rank_are_served() -> None:
    model, feed = tucker_model(row_topk=4, topk=6), tucker_feed(r=1, c=1, h=2)
    native, stock = run_native(model, feed), run_body(model, feed)
    np.testing.assert_array_equal(np.sort(native[0].reshape(2, 2, 6)), np.sort(stock[0].reshape(2, 2, 6)))
    feed_one = lookup_feed() | {"scores": np.full((1, 2, 1), 0.5, np.float32)}
    np.testing.assert_array_equal(run_native(lookup(), feed_one)[0], [[12, 13, 14, 15]])


def test_two_ranks_with_cores_that_are_the_identity_sum_the_ranks() -> None:
    feed = tucker_feed(h=2) | {"cores": np.tile(np.eye(2, dtype=np.float32), (1, 2, 1, 1))}
    addresses, scores = run_native(tucker_model(row_topk=9, topk=5), feed)
    sums = np.einsum("thir,thjr->thij", feed["row_scores"], feed["col_scores"]).reshape(2, 2, 81)
    best = np.sort(np.argsort(-sums, axis=-1)[..., :5], axis=-1)
    np.testing.assert_array_equal(addresses.reshape(2, 2, 5), best)
    np.testing.assert_allclose(scores.reshape(2, 2, 5), np.take_along_axis(sums, best, -1), rtol=1e-5)


def run_with_target(when: str, target: str) -> str:
    """Registers the library, creates a session and runs it, with the environment changed at one of these points."""
    program = """
import os, sys
import numpy as np, onnxruntime
from tests.plugins.test_onnxruntime_limits import lookup, lookup_feed
from umv2_export import native_library
when, target = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
options.register_custom_ops_library(native_library())
if when == "before the session":
    os.environ["UMV2_CPU_TARGET"] = target
try:
    session = onnxruntime.InferenceSession(lookup().SerializeToString(), options, providers=["CPUExecutionProvider"])
    if when == "before the run":
        os.environ["UMV2_CPU_TARGET"] = target
    print(session.run(None, lookup_feed())[0].tolist())
except Exception as error:
    print(error)
"""
    command = [sys.executable, "-c", program, when, target]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_target_that_is_changed_after_a_node_was_created_changes_nothing() -> None:
    assert run_with_target("before the run", "abacus").strip() == "[[24.0, 26.0, 28.0, 30.0]]"


def test_a_target_that_does_not_run_is_refused_when_a_node_is_created() -> None:
    answer = run_with_target("before the session", "abacus")
    assert "UMV2_CPU_TARGET names kernels that this processor does not run" in answer


def stand_in_runtime(name: str, calls: list[tuple[str, str]]) -> tuple[Any, list[Any]]:
    """An OrtApiBase whose table records which of its functions are called; and what must stay alive."""
    table = (ctypes.c_void_p * 400)()
    kept: list[Any] = [table]

    def slot(place: str, function: str, arguments: int, answer: Callable[..., object] = lambda *_: None) -> None:
        def called(*given: Any) -> None:
            calls.append((name, function))
            answer(*given)

        callback = ctypes.CFUNCTYPE(ctypes.c_void_p, *[ctypes.c_void_p] * arguments)(called)
        table[SLOTS[place]] = ctypes.cast(callback, ctypes.c_void_p).value
        kept.append(callback)

    slot(
        "kCreateCustomOpDomain",
        "create domain",
        2,
        lambda _, domain: ctypes.memmove(domain, ctypes.byref(ctypes.c_uint64(1)), 8),
    )
    slot("kAddCustomOp", "add op", 2)
    slot("kAddCustomOpDomain", "add domain", 2)
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(lambda _: ctypes.addressof(table))
    kept.append(get_api)
    base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p).value, None)
    return base, kept


@pytest.mark.parametrize("library", [native_library, cuda_library])
def test_each_runtime_of_a_process_is_called_by_its_own_table(library: Callable[[], str]) -> None:
    calls: list[tuple[str, str]] = []
    runtimes = {name: stand_in_runtime(name, calls) for name in ("first", "second")}
    register = ctypes.CDLL(library()).RegisterCustomOps
    register.restype = ctypes.c_void_p
    for name in ("first", "second", "first"):
        calls.clear()
        assert register(ctypes.c_void_p(8), runtimes[name][0]) is None
        assert {caller for caller, _ in calls} == {name}
        assert calls[-1] == (name, "add domain")
    KEPT.append(runtimes)
