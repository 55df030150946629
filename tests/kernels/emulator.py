"""Runs functions of this process in an emulated processor, which knows AVX-512 whatever the real one knows.

bochscpu executes the guest; the guest's memory is this process, page for page at the same addresses: a function, its
arguments and its results lie where they lie. What is mapped later than `Emulator` is made is not there, and no system
call can be made: arrays are allocated beforehand, and the allocator keeps memory in hand.
"""

import ctypes
import importlib
import mmap
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Emulator", "Fault", "load_bochs", "place_at_edge"]

Array = npt.NDArray[Any]

PAGE = 4096
ENTRIES = PAGE // 8
PRESENT_WRITABLE_USER = 7

# Large mappings are none of the kernels'.
LARGEST_MAPPING = 200 << 20
HEAP = 48 << 20
STACK = 4 << 20

# The wheel was built on a newer C library than that of some distributions, whose names of four functions it wants.
SHIM = """
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
long __isoc23_strtol(const char* s, char** end, int base) { return strtol(s, end, base); }
unsigned long __isoc23_strtoul(const char* s, char** end, int base) { return strtoul(s, end, base); }
long long __isoc23_strtoll(const char* s, char** end, int base) { return strtoll(s, end, base); }
unsigned long long __isoc23_strtoull(const char* s, char** end, int base) { return strtoull(s, end, base); }
int __isoc23_sscanf(const char* s, const char* format, ...) {
  va_list list;
  va_start(list, format);
  const int count = vsscanf(s, format, list);
  va_end(list);
  return count;
}
int __isoc23_fscanf(FILE* file, const char* format, ...) {
  va_list list;
  va_start(list, format);
  const int count = vfscanf(file, format, list);
  va_end(list);
  return count;
}
"""


class Fault(Exception):
    """The guest did what a processor answers with an exception: vector, instruction, address."""


def load_bochs(folder: Path) -> ModuleType:
    """The package, with a shim under it where it does not load by itself; `folder` takes the shim.

    Raises:
        ImportError: it is not installed, or does not load with the shim either.
    """
    try:
        return _import()
    except ImportError as error:
        if "__isoc23_" not in str(error):
            raise
    source, library = folder / "shim.c", folder / "shim.so"
    source.write_text(SHIM, encoding="ascii")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    for name in [name for name in sys.modules if name.startswith("bochscpu")]:
        del sys.modules[name]
    return _import()


def _import() -> ModuleType:
    bochs = importlib.import_module("bochscpu")
    for part in ("cpu", "memory"):
        importlib.import_module(f"bochscpu.{part}")
    return bochs


def place_at_edge(array: Array) -> Array:
    """A copy that ends where no page is mapped: what reads past it faults, here and in the emulator."""
    pages = -(-max(array.nbytes, 1) // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    start = np.frombuffer(memory, dtype=np.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    if protect(ctypes.c_void_p(start.ctypes.data + pages * PAGE), ctypes.c_size_t(PAGE), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    first = pages * PAGE - array.nbytes
    copy: Array = start[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


class Emulator:
    """A processor in long mode whose page tables map this process.

    Args:
        bochs: what `load_bochs` returned.
    """

    def __init__(self, bochs: ModuleType) -> None:
        self._bochs = bochs
        self._keep_memory_in_hand()
        self._stack = np.zeros(STACK, dtype=np.uint8)
        self._halt = np.full(PAGE, 0xF4, dtype=np.uint8)
        self._fs = self._thread_pointer()
        self._session = bochs.Session()
        self._session.missing_page_handler = self._missing_page
        self._tables: dict[tuple[int, ...], tuple[int, Array]] = {}
        self._next_page = 0x1000
        self._root = self._map_process()

    def call(self, function: int, *arguments: int) -> int:
        """What a C function at this address returns; up to seven arguments, all of them whole numbers or pointers.

        Raises:
            Fault: the guest read or wrote what is not mapped, or executed what is no instruction.
        """
        state = self._state()
        registers = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
        for register, value in zip(registers, arguments, strict=False):
            setattr(state, register, value)
        top = (self._stack.ctypes.data + STACK - PAGE) // 64 * 64
        for place, value in enumerate((self._halt.ctypes.data, *arguments[len(registers) :])):
            ctypes.c_uint64.from_address(top - 8 + 8 * place).value = value
        state.rsp, state.rip = top - 8, function
        faults: list[str] = []
        hook = self._bochs.Hook()

        def halted(session: Any, _: object) -> None:
            session.stop()

        def excepted(session: Any, _: object, vector: int, __: int) -> None:
            faults.append(f"exception {vector} at {session.cpu.rip:#x}, address {session.cpu.cr2:#x}")
            session.stop()

        hook.hlt, hook.exception = halted, excepted
        self._session.cpu.state = state
        self._session.run([hook])
        if faults:
            raise Fault(faults[0])
        return int(self._session.cpu.rax)

    @staticmethod
    def _keep_memory_in_hand() -> None:
        """No mapping for a large allocation, none given back: the allocator then asks the system for nothing."""
        library = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_threshold = -1, -3
        library.mallopt(m_mmap_threshold, 1 << 30)
        library.mallopt(m_trim_threshold, 1 << 30)
        library.malloc.restype = ctypes.c_void_p
        memory = library.malloc(ctypes.c_size_t(HEAP))
        ctypes.memset(memory, 0, HEAP)
        library.free(ctypes.c_void_p(memory))

    @staticmethod
    def _thread_pointer() -> int:
        arch_prctl, get_fs = 158, 0x1003
        fs = ctypes.c_ulong()
        ctypes.CDLL(None).syscall(arch_prctl, get_fs, ctypes.byref(fs))
        return fs.value

    @staticmethod
    def _missing_page(address: int) -> None:
        raise Fault(f"the guest has no page {address:#x}")

    @staticmethod
    def _readable() -> Iterator[tuple[int, int]]:
        pattern = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \S+\s*(.*)")
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            if found := pattern.match(line):
                first, end = int(found[1], 16), int(found[2], 16)
                kernels_own = found[4].startswith("[v")
                if found[3].startswith("r") and not kernels_own and end - first <= LARGEST_MAPPING:
                    yield first, end

    def _new_page(self) -> int:
        self._next_page += 1
        return self._next_page * PAGE

    def _table(self) -> tuple[int, Array]:
        memory = np.zeros(2 * ENTRIES, dtype=np.uint64)
        first = -memory.ctypes.data % PAGE // 8
        table, page = memory[first : first + ENTRIES], self._new_page()
        self._bochs.memory.page_insert(page, table.ctypes.data)
        return page, table

    def _map_process(self) -> int:
        """Four levels of tables of 512 entries; the address of the first."""
        root = self._tables[()] = self._table()
        for first, end in list(self._readable()):
            for address in range(first, end, PAGE):
                path = tuple(address >> shift & (ENTRIES - 1) for shift in (39, 30, 21))
                parent = root
                for depth in range(1, 4):
                    if path[:depth] not in self._tables:
                        table = self._tables[path[:depth]] = self._table()
                        parent[1][path[depth - 1]] = table[0] | PRESENT_WRITABLE_USER
                    parent = self._tables[path[:depth]]
                page = self._new_page()
                self._bochs.memory.page_insert(page, address)
                parent[1][address >> 12 & (ENTRIES - 1)] = page | PRESENT_WRITABLE_USER
        return root[0]

    def _state(self) -> Any:
        """Long mode with paging, SSE, AVX and AVX-512 switched on."""
        state = self._bochs.State()
        self._bochs.cpu.set_long_mode(state)
        state.cr0, state.cr3 = 0x80050033, self._root
        # PAE, OSFXSR, OSXMMEXCPT, FSGSBASE, OSXSAVE.
        state.cr4 = 1 << 5 | 1 << 9 | 1 << 10 | 1 << 16 | 1 << 18
        state.efer, state.rflags = 0xD01, 2
        # x87, SSE, AVX, and the three parts of AVX-512.
        state.xcr0, state.mxcsr, state.mxcsr_mask = 0xE7, 0x1F80, 0xFFFF
        code, data = 0xA09B, 0xC093
        state.cs = self._segment(code)
        state.ds = state.es = state.ss = state.gs = self._segment(data)
        state.fs = self._segment(data, self._fs)
        return state

    def _segment(self, attributes: int, base: int = 0) -> Any:
        segment = self._bochs.Segment()
        segment.base, segment.limit, segment.attr, segment.present = base, 0xFFFFFFFF, attributes, True
        return segment
