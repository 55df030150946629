"""From a command to an exit code: whatever ends it, a user reads why, `--json` prints one object, and no traceback."""

import contextlib
import io
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

import click

from umv2_export import terminal
from umv2_export.errors import EnvironmentUnfit, Umv2Error
from umv2_export.terminal import ReaderGone, echo

__all__ = ["json_wanted", "note_json", "print_json", "run"]

EXIT_INTERNAL = 70
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

# Those that end a command from outside and leave it the time to remove what it has half written.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class _Result:
    """What a command has to say with --json: printed once, when nothing can fail any more."""

    wanted: bool = False
    document: str = ""


_result = _Result()


def json_wanted(arguments: list[str]) -> bool:
    """Whether --json was given, of a command line that could not be parsed."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return "--json" in arguments[:end]


def note_json(context: click.Context, option: click.Parameter, value: bool) -> bool:
    """Callback of --json, which knows better than a look at the arguments."""
    _result.wanted = value
    return value


def print_json(document: Mapping[str, Any]) -> None:
    """The one JSON object of this command; NaN is not JSON. It is printed when the command has ended."""
    _result.document = json.dumps(document, indent=2, allow_nan=False, default=dict)


def run(cli: click.Group) -> int:
    """Run the command line of this process; returns the exit code.

    A verdict's code stands whatever becomes of its text: 4 is for a success whose text was lost on a full disk. Where
    the reader of stdout has gone, the code is 141, and nothing is said, as with other tools.
    """
    terminal.reset()
    _result.wanted, _result.document = json_wanted(sys.argv[1:]), ""
    with _interrupts(), _streams():
        try:
            code = _outcome(cli)
            if _result.wanted and _result.document:
                echo(_result.document)
            terminal.standard_stream().flush()
            lost = terminal.lost_output()
            if lost is not None and code == 0:
                code = EnvironmentUnfit.exit_code
                echo(f"error: stdout could not be written: {lost}\n  fix: the command itself succeeded", err=True)
        except ReaderGone:
            code = EXIT_BROKEN_PIPE
        except KeyboardInterrupt:  # a second one, or one while the result is written
            code = EXIT_INTERRUPTED
    return code


def _outcome(cli: click.Group) -> int:
    code: object = 0
    try:
        # Not cli.main(): it turns a closed pipe into exit code 1, which says that a check failed.
        with cli.make_context("umv2-export", sys.argv[1:]) as context:
            cli.invoke(context)
    except ReaderGone:
        raise
    except Umv2Error as error:
        code = _report(error)
    except click.ClickException as error:
        text = io.StringIO()
        error.show(text)
        echo(text.getvalue().rstrip(), err=True)
        code = _error(error.exit_code, error.format_message())
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except SystemExit as stop:
        code = stop.code or 0
    except (KeyboardInterrupt, click.Abort):
        echo("interrupted", err=True)
        code = _error(EXIT_INTERRUPTED, "interrupted")
    except (OSError, MemoryError) as error:
        code = _report(EnvironmentUnfit(str(error) or "not enough memory"))
    except BaseException as error:  # a bug of ours, or the panic of a library: told apart from a failed check
        code = _report_bug(error)
    return code if isinstance(code, int) else EXIT_INTERNAL


def _report(error: Umv2Error) -> int:
    print_json(error.as_json())
    echo(f"error: {error.message()}", err=True)
    return error.exit_code


def _report_bug(error: BaseException) -> int:
    if os.environ.get("UMV2_TRACEBACK"):
        echo("".join(traceback.format_exception(error)), err=True)
    what = f"internal error: {type(error).__name__}: {error}"
    echo(f"{what}\n  fix: please report it, with what UMV2_TRACEBACK=1 shows", err=True)
    return _error(EXIT_INTERNAL, what)


def _error(code: int, what: str) -> int:
    print_json({"error": {"exit_code": code, "what": what}})
    return code


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    """Let everything that is printed, by libraries too, pass through streams that survive what they lead to."""
    stdout, stderr = terminal.standard_stream(), terminal.standard_stream(stderr=True)
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        yield


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as SIGINT does: what it has half written is removed."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            # One that is ignored stays ignored, as under nohup.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                previous[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
