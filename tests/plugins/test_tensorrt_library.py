"""The plugin library for TensorRT, built against its headers and called as TensorRT calls it; TensorRT is not here.

The programs are in tests/plugins/tensorrt. Where kernels run, they do so on the stand-in for the CUDA driver.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.stand_in import stand_in_environment, write_kernels
from tests.gpu.stand_in_kernels import write_stand_in_kernels
from tests.plugins.harness_kernels import Case, compile_cases, harness_cases, split_variants_of, variant_of
from umv2_export.gpu.ahead_of_time import build_kernels
from umv2_export.gpu.archive import ARCHIVE_FILE
from umv2_export.gpu.lookup_variants import LookupVariant
from umv2_export.gpu.variants import Variant

ROOT = Path(__file__).parents[2]
CAPABILITY = "8.9"

TARGETS = (
    "umv2_tensorrt",
    "umv2_tensorrt_self_registering",
    "tensorrt_host_test",
    "tensorrt_harness",
    "stand_in_tensorrt",
)

Done = subprocess.CompletedProcess[str]


def package_folder(package: str, *parts: str) -> Path:
    """A folder of an installed package, which is not imported; the test is skipped without it."""
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed: it brings headers that the plugins are compiled against")
    return Path(found.submodule_search_locations[0]).joinpath(*parts)


def run(*command: object, environment: dict[str, str] | None = None) -> Done:
    return subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)


@dataclass(frozen=True)
class Build:
    """A build folder of the libraries and the programs that call them."""

    folder: Path
    headers: Path

    @property
    def library(self) -> Path:
        return self.folder / "libumv2_tensorrt.so"

    def program(self, name: str) -> Path:
        return self.folder / "tests" / "plugins" / "tensorrt" / name

    def make(self, *targets: str, **options: object) -> Done:
        """Configure and build; the log is that of the last step."""
        tools = Path(sys.executable).parent
        options = {
            # Neither optimised nor with debug information, it compiles in half the time.
            "CMAKE_BUILD_TYPE": "None",
            "CMAKE_MAKE_PROGRAM": tools / "ninja",
            "TENSORRT_INCLUDE_DIR": self.headers,
            "CUDA_INCLUDE_DIR": package_folder("triton", "backends", "nvidia", "include"),
            "UMV2_TESTS": "ON",
        } | options
        flags = [f"-D{name}={value}" for name, value in options.items()]
        configured = run(tools / "cmake", "-S", ROOT, "-B", self.folder, "-G", "Ninja", *flags)
        if configured.returncode:
            return configured
        return run(tools / "cmake", "--build", self.folder, "--target", *targets)

    def host_test(self, case: str, environment: dict[str, str] | None = None) -> Done:
        return run(self.program("tensorrt_host_test"), self.library, case, environment=environment)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Built without kernels."""
    headers = package_folder("kernel_lens", "include", "tensorrt")
    made = Build(tmp_path_factory.mktemp("tensorrt") / "build", headers)
    done = made.make(*TARGETS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stdout + done.stderr
    return made


def computed(case: Case) -> bool:
    """The stand-in computes it."""
    return case["scores_dtype"] == "float32" and case.get("rows_dtype") in (None, "float32", "int8")


@pytest.fixture(scope="module")
def cases(build: Build) -> dict[str, Case]:
    return harness_cases(build.program("tensorrt_harness"))


@dataclass(frozen=True)
class Machine:
    """A process's surroundings: a stand-in for a GPU, and a file of kernels.

    Attributes:
        environment: of the process.
        log: gets a line for each launch.
    """

    environment: dict[str, str]
    log: Path

    @property
    def launches(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Callable[..., Machine]:
    """Machines with kernels of some variants."""

    def make(variants: Iterable[Variant], **options: Any) -> Machine:
        pack = write_stand_in_kernels(tmp_path / "kernels", variants, [CAPABILITY], **options)
        write_kernels(tmp_path / "kernels.txt", [pack.parent])
        log = tmp_path / "launches.jsonl"
        environment = stand_in_environment(kernels=tmp_path / "kernels.txt", log=log, capability=CAPABILITY)
        return Machine(environment | {"UMV2_GPU_KERNELS": str(pack)}, log)

    return make


@pytest.mark.parametrize(
    "case",
    [
        "creators",
        "attributes",
        "bad-attributes",
        "capabilities",
        "output-types",
        "output-shapes",
        "formats",
        "round-trip",
        "wrong-types",
        "wrong-ranks",
        "wrong-sizes",
    ],
)
def test_the_plugins_answer_as_tensorrt_asks(case: str, build: Build) -> None:
    done = build.host_test(case)
    assert done.returncode == 0, done.stderr


def test_sizes_that_no_one_means_are_refused_before_anything_wraps_around(build: Build, tmp_path: Path) -> None:
    sanitized = Build(tmp_path / "build", build.headers)
    done = sanitized.make("umv2_tensorrt", "tensorrt_host_test", UMV2_SANITIZE="ON")
    assert done.returncode == 0, done.stdout + done.stderr
    # Without a driver, calls end where all sizes have been looked at.
    pack = write_stand_in_kernels(tmp_path / "kernels", [])
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1", "UMV2_GPU_KERNELS": str(pack)}
    done = sanitized.host_test("fuzz", {**os.environ, **options})
    assert done.returncode == 0, done.stderr
    assert "runtime error" not in done.stderr


# Loads the library into the registry of TensorRT-RTX, the only TensorRT that PyPI has whole, and asks a creator for a
# plugin, then lets the parser ask for one whose activation is unknown. Of a node with sound attributes the parser of
# TensorRT-RTX 1.7 ends the process once it has the plugin: networks there have no add_plugin_v3.
REAL_REGISTRY = """
import sys
import numpy as np
import tensorrt_rtx as trt
from onnx import TensorProto, helper, numpy_helper

logger = trt.Logger(trt.Logger.WARNING)
registry = trt.get_plugin_registry()
assert registry.load_library(sys.argv[1]) is not None
for op in ("MemoryLookup", "TuckerTopK"):
    creator = registry.get_creator(op, "1", "umv2")
    print("creator", op, *sorted(field.name for field in creator.field_names), flush=True)

sizes = {"pre_value_dim": 8, "rows_per_shard": 7}
for text in (b"gelu\\0", b"gelu", b"relu\\0"):
    fields = [trt.PluginField(name, np.array([n], np.int32), trt.PluginFieldType.INT32) for name, n in sizes.items()]
    fields.append(trt.PluginField("activation", text, trt.PluginFieldType.CHAR))
    creator = registry.get_creator("MemoryLookup", "1", "umv2")
    try:
        made = creator.create_plugin("node", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
    except Exception:
        made = None
    print("plugin", text, made is not None, flush=True)

builder = trt.Builder(logger)
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
named = {"plugin_namespace": "umv2", "plugin_version": "1", "activation": "relu", "groups": 1}
node = helper.make_node("MemoryLookup", list("isqr"), ["y"], domain="umv2", **named, **sizes)
types = [TensorProto.INT64, TensorProto.FLOAT, TensorProto.FLOAT]
inputs = [helper.make_tensor_value_info(*i) for i in zip("isq", types, [[5, 9], [5, 9, 2], [5, 8]])]
output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 16])
rows = numpy_helper.from_array(np.ones((7, 24), np.float32), "r")
graph = helper.make_graph([node], "g", inputs, [output], initializer=[rows])
opsets = [helper.make_opsetid("", 18), helper.make_opsetid("umv2", 1)]
model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
print("parsed", parser.parse(model.SerializeToString()), flush=True)
"""


def test_the_registry_of_tensorrt_rtx_takes_the_library_and_its_parser_gets_the_refusals(build: Build) -> None:
    """Built against the headers of TensorRT 10, whose interfaces of plugins TensorRT-RTX 1.7 has."""
    if find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed")
    done = run(sys.executable, "-c", REAL_REGISTRY, build.library)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith(("creator", "plugin", "parsed"))] == [
        "creator MemoryLookup activation groups pre_value_dim rows_per_shard",
        "creator TuckerTopK row_topk topk",
        r"plugin b'gelu\x00' True",
        "plugin b'gelu' True",
        r"plugin b'relu\x00' False",
        "parsed False",
    ]
    said = "umv2::MemoryLookup: activation must be none or gelu, got relu"
    assert (done.stdout + done.stderr).count(said) == 2


def test_without_a_logger_errors_go_to_stderr(build: Build) -> None:
    done = build.host_test("unlogged")
    assert done.returncode == 0
    assert done.stderr == "umv2::TuckerTopK: attribute topk is missing\n"


def test_the_library_needs_neither_tensorrt_nor_cuda_and_exports_its_entry_points_only(build: Build) -> None:
    exported = run("nm", "-D", "--defined-only", build.library).stdout
    assert {line.split()[-1] for line in exported.splitlines()} == {"getCreators", "setLoggerFinder"}
    needed = run("readelf", "-d", build.library).stdout
    assert "NEEDED" in needed
    assert not re.search(r"NEEDED.*(nvinfer|cuda)", needed)
    # TensorRT unloads libraries, and loaded kernels would be forgotten.
    assert "NODELETE" in needed
    undefined = run("nm", "-D", "--undefined-only", build.library).stdout
    assert not re.search(r"getPluginRegistry|getLogger|createInfer|\bcu[A-Z]", undefined)


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_every_case_runs_on_the_stand_in_and_gives_what_the_plain_computation_gives(
    split: bool, build: Build, cases: dict[str, Case], machine: Callable[..., Machine]
) -> None:
    names = [name for name, case in cases.items() if computed(case)]
    variants = {variant.name: variant for variant in map(variant_of, cases.values())}
    if split:
        variants |= {variant.name: variant for case in cases.values() for variant in split_variants_of(case)}
    there = machine(variants.values())
    done = run(build.program("tensorrt_harness"), build.library, *names, environment=there.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^ok +(\S+)", done.stdout, re.MULTILINE) == names
    assert len(names) >= 7
    lookups = [name for name in names if name.startswith("lookup")]
    assert len(there.launches) == len(names) + (len(lookups) if split else 0)
    assert all(launch["stream"] for launch in there.launches)


def test_hits_are_shared_as_in_python(build: Build, cases: dict[str, Case], machine: Callable[..., Machine]) -> None:
    """One rule in two languages: `LookupVariant.shares`, and launch.cpp."""
    case = cases["lookup-fp32-published"]
    split, adding = split_variants_of(case)
    assert isinstance(split, LookupVariant)
    there = machine([variant_of(case), split, adding])
    done = run(build.program("tensorrt_harness"), build.library, case["name"], environment=there.environment)
    assert done.returncode == 0, done.stdout
    lookup, added = there.launches
    tokens, hits = lookup["grid"][0], lookup["arguments"][4]
    splits, share = split.shares(tokens, hits)
    assert hits == 256
    assert splits > 1
    assert lookup["grid"] == [tokens, 1, splits]
    # indices, scores, query, rows_0, hits, table_rows, rows_per_shard, pre_value_dim, value_dim, share, sums.
    assert lookup["arguments"][9] == share
    assert added["grid"] == [tokens, 1, 1]
    assert added["arguments"][:3] == [lookup["arguments"][10], splits, 192]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_every_case_runs_on_the_gpu(build: Build, tmp_path: Path) -> None:
    major, minor = torch.cuda.get_device_capability()
    pack = compile_cases(build.program("tensorrt_harness"), tmp_path / "kernels", f"{major}.{minor}")
    environment = {**os.environ, "UMV2_GPU_KERNELS": str(pack)}
    done = run(build.program("tensorrt_harness"), build.library, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_result_fails_the_harness(
    build: Build, cases: dict[str, Case], machine: Callable[..., Machine], tmp_path: Path
) -> None:
    """The kernel of a case with GELU computes without."""
    there = machine([variant_of(cases["lookup-fp32-shards-gelu"])])
    kernels = tmp_path / "kernels.txt"
    kernels.write_text(re.sub(r" 1 0 1$", " 0 0 1", kernels.read_text(), flags=re.MULTILINE))
    command = (build.program("tensorrt_harness"), build.library, "lookup-fp32-shards-gelu")
    done = run(*command, environment=there.environment)
    assert done.returncode == 1
    assert "FAILED  lookup-fp32-shards-gelu" in done.stdout
    assert "output element 0 is" in done.stdout


def test_a_kernel_of_more_shards_gets_the_last_one_again(
    build: Build, cases: dict[str, Case], machine: Callable[..., Machine]
) -> None:
    case = cases["lookup-fp32-shards-gelu"]
    assert case["shards"] == 3
    there = machine([variant_of(case | {"shards": 5})])
    command = (build.program("tensorrt_harness"), build.library, case["name"])
    done = run(*command, environment=there.environment)
    assert done.returncode == 0, done.stdout
    rows = there.launches[0]["arguments"][3:8]
    assert len(set(rows)) == 3
    assert rows[2] == rows[3] == rows[4]


def test_without_a_gpu_the_harness_says_so(build: Build) -> None:
    done = run(build.program("tensorrt_harness"), build.library, environment=stand_in_environment(devices=0))
    assert done.returncode == 4
    assert "the CUDA driver failed to start" in done.stderr


def test_no_tokens_are_no_work(build: Build, cases: dict[str, Case], machine: Callable[..., Machine]) -> None:
    there = machine([variant_of(cases["lookup-fp32"])])
    done = build.host_test("empty", there.environment)
    assert done.returncode == 0, done.stderr
    assert there.launches == []


def test_a_tensor_that_a_kernel_would_misread_is_refused(
    build: Build, cases: dict[str, Case], machine: Callable[..., Machine]
) -> None:
    there = machine([variant_of(cases["lookup-fp32"])])
    done = build.host_test("misaligned", there.environment)
    assert done.returncode == 0, done.stderr
    assert there.launches == []


def prepared(build: Build, environment: dict[str, str]) -> tuple[int, str]:
    """What onShapeChange returned, and what was logged."""
    done = build.host_test("prepare", environment)
    assert done.returncode == 0, done.stderr
    code, _, logged = done.stdout.partition("\n")
    return int(code), logged


def test_the_kernel_is_loaded_when_shapes_change_and_not_only_when_it_is_launched(
    build: Build, cases: dict[str, Case], machine: Callable[..., Machine]
) -> None:
    """Shown by code that the driver cannot load."""
    there = machine([variant_of(cases["lookup-fp32"])], image_capability="9.0")
    code, logged = prepared(build, there.environment)
    assert code != 0
    assert "umv2::MemoryLookup: the CUDA driver failed to load a kernel: " in logged


def test_a_kernel_that_was_not_compiled_is_named_when_shapes_change(
    build: Build, cases: dict[str, Case], machine: Callable[..., Machine]
) -> None:
    there = machine([variant_of(cases["topk-fp32"])])
    code, logged = prepared(build, there.environment)
    assert code != 0
    assert (
        "holds no kernel for compute capability 8.9 for a MemoryLookup of fp32 scores, fp32 rows of 64 + 64" in logged
    )


def test_what_is_missing_is_named(build: Build, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "UMV2_GPU_KERNELS"}
    code, logged = prepared(build, environment)
    assert code != 0
    assert "no GPU kernels: let UMV2_GPU_KERNELS name the kernels.bin that `umv2-export kernels` wrote" in logged
    # A folder opens as a file does, and fails when it is read.
    for named in (tmp_path / "absent.bin", tmp_path):
        code, logged = prepared(build, environment | {"UMV2_GPU_KERNELS": str(named)})
        assert code != 0
        assert f"UMV2_GPU_KERNELS names {named}, which cannot be read: let it name a kernels.bin" in logged


def test_kernels_are_built_into_the_library_and_anew_when_they_change(
    build: Build, cases: dict[str, Case], tmp_path: Path
) -> None:
    """With a kernel that was really compiled."""
    variant = variant_of(cases["lookup-fp32"])
    build_kernels(tmp_path / "compiled", [variant], [CAPABILITY])
    write_kernels(tmp_path / "kernels.txt", [tmp_path / "compiled"])
    pack = tmp_path / "compiled" / ARCHIVE_FILE
    real = pack.read_bytes()
    environment = stand_in_environment(kernels=tmp_path / "kernels.txt", capability=CAPABILITY)
    environment.pop("UMV2_GPU_KERNELS", None)
    command = (build.program("tensorrt_harness"), build.library, "lookup-fp32")
    try:
        pack.write_bytes(b"before")
        build_again(build, pack.parent)
        assert "this library is not a whole file of kernels" in run(*command, environment=environment).stdout
        pack.write_bytes(real)
        build_again(build, pack.parent)
        done = run(*command, environment=environment)
        assert done.returncode == 0, done.stdout
    finally:
        build_again(build, "")


def build_again(build: Build, kernels: Path | str) -> None:
    """The library with the kernels of a folder, or with none."""
    done = build.make("umv2_tensorrt", UMV2_KERNELS=kernels)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_folder_without_kernels_is_refused_when_the_library_is_built(build: Build, tmp_path: Path) -> None:
    done = Build(tmp_path / "build", build.headers).make("umv2_tensorrt", UMV2_KERNELS=tmp_path)
    assert done.returncode != 0
    assert "umv2-export kernels BUNDLE -o" in done.stderr


def loaded(library: Path, folder: Path) -> Done:
    """What a process prints that loads the library and does no more."""
    code = f"import ctypes; ctypes.CDLL({str(library)!r})"
    return run(sys.executable, "-c", code, environment={**os.environ, "LD_LIBRARY_PATH": str(folder)})


def tensorrt_major(headers: Path) -> int:
    text = (headers / "NvInferVersion.h").read_text()
    found = re.search(r"define (?:TRT_MAJOR_ENTERPRISE|NV_TENSORRT_MAJOR) (\d+)", text)
    assert found is not None
    return int(found[1])


def test_the_self_registering_library_registers_the_plugins_when_it_is_loaded(build: Build, tmp_path: Path) -> None:
    name = f"libnvinfer.so.{tensorrt_major(build.headers)}"
    (tmp_path / name).symlink_to(build.program("libstand_in_tensorrt.so"))
    done = loaded(build.folder / "libumv2_tensorrt_self_registering.so", tmp_path)
    assert done.stderr == ""
    assert done.stdout == "umv2 MemoryLookup 1\numv2 TuckerTopK 1\n"
    # loadLibrary refuses plugins that are registered already.
    assert loaded(build.library, tmp_path).stdout == ""


def test_the_self_registering_library_says_which_tensorrt_is_missing(build: Build, tmp_path: Path) -> None:
    done = loaded(build.folder / "libumv2_tensorrt_self_registering.so", tmp_path)
    assert done.returncode == 0
    major = tensorrt_major(build.headers)
    assert done.stderr == (
        f"umv2::plugins: the plugins are built for TensorRT {major}, and libnvinfer.so.{major} cannot be loaded\n"
    )
