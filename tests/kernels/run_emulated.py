"""Kernels of a target in the emulator against those of another that this processor runs; prints JSON.

Run by `test_emulated.py` in a process of its own: every page of a process becomes one of the guest, and torch has many.
"""

import ctypes
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.kernels import kernel_calls
from tests.kernels.emulator import Array, Emulator, Fault, load_bochs, place_at_edge
from umv2_export import cpu_kernels

NATIVE = "avx2"

# Differences of sums in another order, over the largest number among them.
TOLERANCE = 3e-5

STORED: dict[str, Callable[[Array], Array]] = {
    "float32": lambda x: x.astype(np.float32),
    "float16": lambda x: x.astype(np.float16),
    "bfloat16": lambda x: (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16),
    "int8": lambda x: np.clip(x * 40, -128, 127).astype(np.int8),
}


class Recorder:
    """Stands for the library: a call is made, and kept with everything that it refers to."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._library, name)

        def call(*arguments: Any) -> Any:
            if name not in {"umv2_kernels", "umv2_pack_panels"}:
                # The arrays that its pointers point to are in the hands of the caller.
                self.calls.append((name, arguments, dict(sys._getframe(1).f_locals)))
            return function(*arguments)

        return call


class Case:
    """One call, its results, and what they were on the target that runs here."""

    def __init__(self, kind: str, recorder: Recorder, results: Sequence[Array]) -> None:
        self.kind, self.results = kind, results
        self.calls, recorder.calls = recorder.calls, []
        self.expected = [result.copy() for result in results]

    def emulate(self, emulator: Emulator, library: ctypes.CDLL, kernels: int) -> str | None:
        """What is wrong, if anything."""
        for result in self.results:
            result[...] = 99
        for name, (_, *arguments), _ in self.calls:
            function = ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
            try:
                emulator.call(function, kernels, *(as_number(argument) for argument in arguments))
            except Fault as fault:
                return f"{self.kind}: {fault}"
        for result, expected in zip(self.results, self.expected, strict=True):
            if result.dtype == np.int64 and not (result == expected).all():
                return f"{self.kind}: other addresses"
            scale = max(1.0, float(np.abs(expected[np.isfinite(expected)]).max(initial=0)))
            if not np.allclose(result, expected, rtol=0, atol=TOLERANCE * scale, equal_nan=True):
                return f"{self.kind}: off by {np.nanmax(np.abs(result - expected))}"
        return None


def as_number(argument: Any) -> int:
    """A pointer or a whole number, as it is passed."""
    if hasattr(argument, "_obj"):
        return ctypes.addressof(argument._obj)
    return int(argument.value or 0)


def cases(recorder: Recorder, count: int) -> Iterator[Case]:
    """`count` random calls of each kernel; all that they read ends where no page is mapped."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return place_at_edge(rng.standard_normal(shape).astype(np.float32))

    def pick(*values: int) -> int:
        return int(rng.choice(values))

    for number in range(count):
        dtype = list(STORED)[number % 4]
        tokens, hits, cores, part = (
            pick(1, 2),
            pick(1, 3, 4, 5, 9, 17),
            pick(1, 2, 3),
            pick(1, 3, 15, 16, 17, 33, 64, 65),
        )
        pre, groups, rows, per_shard = pick(0, 0, 1, 16, 17, 67), pick(1, 1, 3), pick(2, 9, 23), pick(2, 30)
        table = STORED[dtype](rng.standard_normal((rows, pre + part * cores)))
        output = kernel_calls.memory_lookup(
            NATIVE,
            place_at_edge(rng.integers(0, rows, (tokens, hits))),
            normal(tokens, hits, cores),
            [place_at_edge(table[first : first + per_shard]) for first in range(0, rows, per_shard)],
            pre_value_dim=pre,
            gelu=bool(pick(0, 1)),
            groups=groups,
            group=place_at_edge(rng.integers(0, groups, (tokens, hits))) if groups > 1 else None,
            query=normal(tokens, pre) if pre else None,
            row_scales=place_at_edge(rng.random((rows, 2)).astype(np.float32) / 40) if dtype == "int8" else None,
            row_dtype=dtype,
        )
        yield Case("memory_lookup", recorder, [output])
    for number in range(count):
        heads, keys, ranks, cores = pick(1, 2), pick(1, 5, 16, 17, 33, 64, 129, 360), pick(1, 2, 3), pick(1, 2)
        row_topk = int(rng.integers(1, min(keys, 40) + 1))
        # Whole numbers tie, and their sums are the same in any order.
        row, col, u, v, core = (
            place_at_edge(rng.integers(-8, 9, shape).astype(np.float32))
            for shape in (
                (1, heads, keys, ranks),
                (1, heads, keys, ranks),
                *[(heads, ranks)] * 2,
                (cores, heads, ranks, ranks),
            )
        )
        if number % 3 == 0:
            row[0, 0, -1], col[0, 0, 0] = -np.inf, np.inf
        topk = int(rng.integers(1, min(64, row_topk**2) + 1))
        with np.errstate(invalid="ignore"):
            yield Case(
                "tucker_topk",
                recorder,
                kernel_calls.tucker_topk(NATIVE, row, col, u, v, core, row_topk=row_topk, topk=topk),
            )
    for number in range(count):
        dtype, joined, tokens = list(STORED)[number % 3], pick(1, 2, 3), pick(1, 2, 3, 4, 7, 8, 12, 13, 25)
        key_dim, keys = pick(1, 3, 16, 24, 40), pick(1, 15, 16, 17, 33, 100, 128, 150)
        matrices = [place_at_edge(STORED[dtype](rng.standard_normal((key_dim, keys)))) for _ in range(joined)]
        queries = normal(tokens, joined * key_dim)
        yield Case("key_scores", recorder, [kernel_calls.key_scores(NATIVE, queries, matrices, key_dtype=dtype)])
    for _ in range(count):
        size = pick(1, 7, 8, 15, 16, 17, 61, 100)
        yield Case("normalize", recorder, [kernel_calls.normalize(NATIVE, normal(2, size), 1e-5)])
        values = normal(size)
        yield Case("narrow", recorder, [kernel_calls.narrow(NATIVE, values)])
        yield Case("widen", recorder, [kernel_calls.widen(NATIVE, place_at_edge(values.astype(np.float16)))])
        cpu_kernels.gather(NATIVE, normal(5, size), place_at_edge(rng.integers(0, 5, 7)))
        total = recorder.calls[-1][2]["total"]
        yield Case("gather", recorder, [np.frombuffer(total, dtype=np.float32)])


def main(target: str, count: int) -> None:
    """Print how many cases there were, and what is wrong with those that differ."""
    library = cpu_kernels.load_kernels()
    library.umv2_compiled_kernels.restype = ctypes.c_void_p
    recorder = Recorder(library)
    cpu_kernels.load_kernels = lambda: recorder  # type: ignore[assignment]
    made = list(cases(recorder, count))
    # What is told that it has a page more than it has must fault.
    short, result = place_at_edge(np.zeros(16, dtype=np.uint16)), np.zeros(4096, dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        emulator = Emulator(load_bochs(Path(folder)))
    kernels = library.umv2_compiled_kernels(target.encode())
    problems = [problem for case in made if (problem := case.emulate(emulator, library, kernels))]
    widen = ctypes.cast(library.umv2_widen, ctypes.c_void_p).value or 0
    emulator.call(widen, kernels, short.ctypes.data, short.size, result.ctypes.data)
    try:
        emulator.call(widen, kernels, short.ctypes.data, result.size, result.ctypes.data)
        problems.append("a read past the end of an array went unnoticed")
    except Fault:
        pass
    print(json.dumps({"cases": len(made), "problems": problems}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
