"""Tables and progress bars, on streams that survive and with text that is printable."""

from collections.abc import Iterable
from typing import Any, NoReturn

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table

from umv2_export.terminal import ReaderGone, printable, standard_stream

__all__ = ["open_console", "print_table"]


class _PrintableConsole(Console):
    """Text that came from a file is escaped here, wherever it stands in a table; colours are rich's own."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

    def on_broken_pipe(self) -> NoReturn:
        """Rich would exit with code 1."""
        raise ReaderGone


def print_table(table: Table, *, stderr: bool = False) -> None:
    """Print a table; piped into a file, it keeps its columns."""
    console = open_console(stderr=stderr)
    (console if console.is_terminal else open_console(stderr=stderr, width=200)).print(table)


def open_console(*, stderr: bool = False, **options: Any) -> Console:
    """A console on the stream of this moment."""
    return _PrintableConsole(file=standard_stream(stderr=stderr), stderr=stderr, **options)  # type: ignore[arg-type]
