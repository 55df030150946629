"""The bytes that a lookup reads from the memory of the card, counted by the card and by us.

    python -m benchmarks.dram 64

runs one lookup of 64 tokens and nothing else, for `ncu` to look at; `count` starts that under ncu and compares.
"""

import csv
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.peers import our_lookup, random_lookup
from umv2_export.errors import CheckFailed

__all__ = ["Count", "count", "expected_bytes"]

METRIC = "dram__bytes_read.sum"

# 16 GB of bf16: an L2 cache of 50 MB holds none of the rows.
ROWS, WIDTH = 2**23, 1024


@dataclass(frozen=True)
class Count:
    """Bytes read in one lookup.

    Attributes:
        tokens: of the call.
        measured: by the card.
        expected: distinct rows, indices and scores.
    """

    tokens: int
    measured: int
    expected: int


def expected_bytes(indices: torch.Tensor, scores: torch.Tensor, row_bytes: int) -> int:
    """Each distinct row once, and the other inputs."""
    return len(indices.unique()) * row_bytes + indices.nbytes + scores.nbytes


def count(tokens: int) -> Count:
    """Run a lookup under ncu.

    Raises:
        CheckFailed: ncu failed, as it does where the driver keeps its counters from users.
    """
    probe = [sys.executable, "-m", "benchmarks.dram", str(tokens)]
    options = ["--csv", "--print-units", "base", "--metrics", METRIC, "--kernel-name", "regex:memory_lookup"]
    done = subprocess.run(["ncu", *options, *probe], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CheckFailed("ncu failed", why=(done.stderr or done.stdout).strip()[-400:])
    lines = done.stdout.splitlines()
    expected = [line.split()[1] for line in lines if line.startswith("expected ")]
    if len(expected) != 1:
        raise CheckFailed("the lookup under ncu did not say what it reads", why=done.stdout.strip()[-400:])
    return Count(tokens, bytes_read(lines), int(expected[0]))


def bytes_read(lines: Sequence[str]) -> int:
    """The metric in ncu's table, which follows what the program printed; of a lookup in splits, of both kernels."""
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    values = [row["Metric Value"] for row in csv.DictReader(lines[start:]) if row["Metric Name"] == METRIC]
    if not 1 <= len(values) <= 2:
        raise CheckFailed(f"ncu names {METRIC} {len(values)} times, where one lookup was run")
    return round(sum(float(value.replace(",", "")) for value in values))


def main(tokens: int) -> None:
    """One lookup on the GPU; prints the bytes that it must read."""
    table = torch.empty(ROWS, WIDTH, dtype=torch.bfloat16, device="cuda").normal_()
    scores, indices = random_lookup(table, tokens)
    our_lookup(table, scores, indices)()
    torch.cuda.synchronize()
    print("expected", expected_bytes(indices, scores, WIDTH * table.dtype.itemsize))


if __name__ == "__main__":
    main(int(sys.argv[1]))
