"""A flag that has nothing to act on is refused, with exit code 2 and its name: none is ignored without a word."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.command import run_command
from tests.golden import GOLDEN_CASES
from tests.models import random_checkpoint
from umv2_export.presets import PRESETS

Exported = Callable[..., tuple[Path, dict[str, Any]]]

GOLDEN = {case.name: case for case in GOLDEN_CASES}
RING = GOLDEN["v2_shared_ring"]
OLMOE = Path(__file__).parent / "data" / "olmoe" / "plain"


def assert_refused(tmp_path: Path, *arguments: object, flag: str) -> None:
    result = run_command(*arguments)
    assert result.exit_code == 2, result.stderr
    assert flag in result.stderr
    assert "leave out" in result.stderr
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("command", ["convert", "onnx"])
@pytest.mark.parametrize("layout", ["released", "per-rank", "auto"])
def test_a_query_layout_is_of_memory_layers(tmp_path: Path, command: str, layout: str) -> None:
    arguments = (command, OLMOE, "-o", tmp_path / "output", "--query-layout", layout)
    assert_refused(tmp_path, *arguments, flag="--query-layout")


@pytest.mark.parametrize("command", ["convert", "onnx"])
def test_a_query_layout_is_of_queries_for_each_rank(tmp_path: Path, command: str) -> None:
    arguments = (command, GOLDEN["v1_skip_layer"], "-o", tmp_path / "output", "--query-layout", "per-rank")
    assert_refused(tmp_path, *arguments, flag="--query-layout")


@pytest.mark.parametrize("flag", [("--query-layout", "released"), ("--row-topk", "8"), ("--ignore-field", "x")])
def test_how_a_checkpoint_is_read_is_no_flag_for_a_bundle(
    exported: Exported, tmp_path: Path, flag: tuple[str, str]
) -> None:
    assert_refused(tmp_path, "inspect", exported("v2_shared_ring")[0], *flag, flag=flag[0])


@pytest.mark.parametrize("flag", [("--query-layout", "released"), ("--row-topk", "8")])
def test_inspect_refuses_flags_of_memory_layers_without_them(tmp_path: Path, flag: tuple[str, str]) -> None:
    assert_refused(tmp_path, "inspect", OLMOE, *flag, flag=flag[0])


def test_parity_leaves_out_no_field_without_a_checkpoint(exported: Exported, tmp_path: Path) -> None:
    assert_refused(tmp_path, "parity", exported("v2_shared_ring")[0], "--ignore-field", "x", flag="--ignore-field")


@pytest.mark.parametrize(
    "flag", [("--key-dtype", "fp16"), ("--table-dtype", "fp16"), ("--table-dtype", "same"), ("--shard-size", "2GB")]
)
def test_flags_of_tables_are_refused_without_them(tmp_path: Path, flag: tuple[str, ...]) -> None:
    for more in ((), ("--dry-run",)):
        assert_refused(tmp_path, "onnx", OLMOE, "-o", tmp_path / "output", *flag, *more, flag=flag[0])


@pytest.mark.parametrize("form", ["standard", "contrib"])
def test_a_form_of_experts_is_refused_without_them(tmp_path: Path, form: str) -> None:
    arguments = ("onnx", RING, "-o", tmp_path / "output", "--moe-form", form)
    assert_refused(tmp_path, *arguments, flag="--moe-form")


@pytest.mark.parametrize("flag", ["--atol", "--rtol"])
@pytest.mark.parametrize("unchecked", [("--no-validate",), ("--dtype", "bf16", "--target", "gpu")])
def test_a_tolerance_is_refused_where_nothing_is_compared(
    tmp_path: Path, flag: str, unchecked: tuple[str, ...]
) -> None:
    arguments = ("onnx", RING, "-o", tmp_path / "output", flag, "1e-4", *unchecked)
    assert_refused(tmp_path, *arguments, flag=flag)


def test_a_scheme_of_tables_is_refused_without_them(tmp_path: Path) -> None:
    arguments = ("init", "moe-tiny-top8", "-o", tmp_path / "output", "--scheme", "released")
    assert_refused(tmp_path, *arguments, flag="--scheme")


def test_force_without_a_report_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path, "bench", tmp_path, "--force", flag="--force")


def test_preloading_is_refused_without_tables(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "checkpoint", PRESETS["moe-tiny-top8"])
    bundle = tmp_path / "bundle"
    assert run_command("onnx", tmp_path / "checkpoint", "-o", bundle, "--no-validate").exit_code == 0
    arguments = ("generate", bundle, "--prompt-ids", "1", "--preload", "--runtime", "onnxruntime-native")
    assert_refused(tmp_path, *arguments, flag="--preload")


def test_flags_that_apply_are_followed(tmp_path: Path) -> None:
    for arguments in (
        ("onnx", RING, "--query-layout", "released", "--key-dtype", "fp16", "--shard-size", "1GB", "--atol", "1e-3"),
        ("onnx", OLMOE, "--moe-form", "contrib", "--no-validate"),
        ("convert", RING, "--query-layout", "per-rank"),
        ("init", "umv2-tiny", "--scheme", "released"),
    ):
        assert run_command(*arguments, "-o", tmp_path / "output", "--dry-run").exit_code == 0


# Paths, before work starts.


def test_a_report_is_not_written_into_what_is_measured(exported: Exported) -> None:
    bundle, _ = exported("v2_shared_ring")
    before = (bundle / "manifest.json").read_bytes()
    for name in ("manifest.json", "report.html"):
        result = run_command("bench", bundle, "--report", bundle / name, "--force")
        assert result.exit_code == 2
        assert "would be written into, or over" in result.stderr
    assert (bundle / "manifest.json").read_bytes() == before
    assert not (bundle / "report.html").exists()


@pytest.mark.parametrize("name", ["manifest", "new.cache"])
def test_a_timing_cache_is_not_written_into_the_bundle(exported: Exported, tmp_path: Path, name: str) -> None:
    bundle, _ = exported("v2_shared_ring")
    arguments = ("build", bundle, "-o", tmp_path / "output", "--runtime", "tensorrt", "--timing-cache", bundle / name)
    result = run_command(*arguments)
    assert result.exit_code == 2
    assert "would be written into, or over" in result.stderr


def test_force_does_not_delete_the_plugin_library(exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    library = tmp_path / "output" / "plugins.so"
    library.write_bytes(b"")
    arguments = ("--runtime", "tensorrt", "--plugin-library", library, "--force")
    result = run_command("build", exported("v2_shared_ring")[0], "-o", tmp_path / "output", *arguments)
    assert result.exit_code == 2
    assert "--force would delete" in result.stderr


@pytest.mark.parametrize("command", ["inspect", "verify", "convert", "onnx", "generate"])
@pytest.mark.parametrize("name", ["loop", "not-utf-8-\udcff", "nul\0", "n" * 256])
def test_a_path_that_no_library_can_open_is_named_at_once(tmp_path: Path, command: str, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    more = {"convert": ("-o", tmp_path / "output"), "onnx": ("-o", tmp_path / "output")}.get(command, ())
    result = run_command(command, tmp_path / name, *more)
    assert result.exit_code == 2, result.stderr
    assert "path" in result.stderr
    if command == "convert":
        result = run_command(command, RING, "-o", tmp_path / name)
        assert result.exit_code == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["loop"]


def test_without_a_home_force_replaces_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    for _ in range(2):
        assert run_command("convert", RING, "-o", tmp_path / "output", "--force").exit_code == 0


# What a run needs, said beforehand.


def test_a_dry_run_counts_the_check_that_the_run_would_make(tmp_path: Path) -> None:
    arguments = ("onnx", RING, "-o", tmp_path / "output", "--dry-run")
    facts = [json.loads(run_command(*arguments, *more, "--json").stdout) for more in ((), ("--no-validate",))]
    checked, unchecked = (fact["peak_memory_bytes"] for fact in facts)
    assert checked > unchecked
    assert facts[0]["validation_memory_bytes"] == checked
    assert facts[1]["validation_memory_bytes"] == 0
    assert "the check against PyTorch takes" in run_command(*arguments).stdout
    assert "without the check against PyTorch" in run_command(*arguments, "--no-validate").stdout
