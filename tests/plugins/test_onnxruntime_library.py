"""The native op library inside ONNX Runtime: equal to the bodies, strict about its input, the same for any threads."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest

from tests.command import run_command
from tests.golden import GOLDEN_CASES
from tests.ops.bodies import Array, run_body, run_native
from umv2_export import cuda_library, native_library
from umv2_export.bench.sessions import open_session
from umv2_export.bench.single_op import lookup_model, tucker_model
from umv2_export.ops import LookupSignature

GOLDEN = {case.name: case for case in GOLDEN_CASES}
Exported = Callable[..., tuple[Path, dict[str, Any]]]


def lookup_feed(
    signature: LookupSignature,
    *,
    tokens: int = 3,
    hits: int = 10,
    pre_value_dim: int = 12,
    value_dim: int = 32,
    rows_per_shard: int = 7,
    groups: int = 1,
    scores: type = np.float32,
    rows: Any = np.float32,
    seed: int = 0,
) -> dict[str, Array]:
    """Random inputs of a MemoryLookup; the last shard has one row less than the others."""
    rng = np.random.default_rng(seed)
    count = rows_per_shard * signature.shards - (1 if signature.shards > 1 else 0)
    table = rng.standard_normal((count, pre_value_dim + value_dim))
    table = (table * 40).clip(-128, 127).astype(rows) if rows is np.int8 else table.astype(rows)
    feed: dict[str, Array] = {
        "indices": rng.integers(0, count, (tokens, hits)),
        "scores": rng.standard_normal((tokens, hits, 2)).astype(scores),
    }
    if signature.grouped:
        feed["group"] = rng.integers(0, groups, (tokens, hits))
    if signature.pre_values:
        feed["query"] = rng.standard_normal((tokens, pre_value_dim)).astype(scores)
    if signature.quantized:
        feed["row_scales"] = rng.random((count, 2)).astype(np.float32) / 40
    for s in range(signature.shards):
        feed[f"rows_{s}"] = table[s * rows_per_shard : (s + 1) * rows_per_shard]
    return feed


def tucker_feed(
    *, tokens: int = 3, heads: int = 2, keys: int = 50, dtype: type = np.float32, seed: int = 0
) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    shapes = {
        "row_scores": (tokens, heads, keys, 2),
        "col_scores": (tokens, heads, keys, 2),
        "u": (heads, 2),
        "v": (heads, 2),
        "cores": (2, heads, 2, 2),
    }
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_parity_of_the_native_ops_passes_on_every_golden_case(name: str, exported: Exported) -> None:
    result = run_command("parity", exported(name)[0], "--reference", GOLDEN[name], "--runtime", "onnxruntime-native")
    assert result.exit_code == 0, result.stdout


@pytest.mark.parametrize("scores", [np.float32, np.float16])
@pytest.mark.parametrize("tokens", [0, 1, 3, 20])
def test_retrieval_equals_the_body(scores: type, tokens: int) -> None:
    name = "float" if scores is np.float32 else "float16"
    model = tucker_model(row_topk=8, topk=9, scores=name)
    feed = tucker_feed(tokens=tokens, dtype=scores)
    native, stock = run_native(model, feed), run_body(model, feed)
    assert native[1].dtype == scores
    shape = (tokens, 2, 9)
    np.testing.assert_array_equal(np.sort(native[0].reshape(shape), -1), np.sort(stock[0].reshape(shape), -1))
    totals = [np.sort(x[1].astype(np.float32).sum(-1).reshape(shape), -1) for x in (native, stock)]
    np.testing.assert_allclose(totals[0], totals[1], rtol=0, atol=1e-5 if scores is np.float32 else 2e-2)


SIGNATURES = {
    "plain": LookupSignature(shards=1, pre_values=False),
    "pre-values": LookupSignature(shards=1),
    "three shards": LookupSignature(shards=3),
    "gelu": LookupSignature(shards=2, activation="gelu"),
    "groups": LookupSignature(shards=2, grouped=True, pre_values=False),
    "everything": LookupSignature(shards=3, grouped=True, pre_values=True, quantized=True, activation="gelu"),
}


def lookup_case(label: str, **options: Any) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model and its feed."""
    signature = SIGNATURES[label]
    pre_value_dim = 12 if signature.pre_values else 0
    groups = 4 if signature.grouped else 1
    scores, rows = options.get("scores", np.float32), options.get("rows", np.float32)
    rows = np.int8 if signature.quantized else rows
    names = {np.float32: "float", np.float16: "float16", np.int8: "int8", ml_dtypes.bfloat16: "bfloat16"}
    model = lookup_model(
        signature, pre_value_dim=pre_value_dim, rows_per_shard=7, groups=groups, scores=names[scores], rows=names[rows]
    )
    feed = lookup_feed(signature, pre_value_dim=pre_value_dim, groups=groups, **{**options, "rows": rows})
    return model, feed


@pytest.mark.parametrize("label", sorted(SIGNATURES))
@pytest.mark.parametrize("tokens", [0, 1, 3, 20])
def test_lookup_equals_the_body(label: str, tokens: int) -> None:
    model, feed = lookup_case(label, tokens=tokens, hits=40)
    native, stock = run_native(model, feed)[0], run_body(model, feed)[0]
    np.testing.assert_allclose(native, stock, rtol=1e-5, atol=1e-4)


def test_lookup_of_half_precision_rows_and_scores_equals_the_body() -> None:
    model, feed = lookup_case("three shards", scores=np.float16, rows=np.float16, tokens=5)
    native, stock = run_native(model, feed)[0], run_body(model, feed)[0]
    assert native.dtype == np.float16
    np.testing.assert_allclose(native.astype(np.float32), stock.astype(np.float32), rtol=2e-3, atol=2e-2)


def test_results_are_the_same_for_any_number_of_threads() -> None:
    model, feed = lookup_case("pre-values", tokens=2, hits=64)
    one, two = run_native(model, feed, threads=1)[0], run_native(model, feed, threads=2)[0]
    np.testing.assert_array_equal(one, two)


def failure(model: onnx.ModelProto, feed: dict[str, Array]) -> str:
    """What the op says."""
    with pytest.raises(Exception, match="umv2::") as caught:  # the runtime's exceptions share no base
        run_native(model, feed)
    return str(caught.value)


@pytest.mark.parametrize("index", [-1, 20, 2**40])
def test_an_index_outside_the_table_is_an_error_that_names_it(index: int) -> None:
    model, feed = lookup_case("three shards")
    feed["indices"][1, 2] = index
    assert f"indices holds {index} at element 12, valid are 0 to 19" in failure(model, feed)


def test_a_group_outside_the_groups_is_an_error() -> None:
    model, feed = lookup_case("groups")
    feed["group"][0, 0] = 4
    assert "group holds 4" in failure(model, feed)


def test_nan_scores_of_a_lookup_are_an_error() -> None:
    model, feed = lookup_case("plain")
    feed["scores"][2, 1, 0] = np.nan
    assert "scores holds NaN" in failure(model, feed)


@pytest.mark.parametrize("name", ["row_scores", "col_scores"])
def test_nan_scores_of_a_retrieval_are_an_error(name: str) -> None:
    feed = tucker_feed()
    feed[name][1, 1, 3, 0] = np.nan
    assert f"{name} holds NaN" in failure(tucker_model(row_topk=4, topk=4), feed)


def test_infinite_scores_are_no_error() -> None:
    feed = tucker_feed()
    feed["row_scores"][:, :, 7] = -np.inf
    addresses = run_native(tucker_model(row_topk=4, topk=4), feed)[0]
    assert not (addresses // 50 == 7).any()


@pytest.mark.parametrize("name", ["scores", "query", "rows_1", "row_scales", "group"])
def test_a_wrong_shape_is_an_error(name: str) -> None:
    model, feed = lookup_case("everything")
    feed[name] = np.concatenate([feed[name], feed[name]])
    assert "umv2::MemoryLookup" in failure(model, feed)


def test_more_row_keys_than_there_are_is_an_error() -> None:
    assert "row_topk 51" in failure(tucker_model(row_topk=51, topk=4), tucker_feed())


def test_bfloat16_rows_have_a_kernel() -> None:
    """Their values are checked on the kernel itself: numpy cannot feed them to the runtime."""
    signature = SIGNATURES["plain"]
    model = lookup_model(signature, pre_value_dim=0, rows_per_shard=7, rows="bfloat16")
    opened = open_session(model, native=True, threads=1)
    table = ml_dtypes.bfloat16(1.5) * np.ones((7, 4), dtype=ml_dtypes.bfloat16)
    rows = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(table.view(np.uint16), 16)
    feed = {
        "indices": onnxruntime.OrtValue.ortvalue_from_numpy(np.array([[0, 6]])),
        "scores": onnxruntime.OrtValue.ortvalue_from_numpy(np.ones((1, 2, 2), np.float32)),
        "rows_0": rows,
    }
    np.testing.assert_array_equal(opened.run_with_ort_values(None, feed)[0].numpy(), np.full((1, 4), 3.0))


@pytest.mark.parametrize("target", ["portable", "avx2"])
def test_the_kernels_can_be_chosen_by_an_environment_variable(target: str) -> None:
    code = "from umv2_export.cpu_kernels import cpu_target; print(cpu_target())"
    environment = {**os.environ, "UMV2_CPU_TARGET": target}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == target


def test_unknown_kernels_are_refused_when_the_library_is_registered() -> None:
    code = (
        "import onnxruntime, umv2_export;"
        "onnxruntime.SessionOptions().register_custom_ops_library(umv2_export.native_library())"
    )
    environment = {**os.environ, "UMV2_CPU_TARGET": "abacus"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "UMV2_CPU_TARGET names kernels that this processor does not run" in result.stderr


def test_the_library_exports_its_entry_points_only() -> None:
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", native_library()], capture_output=True, text=True, check=True
    )
    names = {line.split()[-1] for line in symbols.stdout.splitlines()}
    kernels = {"gather", "key_scores", "memory_lookup", "narrow", "normalize", "pack_panels", "tucker_topk", "widen"}
    chosen = {"compiled_kernels", "cpu_target", "kernels"}
    assert names == {"RegisterCustomOps", *(f"umv2_{name}" for name in kernels | chosen)}


@pytest.mark.parametrize("library", [native_library, cuda_library])
def test_the_library_stays_where_what_it_registered_and_loaded_is(library: Callable[[], str]) -> None:
    program = """
import sys, onnxruntime
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(sys.argv[1])
del options
assert sys.argv[1] in open("/proc/self/maps").read()
"""
    subprocess.run([sys.executable, "-c", program, os.path.realpath(library())], check=True)


@pytest.mark.parametrize("library", [native_library, cuda_library])
def test_an_older_runtime_is_refused_by_name_and_nothing_else_of_it_is_called(library: Callable[[], str]) -> None:
    messages: list[str] = []
    status = ctypes.create_string_buffer(8)
    create_status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    version = ctypes.create_string_buffer(b"1.19.2")
    version_string = ctypes.CFUNCTYPE(ctypes.c_void_p)

    def record(code: int, message: bytes) -> int:
        messages.append(message.decode())
        return ctypes.addressof(status)

    recorder = create_status(record)
    # Its table has the one slot that every version has; calling another would read beyond it.
    table = (ctypes.c_void_p * 1)(ctypes.cast(recorder, ctypes.c_void_p))
    callbacks = (
        get_api(lambda number: ctypes.addressof(table) if number == 1 else None),
        version_string(lambda: ctypes.addressof(version)),
    )
    base = (ctypes.c_void_p * 2)(*(ctypes.cast(callback, ctypes.c_void_p) for callback in callbacks))
    register = ctypes.CDLL(library()).RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, base) == ctypes.addressof(status)
    assert messages == ["the umv2 op library needs ONNX Runtime 1.20 or later, this is 1.19.2"]
