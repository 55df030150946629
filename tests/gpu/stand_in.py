"""The stand-in for the CUDA driver (stand_in_driver.cpp): built, told of the kernels, and put in a process's way."""

import functools
import os
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from umv2_export.gpu.index import CompiledKernel, read_index
from umv2_export.gpu.lookup_variants import LookupVariant, SumVariant

__all__ = ["build_stand_in", "stand_in_environment", "write_kernels"]

SOURCE = Path(__file__).with_name("stand_in_driver.cpp")

# Keeps the folder for the life of the process.
_FOLDER = tempfile.TemporaryDirectory(prefix="stand-in-")


@functools.cache
def build_stand_in(options: tuple[str, ...] = ()) -> Path:
    """The folder that holds libcuda.so.1; made once for any further options of the compiler."""
    folder = Path(_FOLDER.name) / str(len(options))
    folder.mkdir()
    target = folder / "libcuda.so.1"
    flags = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *options)
    subprocess.run(["c++", *flags, SOURCE, "-o", target], check=True)
    return target.parent


def write_kernels(file: Path, folders: Iterable[Path]) -> None:
    """Describe the kernels of some folders to the stand-in (STAND_IN_KERNELS)."""
    lines = []
    for folder in folders:
        for kernel in read_index(folder):
            facts = _facts(kernel)
            lines += [f"{_digest((folder / name).read_bytes()):x} {facts}" for name in (kernel.ptx, kernel.cubin)]
    file.write_text("\n".join(lines) + "\n")


def stand_in_environment(
    *,
    kernels: Path | None = None,
    log: Path | None = None,
    devices: int = 1,
    capability: str = "8.9",
    folder: Path | None = None,
) -> dict[str, str]:
    """The environment of a process that finds the stand-in in place of a driver.

    Args:
        kernels: file that `write_kernels` wrote.
        log: file that gets a line for each launch.
        devices: number of GPUs.
        capability: compute capability of the GPU.
        folder: with the stand-in, of `build_stand_in`; None: one without further options.
    """
    major, minor = capability.split(".")
    files = {"STAND_IN_KERNELS": kernels, "STAND_IN_LOG": log}
    return {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder or build_stand_in()),
        "STAND_IN_DEVICES": str(devices),
        "STAND_IN_MAJOR": major,
        "STAND_IN_MINOR": minor,
        **{name: str(file) for name, file in files.items() if file is not None},
    }


def _facts(kernel: CompiledKernel) -> str:
    variant = kernel.typed_variant()
    facts = [kernel.op, kernel.block[0], kernel.shared_bytes]
    if isinstance(variant, LookupVariant):
        computed = variant.scores_dtype == torch.float32 and variant.rows_dtype in (torch.float32, torch.int8)
        facts += [variant.divisor, variant.shards, variant.cores, 0, variant.grouped, variant.pre_values]
        facts += [variant.rows_dtype == torch.int8, variant.gelu, variant.split, computed]
    elif isinstance(variant, SumVariant):
        facts += [1, *[0] * 8, variant.scores_dtype == torch.float32]
    else:
        facts += [1, 0, variant.cores, variant.ranks, *[0] * 5, variant.scores_dtype == torch.float32]
    return " ".join(str(int(fact) if isinstance(fact, bool) else fact) for fact in facts)


def _digest(data: bytes) -> int:
    """FNV-1a."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value
