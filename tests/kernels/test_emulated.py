"""The AVX-512 kernels on an emulated processor, for the real one may lack it. Needs bochscpu-python, as CI has it."""

import importlib.util
import json
import subprocess
import sys

import pytest

from tests.kernels.kernel_calls import runnable_targets

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("bochscpu") is None, reason="bochscpu-python is not installed"),
    pytest.mark.skipif("avx2" not in runnable_targets(), reason="the AVX2 kernels are the reference"),
]


@pytest.mark.parametrize("target", ["avx512", "portable"])
def test_emulated_kernels_agree_with_those_that_run_here_and_read_nothing_past_an_array(target: str) -> None:
    command = [sys.executable, "-m", "tests.kernels.run_emulated", target, "120"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["problems"] == []
    assert report["cases"] == 7 * 120
