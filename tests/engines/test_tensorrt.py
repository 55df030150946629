"""`build --runtime tensorrt`, with a stand-in for the library: what it is asked, and how its failures are told."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.command import Result, run_command
from tests.engines.conftest import StandIn, with_links
from umv2_export.bundle import Bundle
from umv2_export.engines import plan as engine_plan
from umv2_export.engines.backends import TENSORRT, TENSORRT_RTX
from umv2_export.engines.graph import read_graph
from umv2_export.engines.manifest import read_engine
from umv2_export.errors import EnvironmentUnfit
from umv2_export.gpu import driver

Exported = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture
def bundle(exported: Exported) -> Path:
    return exported("v2_shared_ring")[0]


def build(bundle: Path, target: Path, *options: object) -> Result:
    return run_command("build", bundle, "-o", target, "--runtime", "tensorrt", *options, "--json")


def built(bundle: Path, target: Path, *options: object) -> dict[str, Any]:
    result = build(bundle, target, *options)
    assert result.exit_code == 0, result.stderr
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


def test_plugins_are_registered_before_the_graph_is_parsed(bundle: Path, tmp_path: Path, stand_in: StandIn) -> None:
    facts = built(bundle, tmp_path / "engine")
    assert stand_in.order() == ["register_plugins", "Builder", "create_network", "parse_from_file", "build"]
    assert stand_in.kernels == [(["MemoryLookup", "TuckerTopK"], ["8.9"])]
    [[files, allow_jit, lookup_inputs]] = stand_in.calls("register_plugins")
    assert (files, allow_jit) == (["kernels.json"], False)
    assert lookup_inputs == ["indices", "scores", "query", "rows_0"]
    assert (facts["runtime"], facts["runtime_version"]) == ("tensorrt", "10.13.0.35")
    assert (facts["compute_capabilities"], facts["plugins"], facts["weights"]) == (["8.9"], "aot", "included")
    assert (tmp_path / "engine" / "model.engine").read_bytes().startswith(b"whole engine\n")
    assert sorted(file.name for file in (tmp_path / "engine").iterdir()) == ["engine.json", "model.engine"]


def test_a_network_is_strongly_typed_and_computes_no_tf32(bundle: Path, tmp_path: Path, stand_in: StandIn) -> None:
    built(bundle, tmp_path / "engine")
    assert stand_in.calls("create_network") == [[["STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS"]]]
    [[facts]] = stand_in.calls("build")
    assert (facts["flags"], facts["hardware"], facts["plugins"]) == ([], "NONE", [])


def test_a_version_that_knows_only_strong_typing_is_asked_for_nothing(
    bundle: Path, tmp_path: Path, stand_in: StandIn
) -> None:
    stand_in.behave(only_strong_typing=True)
    built(bundle, tmp_path / "engine")
    assert stand_in.calls("create_network") == [[["PREFER_AOT_PYTHON_PLUGINS"]]]


def test_prefill_and_decode_are_profiles(bundle: Path, tmp_path: Path, stand_in: StandIn) -> None:
    built(bundle, tmp_path / "engine", "--max-shapes", "input_ids:2x16")
    [[facts]] = stand_in.calls("build")
    assert facts["profiles"] == [[[1, 1], [1, 16], [2, 16]], [[1, 1], [1, 1], [2, 1]]]


def test_ops_with_a_plugin_are_nodes_without_a_body_and_all_others_are_expanded(
    bundle: Path, tmp_path: Path, stand_in: StandIn
) -> None:
    built(bundle, tmp_path / "engine")
    assert stand_in.calls("parse_from_file") == [[["umv2::MemoryLookup", "umv2::TuckerTopK"], []]]


def test_weights_keep_their_names(bundle: Path) -> None:
    before = {tensor.name for tensor in Bundle(bundle).graph().graph.initializer}
    assert before <= set(read_graph(Bundle(bundle), TENSORRT).model.graph.initializers)


def test_a_bundle_of_standard_ops_takes_no_plugins(exported: Exported, tmp_path: Path, stand_in: StandIn) -> None:
    inlined, _ = exported("v2_shared_ring", "--inline-functions", "--shard-size", "40KB")
    assert built(inlined, tmp_path / "engine")["plugins"] == "none"
    assert stand_in.calls("parse_from_file") == [[[], []]]
    assert stand_in.calls("register_plugins") == []
    assert stand_in.calls("create_network") == [[["STRONGLY_TYPED"]]]


@pytest.mark.parametrize(
    ("option", "flags", "hardware", "field"),
    [
        ("--version-compatible", ["VERSION_COMPATIBLE"], "NONE", ("version_compatible", True)),
        ("--hardware-compatible", [], "AMPERE_PLUS", ("hardware_compatible", True)),
        ("--strip-weights", ["REFIT", "STRIP_PLAN"], "NONE", ("weights", "stripped")),
    ],
)
def test_each_switch_sets_its_flags_and_is_recorded(
    option: str, flags: list[str], hardware: str, field: tuple[str, object], bundle: Path, tmp_path: Path,
    stand_in: StandIn,
) -> None:  # fmt: skip
    facts = built(bundle, tmp_path / "engine", option)
    [[called]] = stand_in.calls("build")
    assert (called["flags"], called["hardware"]) == (flags, hardware)
    assert facts[field[0]] == field[1]


def test_a_hardware_compatible_engine_holds_kernels_of_the_oldest_gpu(
    bundle: Path, tmp_path: Path, stand_in: StandIn
) -> None:
    assert built(bundle, tmp_path / "engine", "--hardware-compatible")["compute_capabilities"] == ["8.0"]
    assert stand_in.kernels[0][1] == ["8.0"]


def test_an_older_gpu_builds_no_hardware_compatible_engine(
    bundle: Path, tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "compute_capability", lambda: "7.5")
    result = build(bundle, tmp_path / "engine", "--hardware-compatible")
    assert (result.exit_code, stand_in.order()) == (5, [])
    assert "compute capability 7.5" in result.stderr


def test_the_architecture_that_is_named_must_be_that_of_the_gpu(
    bundle: Path, tmp_path: Path, stand_in: StandIn
) -> None:
    built(bundle, tmp_path / "engine", "--compute-capability", "8.9")
    result = build(bundle, tmp_path / "other", "--compute-capability", "9.0")
    assert result.exit_code == 4
    assert "9.0 was asked for, the GPU of this machine has 8.9" in result.stderr
    assert len(stand_in.calls("build")) == 1
    assert not (tmp_path / "other").exists()


def test_what_is_said_of_another_architecture_can_be_followed(
    bundle: Path, tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "compute_capability", lambda: "9.0")
    for options in ([], ["--hardware-compatible"]):
        refused = build(bundle, tmp_path / "engine", "--compute-capability", "8.6", *options)
        assert refused.exit_code == 4
        assert "leave out --compute-capability and pass --hardware-compatible" in refused.stderr
    built(bundle, tmp_path / "engine", "--hardware-compatible")
    TENSORRT.check_card(read_engine(tmp_path / "engine").manifest, "8.6")


def test_kernels_that_python_compiles_read_no_bf16(
    exported: Exported, tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, _ = exported("v2_per_rank", "--table-dtype", "bf16")
    assert built(bundle, tmp_path / "aot", "--allow-jit")["plugins"] == "aot"
    calls = stand_in.order()
    monkeypatch.setattr(driver, "compute_capability", lambda: "7.5")
    for options in ([], ["--allow-jit"]):
        refused = build(bundle, tmp_path / "jit", *options)
        assert refused.exit_code == 5
        assert "rows of bf16 on a GPU of compute capability 7.5" in refused.stderr
        assert "--table-dtype fp16 or fp32" in refused.stderr
    assert stand_in.order() == calls


def test_without_compiled_kernels_a_build_is_refused_unless_python_may_compile_them(
    bundle: Path, tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "compute_capability", lambda: "7.5")
    refused = build(bundle, tmp_path / "engine")
    assert (refused.exit_code, stand_in.order()) == (5, [])
    assert "no kernels are compiled ahead of time for compute capability 7.5" in refused.stderr
    assert "--allow-jit" in refused.stderr
    assert built(bundle, tmp_path / "engine", "--allow-jit")["plugins"] == "jit"
    assert stand_in.kernels == [(["MemoryLookup", "TuckerTopK"], [])]
    assert stand_in.calls("register_plugins")[0][1] is True
    assert stand_in.calls("create_network") == [[["STRONGLY_TYPED", "PREFER_JIT_PYTHON_PLUGINS"]]]


def test_compiled_kernels_are_taken_even_where_others_are_allowed(
    bundle: Path, tmp_path: Path, stand_in: StandIn
) -> None:
    assert built(bundle, tmp_path / "engine", "--allow-jit")["plugins"] == "aot"
    assert stand_in.calls("register_plugins")[0][1] is False


def test_a_plugin_library_takes_the_place_of_the_python_plugins(
    bundle: Path, tmp_path: Path, stand_in: StandIn
) -> None:
    library = tmp_path / "libumv2_tensorrt.so"
    library.write_bytes(b"code")
    facts = built(bundle, tmp_path / "engine", "--plugin-library", library)
    assert (facts["plugins"], stand_in.kernels) == ("library", [])
    assert stand_in.order()[:2] == ["load_library", "Builder"]
    assert stand_in.calls("load_library") == [[str(library.resolve())]]
    assert stand_in.calls("build")[0][0]["plugins"] == []


def test_a_version_compatible_engine_brings_its_plugin_library(bundle: Path, tmp_path: Path, stand_in: StandIn) -> None:
    library = tmp_path / "libumv2_tensorrt.so"
    library.write_bytes(b"code")
    built(bundle, tmp_path / "engine", "--plugin-library", library, "--version-compatible")
    assert stand_in.calls("build")[0][0]["plugins"] == ["libumv2_tensorrt.so"]


@pytest.mark.parametrize(
    ("options", "exit_code", "named"),
    [
        (["--plugin-library", "missing.so"], 3, "plugin library is missing"),
        (["--plugin-library", "missing.so", "--allow-jit"], 2, "exclude each other"),
        (["--require-timing-cache"], 2, "--timing-cache"),
        (["--require-timing-cache", "--timing-cache", "missing"], 3, "timing cache is missing"),
        (["--max-shapes", "no_input:1x1"], 2, "no_input"),
        (["--max-shapes", "input_ids:9000000x1"], 5, "2147483647 elements"),
        (["--compute-capability", "3.5"], 5, "compute capability 3.5"),
        (["--compute-capability", "newest"], 2, "newest"),
    ],
)
def test_what_cannot_be_built_is_named_before_the_build(
    options: list[str], exit_code: int, named: str, bundle: Path, tmp_path: Path, stand_in: StandIn
) -> None:
    result = build(bundle, tmp_path / "engine", *options)
    assert result.exit_code == exit_code, result.stderr
    assert named in result.stderr
    assert (stand_in.order(), stand_in.kernels) == ([], [])
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    ("behaviour", "exit_code", "named"),
    [
        ({"creators": ["TuckerTopK"]}, 4, "no plugin for umv2::MemoryLookup, version 1"),
        ({"parser_errors": ["node 3: no such op"]}, 6, "node 3: no such op"),
        ({"refuse_profile": True}, 6, "refuses an optimisation profile"),
        ({"refuse_graph": True}, 6, "no implementation for a node"),
        ({"crash": True}, 6, "was ended by SIGABRT"),
        ({"dtypes": {"logits": "HALF"}}, 6, "'dtype': 'float16'"),
        ({"dtypes": {"node_Softmax": "BF16"}}, 6, "bfloat16 in the parsed network, float in the graph"),
    ],
)
def test_a_build_that_fails_says_why_and_leaves_nothing(
    behaviour: dict[str, Any], exit_code: int, named: str, exported: Exported, bundle: Path, tmp_path: Path,
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if "node_Softmax" in behaviour.get("dtypes", {}):
        softmax = next(
            node for node in read_graph(Bundle(bundle), TENSORRT_RTX).model.graph if node.op_type == "Softmax"
        )
        behaviour = {"dtypes": {softmax.outputs[0].name: "BF16"}}
    stand_in.behave(**behaviour)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = build(bundle, tmp_path / "engine")
    assert result.exit_code == exit_code, result.stderr
    assert named in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_missing_plugin_is_found_before_the_graph_is_parsed(bundle: Path, tmp_path: Path, stand_in: StandIn) -> None:
    stand_in.behave(creators=[])
    assert build(bundle, tmp_path / "engine").exit_code == 4
    assert stand_in.order() == ["register_plugins"]


def test_files_of_a_bundle_are_neither_written_nor_taken_for_a_result(
    bundle: Path, tmp_path: Path, stand_in: StandIn
) -> None:
    kept = tmp_path / "kept"
    kept.write_text('{"error": ["InputRejected", {"what": "made up"}]}', encoding="utf-8")
    before = kept.read_bytes()
    hostile = with_links(bundle, tmp_path / "hostile", kept)
    built(hostile, tmp_path / "engine", "--timing-cache", tmp_path / "cache")
    assert kept.read_bytes() == before
    stand_in.behave(crash=True)
    crashed = build(hostile, tmp_path / "crashed")
    assert crashed.exit_code == 6
    assert "was ended by SIGABRT" in crashed.stderr
    assert kept.read_bytes() == before


def test_an_older_version_is_named(
    bundle: Path, tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "10.9.0.34")
    result = build(bundle, tmp_path / "engine")
    assert result.exit_code == 4
    assert "TensorRT 10.9.0.34 is installed" in result.stderr


def test_a_plugin_library_that_does_not_load_is_named(bundle: Path, tmp_path: Path, stand_in: StandIn) -> None:
    stand_in.behave(refuse_library=True)
    (tmp_path / "plugins.so").write_bytes(b"code")
    result = build(bundle, tmp_path / "engine", "--plugin-library", tmp_path / "plugins.so")
    assert result.exit_code == 4
    assert "plugin library cannot be loaded" in result.stderr
    assert stand_in.order() == ["load_library"]


def test_a_build_that_memory_cannot_hold_is_not_begun(
    bundle: Path, tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_plan, "available_bytes", lambda: 5 * 10**8)
    for options in ([], ["--dry-run"]):
        result = build(bundle, tmp_path / "engine", *options)
        assert result.exit_code == 4
        assert "needs about 1.002 GB of memory, 0.500 GB are available" in result.stderr
    assert stand_in.order() == []


def test_a_dry_run_builds_nothing(bundle: Path, tmp_path: Path, stand_in: StandIn) -> None:
    whole = built(bundle, tmp_path / "engine", "--dry-run")
    stripped = built(bundle, tmp_path / "engine", "--dry-run", "--strip-weights")
    assert whole["disk_bytes"] - stripped["disk_bytes"] == sum(
        facts["size"] for facts in Bundle(bundle).manifest.files.values()
    )
    assert (stand_in.order(), stand_in.kernels) == ([], [])


def test_what_was_built_is_verified_and_described(bundle: Path, tmp_path: Path, stand_in: StandIn) -> None:
    built(bundle, tmp_path / "engine")
    verified = run_command("verify", tmp_path / "engine", "--json")
    assert json.loads(verified.stdout) == {"engine": str(tmp_path / "engine"), "passed": True, "files": 1}
    described = json.loads(run_command("inspect", tmp_path / "engine", "--json").stdout)
    assert (described["runtime"], described["plugins"]) == ("tensorrt", "aot")
    (tmp_path / "engine" / "model.engine").write_bytes(b"whale engine")
    assert run_command("verify", tmp_path / "engine").exit_code == 1


def test_people_are_told_what_the_engine_needs(bundle: Path, tmp_path: Path, stand_in: StandIn) -> None:
    arguments = ("build", bundle, "-o", tmp_path / "engine", "--runtime", "tensorrt", "--strip-weights")
    told = run_command(*arguments).stdout
    assert "kernels were compiled ahead of time" in told
    assert "umv2-export refit" in told


def test_people_are_told_of_a_plugin_library_only_where_the_engine_does_not_bring_it(
    bundle: Path, tmp_path: Path, stand_in: StandIn
) -> None:
    library = tmp_path / "libumv2_tensorrt.so"
    library.write_bytes(b"code")
    for options, brings in (([], False), (["--version-compatible"], True)):
        arguments = ("--runtime", "tensorrt", "--plugin-library", library, "--force", *options)
        told = run_command("build", bundle, "-o", tmp_path / "engine", *arguments).stdout
        assert ("the plugin library must be loaded before it" in told) is not brings
        assert ("it brings its plugin library" in told) is brings
    assert "float values of it have the graph's dtypes" in told


def test_without_tensorrt_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EnvironmentUnfit, match="TensorRT is not installed") as caught:
        TENSORRT.load()
    assert caught.value.fix is not None
    assert "tensorrt" in caught.value.fix


def test_types_of_tensorrt_alone_are_not_taken_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # What tensorrt-stubs installs: a folder with a .pyi alone.
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "__init__.pyi").touch()
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(EnvironmentUnfit, match="TensorRT is not installed") as caught:
        TENSORRT.load()
    assert "tensorrt-stubs" in str(caught.value.why)
