"""Tables in memory: advice on mapped ones, and preloading."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.command import run_command
from umv2_export.bundle import Bundle
from umv2_export.runtimes import StepInput, empty_cache, open_runtime
from umv2_export.system import host_memory

Exported = Callable[..., tuple[Path, dict[str, Any]]]

PROMPT = np.array([[1, 2, 3]], dtype=np.int64)


def logits(bundle: Bundle, **options: Any) -> Any:
    runtime = open_runtime("onnxruntime-native", bundle, **options)
    return runtime.run(StepInput(PROMPT, np.ones_like(PROMPT), empty_cache(bundle.config, 1))).logits


@pytest.mark.parametrize("arguments", [(), ("--table-dtype", "bf16", "--shard-size", "40KB")])
def test_preloaded_tables_give_the_same_logits(arguments: tuple[str, ...], exported: Exported) -> None:
    bundle = Bundle(exported("v2_shared_ring", *arguments)[0])
    np.testing.assert_array_equal(logits(bundle, preload=True), logits(bundle))


def test_preloaded_tables_are_not_mapped_from_their_files(exported: Exported) -> None:
    bundle = Bundle(exported("v2_shared_ring")[0])
    runtime = open_runtime("onnxruntime-native", bundle, preload=True)
    assert runtime.name == "onnxruntime-native"
    assert str(bundle.path / "rows-") not in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_tables_larger_than_free_memory_are_refused(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("umv2_export.runtimes.onnxruntime.available_bytes", lambda: 1000)
    result = run_command("generate", exported("v2_shared_ring")[0], "--prompt-ids", "1", "--preload")
    assert result.exit_code == 4
    assert "1000 are free" in result.stderr
    assert "leave out --preload" in result.stderr


def test_the_torch_runtime_does_not_preload(exported: Exported) -> None:
    arguments = ("--prompt-ids", "1", "--preload", "--runtime", "torch")
    result = run_command("generate", exported("v2_shared_ring")[0], *arguments)
    assert result.exit_code == 2
    assert "leave out --preload" in result.stderr


def test_the_native_lookup_advises_random_access_on_its_tables(exported: Exported) -> None:
    bundle = Bundle(exported("v2_shared_ring")[0])
    runtime = open_runtime("onnxruntime-native", bundle)
    runtime.run(StepInput(PROMPT, np.ones_like(PROMPT), empty_cache(bundle.config, 1)))
    regions = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(encoding="utf-8"))
    tables = [region for region in regions if str(bundle.path / "rows-") in region]
    # rr: the kernel's mark of MADV_RANDOM.
    assert any(re.search(r"VmFlags:.*\brr\b", region) for region in tables)


def test_free_memory_is_read_from_the_system() -> None:
    available = host_memory.available_bytes()
    assert available is not None
    assert 10**6 < available < 10**15
