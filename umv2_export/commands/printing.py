"""Lines that several commands print."""

from collections.abc import Iterable
from pathlib import Path

from umv2_export.system.exits import print_json
from umv2_export.terminal import echo

__all__ = ["format_bytes", "format_count", "print_dry_run", "print_notes"]


def format_bytes(size: float) -> str:
    """Decimal units, as disks are sold, in four digits; `rich.filesize.decimal` fixes those after the point alone."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size >= factor:
            return f"{size / factor:.4g} {unit}"
    return f"{size:.0f} bytes"


def format_count(number: float) -> str:
    """Parameters, in the units of model names."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= factor:
            return f"{number / factor:.4g}{unit}"
    return f"{number:.0f}"


def print_notes(notes: Iterable[str]) -> None:
    """What a user should know and did not ask for."""
    for note in notes:
        echo(f"note: {note}", err=True)


def print_dry_run(output: Path, memory: int, disk: int, validation: int | None = None, *, as_json: bool) -> None:
    """What a run would need; `validation` is the memory of the check after it, 0 where that is left out."""
    if as_json:
        checked = {} if validation is None else {"validation_memory_bytes": validation}
        facts = {"dry_run": True, "output": str(output), "peak_memory_bytes": memory, "disk_bytes": disk}
        print_json({**facts, **checked})
        return
    check = {None: "", 0: ", without the check against PyTorch"}.get(
        validation, f"; the check against PyTorch takes {format_bytes(validation or 0)} of it"
    )
    echo(f"{output}: needs {format_bytes(disk)} of disk and about {format_bytes(memory)} of memory{check}")
