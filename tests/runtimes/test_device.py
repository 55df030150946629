"""`--device`: where PyTorch computes. What needs a GPU runs where there is one."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.command import run_command
from tests.golden import GOLDEN_CASES
from umv2_export.bundle import Bundle
from umv2_export.checkpoint import open_checkpoint
from umv2_export.errors import EnvironmentUnfit
from umv2_export.model import reference_model
from umv2_export.parity.parts import routing_of
from umv2_export.runtimes import StepInput, empty_cache
from umv2_export.runtimes import device as runtimes_device
from umv2_export.runtimes.torch import TorchRuntime

Exported = Callable[..., tuple[Path, dict[str, Any]]]

GOLDEN = {case.name: case for case in GOLDEN_CASES}
RING = GOLDEN["v2_shared_ring"]
OLMOE = Path(__file__).parents[1] / "data" / "olmoe" / "plain"

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch sees")


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of which 1000 bytes are free."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))


def commands(bundle: Path) -> Iterator[tuple[object, ...]]:
    yield "parity", bundle, "--device", "cuda"
    yield "parity", bundle, "--reference", RING, "--runtime", "torch", "--device", "cuda"
    yield "generate", bundle, "--prompt-ids", "1", "--runtime", "torch", "--device", "cuda"


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize(("cuda", "why"), [(None, "is a build for CPUs"), ("13.0", "driver is too old for CUDA 13.0")])
def test_without_a_gpu_it_is_exit_code_4_and_what_to_do(
    cuda: str | None, why: str, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    for arguments in commands(exported("v2_shared_ring")[0]):
        result = run_command(*arguments, "--json")
        error = json.loads(result.stdout)["error"]
        assert result.exit_code == error["exit_code"] == 4, result.stderr
        assert error["where"] == "--device cuda"
        assert why in error["why"]
        assert "leave out --device" in error["fix"]


@pytest.mark.usefixtures("without_gpu")
def test_the_lack_of_a_gpu_is_noticed_before_stored_tensors_are_compared(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("umv2_export.parity.run.compare_stored", lambda *_, **__: pytest.fail("long work was begun"))
    arguments = ("parity", exported("v2_shared_ring")[0], "--reference", RING, "--device", "cuda")
    assert run_command(*arguments).exit_code == 4


@pytest.mark.usefixtures("small_gpu")
def test_a_model_that_does_not_fit_the_gpu_is_exit_code_4_with_both_sizes(exported: Exported) -> None:
    for arguments in commands(exported("v2_shared_ring")[0]):
        result = run_command(*arguments)
        assert result.exit_code == 4, result.stderr
        assert "the GPU has too little memory" in result.stderr
        assert "0.000 GB are free" in result.stderr


@pytest.mark.usefixtures("small_gpu")
def test_without_a_compiler_of_kernels_memory_layers_are_refused_and_experts_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_triton() -> None:
        raise EnvironmentUnfit("no triton")

    monkeypatch.setattr(runtimes_device, "require_triton", no_triton)
    with pytest.raises(EnvironmentUnfit, match="no triton"):
        runtimes_device.require_device("cuda", open_checkpoint(RING).config)
    runtimes_device.require_device("cuda", open_checkpoint(OLMOE).config)


def test_memory_that_runs_out_in_a_forward_is_not_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = TorchRuntime(reference_model(open_checkpoint(RING)))

    def exhausted(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runtime.model, "forward", exhausted)
    with pytest.raises(EnvironmentUnfit, match="too little memory"):
        runtime.run(step(runtime))


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime-native"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_device_is_refused_where_pytorch_does_not_compute(runtime: str, device: str, exported: Exported) -> None:
    bundle, _ = exported("v2_shared_ring")
    result = run_command("generate", bundle, "--prompt-ids", "1", "--runtime", runtime, "--device", device)
    assert result.exit_code == 2
    assert "--device has no effect here" in result.stderr


@pytest.mark.parametrize("checkpoint", [*GOLDEN_CASES, OLMOE], ids=lambda path: path.name)
def test_all_that_the_reference_makes_lies_on_its_device(checkpoint: Path) -> None:
    """On the meta device, which computes nothing and refuses to mix with the CPU as a GPU does."""
    runtime = TorchRuntime(reference_model(open_checkpoint(checkpoint)), device="meta")
    assert runtime._forward(step(runtime), None).logits.device.type == "meta"


@pytest.mark.parametrize("name", ["v2_shared_ring", "olmoe"])
def test_all_that_the_folded_model_makes_lies_on_its_device(name: str, exported: Exported) -> None:
    runtime = TorchRuntime.from_bundle(Bundle(exported(name)[0]), "meta")
    assert runtime._forward(step(runtime), None).logits.device.type == "meta"


def test_routers_on_another_device_part_equal_logits(exported: Exported) -> None:
    """Parity reads the weights of routers on the host, wherever the model is."""
    runtime = TorchRuntime.from_bundle(Bundle(exported("olmoe")[0]))
    probes = runtime.run(step(runtime), probe=True).probes
    decoder: Any = runtime.model.transformer
    weights = [block.router.weight for block in decoder.blocks]
    # Such a weight has no numpy() before its cpu().
    blocks = [SimpleNamespace(router=SimpleNamespace(weight=SimpleNamespace(cpu=weight.cpu))) for weight in weights]
    model: Any = SimpleNamespace(config=runtime.model.config, transformer=SimpleNamespace(blocks=blocks))
    elsewhere: Any = SimpleNamespace(model=model)
    expected, found = (routing_of(reference, probes, unrounded=True)[1] for reference in (runtime, elsewhere))
    assert expected.keys() == found.keys()
    assert all((expected[name] == found[name]).all() for name in expected)


@needs_gpu
@pytest.mark.parametrize("options", [(), ("--dtype", "fp16")])
def test_the_reference_on_a_gpu_passes_parity(options: tuple[str, ...], exported: Exported) -> None:
    bundle, _ = exported("v2_shared_ring", *options)
    runtimes = ("--runtime", "onnxruntime", "--runtime", "torch")
    result = run_command("parity", bundle, "--reference", RING, *runtimes, "--device", "cuda")
    assert result.exit_code == 0, result.stdout


@needs_gpu
@pytest.mark.parametrize("name", ["v2_shared_ring", "olmoe"])
def test_a_gpu_generates_the_same_tokens(name: str, exported: Exported) -> None:
    arguments = ("generate", exported(name)[0], "--prompt-ids", "5,6,7", "--runtime", "torch", "--ignore-eos", "--json")
    results = [json.loads(run_command(*arguments, "--device", device).stdout) for device in ("cpu", "cuda")]
    assert results[0]["token_ids"] == results[1]["token_ids"]


def step(runtime: TorchRuntime) -> StepInput:
    """Two sequences, one of them padded."""
    config = runtime.model.config
    mask = np.array([[1, 1, 1], [0, 1, 1]], dtype=np.int64)
    return StepInput(np.ones((2, 3), dtype=np.int64), mask, empty_cache(config, 2))
