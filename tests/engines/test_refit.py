"""`umv2-export refit`, with a stand-in for TensorRT: which engines are loaded, and what they are given."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.command import Result, run_command
from tests.engines.conftest import StandIn, with_links
from umv2_export.bundle import Bundle
from umv2_export.engines import refit as engine_refit
from umv2_export.engines.manifest import EngineManifest
from umv2_export.gpu import driver

CONTENT = b"stripped engine"

Exported = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture
def bundle(exported: Exported) -> Path:
    return exported("v2_shared_ring")[0]


def build(bundle: Path, target: Path, *options: object) -> None:
    result = run_command("build", bundle, "-o", target, "--runtime", "tensorrt", *options)
    assert result.exit_code == 0, result.stderr


@pytest.fixture
def stripped(bundle: Path, tmp_path: Path, stand_in: StandIn) -> Path:
    """An engine without weights, as a build leaves it."""
    folder = tmp_path / "stripped"
    folder.mkdir()
    (folder / "model.engine").write_bytes(CONTENT)
    opened = Bundle(bundle)
    EngineManifest(
        tool_version="0.1.0",
        runtime="tensorrt",
        runtime_version="10.13.0.35",
        compute_capabilities=["8.9"],
        version_compatible=False,
        hardware_compatible=False,
        plugins="aot",
        weights="stripped",
        profiles=[],
        inputs=[],
        outputs=[],
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        bundle=hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest(),
        graph=hashlib.sha256((bundle / "model.onnx").read_bytes()).hexdigest(),
        config=opened.config.as_dict(),
    ).write(folder)
    return folder


def refit(engine: Path, bundle: Path, *options: object) -> Result:
    return run_command("refit", engine, bundle, "-o", engine.parent / "whole", *options)


def edit(engine: Path, **fields: Any) -> None:
    document = json.loads((engine / "engine.json").read_text(encoding="utf-8"))
    (engine / "engine.json").write_text(json.dumps({**document, **fields}), encoding="utf-8")


def test_a_stripped_engine_gets_the_weights_of_its_bundle(bundle: Path, stripped: Path, stand_in: StandIn) -> None:
    result = refit(stripped, bundle, "--json")
    assert result.exit_code == 0, result.stderr
    [[names]] = stand_in.calls("refit_from_file")
    assert {tensor.name for tensor in Bundle(bundle).graph().graph.initializer} <= set(names)
    assert stand_in.calls("deserialize_cuda_engine") == [["stripped engine", False]]
    whole = stripped.parent / "whole"
    assert (whole / "model.engine").read_bytes() == b"engine with its weights"
    before, after = (json.loads((folder / "engine.json").read_text(encoding="utf-8")) for folder in (stripped, whole))
    assert json.loads(result.stdout)["sha256"] == after["sha256"]
    assert {name for name in before if before[name] != after[name]} == {"weights", "size", "sha256"}
    assert run_command("verify", whole).exit_code == 0


def test_kernels_that_lie_in_the_engine_are_not_compiled_again(bundle: Path, stripped: Path, stand_in: StandIn) -> None:
    assert refit(stripped, bundle).exit_code == 0
    assert (stand_in.kernels, stand_in.order()) == ([], ["Runtime", "deserialize_cuda_engine", "refit_from_file"])


def test_plugins_that_python_compiles_are_registered_before_the_engine_is_loaded(
    bundle: Path, tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "compute_capability", lambda: "7.5")
    build(bundle, tmp_path / "stripped", "--strip-weights", "--allow-jit")
    assert refit(tmp_path / "stripped", bundle).exit_code == 0
    assert stand_in.order()[-4:] == ["register_plugins", "Runtime", "deserialize_cuda_engine", "refit_from_file"]
    assert stand_in.calls("register_plugins")[1][1] is True


def test_a_plugin_library_is_loaded_before_the_engine(bundle: Path, tmp_path: Path, stand_in: StandIn) -> None:
    library = tmp_path / "plugins.so"
    library.write_bytes(b"code")
    build(bundle, tmp_path / "stripped", "--strip-weights", "--plugin-library", library)
    missing = refit(tmp_path / "stripped", bundle)
    assert missing.exit_code == 2
    assert "name it by --plugin-library" in missing.stderr
    assert refit(tmp_path / "stripped", bundle, "--plugin-library", library).exit_code == 0
    assert stand_in.order()[-4:] == ["load_library", "Runtime", "deserialize_cuda_engine", "refit_from_file"]


def test_only_a_version_compatible_engine_may_bring_code_of_the_host(
    bundle: Path, tmp_path: Path, stand_in: StandIn
) -> None:
    build(bundle, tmp_path / "stripped", "--strip-weights", "--version-compatible")
    edit(tmp_path / "stripped", runtime_version="10.12.0.36")
    assert refit(tmp_path / "stripped", bundle).exit_code == 0
    assert stand_in.calls("deserialize_cuda_engine") == [["stripped engine", True]]


def test_an_engine_that_was_changed_is_loaded_only_if_the_user_vouches_for_it(
    bundle: Path, stripped: Path, stand_in: StandIn
) -> None:
    (stripped / "model.engine").write_bytes(b"stripped engima")
    refused = refit(stripped, bundle)
    assert refused.exit_code == 3
    assert "not trusted" in refused.stderr
    assert "--trust-engine" in refused.stderr
    assert stand_in.calls("Runtime") == []
    assert refit(stripped, bundle, "--trust-engine").exit_code == 0
    assert stand_in.calls("deserialize_cuda_engine") == [["stripped engima", False]]


@pytest.mark.parametrize(("options", "exit_code"), [([], 3), (["--trust-engine"], 0)])
def test_an_engine_that_is_replaced_after_its_check_is_not_loaded(
    options: list[str], exit_code: int, bundle: Path, stripped: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(plan: object, target: Path) -> None:
        (stripped / "model.engine").write_bytes(b"stripped engima")

    monkeypatch.setattr(engine_refit, "require_resources", replace)
    result = refit(stripped, bundle, *options)
    assert result.exit_code == exit_code
    assert ("the engine was changed since it was checked" in result.stderr) is (exit_code == 3)
    assert len(stand_in.calls("deserialize_cuda_engine")) == (exit_code == 0)


def test_files_of_a_bundle_are_not_written(bundle: Path, stripped: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_bytes(b"{}")
    hostile = with_links(bundle, tmp_path / "hostile", kept)
    assert refit(stripped, hostile).exit_code == 0
    assert kept.read_bytes() == b"{}"


def test_an_engine_without_a_manifest_is_never_loaded(bundle: Path, stripped: Path, stand_in: StandIn) -> None:
    (stripped / "engine.json").unlink()
    assert refit(stripped, bundle, "--trust-engine").exit_code == 3
    assert stand_in.calls("Runtime") == []


def test_another_training_of_the_same_model_fits(bundle: Path, stripped: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    document = json.loads((other / "manifest.json").read_text(encoding="utf-8"))
    (other / "manifest.json").write_text(json.dumps({**document, "source": {}}), encoding="utf-8")
    assert refit(stripped, other).exit_code == 0
    before, after = (
        json.loads((folder / "engine.json").read_text(encoding="utf-8"))["bundle"]
        for folder in (stripped, tmp_path / "whole")
    )
    assert before != after


def test_another_graph_does_not_fit(stripped: Path, exported: Exported, stand_in: StandIn) -> None:
    other, _ = exported("v2_shared_ring", "--inline-functions", "--shard-size", "40KB")
    result = refit(stripped, other)
    assert result.exit_code == 3
    assert "the engine was built from a graph of sha256" in result.stderr
    assert stand_in.calls("Runtime") == []


@pytest.mark.parametrize(
    ("fields", "exit_code", "named"),
    [
        ({"weights": "included"}, 3, "the engine has its weights"),
        ({"runtime": "tensorrt-rtx"}, 5, "an engine of 'tensorrt-rtx'"),
        ({"runtime_version": "10.12.0.36"}, 4, "built by version 10.12.0.36, 10.13.0.35 is installed"),
        ({"compute_capabilities": ["9.0"]}, 4, "has compute capability 8.9, the engine is for 9.0"),
    ],
)
def test_an_engine_that_cannot_be_refitted_here_is_named_before_it_is_loaded(
    fields: dict[str, Any], exit_code: int, named: str, bundle: Path, stripped: Path, stand_in: StandIn
) -> None:
    edit(stripped, **fields)
    result = refit(stripped, bundle)
    assert result.exit_code == exit_code, result.stderr
    assert named in result.stderr
    assert stand_in.calls("Runtime") == []
    assert not (stripped.parent / "whole").exists()


def test_a_hardware_compatible_engine_is_refitted_on_a_newer_gpu(
    bundle: Path, tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(bundle, tmp_path / "stripped", "--strip-weights", "--hardware-compatible")
    monkeypatch.setattr(driver, "compute_capability", lambda: "10.0")
    assert refit(tmp_path / "stripped", bundle).exit_code == 0
    monkeypatch.setattr(driver, "compute_capability", lambda: "7.5")
    assert refit(tmp_path / "stripped", bundle, "--force").exit_code == 4


@pytest.mark.parametrize(
    ("behaviour", "named"),
    [
        ({"refit_errors": ["weights of another size"]}, "weights of another size"),
        ({"missing_weights": ["lm_head.weight"]}, "lm_head.weight"),
        ({"refuse_weights": True}, "the engine refuses the weights"),
    ],
)
def test_weights_that_do_not_fit_leave_nothing(
    behaviour: dict[str, Any], named: str, bundle: Path, stripped: Path, stand_in: StandIn
) -> None:
    stand_in.behave(**behaviour)
    result = refit(stripped, bundle)
    assert result.exit_code == 6
    assert named in result.stderr
    assert not (stripped.parent / "whole").exists()


def test_an_engine_that_does_not_load_is_named(bundle: Path, stripped: Path, stand_in: StandIn) -> None:
    (stripped / "model.engine").write_bytes(b"no engine")
    result = refit(stripped, bundle, "--trust-engine")
    assert result.exit_code == 6
    assert "the engine cannot be loaded" in result.stderr


def test_a_dry_run_loads_nothing(bundle: Path, stripped: Path, stand_in: StandIn) -> None:
    result = refit(stripped, bundle, "--dry-run", "--json")
    assert json.loads(result.stdout)["disk_bytes"] > 900_000
    assert stand_in.calls("Runtime") == []
