"""The runtime onnxruntime-cuda, without a GPU: what it asks of ONNX Runtime, and what it refuses."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx.parser
import onnxruntime
import pytest

from tests.command import Result, run_command
from umv2_export import native_library
from umv2_export.gpu import driver
from umv2_export.runtimes import onnxruntime as runtime

Exported = Callable[..., tuple[Path, dict[str, Any]]]

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
RING = "v2_shared_ring"


@dataclass
class Machine:
    """A machine that seems to have a GPU; sessions compute on the CPU, with the ops for it.

    Attributes:
        kernels: file that is found for any bundle.
        provided: what the installed ONNX Runtime offers.
        sessions: providers of the sessions that will be opened, in order; the last is repeated.
        asked: providers that were asked for.
        named: kernels that each session found in its environment.
    """

    kernels: Path
    provided: list[str] = field(default_factory=lambda: [CUDA, CPU])
    sessions: list[list[str]] = field(default_factory=lambda: [[CUDA, CPU]])
    asked: list[Any] = field(default_factory=list)
    named: list[str | None] = field(default_factory=list)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    described = Machine(tmp_path / "kernels.bin")

    class Session(onnxruntime.InferenceSession):  # type: ignore[misc]
        def __init__(self, source: Any, options: Any = None, providers: Sequence[Any] = (), **others: Any) -> None:
            described.asked.append(providers)
            described.named.append(os.environ.get("UMV2_GPU_KERNELS"))
            sessions = described.sessions
            self._reported = sessions.pop(0) if len(sessions) > 1 else sessions[0]
            super().__init__(source, options, providers=[CPU], **others)

        def get_providers(self) -> list[str]:
            return self._reported

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: described.provided)
    monkeypatch.setattr("umv2_export.runtimes.cuda.compute_capability", lambda: "8.9")
    monkeypatch.setattr("umv2_export.gpu.cache.cached_kernels", lambda *_: described.kernels)
    setup = runtime._SETUPS["onnxruntime-cuda"]
    monkeypatch.setitem(runtime._SETUPS, "onnxruntime-cuda", replace(setup, library=native_library))
    monkeypatch.delenv("UMV2_GPU_KERNELS", raising=False)
    return described


def generate(bundle: Path, *options: object) -> Result:
    return run_command("generate", bundle, "--prompt-ids", "1,2", "--runtime", "onnxruntime-cuda", *options)


def assert_refused(result: Result, exit_code: int, *messages: str) -> None:
    assert result.exit_code == exit_code, result.stderr
    assert result.stdout == ""
    for message in messages:
        assert message in result.stderr


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_parity_and_generation_take_the_runtime(dtype: str, machine: Machine, exported: Exported) -> None:
    bundle, _ = exported(RING, *(() if dtype == "fp32" else ("--dtype", dtype)))
    result = run_command("parity", bundle, "--runtime", "onnxruntime-cuda", "--layerwise", "--json")
    assert result.exit_code == 0, result.stderr
    assert {check["runtime"] for check in json.loads(result.stdout)["checks"]} == {"onnxruntime-cuda"}
    arguments = ("--max-new-tokens", "4", "--ignore-eos")
    stock = run_command("generate", bundle, "--prompt-ids", "1,2", "--runtime", "onnxruntime", *arguments)
    assert generate(bundle, *arguments).stdout == stock.stdout


def test_sessions_ask_for_cuda_without_tf32_and_find_the_kernels_of_the_bundle(
    machine: Machine, exported: Exported
) -> None:
    assert generate(exported(RING)[0], "--max-new-tokens", "1").exit_code == 0
    assert machine.asked == [[(CUDA, {"use_tf32": "0"})]] * 2
    # The first session has no op of ours.
    assert machine.named == [None, str(machine.kernels)]
    assert "UMV2_GPU_KERNELS" not in os.environ


def test_kernels_that_the_user_names_come_first(
    machine: Machine, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.bin"
    own.touch()
    monkeypatch.setenv("UMV2_GPU_KERNELS", str(own))
    assert generate(exported(RING)[0], "--max-new-tokens", "1").exit_code == 0
    assert machine.named[-1] == str(own)
    own.unlink()
    assert_refused(generate(exported(RING)[0]), 4, "UMV2_GPU_KERNELS names a file that does not exist", str(own))


def test_a_machine_without_a_driver_is_unfit(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LIBRARY", "libno-such-driver.so.1")
    driver._library.cache_clear()
    assert_refused(generate(exported(RING)[0]), 4, "there is no CUDA driver")
    assert json.loads(run_command("env", "--json").stdout)["runtimes"]["onnxruntime-cuda"] is False


def test_an_onnx_runtime_without_cuda_is_unfit(machine: Machine, exported: Exported) -> None:
    machine.provided, machine.sessions = [CPU], [[CPU]]
    assert_refused(
        generate(exported(RING)[0]), 4, f"has no {CUDA}", f"it has {CPU}", "pip install onnxruntime-gpu", "share one"
    )
    assert json.loads(run_command("env", "--json").stdout)["runtimes"]["onnxruntime-cuda"] is False


@pytest.mark.parametrize("sessions", [[[CPU]], [[CUDA, CPU], [CPU]]], ids=["at first", "for the bundle"])
def test_a_session_that_fell_back_to_the_cpu_is_refused(
    sessions: list[list[str]], machine: Machine, exported: Exported
) -> None:
    machine.sessions = sessions
    assert_refused(generate(exported(RING)[0]), 4, f"could not load its {CUDA}", "CUDA or cuDNN", "onnxruntime-gpu")


def test_env_lists_the_runtime_where_it_can_be_used(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("umv2_export.environment.cuda_library", lambda: "library")
    assert json.loads(run_command("env", "--json").stdout)["runtimes"]["onnxruntime-cuda"] is True


def test_preloading_is_refused(machine: Machine, exported: Exported) -> None:
    assert_refused(generate(exported(RING)[0], "--preload"), 2, "copies its tables to the GPU", "leave out --preload")


def test_inlined_functions_leave_nothing_for_it(machine: Machine, exported: Exported) -> None:
    bundle, _ = exported(RING, "--inline-functions", "--shard-size", "40KB")
    assert_refused(generate(bundle), 5, "no ops for the native ones", "its functions were inlined")


def test_benchmarks_are_of_processors(exported: Exported) -> None:
    result = run_command("bench", exported(RING)[0], "--runtime", "onnxruntime-cuda")
    assert_refused(result, 5, "bench times processors", "onnxruntime-native")


def test_a_bf16_bundle_is_refused_on_the_cpu_alone(machine: Machine, exported: Exported) -> None:
    bundle, _ = exported("v2_per_rank", "--dtype", "bf16", "--target", "gpu")
    native = run_command("generate", bundle, "--prompt-ids", "1", "--runtime", "onnxruntime-native")
    assert_refused(native, 5, "bf16", "use --runtime onnxruntime-cuda")
    # The session is asked for; of this machine, which has no GPU, the ops refuse it.
    assert_refused(generate(bundle), 3, "ONNX Runtime refuses the graph", "bfloat16")
    assert len(machine.asked) == 2


def test_bf16_goes_in_and_comes_out_rounded_to_the_nearest() -> None:
    text = '<ir_version: 8, opset_import: ["": 18]> g (bfloat16[N, M] x) => (bfloat16[N, M] y) { y = Identity (x) }'
    model = onnx.parser.parse_model(text).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=[CPU])
    # Two ties, which go to the even neighbour.
    array = np.array([[1.0, 1.00390625, 1.01171875], [-3e38, np.inf, 0.1]], dtype=np.float32)
    for given in (array, array[:, :0], np.asfortranarray(array)):
        result = runtime._array(session.run_with_ort_values(None, {"x": runtime._value(given, "bfloat16")})[0])
        np.testing.assert_array_equal(result, given.astype(ml_dtypes.bfloat16).astype(np.float32))
        assert result.dtype == np.float32
