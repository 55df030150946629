"""The ahead-of-time build: resources, and how a caller must call; no GPU is needed."""

import hashlib
import json
import os
import re
import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.command import run_command
from tests.gpu.made_up import lookup, made_up_folder
from umv2_export.errors import BuildFailed, EnvironmentUnfit
from umv2_export.gpu import ahead_of_time
from umv2_export.gpu.ahead_of_time import (
    ARCHITECTURES,
    COMPILER_MEMORY,
    _prepare,
    _without_scratch,
    build_kernels,
    compile_variant,
    compiled_for,
    compiler_processes,
)
from umv2_export.gpu.archive import ARCHIVE_FILE
from umv2_export.gpu.arguments import Argument
from umv2_export.gpu.index import INDEX_FILE, read_index
from umv2_export.gpu.lookup_variants import LookupVariant, lookup_variant, sum_variant
from umv2_export.gpu.topk_variants import TopkVariant, part_variant, topk_variant

if TYPE_CHECKING:
    from umv2_export.gpu.variants import Variant

# Architectures on which ptxas spilled some bytes of the top-k until it was told that one program is enough.
TOPK_BUILDS = {32: ["9.0", "12.0"], 128: ["8.6", "9.0"]}

# Of lookups in splits, which differ from the others in their sizes alone.
SPLIT_ARCHITECTURES = ["8.6", "9.0", "12.0"]

SCORES = {torch.float32: (torch.float32, torch.int8), torch.bfloat16: (torch.bfloat16,)}


def lookups(*, split: bool = False) -> list[LookupVariant]:
    """Of the published sizes, and one of rows that no 16 bytes divide."""
    sizes = [(192, 192), (384, 768)]
    variants = [
        lookup_variant(
            scores, rows, shards=1, cores=2, grouped=False, pre_value_dim=p, value_dim=v, gelu=False, split=split
        )
        for scores, row_dtypes in SCORES.items()
        for rows in row_dtypes
        for p, v in sizes
    ]
    odd = lookup_variant(
        torch.float32,
        torch.float32,
        shards=3,
        cores=1,
        grouped=True,
        pre_value_dim=0,
        value_dim=33,
        gelu=False,
        split=split,
    )
    return [*variants, odd]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Every lookup for every architecture; the top-k, which takes 10 s to compile, for those that spilled."""
    folder = tmp_path_factory.mktemp("kernels")
    build_kernels(folder / "lookup", lookups(), list(ARCHITECTURES))
    build_kernels(
        folder / "split", [*lookups(split=True), sum_variant(torch.float32, value_dim=768)], SPLIT_ARCHITECTURES
    )
    for size, architectures in TOPK_BUILDS.items():
        topk = topk_variant(torch.float32, ranks=2, cores=2, row_topk=size, topk=size)
        build_kernels(folder / f"top{size}", [topk], architectures)
    entries = []
    for name in ("lookup", "split", *(f"top{size}" for size in TOPK_BUILDS)):
        for entry in json.loads((folder / name / INDEX_FILE).read_text())["kernels"]:
            entries.append(entry | {"folder": folder / name})
    return folder, entries


@dataclass(frozen=True)
class PartVariant(TopkVariant):
    """Programs that share a grid; only PyTorch launches them."""

    @property
    def arguments(self) -> list[Argument]:
        return [*super().arguments, Argument("keys", "output", "u32", 16)]


@dataclass(frozen=True)
class MergeVariant(TopkVariant):
    """The choice among what they found, of 1B/7B."""

    kernel = "tucker_topk_merge_kernel"

    @property
    def arguments(self) -> list[Argument]:
        pointers = {"keys": "u32", "part_addresses": "i64", "part_scores": "fp32"}
        return [
            *(Argument(name, "input", dtype, 16) for name, dtype in pointers.items()),
            *(Argument(name, "size", "int32", 1) for name in ("candidates", "topk")),
            *(Argument(name, "output", dtype, 16) for name, dtype in (("addresses", "i64"), ("scores", "fp32"))),
        ]

    @property
    def constants(self) -> dict[str, int | bool]:
        return {"CORES": self.cores, "BLOCK_X": 2048, "BLOCK_K": self.block_k}


@pytest.mark.parametrize("kind", [PartVariant, MergeVariant])
def test_programs_that_share_a_grid_spill_no_registers(kind: type[TopkVariant], tmp_path: Path) -> None:
    whole = topk_variant(torch.float32, ranks=2, cores=2, row_topk=128, topk=128)
    shared = part_variant(whole, retrievals=1, row_topk=128, topk=128)
    assert shared is not None
    variant = kind(**asdict(shared[0]))
    # In a process of its own, for tests run in Triton's interpreter.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_prepare) as pool:
        kernels = [pool.submit(compile_variant, variant, name, tmp_path) for name in ("8.6", "9.0", "12.0")]
        assert {kernel.result().spill_bytes for kernel in kernels} == {0}


def test_no_kernel_spills_registers(built: tuple[Path, list[dict[str, Any]]]) -> None:
    assert {entry["spill_bytes"] for entry in built[1]} == {0}
    assert all(0 < entry["registers"] <= 255 for entry in built[1])


def test_rows_are_read_16_bytes_at_a_time_where_their_size_allows(built: tuple[Path, list[dict[str, Any]]]) -> None:
    for entry in built[1]:
        variant = entry["variant"]
        if entry["op"] != "MemoryLookup":
            continue
        size = {"float32": 4, "bfloat16": 2, "int8": 1}[variant["rows_dtype"]]
        # Bytes of a thread: its share of a block of hits. The smallest blocks give a thread less than 16.
        held = (variant["block_p"] * variant["pre_values"] + variant["block_v"]) * variant["block_k"] * size
        loads = held // (32 * variant["num_warps"] * 16)
        # Rows are the only loads of four words: indices come as pairs of 64 bits.
        found = (entry["folder"] / entry["ptx"]).read_text().count(".v4.b32 {")
        assert found >= loads if variant["divisor"] * size >= 16 else found == 0, entry["ptx"]


def test_no_lane_is_idle_in_rows_of_three_powers_of_two() -> None:
    for variant in (*lookups(), *lookups(split=True)):
        if variant.pre_values:
            assert (variant.block_p, variant.block_v) in {(192, 192), (384, 768)}


def test_warps_do_not_wait_for_each_other_while_rows_are_summed(built: tuple[Path, list[dict[str, Any]]]) -> None:
    """The body of the loop over hits, for the published sizes: of smaller pieces, a warp reads several rows at once."""
    for entry in built[1]:
        if (
            entry["op"] != "MemoryLookup"
            or entry["variant"]["rows_dtype"] == "int8"
            or entry["variant"]["divisor"] < 16
        ):
            continue
        lines = (entry["folder"] / entry["ptx"]).read_text().splitlines()
        labels = {line.split(":")[0]: number for number, line in enumerate(lines) if line.startswith("$L")}
        loops = []
        for number, line in enumerate(lines):
            jump = re.search(r"bra(?:\.uni)?\s+(\$L[^;\s]+)", line)
            if jump is not None and labels.get(jump[1], number) < number:
                loops.append("\n".join(lines[labels[jump[1]] : number]))
        assert loops, entry["ptx"]
        assert not any("bar.sync" in loop or "barrier" in loop for loop in loops), entry["ptx"]


def test_the_entry_takes_the_arguments_of_the_index_and_no_others(built: tuple[Path, list[dict[str, Any]]]) -> None:
    for entry in built[1]:
        ptx = (entry["folder"] / entry["ptx"]).read_text()
        head = re.search(rf"\.visible \.entry {entry['entry']}\((.*?)\)", ptx, re.DOTALL)
        assert head is not None
        kinds = re.findall(r"\.param \.(u64|u32)", head[1])
        assert kinds == ["u32" if argument["kind"] == "size" else "u64" for argument in entry["arguments"]]


def test_ptx_is_of_the_version_and_target_of_its_architecture(built: tuple[Path, list[dict[str, Any]]]) -> None:
    for entry in built[1]:
        target, version = ARCHITECTURES[entry["compute_capability"]]
        ptx = (entry["folder"] / entry["ptx"]).read_text()
        assert f".target {target}" in ptx
        assert f".version {version // 10}.{version % 10}" in ptx
        assert entry["ptx_version"] == version


def test_files_are_those_of_the_index(built: tuple[Path, list[dict[str, Any]]]) -> None:
    for entry in built[1]:
        for name, digest in entry["sha256"].items():
            assert hashlib.sha256((entry["folder"] / name).read_bytes()).hexdigest() == digest
        assert (entry["folder"] / entry["cubin"]).read_bytes()[:4] == b"\x7fELF"


def test_inputs_come_first_in_the_order_of_the_op_then_sizes_then_outputs() -> None:
    topk = topk_variant(torch.float32, ranks=2, cores=2, row_topk=8, topk=8)
    variants: list[Variant] = [*lookups(), topk]
    for variant in variants:
        kinds = [argument.kind for argument in variant.arguments]
        assert kinds == sorted(kinds, key=["input", "size", "output"].index)
    quantised = lookup_variant(
        torch.float16, torch.int8, shards=2, cores=2, grouped=True, pre_value_dim=16, value_dim=32, gelu=True
    )
    names = [argument.name for argument in quantised.arguments if argument.kind == "input"]
    assert names == ["indices", "scores", "group", "query", "row_scales", "rows_0", "rows_1"]


def test_a_kernel_that_reads_its_scratch_memory_is_refused() -> None:
    parameters = ",\n".join(f"\t.param .u64 .ptr .global .align 1 k_param_{i}" for i in range(3))
    ptx = f".visible .entry k(\n{parameters}\n)\n{{ ret; }}\n"
    assert "k_param_1" not in _without_scratch(ptx, "k", 1)
    with pytest.raises(BuildFailed, match="scratch"):
        _without_scratch(ptx.replace("ret;", "ld.param.b64 %rd1, [k_param_2]; ret;"), "k", 1)


@pytest.mark.parametrize(
    ("tasks", "cores", "available", "processes"),
    [
        (12, 4, None, 4),
        (3, 4, None, 3),
        (12, 4, 2 * COMPILER_MEMORY + 1, 2),
        (12, 4, COMPILER_MEMORY - 1, 1),
        (0, 4, None, 1),
    ],
)
def test_as_many_processes_compile_as_the_machine_holds(
    tasks: int, cores: int, available: int | None, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setattr(ahead_of_time, "available_bytes", lambda: available)
    assert compiler_processes(tasks) == processes


def ended(*_: object) -> None:
    """In the place of a compiler: the system ends it."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_compiler_that_is_ended_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_of_time, "compile_variant", ended)
    with pytest.raises(EnvironmentUnfit, match="a process that compiles GPU kernels was ended") as caught:
        build_kernels(tmp_path / "kernels", lookups()[:1], ["8.9"])
    assert "lack of memory" in str(caught.value.why)
    assert not list(tmp_path.iterdir())


def test_the_command_compiles_what_a_bundle_calls(tmp_path: Path, exported: Any) -> None:
    bundle, _ = exported("v2_shared_ring", "--inline-functions", "--shard-size", "40KB")
    options = ("--compute-capability", "8.9", "--json")
    planned = run_command("kernels", bundle, "-o", tmp_path / "out", *options, "--dry-run")
    assert planned.exit_code == 0, planned.stderr
    assert not (tmp_path / "out").exists()
    result = run_command("kernels", bundle, "-o", tmp_path / "out", *options)
    assert result.exit_code == 0, result.stderr
    kernels = json.loads(result.stdout)["kernels"]
    assert kernels == json.loads((tmp_path / "out" / INDEX_FILE).read_text())["kernels"]
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {INDEX_FILE, ARCHIVE_FILE, *(name for kernel in kernels for name in kernel["sha256"])}
    assert sum(file.stat().st_size for file in (tmp_path / "out").iterdir()) <= json.loads(planned.stdout)["disk_bytes"]
    shards = len(list(bundle.glob("rows-*.data")))
    assert shards > 1
    calls = {
        (kernel["op"], kernel["variant"]["scores_dtype"], kernel["variant"].get("rows_dtype")) for kernel in kernels
    }
    # Lookups whole and in splits, and for each dtype of scores a sum of these and a top-k.
    assert len({name for kernel in kernels for name in [kernel["name"]]}) == len(kernels) == 2 * 8 + 2 * 3
    assert len(calls) == 8 + 2 * 3
    assert {kernel["variant"].get("shards", shards) for kernel in kernels} == {shards}


@pytest.mark.parametrize(("name", "exit_code"), [("7.5", 5), ("newest", 2)])
def test_an_architecture_that_cannot_be_compiled_for_is_named(name: str, exit_code: int, tmp_path: Path) -> None:
    result = run_command("kernels", "-o", tmp_path / "out", "--compute-capability", name)
    assert result.exit_code == exit_code
    assert name in result.stderr
    assert not (tmp_path / "out").exists()


def test_experts_have_no_kernels(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    assert run_command("init", "moe-tiny-top2", "-o", tmp_path / "experts").exit_code == 0
    assert run_command("onnx", tmp_path / "experts", "-o", bundle, "--no-validate").exit_code == 0
    result = run_command("kernels", bundle, "-o", tmp_path / "out")
    assert result.exit_code == 5
    assert "no memory layers" in result.stderr


@pytest.mark.parametrize(
    ("gpu", "compiled"),
    [
        ("8.0", "8.0"),
        ("8.8", "8.6"),
        ("8.9", "8.9"),
        ("10.3", "10.0"),
        ("12.1", "12.0"),
        ("8.7", None),
        ("7.5", None),
        ("11.0", None),
    ],
)
def test_a_gpu_runs_what_was_compiled_for_an_older_one_of_its_kind(gpu: str, compiled: str | None) -> None:
    assert compiled_for(gpu) == compiled


def test_spilled_registers_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = read_index(made_up_folder(tmp_path / "made", [lookup()]))
    spilling = [replace(kernel, spill_bytes=8) for kernel in kernels]
    monkeypatch.setattr(ahead_of_time, "build_kernels", lambda *_, **__: spilling)
    result = run_command("kernels", "-o", tmp_path / "out", "--compute-capability", "8.9", "--json")
    assert result.exit_code == 0
    assert f"{kernels[0].name} for 8.9 spills 8 bytes" in " ".join(result.stderr.split())


def test_the_sizes_of_a_variant_cover_the_model() -> None:
    for size in (1, 2, 3, 16, 17, 200, 1000):
        lookup = lookup_variant(
            torch.float32,
            torch.float32,
            shards=1,
            cores=1,
            grouped=False,
            pre_value_dim=size,
            value_dim=size,
            gelu=False,
        )
        assert lookup.block_p >= size
        assert lookup.block_v >= size
        assert size % lookup.divisor == 0
        topk = topk_variant(torch.float32, ranks=2, cores=2, row_topk=size, topk=size)
        assert isinstance(topk, TopkVariant)
        assert topk.block_m >= size
