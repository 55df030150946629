"""Progress bars on stderr: for a person at a terminal, silent everywhere else."""

import contextlib
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from umv2_export.console import open_console

__all__ = ["Advance", "Tracker", "progress_bars", "silent"]

Advance = Callable[[int], None]

# Starts a task of so many bytes, or of unknown length (None), and returns how to advance or end it.
Tracker = Callable[[str, int | None], Advance]


def silent(description: str, total: int | None) -> Advance:
    """A tracker that shows nothing."""
    return lambda _: None


@contextlib.contextmanager
def progress_bars() -> Iterator[Tracker]:
    """A tracker whose bars are drawn when stderr is a terminal."""
    console = open_console(stderr=True)
    if not console.is_terminal:
        yield silent
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:

        def track(description: str, total: int | None) -> Advance:
            task = progress.add_task(description, total=total)
            if total is None:
                return lambda _: progress.update(task, total=1, completed=1)
            return lambda amount: progress.advance(task, amount)

        yield track
