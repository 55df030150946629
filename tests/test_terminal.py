"""Text from files on its way to the terminal: nothing in it moves the cursor, reorders lines or forges one."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.command import run_command
from tests.golden import GOLDEN_CASES
from umv2_export.commands.parity_table import print_parity
from umv2_export.console import open_console
from umv2_export.errors import InputRejected
from umv2_export.parity.compare import Check
from umv2_export.parity.report import ParityReport
from umv2_export.terminal import one_line, printable

Exported = Callable[..., tuple[Path, dict[str, Any]]]

RING = next(case for case in GOLDEN_CASES if case.name == "v2_shared_ring")

# ESC and the C1 control that terminals take for ESC [; BEL, backspace, carriage return; bidirectional override and
# isolate; line and paragraph separator; no-break zero width; half a surrogate pair; private use.
STEERING = (
    "\x1b[31m",
    "\x9b31m",
    "\x07",
    "\x08",
    "\r",
    "\u202e",
    "\u2066",
    "\u2028",
    "\u2029",
    "\ufeff",
    "\udc9b",
    "\ue000",
)


def steers(text: str) -> bool:
    return any(sign in text for sign in (*"\x1b\x9b\x07\x08\r", *STEERING[5:]))


@pytest.mark.parametrize("text", STEERING, ids=ascii)
def test_what_steers_a_terminal_is_escaped(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(f"a{text}b") != f"a{text}b"


@pytest.mark.parametrize("text", ["größe", "日本語\u3000記憶", "a\u00a0b", "naïve\n", "😀"])
def test_what_people_write_stays(text: str) -> None:
    assert printable(text) == text


def test_a_name_cannot_forge_a_line() -> None:
    assert one_line("name\nerror: none") == "name\\nerror: none"


@pytest.mark.parametrize("text", STEERING, ids=ascii)
def test_an_error_message_is_printable(text: str) -> None:
    error = InputRejected(f"tensor {text}", where=f"folder {text}", why=text, fix=text)
    assert not steers(error.message())


@pytest.fixture
def bundle(exported: Exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported("v2_shared_ring")[0], tmp_path / "bundle"))


HOSTILE = "".join(STEERING[:10]) + "\nkind: forged"


def hostile_files(bundle: Path) -> Iterator[Path]:
    """The bundle with such text in every field that holds free text, and its graph."""
    document = json.loads((bundle / "manifest.json").read_text())
    document["tool_version"] = HOSTILE
    document["source"]["format"] = HOSTILE
    document["source"]["files"] = {HOSTILE: "0" * 64}
    document["files"][HOSTILE] = {"size": 1, "sha256": ""}
    (bundle / HOSTILE.replace("/", "")).write_bytes(b"x")
    (bundle / "manifest.json").write_text(json.dumps(document))
    yield bundle
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    model.producer_name = HOSTILE
    model.graph.node[0].op_type = model.graph.node[0].domain = HOSTILE
    model.graph.input[0].name = HOSTILE
    model.functions[0].name = HOSTILE
    (bundle / "other.onnx").write_bytes(model.SerializeToString())
    yield bundle / "other.onnx"


def test_inspect_prints_no_control_character_of_a_file(bundle: Path) -> None:
    for path in hostile_files(bundle):
        result = run_command("inspect", path)
        assert result.exit_code == 0, result.stderr
        assert "forged" in result.stdout
        assert "kind: forged" not in result.stdout.splitlines()
        assert not steers(result.stdout)


def test_verify_and_json_print_none_either(bundle: Path) -> None:
    for _ in hostile_files(bundle):
        pass
    result = run_command("verify", bundle)
    assert result.exit_code == 1
    assert not steers(result.stderr)
    assert run_command("inspect", bundle, "--json").stdout.isascii()


def test_a_table_prints_none_either(capsys: pytest.CaptureFixture[str]) -> None:
    check = Check(HOSTILE, HOSTILE, "logits", "pass", 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, note=HOSTILE)
    print_parity(ParityReport([check]), HOSTILE)
    open_console(stderr=True).print(HOSTILE, markup=False)
    printed = capsys.readouterr()
    assert "forged" in printed.out
    assert not steers(printed.out)
    assert not steers(printed.err)


def test_a_path_that_the_user_typed_is_printed_the_same_way(tmp_path: Path) -> None:
    result = run_command("inspect", tmp_path / "a\x1b[2Jb\u202ec")
    assert result.exit_code == 3
    assert not steers(result.stderr)


@pytest.mark.parametrize("command", ["convert", "inspect", "onnx"])
def test_a_usage_error_prints_none_either(command: str) -> None:
    result = run_command(command, RING, "--no-such\x9b31m")
    assert result.exit_code == 2
    assert not steers(result.stderr)
