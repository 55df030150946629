"""Static caches in this project's own runtimes and commands."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.command import Result, run_command
from tests.conftest import CHECKPOINTS
from umv2_export.bundle import Bundle
from umv2_export.errors import InvalidRequest, Unsupported
from umv2_export.generation import generate
from umv2_export.runtimes import open_runtime
from umv2_export.runtimes.decoding import open_decoder
from umv2_export.runtimes.onnxruntime import OnnxRuntime

Exported = Callable[..., tuple[Path, dict[str, Any]]]

HERE = Path(__file__).parent
STATIC = ("--cache", "static")
RUNTIMES = ("onnxruntime", "onnxruntime-native")

# A prompt of 17 and 8 new tokens, of which the last is not read.
LENGTHS = (("--cache-length", 24), ("--cache-length", 4096))


@pytest.fixture
def bundle(exported: Exported) -> Path:
    return exported("v2_shared_ring", *STATIC)[0]


def authors() -> dict[str, Any]:
    with np.load(CHECKPOINTS["v2_shared_ring"] / "expected.npz") as arrays:
        return dict(arrays)


def tokens_of(bundle: Path, *options: object) -> list[int]:
    prompt = ",".join(map(str, authors()["input_ids"][0]))
    arguments = ("--prompt-ids", prompt, "--max-new-tokens", 8, "--ignore-eos", "--json")
    result = run_command("generate", bundle, *arguments, *options)
    assert result.exit_code == 0, result.stderr
    tokens: list[int] = json.loads(result.stdout)["token_ids"]
    return tokens


@pytest.mark.parametrize(
    ("runtime", "options"),
    [("torch", ()), *((name, options) for name in RUNTIMES for options in ((), *LENGTHS))],
    ids=str,
)
def test_generate_gives_the_authors_tokens_whatever_the_length(
    runtime: str, options: tuple[object, ...], bundle: Path
) -> None:
    assert tokens_of(bundle, "--runtime", runtime, *options) == authors()["greedy"][0].tolist()


def test_a_batch_of_prompts_of_different_lengths_continues_as_each_does_alone(exported: Exported) -> None:
    prompts = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]
    for options in ((), STATIC):
        opened = Bundle(exported("v2_shared_ring", *options)[0])
        runtime = open_runtime("onnxruntime", opened)
        together = generate(runtime, opened.config, prompts, 6, stop_at_eos=False)
        alone = [generate(runtime, opened.config, [one], 6, stop_at_eos=False).token_ids[0] for one in prompts]
        assert together.token_ids == alone


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_steps_neither_allocate_nor_copy_a_cache(runtime: str, bundle: Path, tmp_path: Path) -> None:
    library = tmp_path / "large_allocations.so"
    source = HERE / "large_allocations.c"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-fno-builtin", "-o", library, source], check=True)
    # A tensor of 2 x 4 x 4096 x 16 floats; nothing else of a step is as large as half of it.
    command = [sys.executable, "-m", "tests.runtimes.count_allocations", str(bundle), runtime, "2", "4096"]
    process = subprocess.run(
        command,
        cwd=HERE.parents[1],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    bound, handed_over = json.loads(process.stdout)
    assert bound == [0, 0]
    # The counters count: a cache that is handed in and out is allocated anew.
    assert handed_over[0] > 0


def refused(result: Result, exit_code: int, *said: str) -> None:
    assert result.exit_code == exit_code, result.stderr
    assert not result.stdout
    for text in said:
        assert text in result.stderr


def test_a_prompt_longer_than_the_cache_is_refused_before_a_session_is_opened(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnnxRuntime, "__init__", lambda *_, **__: pytest.fail("a session was opened"))
    options = ("--max-new-tokens", 3, "--cache-length", 4)
    result = run_command("generate", bundle, "--prompt-ids", "1,2,3", *options)
    refused(result, 2, "take 5 positions, the cache has 4", "--cache-length")


def test_the_last_position_can_be_used(bundle: Path) -> None:
    arguments = ("--prompt-ids", "1,2,3", "--max-new-tokens", 3, "--cache-length", 5, "--ignore-eos", "--json")
    assert len(json.loads(run_command("generate", bundle, *arguments).stdout)["token_ids"]) == 3


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_a_length_without_a_static_cache_is_refused(runtime: str, bundle: Path, exported: Exported) -> None:
    growing = bundle if runtime == "torch" else exported("v2_shared_ring")[0]
    result = run_command("generate", growing, "--prompt-ids", "1", "--cache-length", 9, "--runtime", runtime)
    refused(result, 2, "--cache-length has no effect here", "a cache that grows")


@pytest.mark.parametrize(("batch", "total"), [(3, 4), (1, 4), (2, 9)])
def test_more_sequences_or_positions_than_the_buffers_hold_are_refused(batch: int, total: int, bundle: Path) -> None:
    opened = Bundle(bundle)
    decoder = open_decoder(open_runtime("onnxruntime", opened), opened.config, 2, 8)
    ids = np.ones((batch, total), dtype=np.int64)
    with pytest.raises(InvalidRequest, match=f"{batch} sequences of {total} positions, the cache has 2 of 8"):
        decoder.step(ids, np.ones_like(ids))


def test_a_cache_that_memory_does_not_hold_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("umv2_export.runtimes.static_cache.available_bytes", lambda: 1000)
    refused(run_command("generate", bundle, "--prompt-ids", "1"), 4, "1000 are free")


def test_the_cuda_runtime_refuses_a_static_bundle_before_it_looks_for_a_gpu(bundle: Path) -> None:
    with pytest.raises(Unsupported, match="static cache") as caught:
        open_runtime("onnxruntime-cuda", Bundle(bundle))
    assert caught.value.fix is not None
    assert "--cache growing" in caught.value.fix
