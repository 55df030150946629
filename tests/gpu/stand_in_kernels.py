"""Folders of kernels that only the stand-in driver runs: their images name an entry and hold no code."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from umv2_export.gpu.archive import ARCHIVE_FILE, archive_kernels
from umv2_export.gpu.index import CompiledKernel, plain_variant, write_index
from umv2_export.gpu.variants import Variant

__all__ = ["entry_name", "write_stand_in_kernels"]

# More than a launch may use without asking for it.
SHARED_BYTES = 64 * 1024


def entry_name(variant: Variant, capability: str) -> str:
    """What the kernel of a variant is called in its image."""
    return f"stand_in_{hashlib.sha256(variant.name.encode()).hexdigest()[:16]}_sm{capability.replace('.', '')}"


def write_stand_in_kernels(
    folder: Path, variants: Iterable[Variant], capabilities: Sequence[str] = ("8.9",), *, image_capability: str = ""
) -> Path:
    """Write a folder as `umv2-export kernels` does; returns its pack.

    Args:
        folder: to be filled.
        variants: of the kernels.
        capabilities: architectures that they are said to be for.
        image_capability: another that the images are for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kernels = [
        _write(folder, variant, capability, image_capability or capability)
        for variant in variants
        for capability in capabilities
    ]
    write_index(folder, kernels)
    (folder / ARCHIVE_FILE).write_bytes(archive_kernels(folder))
    return folder / ARCHIVE_FILE


def _write(folder: Path, variant: Variant, capability: str, image_capability: str) -> CompiledKernel:
    entry, target = entry_name(variant, capability), f"sm_{image_capability.replace('.', '')}"
    image = f".version 8.0\n.target {target}\n.visible .entry {entry}() // {variant.name}\n".encode()
    # The driver reads text up to a zero; in the pack another image follows.
    files = {f"{entry}.ptx": image, f"{entry}.cubin": image + b"\0"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return CompiledKernel(
        name=variant.name,
        op=variant.op,
        variant=plain_variant(variant),
        compute_capability=capability,
        target=target,
        entry=entry,
        arguments=[asdict(argument) for argument in variant.arguments],
        grid=variant.grid,
        block=(32 * variant.num_warps, 1, 1),
        shared_bytes=SHARED_BYTES,
        registers=32,
        spill_bytes=0,
        vector_loads=0,
        ptx_version=80,
        ptx=f"{entry}.ptx",
        cubin=f"{entry}.cubin",
        sha256={name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    )
