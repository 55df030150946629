"""An ONNX Runtime that is older than a bundle needs is refused wherever a session would be opened."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from tests.command import Result, run_command
from tests.conftest import CHECKPOINTS

Exported = Callable[..., tuple[Path, dict[str, Any]]]

BENCH = ("--batch", "1", "--past", "4", "--prefill", "8", "--iterations", "3")


def assert_refused(result: Result, installed: str, minimum: str) -> None:
    assert result.exit_code == 4, result.stderr
    assert f"ONNX Runtime {installed} is installed, {minimum} or later is needed" in result.stderr
    assert f">={minimum}'" in result.stderr


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime-native"])
def test_a_release_below_all_bundles_is_refused(
    runtime: str, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, _ = exported("v2_shared_ring")
    monkeypatch.setattr(onnxruntime, "__version__", "1.19.2")
    for command in (("generate", bundle, "--prompt-ids", "1"), ("parity", bundle)):
        assert_refused(run_command(*command, "--runtime", runtime), "1.19.2", "1.20.0")
    assert_refused(run_command("bench", bundle, "--runtime", runtime), "1.19.2", "1.23.0")
    assert_refused(run_command("bench-op"), "1.19.2", "1.23.0")


def test_env_offers_no_runtime_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.19.2")
    runtimes = json.loads(run_command("env", "--json").stdout)["runtimes"]
    assert not any(available for name, available in runtimes.items() if name.startswith("onnxruntime"))


@pytest.mark.parametrize(
    ("options", "minimum"),
    [
        ((), "1.20.0"),
        (("--opset", "21"), "1.20.0"),
        (("--opset", "22"), "1.21.0"),
        (("--opset", "23"), "1.23.0"),
        (("--opset", "24"), "1.24.1"),
        (("--moe-form", "contrib"), "1.23.1"),
        (("--cache", "static"), "1.22.0"),
        (("--moe-form", "contrib", "--opset", "24"), "1.24.1"),
    ],
    ids=str,
)
def test_an_export_that_would_be_validated_is_refused_before_it_begins(
    options: tuple[str, ...], minimum: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.19.2")
    result = run_command("onnx", CHECKPOINTS["olmoe"], "-o", tmp_path / "bundle", *options)
    assert_refused(result, "1.19.2", minimum)
    assert not list(tmp_path.iterdir())


def test_a_baseline_that_needs_a_later_release_is_refused(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    standard, contrib = exported("olmoe")[0], exported("olmoe", "--moe-form", "contrib")[0]
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.0")
    # Both have one routing, which the standard form traces: of the other no session is opened before it is timed.
    result = run_command("bench", standard, "--runtime", "onnxruntime", "--baseline", contrib, *BENCH)
    assert_refused(result, "1.23.0", "1.23.1")
    assert str(contrib) in result.stderr


def test_inner_values_need_a_later_release_than_the_bundle(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, _ = exported("v2_shared_ring")
    monkeypatch.setattr(onnxruntime, "__version__", "1.20.1")
    assert run_command("parity", bundle).exit_code == 0
    assert_refused(run_command("parity", bundle, "--layerwise"), "1.20.1", "1.21.0")


@pytest.fixture
def copy(exported: Exported, tmp_path: Path) -> Path:
    """A bundle to spoil."""
    return Path(shutil.copytree(exported("v2_shared_ring")[0], tmp_path / "copy"))


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def test_the_manifest_decides(copy: Path) -> None:
    edit(copy, lambda manifest: manifest.update(min_onnxruntime="99.0.0"))
    assert_refused(run_command("generate", copy, "--prompt-ids", "1"), onnxruntime.__version__, "99.0.0")
    assert run_command("generate", copy, "--prompt-ids", "1", "--runtime", "torch").exit_code == 0


@pytest.mark.parametrize("value", [None, 1.2, "1.20", "1.20.0rc1", "1.20.0\n", "9" * 5000 + ".0.0", ["1.20.0"]])
def test_a_minimum_that_is_no_release_is_refused(copy: Path, value: object) -> None:
    edit(copy, lambda manifest: manifest.update(min_onnxruntime=value))
    result = run_command("generate", copy, "--prompt-ids", "1")
    assert result.exit_code == 3
    assert "field 'min_onnxruntime' is missing or malformed" in result.stderr


def test_a_bundle_from_before_the_field_is_refused_with_what_to_do(copy: Path) -> None:
    def as_before(manifest: dict[str, Any]) -> None:
        del manifest["min_onnxruntime"]
        manifest["format_version"] = 2

    edit(copy, as_before)
    result = run_command("generate", copy, "--prompt-ids", "1")
    assert result.exit_code == 3
    assert "format version 2, this tool reads 3" in result.stderr
    assert "export the checkpoint again" in result.stderr
