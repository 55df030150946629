"""kernels.json: what was compiled into a folder, and how to call it. It is read as an untrusted file."""

from collections.abc import Iterable
from dataclasses import Field, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from umv2_export import __version__
from umv2_export.errors import InputRejected, shown
from umv2_export.gpu.lookup_variants import LookupVariant, SumVariant
from umv2_export.gpu.topk_variants import TopkVariant
from umv2_export.gpu.variants import Variant
from umv2_export.records.documents import Document
from umv2_export.records.forms import Form, anything, flag, instance, integer, list_of, matching, one_of, text
from umv2_export.system.files import file_sha256, inside

__all__ = ["INDEX_FILE", "CompiledKernel", "plain_variant", "read_index", "write_index"]

INDEX_FILE = "kernels.json"
DOCUMENT = Document(
    file=INDEX_FILE,
    title="an index of kernels",
    folder="GPU kernels",
    writer="umv2-export kernels",
    format="umv2-kernels",
    # 2: lookups take the rows of the table; values in splits. 3: readers take the first kernel that fits.
    version=3,
    renewal="compile the kernels again",
    indent=1,
)

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
            Malformed: it is not a variant of the op.
        """
        return _VARIANT_FORMS[self.op].read(self.variant, "variant")


def plain_variant(variant: Variant) -> dict[str, Any]:
    """A variant for JSON: dtypes as text."""
    return {
        name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for name, value in asdict(variant).items()
    }


def write_index(folder: Path, kernels: Iterable[CompiledKernel]) -> list[CompiledKernel]:
    """Write the index of kernels in a folder; returns them in its order: readers take the first that fits."""
    ordered = sorted(kernels, key=_rank)
    DOCUMENT.write(folder, {"tool_version": __version__, "kernels": [kernel.as_dict() for kernel in ordered]})
    return ordered


def _rank(kernel: CompiledKernel) -> tuple[Any, ...]:
    """What comes first is taken: code for a device's own architecture, then what fits closest; a total order."""
    major, minor = map(int, kernel.compute_capability.split("."))
    return kernel.op, -major, -minor, kernel.typed_variant().waste, kernel.name


def _variant_form(field: Field[Any]) -> Form[Any]:
    """An element type as text, a flag, or a size."""
    if field.type is not torch.dtype:
        return flag if field.type is bool else integer(1, MAX_SIZE)
    known = _ROW_DTYPES if field.name == "rows_dtype" else _DTYPES
    name = one_of(*known)
    return Form(name.allowed, name.accepts, lambda value, _: known[value])


_VARIANT_FORMS: dict[str, Form[Variant]] = {
    op: instance(kind, **{field.name: _variant_form(field) for field in fields(kind)}) for op, kind in _VARIANTS.items()
}
_KERNEL = instance(
    CompiledKernel,
    op=one_of(*_VARIANTS),
    compute_capability=matching(r"[0-9]{1,2}\.[0-9]", "a compute capability such as 8.9"),
    entry=matching(r"[A-Za-z_][A-Za-z0-9_]{0,62}", "the name of a function"),
    shared_bytes=integer(0, MAX_SHARED_BYTES),
)


def read_index(folder: Path) -> list[CompiledKernel]:
    """The kernels of a folder that `umv2-export kernels` wrote, whose files are those that the index describes.

    Args:
        folder: with kernels.json.

    Raises:
        InputRejected: it is not such a folder, its index is malformed or of another version, or a file is not the one
            that was built.
    """
    entries = DOCUMENT.read(folder, {"tool_version": text, "kernels": list_of(anything)})["kernels"]
    kernels = []
    for number, entry in enumerate(entries):
        try:
            kernels.append(_kernel(entry))
        except ValueError as error:
            raise InputRejected(f"kernels[{number}] is malformed", where=folder / INDEX_FILE, why=str(error)) from error
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
    kernel = _KERNEL.read(entry)
    if kernel.sha256.keys() != {kernel.ptx, kernel.cubin}:
        raise ValueError("sha256 must name the ptx and the cubin")
    variant = kernel.typed_variant()
    threads = 32 * variant.num_warps
    if kernel.block != (threads, 1, 1) or threads > MAX_THREADS:
        raise ValueError(f"block {kernel.block}, its variant has {variant.num_warps} warps")
    if kernel.grid != variant.grid:
        raise ValueError(f"grid {shown(kernel.grid)}, a {kernel.op} has {variant.grid}")
    if kernel.arguments != [asdict(argument) for argument in variant.arguments]:
        raise ValueError("its arguments are not those of its variant")
    return kernel
