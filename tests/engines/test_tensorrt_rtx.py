"""Engines of TensorRT-RTX, built without a GPU: what they accept, and what a failing compiler leaves behind."""

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.golden import GOLDEN_CASES
from umv2_export.bundle import Bundle
from umv2_export.engines import plan as engine_plan
from umv2_export.engines import worker
from umv2_export.engines.backend import BuildOptions, BuildTarget
from umv2_export.engines.build import build_engine, plan_build
from umv2_export.engines.manifest import describe_engine, require_trusted
from umv2_export.engines.plan import BuildPlan
from umv2_export.errors import BuildFailed, EnvironmentUnfit, Unsupported

Exported = Callable[..., tuple[Path, dict[str, Any]]]

# Registers a creator for MemoryLookup in the namespace named first, then parses the graph named second. What the parser
# hands to it goes, decoded as TensorRT's own Python layer decodes it, into the plugin of ours that makes outputs.
PLUGIN_CREATOR = """
import sys
from pathlib import Path
import tensorrt_rtx as trt
from tests.plugins.tensorrt_plugin_api import DataType, Expression, TensorDesc, stand_in

class Creator(trt.IPluginCreatorV3One):
    def __init__(self):
        trt.IPluginCreatorV3One.__init__(self)
        self.name, self.plugin_version, self.plugin_namespace = "MemoryLookup", "1", sys.argv[1]
        names = ("pre_value_dim", "rows_per_shard", "groups")
        fields = [trt.PluginField(name, b"", trt.PluginFieldType.INT32) for name in names]
        fields.append(trt.PluginField("activation", b"", trt.PluginFieldType.CHAR))
        self.field_names = trt.PluginFieldCollection(fields)

    def create_plugin(self, name, fields, phase):
        print("creator reached with", *sorted(field.name for field in fields), flush=True)
        found = {}
        for field in fields:
            if field.type == trt.PluginFieldType.CHAR:
                print("creator got", field.name, field.data.tobytes(), flush=True)
                found[field.name] = field.data.tobytes().decode("utf-8")
            else:
                found[field.name] = int(field.data[0])
        tensorrt, sys.modules["tensorrt.plugin"], plugins = stand_in()
        from umv2_export.plugins.tensorrt.python_plugins import register_plugins
        from tests.gpu.made_up import made_up_folder
        names = ["indices", "scores", "query", "rows_0"]
        register_plugins(tensorrt, made_up_folder(Path(sys.argv[3]), []), allow_jit=True, lookup_inputs=names)
        width = found["pre_value_dim"] + 40
        shapes = ((3, 8), (3, 8, 2), (3, 6), (9, width))
        inputs = [TensorDesc([Expression(size) for size in shape], DataType.FLOAT) for shape in shapes]
        output = plugins["umv2::MemoryLookup"].raw["register"](*inputs, **found)
        print("creator made", [axis.at({}) for axis in output.shape_expr], flush=True)

creator, logger = Creator(), trt.Logger()
assert trt.get_plugin_registry().register_creator(creator, sys.argv[1])
builder = trt.Builder(logger)
network = builder.create_network(1)
parser = trt.OnnxParser(network, logger)
print("parsed", parser.parse_from_file(sys.argv[2]), flush=True)
"""


def decode_plan(bundle: Path, compute_capability: str = "8.6,8.9,12.0", **options: Any) -> BuildPlan:
    """A build of the decode profile alone: both take twice the time."""
    plan = plan_build("tensorrt-rtx", Bundle(bundle), BuildOptions(compute_capability, **options))
    return dataclasses.replace(plan, profiles=plan.profiles[1:])


def architectures_in(engine: Path) -> set[str]:
    """Architectures for which the engine file names code."""
    return {match.decode() for match in re.findall(rb"(?<![a-z])sm[0-9]{2,3}(?![0-9])", engine.read_bytes())}


@pytest.mark.parametrize("name", [case.name for case in GOLDEN_CASES])
def test_every_golden_checkpoint_builds_for_three_architectures(name: str, exported: Exported, tmp_path: Path) -> None:
    bundle, _ = exported(name)
    engine = build_engine(decode_plan(bundle), tmp_path / "engine").engine
    assert architectures_in(engine.file) == {"sm86", "sm89", "sm120"}
    written = json.loads((tmp_path / "engine" / "engine.json").read_text(encoding="utf-8"))
    exported_io = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    assert (written["inputs"], written["outputs"]) == (exported_io["inputs"], exported_io["outputs"])
    assert written["sha256"] == hashlib.sha256(engine.file.read_bytes()).hexdigest()
    assert written["bundle"] == hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()


def test_an_engine_holds_both_profiles_and_stands_alone(exported: Exported, tmp_path: Path) -> None:
    bundle, _ = exported("v2_shared_ring")
    plan = plan_build("tensorrt-rtx", Bundle(bundle), BuildOptions("8.9", {"max": ["input_ids:2x16"]}))
    build_engine(plan, tmp_path / "engine")
    assert sorted(file.name for file in tmp_path.rglob("*") if file.is_file()) == ["engine.json", "model.engine"]
    assert architectures_in(tmp_path / "engine" / "model.engine") == {"sm89"}
    require_trusted(tmp_path / "engine", trust=False)
    profiles = describe_engine(tmp_path / "engine")["profiles"]
    assert list(profiles) == ["prefill", "decode"]
    assert [profiles[name]["input_ids"]["max"] for name in profiles] == [[2, 16], [2, 1]]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("v2_per_rank", ("--dtype", "bf16", "--target", "gpu")),
        ("v2_shared_ring", ("--dtype", "fp16", "--table-dtype", "bf16")),
        ("v2_per_rank", ("--table-dtype", "bf16", "--opset", "23")),
        ("v2_shared_ring", ("--inline-functions", "--shard-size", "40KB")),
    ],
)
def test_other_dtypes_opsets_and_shards_build(
    name: str, options: tuple[str, ...], exported: Exported, tmp_path: Path
) -> None:
    build_engine(decode_plan(exported(name, *options)[0], "8.9"), tmp_path / "engine")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timing_cache": Path("cache")}, "no timing cache"),
        ({"require_timing_cache": True}, "no timing cache"),
        ({"allow_jit": True}, "takes no plugins"),
        ({"plugin_library": Path("library.so")}, "takes no plugins"),
        ({"version_compatible": True}, "no version-compatible engines"),
        ({"hardware_compatible": True}, "no hardware compatibility level"),
        ({"strip_weights": True}, "strips no weights"),
    ],
)
def test_options_that_only_tensorrt_has_are_unsupported(
    options: dict[str, Any], message: str, exported: Exported
) -> None:
    with pytest.raises(Unsupported, match=message) as caught:
        decode_plan(exported("v2_shared_ring")[0], **options)
    assert f"--{next(iter(options)).replace('_', '-')}" in str(caught.value.fix)


def test_the_library_says_that_its_timing_cache_does_nothing() -> None:
    script = "import tensorrt_rtx as t; b = t.Builder(t.Logger()); b.create_builder_config().get_timing_cache()"
    result = subprocess.run([sys.executable, "-W", "always", "-c", script], capture_output=True, text=True, check=True)
    assert "Timing cache operations are no-ops in TensorRT-RTX" in result.stderr


def test_a_missing_library_is_named(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(EnvironmentUnfit, match=r"umv2-export\[rtx\]"):
        decode_plan(exported("v2_shared_ring")[0])


def test_a_build_that_memory_cannot_hold_is_not_begun(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = decode_plan(exported("v2_shared_ring")[0])
    monkeypatch.setattr(engine_plan, "available_bytes", lambda: plan.memory_bytes - 1)
    with pytest.raises(
        EnvironmentUnfit, match=r"TensorRT-RTX needs about 1\.002 GB of memory, 1\.002 GB are"
    ) as caught:
        build_engine(plan, tmp_path / "engine")
    assert caught.value.exit_code == 4
    assert not list(tmp_path.iterdir())


def test_memory_that_suffices_and_memory_that_is_unknown_are_no_hindrance(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = decode_plan(exported("v2_shared_ring")[0])
    for available in (plan.memory_bytes, None):
        monkeypatch.setattr(engine_plan, "available_bytes", lambda available=available: available)
        engine_plan.check_target_and_resources(plan, tmp_path / "engine")


def test_a_worker_loads_the_library_and_little_else() -> None:
    script = "import sys, umv2_export.engines.worker; print({'torch', 'onnx', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


@pytest.mark.parametrize(
    ("script", "ending"),
    [
        ("import os; print('last words', flush=True); os.abort()", "was ended by SIGABRT"),
        ("import sys; print('last words', file=sys.stderr); sys.exit(7)", "ended with exit code 7"),
    ],
)
def test_a_compiler_that_crashes_leaves_nothing(
    script: str, ending: str, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "WORKER", (sys.executable, "-c", script))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(BuildFailed, match=ending) as caught:
        build_engine(decode_plan(exported("v2_shared_ring")[0]), tmp_path / "engine")
    assert caught.value.exit_code == 6
    assert caught.value.why == "last words"
    assert not list(tmp_path.iterdir())


def test_a_crash_leaves_the_engine_that_was_there(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "model.engine").write_bytes(b"old")
    monkeypatch.setattr(worker, "WORKER", (sys.executable, "-c", "import os; os.abort()"))
    with pytest.raises(BuildFailed):
        build_engine(decode_plan(exported("v2_shared_ring")[0]), tmp_path / "engine", replace_target=True)
    assert (tmp_path / "engine" / "model.engine").read_bytes() == b"old"


@pytest.mark.parametrize("kind", ["ImportError", "OSError"])
def test_a_library_that_does_not_load_is_named(
    kind: str, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt_rtx.py").write_text(f"raise {kind}('libmissing.so: no such file')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(EnvironmentUnfit, match="TensorRT-RTX: a library does not load") as caught:
        build_engine(decode_plan(exported("v2_shared_ring")[0]), tmp_path / "engine")
    assert "libmissing.so" in str(caught.value.why)
    assert not (tmp_path / "engine").exists()


def test_a_file_that_a_worker_cannot_open_is_named(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt_rtx.py").write_text(f"open({str(tmp_path / 'missing')!r})", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        build_engine(decode_plan(exported("v2_shared_ring")[0]), tmp_path / "engine")
    assert caught.value.filename == str(tmp_path / "missing")


def test_what_the_parser_says_of_a_graph_reaches_the_user(exported: Exported, tmp_path: Path) -> None:
    plan = decode_plan(exported("v2_shared_ring")[0])
    next(iter(plan.graph.model.graph)).op_type = "NoSuchOp"
    with pytest.raises(BuildFailed, match="refuses the graph") as caught:
        build_engine(plan, tmp_path / "engine")
    assert "NoSuchOp" in (caught.value.why or "")
    assert not list(tmp_path.iterdir())


def test_what_the_builder_says_of_a_graph_reaches_the_user(exported: Exported, tmp_path: Path) -> None:
    plan = dataclasses.replace(decode_plan(exported("v2_shared_ring")[0]), target=BuildTarget(("7.5",)))
    with pytest.raises(BuildFailed, match="refuses the graph") as caught:
        build_engine(plan, tmp_path / "engine")
    assert "FP32 GEMM is not supported" in (caught.value.why or "")


@pytest.mark.parametrize(
    ("namespace", "marks"),
    [
        (
            "umv2",
            [
                "creator reached with activation groups pre_value_dim rows_per_shard",
                r"creator got activation b'none\x00'",
                "creator made [3, 40]",
                "parsed False",
            ],
        ),
        ("other", ["parsed True"]),
    ],
)
def test_the_parser_finds_a_plugin_by_its_namespace_and_ends_strings_with_a_zero_that_the_plugin_takes_off(
    namespace: str, marks: list[str], exported: Exported, tmp_path: Path
) -> None:
    graph = exported("v2_shared_ring")[0] / "model.onnx"
    command = [sys.executable, "-c", PLUGIN_CREATOR, namespace, str(graph), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert [line for line in result.stdout.splitlines() if line.startswith(("creator", "parsed"))] == marks
