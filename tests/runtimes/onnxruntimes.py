"""Other releases of ONNX Runtime, each fetched once into a folder below build/ and laid over the suite's packages."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from filelock import FileLock

from tests.command import Result

__all__ = ["commands_under", "folder_of"]

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "onnxruntime"


def folder_of(version: str) -> Path:
    """Where that release lies; a test that asks for one that cannot be fetched is skipped."""
    name = f"{version}-{sys.implementation.cache_tag}"
    folder = CACHE / name
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f"{name}.lock"):
        if not folder.is_dir():
            partial = CACHE / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            with tempfile.TemporaryDirectory() as wheels:
                fetched = _pip("download", "--no-deps", "--dest", wheels, f"onnxruntime=={version}")
                if fetched.returncode:
                    reason = (fetched.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
                    pytest.skip(f"onnxruntime {version} cannot be fetched: {reason}")
                installed = _pip("install", "--no-deps", "--target", str(partial), *map(str, Path(wheels).iterdir()))
                assert installed.returncode == 0, installed.stderr
            partial.rename(folder)
    return folder


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def commands_under(version: str, commands: Sequence[Sequence[object]]) -> list[Result]:
    """Results of commands of `umv2-export` with that release; `installed` is the suite's own."""
    environment = dict(os.environ)
    if version != "installed":
        environment["PYTHONPATH"] = os.pathsep.join([str(folder_of(version)), environment.get("PYTHONPATH", "")])
    process = subprocess.run(
        [sys.executable, "-m", "tests.runtimes.run_commands"],
        cwd=ROOT,
        env=environment,
        input=json.dumps([[str(argument) for argument in arguments] for arguments in commands]),
        capture_output=True,
        text=True,
        check=True,
    )
    return [Result(*facts) for facts in json.loads(process.stdout.splitlines()[-1])]
