"""Runs choose_kernel.cpp: which kernel of an archive the C++ takes for a node."""

import functools
import subprocess
import tempfile
from pathlib import Path

__all__ = ["choose"]

ROOT = Path(__file__).parents[2]

# Keeps the folder for the life of the process.
_FOLDER = tempfile.TemporaryDirectory(prefix="choose-kernel-")


@functools.cache
def _program() -> Path:
    program = Path(_FOLDER.name) / "choose_kernel"
    sources = (ROOT / "tests" / "gpu" / "choose_kernel.cpp", ROOT / "plugins" / "cuda" / "kernel_archive.cpp")
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror"]
    flags += [f"-I{ROOT / 'plugins' / folder}" for folder in ("cuda", "common")]
    subprocess.run(["c++", *flags, *sources, "-o", program], check=True)
    return program


def choose(archive: Path, capability: str, *node: object) -> subprocess.CompletedProcess[str]:
    """Its answer: the entry of the kernel, or with exit code 1 what it says.

    Args:
        archive: kernels.bin.
        capability: of the device.
        node: as choose_kernel.cpp describes.
    """
    command = [str(_program()), str(archive), capability, *map(str, node)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
