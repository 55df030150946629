"""Anonymous memory for tables that are read at random, in huge pages where the system grants them."""

import mmap
from pathlib import Path

__all__ = ["anonymous_memory", "available_bytes"]

CGROUP = Path("/sys/fs/cgroup")


def anonymous_memory(size: int, *, huge_pages: bool = True) -> mmap.mmap:
    """Zeroed memory that lives as long as what refers to it.

    Args:
        size: bytes, at least 1.
        huge_pages: ask for pages of 2 MiB: a row of a large table then costs no page walk of its own. A request, which
            the system may refuse without a word (see /sys/kernel/mm/transparent_hugepage/enabled).
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
    return memory


def available_bytes() -> int | None:
    """Memory that can be had without swapping, within the limit of a container; None where the system does not say."""
    free = [size for size in (_free_of_machine(), _free_of_container()) if size is not None]
    return min(free, default=None)


def _free_of_machine() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def _free_of_container() -> int | None:
    """Of control group version 2; page cache counts as used, though it would give way."""
    try:
        limit, used = (int((CGROUP / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no such group, or "max": no limit
        return None
    return max(0, limit - used)
