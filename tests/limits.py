"""Bounds for what must fail fast: an absurd size in a file costs an error message, not the machine's memory."""

import contextlib
import resource
import signal
from collections.abc import Iterator
from types import FrameType

__all__ = ["resident_bytes", "within_limits"]


@contextlib.contextmanager
def within_limits(*, memory_bytes: int = 10**9, cpu_seconds: float = 2.0) -> Iterator[None]:
    """Run the block with this much more address space and CPU time; MemoryError or TimeoutError is raised beyond."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"more than {cpu_seconds} s of CPU time")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGVTALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (_status_bytes("VmSize") + memory_bytes, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, handler)


def resident_bytes() -> int:
    """Anonymous memory of this process; pages of mapped files do not count."""
    return _status_bytes("RssAnon")


def _status_bytes(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
