"""The ops for ONNX Runtime's CUDA provider: whole models on a stand-in driver, and the library itself.

No GPU takes part. The sources of the library are compiled once more for the provider of the CPU, whose memory is also
the stand-in's.
"""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests.gpu.stand_in import build_stand_in, stand_in_environment, write_kernels
from tests.gpu.stand_in_kernels import write_stand_in_kernels
from tests.ops.bodies import Array, run_body
from tests.plugins.test_onnxruntime_library import lookup_case, tucker_feed
from umv2_export import cuda_library
from umv2_export.bench.single_op import tucker_model
from umv2_export.bundle import Bundle
from umv2_export.gpu.lookup_variants import SPLIT_PROGRAMS, LookupVariant, lookup_variant, sum_variant
from umv2_export.gpu.topk_variants import topk_variant
from umv2_export.gpu.variants import Variant, node_variants
from umv2_export.parity.compare import Tolerance, difference

Exported = Callable[..., tuple[Path, dict[str, Any]]]

PLUGINS = Path(__file__).parents[2] / "plugins"

TOPK = topk_variant(torch.float32, ranks=2, cores=2, row_topk=8, topk=9)


SANITIZE = ("-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of the CUDA library, registered for the provider of the CPU."""
    return build_library(tmp_path_factory.mktemp("library") / "libops.so")


def build_library(target: Path, *options: str) -> Path:
    """Compile it with further options; returns it."""
    sources = [
        *(PLUGINS / "onnxruntime" / name for name in ("library.cpp", "op_inputs.cpp")),
        *sorted((PLUGINS / "onnxruntime_cuda").glob("*.cpp")),
        *sorted((PLUGINS / "cuda").glob("*.cpp")),
    ]
    flags = ["-std=c++17", "-O0", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", *options]
    flags += [
        '-DUMV2_EXECUTION_PROVIDER="CPUExecutionProvider"',
        f"-I{PLUGINS / 'onnxruntime'}",
        f"-I{PLUGINS / 'cuda'}",
        f"-I{PLUGINS / 'common'}",
    ]
    subprocess.run(["c++", *flags, *sources, "-ldl", "-o", target], check=True)
    return target


@dataclass(frozen=True)
class Case:
    """A model, the kernels that are there for it, and its input."""

    model: Path | onnx.ModelProto
    variants: list[Variant]
    feed: Mapping[str, Array]


def run_on_stand_in(library: Path, folder: Path, cases: Mapping[str, Case]) -> dict[str, dict[str, Array] | str]:
    """The outputs of each case by name, or its error."""
    folders = {name: folder / str(number) for number, name in enumerate(cases)}
    for name, case in cases.items():
        write_stand_in_kernels(folders[name], case.variants)
        model = case.model
        if isinstance(model, onnx.ModelProto):
            onnx.save(model, folders[name] / "model.onnx")
            model = folders[name] / "model.onnx"
        (folders[name] / "model.txt").write_text(str(model))
        feed: dict[str, Any] = dict(case.feed)
        np.savez(folders[name] / "feed.npz", **feed)
    write_kernels(folder / "kernels.txt", folders.values())
    command: list[str | Path] = [sys.executable, "-m", "tests.plugins.run_cuda_ops", library, *folders.values()]
    environment = stand_in_environment(kernels=folder / "kernels.txt", log=folder / "launches.txt")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Array] | str] = {}
    for name, place in folders.items():
        if (place / "error.txt").exists():
            found[name] = (place / "error.txt").read_text()
        else:
            with np.load(place / "outputs.npz") as outputs:
                found[name] = dict(outputs)
    return found


def bundle_kernels(bundle: Bundle) -> list[Variant]:
    """Those that its nodes ask for."""
    return node_variants(bundle.config, bundle.layout.shards, bundle.layout.dtype)


def model_feed(bundle: Bundle, *, past: int) -> dict[str, Array]:
    """Three tokens of two sequences after some cached ones."""
    rng = np.random.default_rng(0)
    config = bundle.config
    dtype = np.float16 if bundle.manifest.dtype == "fp16" else np.float32
    cache = rng.standard_normal((2, config.num_heads, past, config.head_size)).astype(dtype)
    feed = {
        "input_ids": rng.integers(0, config.vocab_size, (2, 3)),
        "attention_mask": np.ones((2, past + 3), dtype=np.int64),
    }
    return feed | {f"past_key_values.{i}.{kind}": cache for i in range(config.num_layers) for kind in ("key", "value")}


# Bundles by what their lookups have.
BUNDLES = {
    "pre-values in several shards": ("v2_shared_ring", "--shard-size", "40KB"),
    "groups": ("v1_skip_layer",),
    "gelu, two heads": ("v2_glu_two_heads",),
    "no pre-values": ("v2_no_pre_values",),
    "fp16": ("v2_shared_ring", "--dtype", "fp16"),
}


def test_bundles_give_the_logits_of_their_bodies(library: Path, tmp_path: Path, exported: Exported) -> None:
    bundles = {label: Bundle(exported(*arguments)[0]) for label, arguments in BUNDLES.items()}
    assert bundles["pre-values in several shards"].layout.shards > 1
    cases = {
        f"{label}, past {past}": Case(bundle.model_file, bundle_kernels(bundle), model_feed(bundle, past=past))
        for label, bundle in bundles.items()
        for past in (0, 4)
    }
    found = run_on_stand_in(library, tmp_path, cases)
    for name, case in cases.items():
        outputs = found[name]
        assert isinstance(outputs, dict), outputs
        stock = onnxruntime.InferenceSession(case.model, providers=["CPUExecutionProvider"])
        logits = dict(zip((output.name for output in stock.get_outputs()), stock.run(None, case.feed), strict=True))[
            "logits"
        ]
        dtype = "fp16" if name.startswith("fp16") else "fp32"
        bounds = Tolerance(dtype=dtype, layers=4).bounds(logits)
        compared = difference(outputs["logits"], logits, bounds)
        assert compared.within, (name, compared)


def lookup_of(label: str, shards: int, **options: Any) -> Case:
    """A MemoryLookup by itself, with a kernel of `shards` shards."""
    model, feed = lookup_case(label, **options)
    rows = feed["rows_0"].dtype
    variant = lookup_variant(
        torch.float32,
        torch.int8 if rows == np.int8 else torch.float32,
        shards=shards,
        cores=2,
        grouped="group" in feed,
        pre_value_dim=12 if "query" in feed else 0,
        value_dim=32,
        gelu=label in ("gelu", "everything"),
    )
    return Case(model, [variant], feed)


LOOKUPS = {
    "int8 rows with everything else": lookup_of("everything", 3, tokens=5, hits=20),
    "a kernel of more shards": lookup_of("three shards", 5, tokens=5),
    "no tokens": lookup_of("pre-values", 1, tokens=0),
    "no hits": lookup_of("pre-values", 1, tokens=5, hits=0),
}


def topk_of(**options: Any) -> Case:
    """A TuckerTopK by itself."""
    return Case(tucker_model(row_topk=8, topk=9), [TOPK], tucker_feed(**options))


def sorted_hits(addresses: Array, scores: Array) -> tuple[Array, Array]:
    """The hits of each token and head in the order of their addresses: that of the op is unspecified."""
    addresses, scores = addresses.reshape(-1, 9), scores.reshape(-1, 9, 2)
    order = addresses.argsort(-1)
    return np.take_along_axis(addresses, order, 1), np.take_along_axis(scores, order[..., None], 1)


def test_single_ops_give_what_their_bodies_give(library: Path, tmp_path: Path) -> None:
    topk = {
        f"top-k of {sizes}": topk_of(**sizes) for sizes in ({"tokens": 4}, {"tokens": 0}, {"tokens": 4, "heads": 0})
    }
    cases = LOOKUPS | topk
    for name, outputs in run_on_stand_in(library, tmp_path, cases).items():
        assert isinstance(outputs, dict), (name, outputs)
        case = cases[name]
        assert isinstance(case.model, onnx.ModelProto)
        actual, expected = list(outputs.values()), run_body(case.model, case.feed)
        assert [array.shape for array in actual] == [array.shape for array in expected]
        if name in topk:
            actual, expected = [*sorted_hits(*actual)], [*sorted_hits(*expected)]
            np.testing.assert_array_equal(actual[0], expected[0])
        np.testing.assert_allclose(actual[-1], expected[-1], rtol=1e-5, atol=1e-4)


def split_lookup(**options: Any) -> Case:
    """A lookup with all that it can have, and kernels for splits."""
    case = lookup_of("everything", 3, **options)
    [whole] = case.variants
    assert isinstance(whole, LookupVariant)
    return Case(case.model, [whole, replace(whole, split=True), sum_variant(torch.float32, value_dim=32)], case.feed)


# hits of a token, tokens, and whether the kernels for splits are there -> splits, 0 for none.
SPLITS = {
    "few tokens": (200, 3, True, 7),
    "as many programs as fill a GPU": (200, SPLIT_PROGRAMS, True, 0),
    "fewer hits than a program takes": (9, 3, True, 0),
    "no kernels for splits": (200, 3, False, 0),
}


@pytest.mark.parametrize("label", sorted(SPLITS))
def test_hits_of_few_tokens_are_split_and_give_what_the_body_gives(label: str, library: Path, tmp_path: Path) -> None:
    hits, tokens, there, splits = SPLITS[label]
    case = split_lookup(tokens=tokens, hits=hits)
    [outputs] = run_on_stand_in(
        library, tmp_path, {label: case if there else replace(case, variants=case.variants[:1])}
    ).values()
    assert isinstance(outputs, dict), outputs
    assert isinstance(case.model, onnx.ModelProto)
    [found], [expected] = outputs.values(), run_body(case.model, case.feed)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    launches = [json.loads(line) for line in (tmp_path / "launches.txt").read_text().splitlines()]
    assert [launch["grid"][2] for launch in launches] == ([splits, 1] if splits else [1])


def scratch_calls(program: Path, *, stream: int = 9, size: int = 4096, fails: str = "none") -> list[str]:
    """What the memory of a call asks of the runtime, in order (scratch_test.cpp)."""
    command = [str(program), str(stream), str(size), fails]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def scratch_test(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program."""
    program = tmp_path_factory.mktemp("scratch") / "scratch_test"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror"]
    flags += [f"-I{PLUGINS / name}" for name in ("common", "cuda", "onnxruntime", "onnxruntime_cuda")]
    source = Path(__file__).with_name("scratch_test.cpp")
    subprocess.run(["c++", *flags, source, "-o", program], check=True)
    return program


OPENED, CLOSED = ["memory type 0: allocator", "info"], ["release allocator"]


def test_memory_for_sums_is_of_the_stream_and_given_back(scratch_test: Path) -> None:
    assert scratch_calls(scratch_test) == [
        *OPENED, "4096 bytes of 0x5: scratch buffer", "used: 0x20", "0x20: free", *CLOSED
    ]  # fmt: skip


def test_without_a_stream_memory_is_of_the_allocator(scratch_test: Path) -> None:
    assert scratch_calls(scratch_test, stream=0) == [
        *OPENED, "4096 bytes: allocate", "used: 0x10", "0x10: free", *CLOSED
    ]  # fmt: skip


def test_a_call_without_splits_takes_no_memory(scratch_test: Path) -> None:
    assert scratch_calls(scratch_test, size=0) == [*OPENED, "used: (nil)", *CLOSED]


def test_a_runtime_without_memory_is_an_error_that_leaks_nothing(scratch_test: Path) -> None:
    failed = ["release status", *CLOSED, "ONNX Runtime failed: scratch memory: it fails"]
    assert scratch_calls(scratch_test, fails="scratch buffer")[-3:] == failed
    assert scratch_calls(scratch_test, stream=0, fails="allocate")[-3:] == failed
    info = ["release status", *CLOSED, "ONNX Runtime failed: allocator info: it fails"]
    assert scratch_calls(scratch_test, fails="info")[-3:] == info


BOTH = (False, True)


def general_kernels() -> list[Variant]:
    """For all nodes of small sizes, and of any: a divisor of 1."""
    lookups: list[Variant] = [
        lookup_variant(
            torch.float32,
            rows,
            shards=3,
            cores=cores,
            grouped=grouped,
            pre_value_dim=13 * pre_values,
            value_dim=31,
            gelu=False,
            split=split,
        )
        for rows in (torch.float32, torch.int8)
        for cores, grouped, pre_values, split in itertools.product(range(1, 6), BOTH, BOTH, BOTH)
    ]
    topks = [
        topk_variant(torch.float32, ranks=ranks, cores=cores, row_topk=5, topk=25)
        for ranks, cores in itertools.product(range(1, 6), repeat=2)
    ]
    return [*lookups, sum_variant(torch.float32, value_dim=31), *topks]


def sanitizer(name: str) -> str:
    found = subprocess.run(["c++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def test_random_attributes_and_shapes_are_answered_or_refused_and_touch_nothing_else(tmp_path: Path) -> None:
    """The tests of the CPU's ops, in a process whose ops and driver AddressSanitizer watches."""
    library = build_library(tmp_path / "libops.so", *SANITIZE)
    archive = write_stand_in_kernels(tmp_path / "kernels", general_kernels())
    write_kernels(tmp_path / "kernels.txt", [archive.parent])
    environment = stand_in_environment(
        kernels=tmp_path / "kernels.txt", log=tmp_path / "launches.txt", folder=build_stand_in(SANITIZE)
    )
    environment |= {
        "UMV2_KERNEL_LIBRARY": str(library),
        "UMV2_GPU_KERNELS": str(archive),
        "LD_PRELOAD": f"{sanitizer('asan')} {sanitizer('ubsan')}",
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "halt_on_error=1",
    }
    tests = ("tests/kernels/test_op_fuzz.py", "-k", "lookup or retrieval", "-p", "tests.plugins.current_context", "-q")
    command = [sys.executable, "-m", "pytest", *tests]
    done = subprocess.run(command, env=environment, cwd=PLUGINS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "2 passed" in done.stdout
    assert len((tmp_path / "launches.txt").read_text().splitlines()) >= 5


EVERYTHING = LOOKUPS["int8 rows with everything else"]


def doubled(name: str) -> Case:
    """An input of a lookup with twice its rows."""
    return Case(
        EVERYTHING.model, EVERYTHING.variants, {**EVERYTHING.feed, name: np.repeat(EVERYTHING.feed[name], 2, 0)}
    )


def with_half_query() -> Case:
    """A query that is not of the dtype of the scores, as the CPU's op takes it."""
    case = lookup_of("pre-values", 1)
    assert isinstance(case.model, onnx.ModelProto)
    case.model.graph.input[2].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    return Case(case.model, case.variants, {**case.feed, "query": case.feed["query"].astype(np.float16)})


ERRORS = {
    "two shapes of hits": (
        doubled("scores"),
        "indices [T, K] and scores [T, K, C] expected, got [5, 20] and [10, 20, 2]",
    ),
    "query": (doubled("query"), "query must be [T, P], got [10, 12]"),
    "group": (doubled("group"), "group must be int64 like indices, got [10, 20]"),
    "row_scales": (doubled("row_scales"), "row_scales must be float [rows, 2], got [40, 2]"),
    "shard": (doubled("rows_1"), "shard 1 is [14, 44], which does not fit rows_per_shard 7"),
    "query of another dtype": (with_half_query(), "query and scores must be of one element type"),
    "row_topk": (
        Case(tucker_model(row_topk=51, topk=4), [TOPK], tucker_feed()),
        "row_topk 51 is not within the 50 keys",
    ),
    "no kernel": (
        Case(EVERYTHING.model, [TOPK], EVERYTHING.feed),
        "holds no kernel for compute capability 8.9 for a MemoryLookup",
    ),
    "keys": (topk_of(tokens=1, heads=1, keys=46341), "the number of keys of a side is 46341, kernels take up to 46340"),
    # Its session opens, so bf16 scores have an op; numpy cannot feed it.
    "bf16": (Case(tucker_model(row_topk=8, topk=9, scores="bfloat16"), [TOPK], {}), "Required inputs"),
}


def test_what_no_kernel_takes_is_an_error_of_the_op(library: Path, tmp_path: Path) -> None:
    found = run_on_stand_in(library, tmp_path, {name: case for name, (case, _) in ERRORS.items()})
    for name, (_, message) in ERRORS.items():
        assert message in found[name], name


def test_the_types_of_a_bf16_bundle_are_accepted(library: Path, tmp_path: Path, exported: Exported) -> None:
    bundle = Bundle(exported("v2_per_rank", "--dtype", "bf16", "--target", "gpu")[0])
    found = run_on_stand_in(library, tmp_path, {"bf16": Case(bundle.model_file, bundle_kernels(bundle), {})})
    # The provider of the CPU lacks the arithmetic of the standard ops; a type that an op refused would be met before.
    assert "Could not find an implementation for Mul" in found["bf16"]


def test_without_kernels_no_session_opens(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UMV2_GPU_KERNELS", raising=False)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    model = tucker_model(row_topk=8, topk=9).SerializeToString()
    with pytest.raises(Exception, match="no GPU kernels: let UMV2_GPU_KERNELS name"):
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)


def test_the_installed_library_computes_nothing_on_a_cpu(exported: Exported) -> None:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(cuda_library())
    model = exported("v2_shared_ring")[0] / "model.onnx"
    with pytest.raises(Exception, match=r"Could not find an implementation for TuckerTopK"):
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)


def test_the_installed_library_needs_no_cuda_and_exports_its_entry_point_only() -> None:
    symbols = subprocess.run(["nm", "-D", "--defined-only", cuda_library()], capture_output=True, text=True, check=True)
    assert [line.split()[-1] for line in symbols.stdout.splitlines()] == ["RegisterCustomOps"]
    needed = subprocess.run(["readelf", "-d", cuda_library()], capture_output=True, text=True, check=True)
    assert "libcu" not in needed.stdout
