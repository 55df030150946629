"""The GPU kernels compiled ahead of time: PTX and cubin by op, dtype and architecture, and how to call them.

Compiling needs Triton, but no GPU and no driver.
"""

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from importlib import import_module
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from umv2_export.errors import BuildFailed, EnvironmentUnfit
from umv2_export.gpu.archive import ARCHIVE_FILE, archive_kernels
from umv2_export.gpu.index import CompiledKernel, plain_variant, write_index
from umv2_export.gpu.variants import Variant
from umv2_export.progress import Tracker, silent
from umv2_export.system.host_memory import available_bytes
from umv2_export.system.output import atomic_directory

__all__ = [
    "ARCHITECTURES",
    "COMPILER_MEMORY",
    "KERNEL_BYTES",
    "build_kernels",
    "compile_variant",
    "compiled_for",
    "compiler_processes",
    "require_triton",
]

# Compute capability -> (target of ptxas, PTX version). The lowest version that Triton writes for a target: a driver
# reads PTX of its own time and older. 8.0 came with CUDA 12.0; 8.6 with 12.7 and 8.7 with 12.8, which know Blackwell.
# Plain targets: the kernels use nothing that sm_90a and its like add, and code of those runs on one architecture alone,
# whereas the cubin for 10.0 runs on 10.3 too, that for 12.0 on 12.1, and the PTX on what comes after.
ARCHITECTURES: Mapping[str, tuple[str, int]] = {
    "8.0": ("sm_80", 80),
    "8.6": ("sm_86", 80),
    "8.9": ("sm_89", 80),
    "9.0": ("sm_90", 80),
    "10.0": ("sm_100", 86),
    "12.0": ("sm_120", 87),
}

# Of one process that compiles (0.39 GB measured), and of the files of one kernel (0.26 MB in the mean).
COMPILER_MEMORY = 400 * 10**6
KERNEL_BYTES = 300 * 10**3


# Orin: code for desktop GPUs of the same major version does not run there.
ALONE = "8.7"


def compiled_for(capability: str) -> str | None:
    """The architecture whose cubin a GPU of this compute capability runs: its own, else an older one of its kind.

    Returns:
        one of `ARCHITECTURES`; None where none runs there.
    """
    major, minor = map(int, capability.split("."))
    older = [
        name
        for name in ARCHITECTURES
        if int(name.split(".")[0]) == major and int(name.split(".")[1]) <= minor and capability != ALONE
    ]
    return max(older, key=lambda name: int(name.split(".")[1]), default=None)


def require_triton() -> None:
    """Notice before long work that Triton is not installed.

    Raises:
        EnvironmentUnfit: it is not.
    """
    try:
        import triton  # noqa: F401, PLC0415 - an optional package
    except ImportError as error:
        raise EnvironmentUnfit(
            "the GPU kernels are compiled by triton", fix="pip install 'umv2-export[gpu]'"
        ) from error


def compiler_processes(tasks: int) -> int:
    """How many processes compile `tasks` kernels: as many as processors and memory allow, and at least one."""
    processes = min(tasks, len(os.sched_getaffinity(0)))
    available = available_bytes()
    return max(1, processes if available is None else min(processes, available // COMPILER_MEMORY))


def build_kernels(
    target: Path,
    variants: Sequence[Variant],
    architectures: Sequence[str],
    track: Tracker = silent,
    *,
    replace_target: bool = False,
) -> list[CompiledKernel]:
    """Compile every variant for every architecture into a folder, with an index; it appears whole or not at all.

    Args:
        target: folder.
        variants: of the kernels.
        architectures: compute capabilities, of `ARCHITECTURES`.
        track: progress.
        replace_target: replace a folder that is not empty.

    Raises:
        BuildFailed: the compiler failed.
        EnvironmentUnfit: Triton is not installed, the disk is full, or a compiler was ended.
    """
    require_triton()
    tasks = [(variant, architecture) for variant in variants for architecture in architectures]
    advance = track("compiling kernels", len(tasks))
    compiled = []
    with atomic_directory(target, replace=replace_target) as folder:
        # Processes: the compiler holds the interpreter lock. Started anew: Triton reads its environment when imported.
        processes = compiler_processes(len(tasks))
        try:
            with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_prepare) as pool:
                try:
                    with _children_left_alone():
                        futures = [pool.submit(compile_variant, *task, folder) for task in tasks]
                    for future in futures:
                        compiled.append(future.result())
                        advance(1)
                except BaseException:
                    # Leaving the pool waits for all that was submitted, minutes after an interrupt.
                    pool.shutdown(wait=False, cancel_futures=True)
                    for process in active_children():
                        process.terminate()
                    raise
        except BrokenProcessPool as error:
            raise EnvironmentUnfit(
                "a process that compiles GPU kernels was ended",
                why=f"often for lack of memory: each of {processes} takes about {COMPILER_MEMORY / 1e9:.1f} GB",
                fix="end other processes, or take a machine with more memory",
            ) from error
        kernels = write_index(folder, compiled)
        (folder / ARCHIVE_FILE).write_bytes(archive_kernels(folder))
    return kernels


@contextlib.contextmanager
def _children_left_alone() -> Iterator[None]:
    """Let processes that are started here ignore Ctrl-C, which reaches all: each would show a traceback of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _prepare() -> None:
    # In Triton's interpreter nothing can be compiled.
    os.environ.pop("TRITON_INTERPRET", None)


def compile_variant(variant: Variant, architecture: str, folder: Path) -> CompiledKernel:
    """Compile one variant and write its two files.

    Raises:
        BuildFailed: the compiler failed.
    """
    import triton  # noqa: PLC0415 - an optional package, read in a process of its own
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource  # noqa: PLC0415

    target, ptx_version = ARCHITECTURES[architecture]
    kernel = getattr(import_module(f"umv2_export.kernels.triton.{variant.module}"), variant.kernel)
    signature, constants, attributes = _specialisation(kernel.arg_names, variant)
    try:
        compiled = triton.compile(
            ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes),
            target=GPUTarget("cuda", int(architecture.replace(".", "")), 32),
            options={"ptx_version": ptx_version, "num_warps": variant.num_warps},
        )
    except Exception as error:  # the compiler raises many kinds
        raise BuildFailed(f"triton could not compile {variant.name} for {architecture}", why=str(error)) from error
    entry = compiled.metadata.name
    text = _without_scratch(compiled.asm["ptx"], entry, len(variant.arguments))
    # Triton writes the target of one architecture alone (sm_90a) from Hopper on.
    ptx = re.sub(rf"\.target {target}a?$", f".target {target}", text, count=1, flags=re.MULTILINE).encode()
    registers, spill_bytes, cubin = _assemble(ptx, target)
    if spill_bytes:
        # ptxas spills a few bytes to fit more programs on a multiprocessor (4 bytes at 64 registers, where 87 hold
        # everything); told that one program is enough, it does not.
        ptx = re.sub(rb"(\.reqntid [0-9, ]+)", rb"\1\n.minnctapersm 1", ptx, count=1)
        registers, spill_bytes, cubin = _assemble(ptx, target)
    stem = f"{variant.name}_sm{architecture.replace('.', '')}"
    files = {f"{stem}.ptx": ptx, f"{stem}.cubin": cubin}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return CompiledKernel(
        variant.name,
        variant.op,
        plain_variant(variant),
        architecture,
        target,
        entry,
        [asdict(argument) for argument in variant.arguments],
        variant.grid,
        (32 * variant.num_warps, 1, 1),
        compiled.metadata.shared,
        registers,
        spill_bytes,
        len(re.findall(rb"ld\.global\S*\.(?:v4\.b32|v2\.b64)", ptx)),
        ptx_version,
        f"{stem}.ptx",
        f"{stem}.cubin",
        {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    )


def _specialisation(
    names: Sequence[str], variant: Variant
) -> tuple[dict[str, Any], dict[str, Any], dict[tuple[int, ...], Any]]:
    """Types, constants and divisors of the parameters of a kernel, as Triton takes them; absent inputs are None."""
    shards = [argument for argument in variant.arguments if re.fullmatch(r"rows_\d+", argument.name)]
    arguments = {argument.name: argument for argument in variant.arguments}
    signature: dict[str, Any] = {}
    constants: dict[str, Any] = dict(variant.constants)
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(names):
        if name == "rows":
            signature[name] = tuple(f"*{shard.dtype}" for shard in shards)
            attributes |= {(index, s): [["tt.divisibility", shard.divisor]] for s, shard in enumerate(shards)}
        elif name in arguments:
            argument = arguments[name]
            signature[name] = "i32" if argument.kind == "size" else f"*{argument.dtype}"
            if argument.divisor > 1:
                attributes[index,] = [["tt.divisibility", argument.divisor]]
        else:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
    return signature, constants, attributes


def _without_scratch(ptx: str, entry: str, arguments: int) -> str:
    """The PTX with the parameters of the op alone.

    Triton appends two pointers to scratch memory, which these kernels never read. A caller that passes the arguments of
    the op, as TensorRT does, would leave them unset, and the driver would read past its list.
    """
    for number in (arguments, arguments + 1):
        parameter = rf",\s*\.param \.u64 \.ptr \.global \.align \d+ {entry}_param_{number}\b(?=[\s,)])"
        if len(re.findall(rf"{entry}_param_{number}\b", ptx)) != 1:
            raise BuildFailed(f"{entry} reads its scratch memory, parameter {number}")
        ptx, removed = re.subn(parameter, "", ptx)
        if removed != 1:
            raise BuildFailed(f"{entry} has no parameter {number} for scratch memory")
    return ptx


def _assemble(ptx: bytes, target: str) -> tuple[int, int, bytes]:
    """Registers and spilled bytes of a thread, and the cubin."""
    from triton import knobs  # noqa: PLC0415 - an optional package

    with tempfile.TemporaryDirectory() as scratch:
        source, cubin = Path(scratch) / "kernel.ptx", Path(scratch) / "kernel.cubin"
        source.write_bytes(ptx)
        blackwell = int(re.sub(r"\D", "", target)) >= 100
        assembler = knobs.nvidia.ptxas_blackwell if blackwell else knobs.nvidia.ptxas
        done = subprocess.run(
            [assembler.path, "-v", "--gpu-name", target, source, "-o", cubin],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise BuildFailed(f"ptxas refused a kernel for {target}", why=done.stderr.strip())
        registers = re.search(r"Used (\d+) registers", done.stderr)
        spills = re.search(r"(\d+) bytes spill stores", done.stderr)
        if registers is None or spills is None:
            raise BuildFailed("ptxas did not say what the kernel uses", why=done.stderr.strip())
        return int(registers[1]), int(spills[1]), cubin.read_bytes()
