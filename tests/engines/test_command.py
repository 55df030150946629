"""`umv2-export build`, as a user meets it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.command import run_command
from umv2_export.commands.build import build
from umv2_export.engines.backends import TENSORRT_RTX

ONE_TOKEN = [part for bound in ("min", "opt", "max") for part in (f"--{bound}-shapes", "input_ids:1x1")]


def test_an_engine_is_built_and_described(tmp_path: Path, exported: Any) -> None:
    bundle, _ = exported("v2_shared_ring")
    built = run_command(
        "build", bundle, "-o", tmp_path / "engine", "--runtime", "tensorrt-rtx", *ONE_TOKEN,
        "--compute-capability", "8.9", "--json",
    )  # fmt: skip
    assert built.exit_code == 0, built.stderr
    facts = json.loads(built.stdout)
    assert facts["compute_capabilities"] == ["8.9"]
    described = run_command("inspect", tmp_path / "engine", "--json")
    assert described.exit_code == 0, described.stderr
    assert json.loads(described.stdout)["kind"] == "engine"
    assert json.loads(described.stdout)["sha256"] == facts["sha256"]


@pytest.mark.parametrize(
    ("options", "exit_code", "named"),
    [
        (["--compute-capability", "9.0"], 5, "9.0"),
        (["--compute-capability", "newest"], 2, "newest"),
        (["--timing-cache", "cache"], 5, "timing cache"),
        (["--opt-shapes", "no_input:1x1"], 2, "no_input"),
        (["--min-shapes", "input_ids:2x1", "--max-shapes", "input_ids:1x1"], 2, "batch"),
    ],
)
def test_what_cannot_be_built_is_named_before_the_build(
    options: list[str], exit_code: int, named: str, tmp_path: Path, exported: Any
) -> None:
    bundle, _ = exported("v2_shared_ring")
    result = run_command("build", bundle, "-o", tmp_path / "engine", "--runtime", "tensorrt-rtx", *options)
    assert result.exit_code == exit_code, result.stderr
    assert named in result.stderr
    assert not (tmp_path / "engine").exists()


def test_the_help_names_the_default_architectures() -> None:
    parameters: list[Any] = build.params
    [option] = [each for each in parameters if each.name == "compute_capability"]
    assert TENSORRT_RTX.default_architectures in option.help
    assert all(architecture in option.help for architecture in TENSORRT_RTX.architectures)


def test_a_dry_run_builds_nothing(tmp_path: Path, exported: Any) -> None:
    bundle, _ = exported("v2_shared_ring")
    result = run_command("build", bundle, "-o", tmp_path / "engine", "--runtime", "tensorrt-rtx", "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["disk_bytes"] > 0
    assert not (tmp_path / "engine").exists()
