"""The command line, run in this process: an import of torch costs two seconds, and there are a hundred calls."""

import contextlib
import io
import sys
from dataclasses import dataclass
from unittest import mock

import umv2_export.cli

__all__ = ["Result", "run_command"]


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    exit_code: int
    stdout: str
    stderr: str


def run_command(*arguments: object) -> Result:
    """Run `umv2-export` with these arguments, through the entry point that turns errors into exit codes."""
    stdout, stderr = io.StringIO(), io.StringIO()
    argv = ["umv2-export", *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            umv2_export.cli.main()
        except SystemExit as stop:
            code = stop.code
    if not isinstance(code, int):
        raise TypeError(f"the exit code is {code!r}")
    return Result(code, stdout.getvalue(), stderr.getvalue())
