"""`umv2-export`, and `python -m umv2_export`. First of all an interrupt is made silent: imports take 0.1 to 3 s.

What Python does before it comes here (0.03 s) is out of reach. This file imports nothing that Python has not loaded.
"""

import atexit
import os
import signal
import sys

__all__ = ["main"]

EXIT_INTERRUPTED = 130

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _quit(number: int, frame: object) -> None:
    """Nothing was begun: there is nothing to remove."""
    json = b'{"error": {"exit_code": 130, "what": "interrupted"}}\n' if "--json" in sys.argv else b""
    for descriptor, text in ((1, json), (2, b"interrupted\n")):
        try:
            os.write(descriptor, text)
        except OSError:
            continue
    os._exit(EXIT_INTERRUPTED)


def _quit_silently(number: int, frame: object) -> None:
    """All was said: Python itself is ending."""
    os._exit(EXIT_INTERRUPTED)


def _ignore() -> None:
    """Python takes its handlers away when it ends: a signal would then stand in the place of the exit code."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _on_interrupt(*, silently: bool) -> None:
    for number in SIGNALS:
        # One that is ignored stays ignored, as under nohup.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _quit_silently if silently else _quit)


def main() -> None:
    """Run the command line."""
    _on_interrupt(silently=False)
    # The first to be registered is the last to be called.
    atexit.register(_ignore)
    try:
        from umv2_export.cli import main as run  # noqa: PLC0415 - not before interrupts are dealt with

        run()
    finally:
        _on_interrupt(silently=True)


if __name__ == "__main__":
    main()
