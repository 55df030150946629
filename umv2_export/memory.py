"""Anonymous memory for tables that are read at random, in huge pages where the system grants them."""

import mmap

__all__ = ["anonymous_memory", "available_bytes"]


def anonymous_memory(size: int, *, huge_pages: bool = True) -> mmap.mmap:
    """Zeroed memory that lives as long as what refers to it.

    Args:
        size: bytes, at least 1.
        huge_pages: ask for pages of 2 MiB: a row of a large table then costs no page walk of its own. A request, which
            the system may refuse without a word (see /sys/kernel/mm/transparent_hugepage/enabled).
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
