"""What reaches the terminal. All text passes through here, so that none of a file's can steer it."""

import os
import sys
import unicodedata
from typing import Any, TextIO

__all__ = ["ReaderGone", "Stream", "echo", "lost_output", "one_line", "printable", "reset", "standard_stream"]


class ReaderGone(Exception):
    """Whatever read stdout has closed it, as `| head -1` does."""


# The first error of a write to stdout that failed for another reason; the command goes on, its verdict counts.
_lost: list[OSError] = []


def printable(text: str, keep: str = "\n") -> str:
    """The text, escaped where it would move the cursor, reorder what is shown, or show nothing.

    That is: controls of both sets, bidirectional overrides, line separators, private and unassigned characters, halves
    of surrogate pairs.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or not _steers(c) else ascii(c)[1:-1] for c in text)


def _steers(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] == "C" or category in ("Zl", "Zp")


def one_line(text: str) -> str:
    """Printable text in which a line break is escaped too: a name could forge a line of its own."""
    return printable(text, keep="")


def echo(text: str, *, err: bool = False, keep: str = "\n", end: str = "\n") -> None:
    """Print a line, or, with another end, a part of one."""
    stream = standard_stream(stderr=err)
    stream.write(printable(text, keep) + end)
    stream.flush()


class Stream:
    """stdout or stderr, whatever becomes of it.

    A write to stdout whose reader is gone raises `ReaderGone`. Any other failure is kept for `lost_output`, or on
    stderr forgotten, and the stream then leads nowhere: a full disk under a log must not lose a verdict.
    """

    def __init__(self, stream: "TextIO | _Nowhere", *, stderr: bool) -> None:
        self._stream, self._stderr = stream, stderr

    def write(self, text: str) -> int:
        """Write text, escaped where the stream's encoding has no such character."""
        encoding = self._stream.encoding or "utf-8"
        try:
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self._fail(error)
        return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError):
            descriptor = None
        if descriptor is not None:
            # What is still in the buffer goes there too: Python flushes it when it ends, and would complain.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
        if self._stderr:
            return
        if isinstance(error, BrokenPipeError):
            raise ReaderGone from error
        if isinstance(error, OSError):
            _lost.append(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def standard_stream(*, stderr: bool = False) -> Stream:
    """The stream of this moment; one that was closed before the command began leads nowhere."""
    stream = sys.stderr if stderr else sys.stdout
    return Stream(_Nowhere() if stream is None else stream, stderr=stderr)


class _Nowhere:
    encoding = "utf-8"

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        raise OSError


def lost_output() -> OSError | None:
    """Why not all of stdout could be written, where that is so."""
    return _lost[0] if _lost else None


def reset() -> None:
    """Forget the failures of an earlier command of this process."""
    _lost.clear()
