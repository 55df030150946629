"""kernels.json: what was compiled into a folder, and how to call it. It is read as an untrusted file."""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from umv2_export import __version__
from umv2_export.errors import InputRejected, shown
from umv2_export.files import file_sha256, inside, read_json
from umv2_export.gpu.lookup_variants import LookupVariant, SumVariant
from umv2_export.gpu.topk_variants import TopkVariant
from umv2_export.gpu.variants import Variant

__all__ = ["INDEX_FILE", "CompiledKernel", "plain_variant", "read_index", "write_index"]

INDEX_FILE = "kernels.json"
FORMAT = "umv2-kernels"
# 2: lookups take the rows of the table; values in splits.
FORMAT_VERSION = 2

_VARIANTS: dict[str, type[Variant]] = {kind.op: kind for kind in (LookupVariant, SumVariant, TopkVariant)}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
_ROW_DTYPES = _DTYPES | {"int8": torch.int8}

# Threads of a block, and shared memory, that no architecture exceeds; block sizes and counts far above any model's.
MAX_THREADS = 1024
MAX_SHARED_BYTES = 228 * 1024
MAX_SIZE = 2**20


@dataclass(frozen=True)
class CompiledKernel:
    """One entry of the index.

    Attributes:
        name: of the variant.
        op: name of the op, or of the step of it.
        variant: what is fixed: dtypes as text, sizes of blocks, flags.
        compute_capability: such as "8.9".
        target: of ptxas, such as sm_89; code of one that ends in "a" runs on that architecture alone.
        entry: name of the function in PTX and cubin.
        arguments: in order: name, kind (input, size, output), dtype, and the divisor that the caller vouches for.
        grid: programs along x, y and z: `tokens`, `groups`, `heads`, `splits` or a number.
        block: threads of a program along x, y and z.
        shared_bytes: dynamic shared memory of a program.
        registers: of a thread.
        spill_bytes: stores to local memory of a thread; 0 is what the build asks for.
        vector_loads: loads of 16 bytes in the PTX.
        ptx_version: times ten.
        ptx, cubin: file names.
        sha256: of both files, by name.
    """

    name: str
    op: str
    variant: dict[str, Any]
    compute_capability: str
    target: str
    entry: str
    arguments: list[dict[str, Any]]
    grid: tuple[str, str, str]
    block: tuple[int, int, int]
    shared_bytes: int
    registers: int
    spill_bytes: int
    vector_loads: int
    ptx_version: int
    ptx: str
    cubin: str
    sha256: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def typed_variant(self) -> Variant:
        """`variant` with its types.

        Raises:
            ValueError: it is no variant of the op.
        """
        kind = _VARIANTS[self.op]
        if self.variant.keys() != {field.name for field in fields(kind)}:
            raise ValueError(f"a variant of {self.op} has other fields")
        facts: dict[str, Any] = {}
        for field in fields(kind):
            value = self.variant[field.name]
            if field.type is torch.dtype:
                known = _ROW_DTYPES if field.name == "rows_dtype" else _DTYPES
                if not isinstance(value, str) or value not in known:
                    raise ValueError(f"{field.name} {shown(value)}")
                facts[field.name] = known[value]
            elif type(value) is not field.type or (field.type is int and not 1 <= value <= MAX_SIZE):
                raise ValueError(f"{field.name} {shown(value)}")
            else:
                facts[field.name] = value
        return kind(**facts)


def plain_variant(variant: Variant) -> dict[str, Any]:
    """A variant for JSON: dtypes as text."""
    return {
        name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for name, value in asdict(variant).items()
    }


def write_index(folder: Path, kernels: Iterable[CompiledKernel]) -> list[CompiledKernel]:
    """Write the index of kernels in a folder; returns them in its order: readers take the first that fits."""
    ordered = sorted(kernels, key=_rank)
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "tool_version": __version__,
        "kernels": [kernel.as_dict() for kernel in ordered],
    }
    (folder / INDEX_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return ordered


def _rank(kernel: CompiledKernel) -> tuple[Any, ...]:
    """What comes first is taken: code for a device's own architecture, then what fits closest; a total order."""
    major, minor = map(int, kernel.compute_capability.split("."))
    return kernel.op, -major, -minor, kernel.typed_variant().waste, kernel.name


def read_index(folder: Path) -> list[CompiledKernel]:
    """The kernels of a folder that `umv2-export kernels` wrote, whose files are those that the index describes.

    Args:
        folder: with kernels.json.

    Raises:
        InputRejected: it is no such folder, its index is malformed or of another version, or a file is not the one
            that was built.
    """
    file = folder / INDEX_FILE
    if not file.is_file():
        raise InputRejected(
            f"no GPU kernels: {INDEX_FILE} is missing",
            where=folder,
            fix="pass a folder that `umv2-export kernels` wrote",
        )
    document = read_json(file)
    if document.get("format") != FORMAT:
        raise InputRejected(f"not an index of kernels: its format is not {FORMAT!r}", where=file)
    if document.get("format_version") != FORMAT_VERSION:
        raise InputRejected(
            f"format version {shown(document.get('format_version'))}, this tool reads {FORMAT_VERSION}",
            where=file,
            fix="compile the kernels again with this version",
        )
    entries = document.get("kernels")
    if not isinstance(entries, list):
        raise InputRejected("field 'kernels' is missing or malformed", where=file)
    kernels = []
    for number, entry in enumerate(entries):
        try:
            kernels.append(_kernel(entry))
        except ValueError as error:
            raise InputRejected(f"kernels[{number}] is malformed", where=file, why=str(error)) from error
    for kernel in kernels:
        for name in (kernel.ptx, kernel.cubin):
            if file_sha256(inside(folder, name)) != kernel.sha256[name]:
                raise InputRejected(
                    f"file {shown(name)} is not the one that the index describes",
                    where=folder,
                    fix="copy the folder again, or compile the kernels again",
                )
    return kernels


def _kernel(entry: object) -> CompiledKernel:
    """An entry of the index.

    Raises:
        ValueError: it has not the types, or the arguments and the grid, on which later code relies.
    """
    names = {field.name for field in fields(CompiledKernel)}
    if not isinstance(entry, dict) or entry.keys() != names:
        raise ValueError(f"expected the fields {', '.join(sorted(names))}")
    for field in fields(CompiledKernel):
        if field.type in (str, int) and type(entry[field.name]) is not field.type:
            raise ValueError(f"{field.name} is {shown(entry[field.name])}")
    if entry["op"] not in _VARIANTS:
        raise ValueError(f"op {shown(entry['op'])}")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,62}", entry["entry"]):
        raise ValueError(f"entry {shown(entry['entry'])}")
    if not re.fullmatch(r"[0-9]{1,2}\.[0-9]", entry["compute_capability"]):
        raise ValueError(f"compute_capability {shown(entry['compute_capability'])}")
    if not 0 <= entry["shared_bytes"] <= MAX_SHARED_BYTES:
        raise ValueError(f"shared_bytes {shown(entry['shared_bytes'])}")
    digests = entry["sha256"]
    if not isinstance(digests, dict) or digests.keys() != {entry["ptx"], entry["cubin"]}:
        raise ValueError("sha256 must name the ptx and the cubin")
    if not isinstance(entry["variant"], dict):
        raise ValueError("variant is no object")
    kernel = CompiledKernel(**entry)
    variant = kernel.typed_variant()
    threads = 32 * variant.num_warps
    if entry["block"] != [threads, 1, 1] or not 0 < threads <= MAX_THREADS:
        raise ValueError(f"block {shown(entry['block'])}, its variant has {variant.num_warps} warps")
    if entry["grid"] != list(variant.grid):
        raise ValueError(f"grid {shown(entry['grid'])}, a {kernel.op} has {variant.grid}")
    if entry["arguments"] != [asdict(argument) for argument in variant.arguments]:
        raise ValueError("its arguments are not those of its variant")
    # JSON has no tuples.
    return CompiledKernel(**entry | {"grid": variant.grid, "block": (threads, 1, 1)})
