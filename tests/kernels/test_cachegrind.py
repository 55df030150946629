"""Bytes that the lookup really moves: cache lines under cachegrind against the count that follows from the indices."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.kernel_calls import runnable_targets

CACHE_LINE = 64

pytestmark = [
    pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed"),
    pytest.mark.skipif("avx2" not in runnable_targets(), reason="valgrind runs the AVX2 kernels"),
]


def run_cold(tokens: int, folder: Path) -> tuple[int, int, int]:
    """Lines read from memory in all, unique rows, and bytes of a row."""
    out = folder / f"cachegrind.{tokens}"
    # 128 MiB of last-level cache, more than a run touches: a line is missed once, when it is read first.
    command = [
        "valgrind",
        "--tool=cachegrind",
        "--cache-sim=yes",
        "--LL=134217728,16,64",
        f"--cachegrind-out-file={out}",
    ]
    script = [sys.executable, "-m", "tests.kernels.cold_lookup", str(tokens)]
    root = Path(__file__).parents[2]
    # What python itself reads is then the same in both runs.
    result = subprocess.run(
        [*command, *script],
        cwd=root,
        env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    facts = json.loads(result.stdout)
    text = out.read_text(encoding="utf-8")
    names = re.search(r"^events: (.*)$", text, re.MULTILINE)
    totals = re.search(r"^summary: (.*)$", text, re.MULTILINE)
    assert names is not None
    assert totals is not None
    counts = dict(zip(names[1].split(), map(int, totals[1].split()), strict=True))
    return counts["DLmr"], len(facts["rows"]), facts["row_bytes"]


def test_a_cold_lookup_reads_each_row_that_it_hits_once_and_nothing_else(tmp_path: Path) -> None:
    without, _, _ = run_cold(0, tmp_path)
    cold, rows, row_bytes = run_cold(256, tmp_path)
    expected = rows * row_bytes // CACHE_LINE
    assert rows < 256 * 32, "some rows are hit twice: they must be read once"
    assert cold - without == pytest.approx(expected, rel=0.01)
    print(f"{cold - without} lines read, {expected} counted")
