"""How commands end: the exit code tells the verdict, whatever becomes of the text; --json prints one object, always."""

import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import umv2_export.cli
from tests.command import run_command
from tests.golden import GOLDEN_CASES
from umv2_export.errors import InvalidRequest
from umv2_export.parity.compare import Check
from umv2_export.parity.report import ParityReport
from umv2_export.system import exits

Exported = Callable[..., tuple[Path, dict[str, Any]]]

GOLDEN = {case.name: case for case in GOLDEN_CASES}
RING = GOLDEN["v2_shared_ring"]
MODULE = (sys.executable, "-m", "umv2_export")


class BrokenStream(io.StringIO):
    """A stream whose every write fails."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self._code = code

    def write(self, text: str) -> int:
        raise OSError(self._code, os.strerror(self._code))


def exit_code(*arguments: object, stdout: io.StringIO | None = None, stderr: io.StringIO | None = None) -> object:
    argv = ["umv2-export", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(stdout or io.StringIO()),
        contextlib.redirect_stderr(stderr or io.StringIO()),
        pytest.raises(SystemExit) as stop,
    ):
        umv2_export.cli.main()
    return stop.value.code


@pytest.fixture
def failing(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle whose parity check fails."""
    bundle = exported("v2_shared_ring")[0]
    facts: dict[str, Any] = dict.fromkeys(("max_abs", "max_rel", "median_abs", "required_atol"), 1.0)
    check = mock.Mock(spec=Check, **facts)
    report = ParityReport([check])
    monkeypatch.setattr(ParityReport, "passed", False)
    monkeypatch.setattr(ParityReport, "as_dict", lambda self: {"passed": False})
    monkeypatch.setattr("umv2_export.parity.check_bundle", lambda *arguments, **options: report)
    monkeypatch.setattr("umv2_export.commands.parity_table.print_parity", lambda *arguments: print("FAILED " * 10_000))
    return bundle


# The reader of stdout has gone.


@pytest.mark.parametrize("arguments", [("inspect", RING), ("inspect", RING, "--json"), ("--help",), ("env",)], ids=str)
def test_a_closed_pipe_is_exit_code_141_and_silence(arguments: tuple[object, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stdout:
        done = subprocess.run([*MODULE, *map(str, arguments)], stdout=stdout, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_closed_pipe_under_a_failed_check_is_not_a_passed_one(failing: Path, options: tuple[str, ...]) -> None:
    stderr = io.StringIO()
    assert exit_code("parity", failing, *options, stdout=BrokenStream(errno.EPIPE), stderr=stderr) == 141
    assert stderr.getvalue() == ""


def test_another_pipe_that_breaks_is_not_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "umv2_export.inspection.describe_path", mock.Mock(side_effect=BrokenPipeError(32, "a worker's"))
    )
    result = run_command("inspect", RING)
    assert result.exit_code == 4
    assert "a worker's" in result.stderr


# stdout or stderr cannot be written.


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_failed_check_is_exit_code_1_though_its_text_is_lost(failing: Path, options: tuple[str, ...]) -> None:
    for stderr in (None, BrokenStream(errno.ENOSPC)):
        assert exit_code("parity", failing, *options, stdout=BrokenStream(errno.ENOSPC), stderr=stderr) == 1


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_success_whose_text_is_lost_is_exit_code_4_and_says_so(options: tuple[str, ...]) -> None:
    with open("/dev/full", "w", encoding="ascii") as full:
        done = subprocess.run(
            [*MODULE, "inspect", str(RING), *options], stdout=full, stderr=subprocess.PIPE, check=False, text=True
        )
    assert done.returncode == 4
    assert "stdout could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize(("path", "code"), [(RING, 0), ("missing", 3)])
def test_a_full_stderr_changes_no_exit_code(path: object, code: int) -> None:
    with open("/dev/full", "w", encoding="ascii") as full:
        done = subprocess.run([*MODULE, "inspect", str(path)], stdout=subprocess.PIPE, stderr=full, check=False)
    assert done.returncode == code


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-"])
def test_streams_that_are_closed_from_the_start_are_no_error(redirection: str) -> None:
    script = f'"$0" -m umv2_export inspect "$1" {redirection}'
    done = subprocess.run(["/bin/sh", "-c", script, sys.executable, RING], check=False, capture_output=True)
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr


def test_a_character_that_the_encoding_of_stdout_lacks_is_escaped(tmp_path: Path) -> None:
    (tmp_path / "größe").mkdir()
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*MODULE, "init", "umv2-tiny", "-o", tmp_path / "größe" / "output"],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0
    assert b"gr\\xf6\\xdfe" in done.stdout


# One JSON object.


def raising(error: BaseException) -> Callable[..., object]:
    return mock.Mock(side_effect=error)


class Panic(BaseException):
    """What a library in Rust raises when it fails."""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ZeroDivisionError("a bug"), 70),
        (Panic("a panic"), 70),
        (RecursionError("a bug"), 70),
        (KeyboardInterrupt(), 130),
        (MemoryError(), 4),
        (OSError(errno.EIO, "Input/output error"), 4),
        (InvalidRequest("a mistake"), 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_ends_a_command_json_is_one_object(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("umv2_export.inspection.describe_path", raising(error))
    result = run_command("inspect", RING, "--json")
    assert result.exit_code == json.loads(result.stdout)["error"]["exit_code"] == code
    assert result.stderr
    assert run_command("inspect", RING).stdout == ""


def test_an_error_after_the_result_replaces_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = exits.print_json

    def print_and_fail(document: Any) -> None:
        plain(document)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("umv2_export.commands.inspect.print_json", print_and_fail)
    result = run_command("inspect", RING, "--json")
    assert json.loads(result.stdout)["error"]["exit_code"] == result.exit_code == 4


def test_a_bug_shows_its_traceback_on_request_and_keeps_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UMV2_TRACEBACK", "1")
    monkeypatch.setattr("umv2_export.inspection.describe_path", raising(ZeroDivisionError("a bug")))
    result = run_command("inspect", RING, "--json")
    assert result.exit_code == json.loads(result.stdout)["error"]["exit_code"] == 70
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(
    "arguments", [("--json",), ("nothing", "--json"), ("inspect", "--json"), ("env", "--json", "--no-such")], ids=str
)
def test_a_command_line_that_cannot_be_read_is_one_object_too(arguments: tuple[str, ...]) -> None:
    result = run_command(*arguments)
    assert result.exit_code == json.loads(result.stdout)["error"]["exit_code"] == 2


def test_an_argument_that_reads_json_is_not_the_option(tmp_path: Path) -> None:
    assert run_command("inspect", "--", "--json").stdout == ""
    assert run_command("generate", tmp_path, "--prompt", "--json").stdout == ""


# Interrupts.

# Stands in the place of click, which is imported first of all, and interrupts there.
INTERRUPTING_IMPORT = """
import os, signal, sys, time
os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
time.sleep(60)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_an_interrupt_before_the_command_line_is_loaded_shows_no_traceback(
    tmp_path: Path, name: str, options: tuple[str, ...]
) -> None:
    (tmp_path / "click.py").write_text(INTERRUPTING_IMPORT)
    done = subprocess.run(
        [*MODULE, "env", *options],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "SIGNAL": name},
        capture_output=True,
        check=False,
        text=True,
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
    assert (json.loads(done.stdout)["error"]["exit_code"] == 130) if options else done.stdout == ""


# Python deletes what a module holds after it took its signal handlers away.
LATE = """
import os, signal, sys
class Late:
    def __init__(self, number):
        self.kill, self.arguments = os.kill, (os.getpid(), number)
    def __del__(self):
        self.kill(*self.arguments)
late = Late(getattr(signal, sys.argv[1]))
sys.argv = ["umv2-export", "--version"]
from umv2_export.__main__ import main
main()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_while_python_ends_changes_no_exit_code(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", LATE, name], capture_output=True, check=False, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("umv2-export")


def test_the_command_that_is_installed_starts_where_interrupts_are_dealt_with() -> None:
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert 'umv2-export = "umv2_export.__main__:main"' in pyproject


# Writes without end, as an export does.
ENDLESS = """
import sys, time
import umv2_export.checkpoint.own_format as native
def write(file, tensors, advance):
    file.write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
native._write_file = write
sys.argv = ["umv2-export", "convert", sys.argv[1], "-o", sys.argv[2], *sys.argv[3:]]
from umv2_export.__main__ import main
main()
"""


@pytest.mark.parametrize(("name", "options"), [("SIGTERM", ()), ("SIGINT", ("--json",)), ("SIGHUP", ())])
def test_a_signal_that_ends_a_run_leaves_nothing_half_written(
    tmp_path: Path, name: str, options: tuple[str, ...]
) -> None:
    command = [sys.executable, "-c", ENDLESS, str(RING), str(tmp_path / "output"), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "writing\n"
        assert len(list(tmp_path.iterdir())) == 1
        run.send_signal(getattr(signal, name))
        stdout, stderr = run.communicate(timeout=30)
    assert (run.returncode, stderr) == (130, "interrupted\n")
    assert (json.loads(stdout)["error"]["exit_code"] == 130) if options else stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_was_ignored_stays_ignored(tmp_path: Path) -> None:
    command = [
        "/bin/sh",
        "-c",
        'trap "" HUP; exec "$0" "$@"',
        sys.executable,
        "-c",
        ENDLESS.replace("time.sleep(60)", "time.sleep(0.5)"),
        str(RING),
        str(tmp_path / "o"),
    ]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "writing\n"
        run.send_signal(signal.SIGHUP)
        time.sleep(0.1)
        run.communicate(timeout=60)
    assert run.returncode == 0
