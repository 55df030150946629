"""Releases of ONNX Runtime from the oldest that is allowed to the installed one: right, or refused with exit 4.

`make test` tries three of them, `make test-runtimes` those that UMV2_ONNXRUNTIMES names.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from packaging.version import Version

from tests.command import Result
from tests.onnx.cases import case_of
from tests.runtimes.onnxruntimes import commands_under

Exported = Callable[..., tuple[Path, dict[str, Any]]]

# The oldest; the last for Python 3.10, with the kernel for experts that overwrites what it reads; the suite's own.
VERSIONS = os.environ.get("UMV2_ONNXRUNTIMES", "1.20.0,1.23.2,installed").split(",")

STOCK, NATIVE = "onnxruntime", "onnxruntime-native"

# Bundle: arguments of its export, runtimes, and the oldest release that runs `parity` on it. In fp16 rows change
# places, and parity looks at inner values.
BUNDLES = {
    "memory": (("v2_shared_ring",), (STOCK, NATIVE), "1.20.0"),
    "memory of groups": (("v1_skip_layer",), (STOCK, NATIVE), "1.20.0"),
    "memory, inlined": (("v2_shared_ring", "--inline-functions", "--shard-size", "30KB"), (STOCK,), "1.20.0"),
    "memory, fp16": (("v2_shared_ring", "--dtype", "fp16", "--table-dtype", "bf16"), (STOCK, NATIVE), "1.21.0"),
    "memory, opset 23": (("v2_per_rank", "--table-dtype", "bf16", "--opset", "23"), (STOCK, NATIVE), "1.23.0"),
    "memory, static cache": (("v2_shared_ring", "--cache", "static"), (STOCK, NATIVE), "1.22.0"),
    "experts": (("olmoe",), (STOCK,), "1.20.0"),
    "experts, contrib": (("olmoe", "--moe-form", "contrib"), (STOCK,), "1.23.1"),
}
CALLS = [(name, runtime) for name, (_, runtimes, _) in BUNDLES.items() for runtime in runtimes]

FP32 = [(name, runtime) for name, runtime in CALLS if "fp16" not in name]


class Release:
    """What the commands gave under one release.

    Attributes:
        version: of ONNX Runtime.
        parity, generated: by bundle and runtime.
        preloaded, bench: of the bundle with memory layers.
    """

    def __init__(self, version: str, bundles: dict[str, Path], prompts: dict[str, str]) -> None:
        commands: list[tuple[object, ...]] = []
        for name, runtime in CALLS:
            bundle, prompt = bundles[name], prompts[name]
            commands.append(("parity", bundle, "--runtime", runtime))
            commands.append(
                ("generate", bundle, "--runtime", runtime, "--prompt-ids", prompt, "--max-new-tokens", 8, "--json")
            )
        memory, prompt = bundles["memory"], prompts["memory"]
        commands.append(("generate", memory, "--runtime", NATIVE, "--preload", "--prompt-ids", prompt, "--json"))
        commands.append(("bench", memory, "--batch", "1", "--past", "4", "--prefill", "8", "--iterations", "3"))
        commands.append(("env", "--json"))
        *results, self.preloaded, self.bench, described = commands_under(version, commands)
        self.version = Version(json.loads(described.stdout)["packages"]["onnxruntime"])
        assert version in ("installed", str(self.version))
        self.parity = dict(zip(CALLS, results[0::2], strict=True))
        self.generated = dict(zip(CALLS, results[1::2], strict=True))


@pytest.fixture(scope="module")
def bundles(exported: Exported) -> dict[str, Path]:
    return {name: exported(*arguments)[0] for name, (arguments, _, _) in BUNDLES.items()}


@pytest.fixture(scope="module")
def greedy(bundles: dict[str, Path]) -> dict[str, tuple[str, list[int]]]:
    """Prompt and continuation by the authors' code."""
    found = {}
    for name, bundle in bundles.items():
        case = case_of(BUNDLES[name][0][0], onnx.load(bundle / "model.onnx", load_external_data=False))
        found[name] = (",".join(str(token) for token in case.prompt), case.greedy[:8])
    return found


@pytest.fixture(scope="module", params=VERSIONS)
def release(
    request: pytest.FixtureRequest, bundles: dict[str, Path], greedy: dict[str, tuple[str, list[int]]]
) -> Release:
    return Release(request.param, bundles, {name: prompt for name, (prompt, _) in greedy.items()})


def assert_refused(result: Result, release: Release, minimum: str) -> None:
    assert result.exit_code == 4, result.stderr
    assert f"ONNX Runtime {release.version} is installed, {minimum} or later is needed" in result.stderr
    assert f"pip install --upgrade 'onnxruntime>={minimum}'" in result.stderr


@pytest.mark.parametrize(("name", "runtime"), CALLS, ids=str)
def test_a_bundle_computes_what_its_weights_do_in_torch_or_is_refused(
    name: str, runtime: str, release: Release
) -> None:
    result, minimum = release.parity[name, runtime], BUNDLES[name][2]
    if release.version < Version(minimum):
        assert_refused(result, release, minimum)
    else:
        assert result.exit_code == 0, result.stdout + result.stderr


@pytest.mark.parametrize(("name", "runtime"), FP32, ids=str)
def test_a_bundle_generates_the_authors_tokens_or_is_refused(
    name: str, runtime: str, release: Release, greedy: dict[str, tuple[str, list[int]]]
) -> None:
    result, minimum = release.generated[name, runtime], BUNDLES[name][2]
    if release.version < Version(minimum):
        assert_refused(result, release, minimum)
    else:
        assert result.exit_code == 0, result.stderr
        tokens = json.loads(result.stdout)["token_ids"]
        assert tokens
        assert tokens == greedy[name][1][: len(tokens)]


def test_preloaded_tables_serve_every_release(release: Release, greedy: dict[str, tuple[str, list[int]]]) -> None:
    assert release.preloaded.exit_code == 0, release.preloaded.stderr
    assert json.loads(release.preloaded.stdout)["token_ids"][:8] == greedy["memory"][1]


def test_a_benchmark_runs_where_sessions_can_share_threads(release: Release) -> None:
    if release.version < Version("1.23.0"):
        assert_refused(release.bench, release, "1.23.0")
    else:
        assert release.bench.exit_code == 0, release.bench.stderr
