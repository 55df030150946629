"""Compiled kernels launched as TensorRT launches them: on the GPU where there is one, and on the stand-in driver."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from tests.gpu.compiled import CASES, compiled_folder
from tests.gpu.stand_in import stand_in_environment, write_kernels
from umv2_export.gpu.index import read_index

STAND_IN_CAPABILITY = "8.9"


def run_cases(cases: Iterable[str], capability: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    folders = [f"{case}={compiled_folder(case, capability)}" for case in cases]
    command = [sys.executable, "-m", "tests.gpu.launch_compiled", *folders]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_kernels_launched_on_the_stand_in_take_what_the_index_says(tmp_path: Path) -> None:
    folders = [compiled_folder(case, STAND_IN_CAPABILITY) for case in CASES]
    kernels, log = tmp_path / "kernels.txt", tmp_path / "launches.jsonl"
    write_kernels(kernels, folders)
    done = run_cases(CASES, STAND_IN_CAPABILITY, stand_in_environment(kernels=kernels, log=log))
    assert done.returncode == 0, done.stderr
    launches = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(launches) == 2 * (1 + len(CASES))
    arguments = {(kernel.entry, len(kernel.arguments)) for folder in folders for kernel in read_index(folder)}
    assert {(launch["entry"], len(launch["arguments"])) for launch in launches} == arguments


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernels_launched_on_the_gpu_agree_with_the_oracle() -> None:
    major, minor = torch.cuda.get_device_capability()
    done = run_cases(CASES, f"{major}.{minor}", dict(os.environ))
    assert done.returncode == 0, done.stderr


def test_a_pointer_in_the_place_of_another_is_noticed(tmp_path: Path) -> None:
    folder = compiled_folder("query", STAND_IN_CAPABILITY)
    kernels = tmp_path / "kernels.txt"
    write_kernels(kernels, [folder])
    # As if the kernel took a group where the query is passed.
    text = kernels.read_text()
    changed = re.sub(r"(MemoryLookup(?: \d+){6}) 0 1 ", r"\1 1 0 ", text)
    assert changed != text
    kernels.write_text(changed)
    done = run_cases(["query"], STAND_IN_CAPABILITY, stand_in_environment(kernels=kernels))
    assert done.returncode == 1
    assert "Mismatched elements" in done.stderr
