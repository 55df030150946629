"""The runtimes tensorrt and tensorrt-rtx, with stand-ins for the library and the driver; nothing ran on a GPU."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.command import Result, run_command
from tests.engines.conftest import StandIn
from tests.gpu.stand_in import build_stand_in
from umv2_export import names
from umv2_export.bundle import Bundle
from umv2_export.engines.backends import TensorRt, TensorRtRtx
from umv2_export.engines.tasks import load_engine
from umv2_export.errors import BuildFailed
from umv2_export.gpu import driver
from umv2_export.runtimes import EngineChoice, StepInput, empty_cache, open_runtime, tensorrt

Exported = Callable[..., tuple[Path, dict[str, Any]]]
Built = Callable[..., Path]

RING = "v2_shared_ring"


class Machine:
    """A machine with TensorRT and a GPU, both stand-ins; tests copy its engines before they change them."""

    def __init__(self, stand_in: StandIn, folder: Path, kept: dict[Any, Path]) -> None:
        self.stand_in = stand_in
        self._folder = folder
        self._kept = kept

    def engine(self, bundle: Path, *options: str, graph: Path | None = None, **behaviour: Any) -> Path:
        """An engine of a bundle, which computes what the graph of `graph` says, or else of the bundle."""
        self.stand_in.behave(graph=str((graph or bundle) / "model.onnx"), **behaviour)
        key = (bundle, options)
        if key not in self._kept:
            target = self._folder / str(len(self._kept))
            result = run_command("build", bundle, "-o", target, "--runtime", "tensorrt", *options)
            assert result.exit_code == 0, result.stderr
            self._kept[key] = target
        return self._kept[key]

    def copied(self, target: Path, bundle: Path, /, **fields: Any) -> Path:
        """A copy of the engine of a bundle, with some fields of its manifest replaced."""
        shutil.copytree(self.engine(bundle), target)
        document = json.loads((target / "engine.json").read_text(encoding="utf-8"))
        (target / "engine.json").write_text(json.dumps({**document, **fields}), encoding="utf-8")
        return target


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Any, Path]]:
    """Engines that were built."""
    return tmp_path_factory.mktemp("engines"), {}


@pytest.fixture
def machine(
    stand_in: StandIn, kept: tuple[Path, dict[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Machine]:
    monkeypatch.setattr(driver, "LIBRARY", str(build_stand_in() / "libcuda.so.1"))
    driver._library.cache_clear()
    plugins: Any = sys.modules["tensorrt"]._PYTHON_PLUGINS
    monkeypatch.setitem(sys.modules, plugins.__name__, plugins)
    yield Machine(stand_in, *kept)
    driver._library.cache_clear()


@pytest.fixture
def bundle(exported: Exported) -> Path:
    return exported(RING)[0]


def parity(bundle: Path, engine: Path, *options: object, runtime: str = "tensorrt") -> Result:
    return run_command("parity", bundle, "--runtime", runtime, "--engine", engine, *options)


def generate(bundle: Path, engine: Path, *options: object) -> Result:
    arguments = ("--prompt-ids", "1,2,3", "--runtime", "tensorrt", "--engine", engine)
    return run_command("generate", bundle, *arguments, *options)


def assert_refused(result: Result, exit_code: int, *messages: str) -> None:
    assert result.exit_code == exit_code, result.stderr
    assert result.stdout == ""
    for message in messages:
        assert message in result.stderr


def test_an_engine_computes_what_the_reference_does_in_every_case(machine: Machine, bundle: Path) -> None:
    result = parity(bundle, machine.engine(bundle), "--json")
    assert result.exit_code == 0, result.stderr
    checks = json.loads(result.stdout)["checks"]
    assert {check["runtime"] for check in checks} == {"tensorrt"}
    assert [check["case"] for check in checks if check["output"] == "logits"] == [
        "prefill 1x1",
        "prefill 1x17",
        "prefill 3x9",
        "decode 3x1, past 9",
        "chunk 3x4, past 9",
        "left-padded 3x8",
        "decode after padding",
    ]
    assert {check["status"] for check in checks} == {"pass"}
    # Steps of one token go to the profile decode, number 1; each change is told once.
    assert machine.stand_in.calls("set_optimization_profile_async") == [[1], [0], [1], [0], [1]]
    assert machine.stand_in.order().count("deserialize_cuda_engine") == 1


@pytest.mark.parametrize(
    ("case", "options", "dtype"),
    [
        ("v2_per_rank", ("--dtype", "bf16", "--target", "gpu"), ml_dtypes.bfloat16),
        (RING, ("--dtype", "fp16"), np.float16),
    ],
)
def test_caches_and_outputs_are_rounded_to_the_dtype_of_the_graph(
    case: str, options: tuple[str, ...], dtype: Any, machine: Machine, exported: Exported
) -> None:
    def rounded(array: Any) -> Any:
        return array.astype(dtype).astype(np.float32)

    opened, whole = Bundle(exported(case, *options)[0]), Bundle(exported(case)[0])
    # It computes in fp32: what it is given and what it gives are all that is rounded.
    runtime = open_runtime("tensorrt", opened, engine=EngineChoice(machine.engine(opened.path, graph=whole.path)))
    stock = open_runtime("onnxruntime", whole)
    past = empty_cache(whole.config, 2)
    for length, sequence in ((0, 3), (3, 1), (4, 2)):
        ids = np.arange(2 * sequence, dtype=np.int64).reshape(2, sequence)
        mask = np.ones((2, length + sequence), dtype=np.int64)
        found = runtime.run(StepInput(ids, mask, past))
        expected = stock.run(StepInput(ids, mask, [(rounded(keys), rounded(values)) for keys, values in past]))
        np.testing.assert_array_equal(found.logits, expected.logits)  # in fp32 always
        for ours, theirs in zip(found.present, expected.present, strict=True):
            np.testing.assert_array_equal(ours, rounded(np.stack(theirs)))
        assert found.logits.dtype == found.present[0][0].dtype == np.float32
        past = expected.present


@pytest.mark.parametrize("output", ["logits", "present.1.key"])
def test_a_wrong_output_fails_and_says_what_cannot_be_told(output: str, machine: Machine, bundle: Path) -> None:
    result = parity(bundle, machine.engine(bundle, spoil={output: 0.01}), "--json")
    assert result.exit_code == 1
    failed = [check for check in json.loads(result.stdout)["checks"] if check["status"] != "pass"]
    assert {check["output"] for check in failed} == {output.partition(".")[0]}
    assert {check["status"] for check in failed} == {"fail"}
    assert all("tensorrt does not show the rows that it retrieved" in check["note"] for check in failed)


def test_it_generates_what_onnx_runtime_does(machine: Machine, bundle: Path) -> None:
    arguments = ("--max-new-tokens", "5", "--ignore-eos")
    stock = run_command("generate", bundle, "--prompt-ids", "1,2,3", *arguments)
    result = generate(bundle, machine.engine(bundle), *arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == stock.stdout
    assert len(result.stdout.split(",")) == 5
    assert machine.stand_in.calls("set_optimization_profile_async") == [[1]]


def test_another_runtime_is_checked_beside_it(machine: Machine, bundle: Path) -> None:
    result = parity(bundle, machine.engine(bundle), "--runtime", "onnxruntime", "--json")
    assert {check["runtime"] for check in json.loads(result.stdout)["checks"]} == {"tensorrt", "onnxruntime"}


def test_a_runtime_that_is_named_twice_runs_once(machine: Machine, bundle: Path, tmp_path: Path) -> None:
    jit = machine.copied(tmp_path / "jit", bundle, plugins="jit")
    registered = len(machine.stand_in.calls("register_plugins"))
    result = parity(bundle, jit, "--runtime", "tensorrt", "--json")
    assert result.exit_code == 0, result.stderr
    assert len(machine.stand_in.calls("register_plugins")) == registered + 1
    cases = [check["case"] for check in json.loads(result.stdout)["checks"] if check["output"] == "logits"]
    assert len(cases) == len(set(cases))


def test_tensorrt_rtx_runs_its_engines_by_the_same_calls(
    machine: Machine, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", sys.modules["tensorrt"])
    engine = machine.copied(tmp_path / "rtx", bundle, runtime="tensorrt-rtx", plugins="none")
    result = parity(bundle, engine, "--json", runtime="tensorrt-rtx")
    assert result.exit_code == 0, result.stderr
    assert {check["runtime"] for check in json.loads(result.stdout)["checks"]} == {"tensorrt-rtx"}
    assert_refused(generate(bundle, engine), 2, "the engine is of 'tensorrt-rtx'")


def test_memory_of_a_step_is_freed_with_it_and_the_rest_at_the_end(
    machine: Machine, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    call = driver._call

    def record(name: str, *arguments: object) -> None:
        calls.append(name)
        call(name, *arguments)

    monkeypatch.setattr(driver, "_call", record)
    opened = Bundle(bundle)
    runtime = open_runtime("tensorrt", opened, engine=EngineChoice(machine.engine(bundle)))
    step = StepInput(np.array([[1, 2]], dtype=np.int64), np.ones((1, 2), dtype=np.int64), empty_cache(opened.config, 1))
    for steps in (1, 2):
        runtime.run(step)
        tensors = 3 + 4 * opened.config.num_layers
        assert calls.count("cuMemAlloc_v2") == calls.count("cuMemFree_v2") == steps * tensors
    assert "cuDevicePrimaryCtxRelease_v2" not in calls
    del runtime
    assert calls[-2:] == ["cuStreamDestroy_v2", "cuDevicePrimaryCtxRelease_v2"]


def test_bf16_is_rounded_to_the_nearest_and_comes_back() -> None:
    # Two ties, which go to the even neighbour.
    array = np.array([[1.0, 1.00390625, 1.01171875], [-3e38, np.inf, 0.1]], dtype=np.float32)
    for given in (array, array[:, :0], np.asfortranarray(array)):
        result = tensorrt._array(tensorrt._bytes(given, "bfloat16"), "bfloat16", given.shape)
        np.testing.assert_array_equal(result, given.astype(ml_dtypes.bfloat16).astype(np.float32))
        assert result.dtype == np.float32


def test_shapes_outside_all_profiles_are_named_with_the_ranges(machine: Machine, bundle: Path) -> None:
    engine = machine.engine(bundle, "--max-shapes", "input_ids:2x8")
    assert generate(bundle, engine, "--max-new-tokens", "1").exit_code == 0
    result = run_command(
        "generate", bundle, "--prompt-ids", ",".join("1" * 9), "--runtime", "tensorrt", "--engine", engine
    )
    assert_refused(
        result,
        2,
        "no profile of the engine holds input_ids 1x9 with attention_mask 1x9",
        "prefill takes input_ids 1x1 to 2x8, not 1x9",
        "decode takes input_ids 1x1 to 2x1, not 1x9",
        "--max-shapes",
    )


def test_an_engine_needs_a_runtime_and_a_runtime_an_engine(bundle: Path, tmp_path: Path) -> None:
    for command in (("parity", bundle), ("generate", bundle, "--prompt-ids", "1")):
        for runtime in names.BUILD_RUNTIMES:
            assert_refused(
                run_command(*command, "--runtime", runtime), 2, f"the runtime {runtime} runs an engine", "--engine"
            )
        assert_refused(run_command(*command, "--engine", tmp_path), 2, "--engine without a runtime that runs it")
        assert_refused(run_command(*command, "--trust-engine"), 2, "--trust-engine without an engine")
        assert_refused(run_command(*command, "--plugin-library", tmp_path / "x.so"), 2, "--plugin-library without")
    both = ("--runtime", "tensorrt-rtx", "--engine", tmp_path)
    assert_refused(run_command("parity", bundle, "--runtime", "tensorrt", *both), 2, "no engine in common")


def test_layers_cannot_be_compared(machine: Machine, bundle: Path) -> None:
    result = parity(bundle, machine.engine(bundle), "--layerwise")
    assert_refused(result, 2, "--layerwise", "an engine puts out logits and cache only", "--runtime onnxruntime")
    assert machine.stand_in.calls("Runtime") == []


def test_preloading_is_refused(machine: Machine, bundle: Path) -> None:
    assert_refused(generate(bundle, machine.engine(bundle), "--preload"), 2, "copies its engine to the GPU")


@pytest.mark.parametrize("runtime", names.BUILD_RUNTIMES)
def test_benchmarks_are_of_processors(runtime: str, bundle: Path) -> None:
    assert_refused(run_command("bench", bundle, "--runtime", runtime), 5, "bench times processors")


@pytest.mark.parametrize(
    ("fields", "exit_code", "named"),
    [
        ({"runtime": "tensorrt-rtx"}, 2, "the engine is of 'tensorrt-rtx', and tensorrt was asked for"),
        ({"weights": "stripped"}, 3, "umv2-export refit"),
        ({"bundle": "0" * 64}, 3, "the engine has the weights of a bundle whose manifest has sha256 '000"),
        ({"runtime_version": "10.12.0.36"}, 4, "built by version 10.12.0.36, 10.13.0.35 is installed"),
        ({"compute_capabilities": ["9.0", "8.0"]}, 4, "has compute capability 8.9, the engine is for 9.0, 8.0"),
        ({"plugins": "library"}, 2, "name it by --plugin-library"),
        ({"sha256": "0" * 64}, 3, "pass --trust-engine"),
        ({"profiles": "none"}, 3, "field 'profiles' is missing or malformed"),
    ],
)
def test_an_engine_that_cannot_be_run_here_is_named_before_it_is_loaded(
    fields: dict[str, Any], exit_code: int, named: str, machine: Machine, bundle: Path, tmp_path: Path
) -> None:
    engine = machine.copied(tmp_path / "engine", bundle, **fields)
    for result in (generate(bundle, engine), parity(bundle, engine)):
        assert_refused(result, exit_code, named)
    assert machine.stand_in.calls("Runtime") == []


def test_a_version_compatible_and_a_hardware_compatible_engine_run_elsewhere(
    machine: Machine, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"version_compatible": True, "hardware_compatible": True, "compute_capabilities": ["8.0"]}
    engine = machine.copied(tmp_path / "engine", bundle, runtime_version="10.12.0.36", plugins="library", **fields)
    assert generate(bundle, engine, "--max-new-tokens", "1").exit_code == 0
    # It brings code of the host, and its plugin library.
    assert machine.stand_in.calls("deserialize_cuda_engine") == [["whole engine", True]]
    monkeypatch.setattr(driver, "compute_capability", lambda: "7.5")
    assert_refused(generate(bundle, engine), 4, "has compute capability 7.5")


def test_an_engine_that_was_changed_runs_only_if_the_user_vouches_for_it(
    machine: Machine, bundle: Path, tmp_path: Path
) -> None:
    engine = machine.copied(tmp_path / "engine", bundle)
    file = engine / "model.engine"
    file.write_bytes(file.read_bytes().replace(b"whole engine", b"whole engima"))
    assert_refused(generate(bundle, engine), 3, "not trusted", "--trust-engine")
    assert machine.stand_in.calls("Runtime") == []
    assert generate(bundle, engine, "--trust-engine", "--max-new-tokens", "1").exit_code == 0
    file.write_bytes(b"another thing")
    result = generate(bundle, engine, "--trust-engine")
    assert_refused(result, 3, "TensorRT cannot load the engine", str(engine), "why: this is no engine")
    (engine / "engine.json").unlink()
    assert_refused(generate(bundle, engine, "--trust-engine"), 3, "not trusted", "engine.json is missing")


def test_an_engine_that_is_replaced_after_its_check_is_not_loaded(
    machine: Machine, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = machine.copied(tmp_path / "engine", bundle)
    content = (engine / "model.engine").read_bytes()

    def replace(backend: object, manifest: object, card: str) -> None:
        (engine / "model.engine").write_bytes(content.replace(b"whole engine", b"whole engima"))

    monkeypatch.setattr(TensorRt, "check_card", replace)
    assert_refused(generate(bundle, engine), 3, "the engine was changed since it was checked")
    assert machine.stand_in.calls("Runtime") == []
    assert generate(bundle, engine, "--trust-engine", "--max-new-tokens", "1").exit_code == 0


def test_an_engine_goes_before_the_device(machine: Machine, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[str] = []
    module: Any = sys.modules["tensorrt"]

    class Context(module.IExecutionContext):  # type: ignore[misc]
        def __del__(self) -> None:
            gone.append("context")

    class Engine(module.ICudaEngine):  # type: ignore[misc]
        def __del__(self) -> None:
            gone.append("engine")

    free = driver.Device._free

    def freed(device: driver.Device) -> None:
        gone.append("device")
        free(device)

    engine = machine.engine(bundle)
    monkeypatch.setattr(module, "IExecutionContext", Context)
    monkeypatch.setattr(module, "ICudaEngine", Engine)
    monkeypatch.setattr(driver.Device, "_free", freed)
    runtime = open_runtime("tensorrt", Bundle(bundle), engine=EngineChoice(engine))
    assert gone == []
    del runtime
    assert gone == ["context", "engine", "device"]


def test_a_trusted_engine_of_another_model_is_refused(
    machine: Machine, bundle: Path, exported: Exported, tmp_path: Path
) -> None:
    half = machine.engine(exported(RING, "--dtype", "fp16")[0])
    engine = machine.copied(tmp_path / "engine", bundle)
    shutil.copy(half / "model.engine", engine / "model.engine")
    result = generate(bundle, engine, "--trust-engine")
    assert_refused(result, 3, "the graph, not the engine, has the input 'past_key_values.0.key' of float", "again")


def test_a_refitted_engine_runs(machine: Machine, bundle: Path, tmp_path: Path) -> None:
    stripped = machine.engine(bundle, "--strip-weights")
    assert_refused(generate(bundle, stripped), 3, "the engine has no weights", "umv2-export refit")
    assert run_command("refit", stripped, bundle, "-o", tmp_path / "whole").exit_code == 0
    assert generate(bundle, tmp_path / "whole", "--max-new-tokens", "1").exit_code == 0


def test_plugins_are_there_before_the_engine_is_loaded(
    machine: Machine, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def order() -> Sequence[str]:
        return machine.stand_in.order()[-4:]

    jit = machine.copied(tmp_path / "jit", bundle, plugins="jit")
    assert generate(bundle, jit, "--max-new-tokens", "1").exit_code == 0
    assert order() == ["register_plugins", "Runtime", "deserialize_cuda_engine", "create_execution_context"]
    [[files, allow_jit, _]] = machine.stand_in.calls("register_plugins")[-1:]
    assert (files, allow_jit) == (["kernels.json"], True)
    library = tmp_path / "plugins.so"
    needing = machine.copied(tmp_path / "needing", bundle, plugins="library")
    assert_refused(generate(bundle, needing, "--plugin-library", library), 3, "the plugin library is missing")
    library.write_bytes(b"code")
    assert generate(bundle, needing, "--plugin-library", library, "--max-new-tokens", "1").exit_code == 0
    assert order() == ["load_library", "Runtime", "deserialize_cuda_engine", "create_execution_context"]
    machine.engine(bundle, refuse_library=True)
    refused = generate(bundle, needing, "--plugin-library", library)
    assert_refused(refused, 4, "the plugin library cannot be loaded", str(library))
    aot = machine.engine(bundle)
    assert_refused(generate(bundle, aot, "--plugin-library", library), 2, "the engine needs no plugin library")


@pytest.mark.parametrize(
    ("behaviour", "exit_code", "messages"),
    [
        ({"no_memory": True}, 4, ("TensorRT cannot prepare to run the engine", "why: out of memory")),
        ({"refuse_shapes": True}, 3, ("TensorRT refuses 'input_ids' of shape 1x3", "is out of bounds")),
        ({"refuse_addresses": True}, 3, ("TensorRT refuses memory for 'input_ids'",)),
        (
            {"refuse_execution": True},
            3,
            ("TensorRT cannot run the engine", "why: it did not work", "TensorRT: it will not work"),
        ),
    ],
)
def test_what_the_library_refuses_is_told_in_its_words(
    behaviour: dict[str, Any], exit_code: int, messages: tuple[str, ...], machine: Machine, bundle: Path
) -> None:
    assert_refused(generate(bundle, machine.engine(bundle, **behaviour)), exit_code, *messages)


def test_the_log_of_the_library_does_not_mix_with_results(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    log = tensorrt._log_of(rtx, "TensorRT-RTX")
    (tmp_path / "model.engine").write_bytes(b"this is no engine" * 100)
    with pytest.raises(BuildFailed):
        load_engine(
            rtx,
            log,
            tmp_path / "model.engine",
            sha256=None,
            version=rtx.__version__,
            version_compatible=False,
            plugins=None,
        )
    assert any("deserializeCudaEngine" in line for line in log.errors)
    log.log(rtx.ILogger.WARNING, "a warning")
    log.log(rtx.ILogger.INFO, "a fact")
    assert capfd.readouterr() == ("", "TensorRT-RTX: a warning\n")


def test_without_the_library_or_a_gpu_the_machine_is_unfit(
    machine: Machine, bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = machine.engine(bundle)
    rtx = machine.copied(tmp_path / "rtx", bundle, runtime="tensorrt-rtx", plugins="none")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert_refused(generate(bundle, engine), 4, "TensorRT is not installed", "pip install tensorrt-cu13")
    monkeypatch.setattr(TensorRtRtx, "require", lambda _: None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert_refused(parity(bundle, rtx, runtime="tensorrt-rtx"), 4, "TensorRT-RTX does not load")
    monkeypatch.undo()
    monkeypatch.setattr(driver, "LIBRARY", "libno-such-driver.so.1")
    driver._library.cache_clear()
    assert_refused(generate(bundle, engine), 4, "there is no CUDA driver")


def test_env_lists_the_runtimes_where_they_can_be_used(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def runtimes() -> dict[str, bool]:
        found: dict[str, bool] = json.loads(run_command("env", "--json").stdout)["runtimes"]
        return {name: found[name] for name in names.BUILD_RUNTIMES}

    monkeypatch.setitem(sys.modules, "tensorrt_rtx", sys.modules["tensorrt"])
    assert runtimes() == {"tensorrt": True, "tensorrt-rtx": True}
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert runtimes() == {"tensorrt": False, "tensorrt-rtx": True}
    monkeypatch.setattr(driver, "LIBRARY", "libno-such-driver.so.1")
    driver._library.cache_clear()
    assert runtimes() == {"tensorrt": False, "tensorrt-rtx": False}
