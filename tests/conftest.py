"""Bundles that several tests look at: an export takes about 15 s, so each is made once."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from tests.command import run_command
from tests.golden import GOLDEN_CASES, TRAINED_CASES

# A run in the background of a script ignores interrupts; the tests send some, and their children would inherit it.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

# Without a GPU, the GPU kernels run in Triton's interpreter, which Triton decides when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples in every run: a near tie in fp32 that a float64 oracle decides otherwise is found here, not in CI.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# The authors' cases, a model of experts, and one that was trained on text.
CHECKPOINTS = {case.name: case for case in (*GOLDEN_CASES, *TRAINED_CASES)}
CHECKPOINTS["umv2"] = Path(__file__).parents[1] / "samples" / "checkpoints" / "umv2"
CHECKPOINTS["olmoe"] = Path(__file__).parent / "data" / "olmoe" / "plain"


class Exports:
    """Exports checkpoints on demand, one folder per case and options, which all processes of a test run share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def __call__(self, name: str, *options: str) -> tuple[Path, dict[str, Any]]:
        """The bundle of a case, and the JSON that `onnx` printed."""
        output = self._folder / "-".join(part.strip("-") for part in (name, *options))
        record = output.with_name(f"{output.name}.json")
        with FileLock(f"{output}.lock"):
            if not record.is_file():
                result = run_command("onnx", CHECKPOINTS[name], "-o", output, *options, "--json")
                assert result.exit_code == 0, result.stderr
                record.write_text(result.stdout, encoding="utf-8")
        return output, json.loads(record.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Function (name of a case, *options) -> (bundle, JSON of the export)."""
    folder = tmp_path_factory.getbasetemp()
    # Each process of a run in parallel has a folder of its own below that of the run.
    return Exports((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "exports")
