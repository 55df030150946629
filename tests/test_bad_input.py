"""Bad input and unfit machines: a clear message, the right exit code, and nothing written."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.checkpoint.variants import (
    GOLDEN,
    VALUES,
    changed_tensors,
    copy_golden,
    load_golden,
    remove_field,
    set_fields,
    split_into_ranks,
)
from tests.command import Result, run_command
from umv2_export import errors
from umv2_export.checkpoint import open_checkpoint
from umv2_export.onnx.export import ExportOptions, plan_export
from umv2_export.system.output import HashedFile, atomic_directory

USAGE, REJECTED, ENVIRONMENT, UNSUPPORTED, INTERRUPTED = 2, 3, 4, 5, 130

RING = GOLDEN["v2_shared_ring"]
BYTES_TOKENIZER = Path(__file__).parents[1] / "samples" / "checkpoints" / "moe" / "tokenizer.json"


def assert_refused(result: Result, output: Path, exit_code: int, *named: str) -> None:
    """The exit code, a message that names these things, and no trace of an output."""
    assert result.exit_code == exit_code, result.stderr
    for text in named:
        assert text in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not os.path.lexists(output)
    if output.parent.is_dir():
        assert not list(output.parent.glob(".*"))


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """A checkpoint that a test may spoil."""
    return copy_golden(tmp_path)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Where nothing may appear."""
    return tmp_path / "results" / "output"


def test_every_class_of_error_has_its_documented_exit_code() -> None:
    codes = {name: getattr(errors, name).exit_code for name in errors.__all__ if name[0].isupper()}
    assert codes == {
        "Umv2Error": 1,
        "CheckFailed": 1,
        "InvalidRequest": 2,
        "InputRejected": 3,
        "EnvironmentUnfit": 4,
        "Unsupported": 5,
        "BuildFailed": 6,
    }


# Checkpoints that are refused before anything is computed, by every command that reads one.


class Spoil(NamedTuple):
    """A way to spoil a checkpoint, the exit code, and what the message names."""

    spoil: Callable[[Path], object]
    exit_code: int
    named: tuple[str, ...]


def truncate_weights(checkpoint: Path) -> None:
    os.truncate(checkpoint / "model.pt", (checkpoint / "model.pt").stat().st_size // 2)


def make_table_narrow(checkpoint: Path) -> None:
    with changed_tensors(checkpoint) as state:
        state[VALUES] = torch.zeros(768, 16)


def make_table_int8(checkpoint: Path) -> None:
    with changed_tensors(checkpoint) as state:
        state[VALUES] = state[VALUES].to(torch.int8)


def add_tensor(checkpoint: Path) -> None:
    with changed_tensors(checkpoint) as state:
        state["transformer.gate.weight"] = torch.zeros(1)


def remove_tensor(checkpoint: Path) -> None:
    with changed_tensors(checkpoint) as state:
        del state["transformer.ln_f.weight"]


def repeat_an_address(checkpoint: Path) -> None:
    with changed_tensors(checkpoint) as state:
        state["transformer.mem_blocks.0.shuffle_index"][:2] = 5


def remove_a_rank(checkpoint: Path) -> None:
    split_into_ranks(checkpoint)
    shutil.rmtree(checkpoint / "rank_1")


SPOILS = {
    "missing folder": Spoil(shutil.rmtree, REJECTED, ("no such", "official")),
    "missing config": Spoil(
        lambda c: (c / "config.yaml").unlink(),
        REJECTED,
        ("the folder holds no checkpoint", "config.yaml", "config.json"),
    ),
    "missing weights": Spoil(lambda c: (c / "model.pt").unlink(), REJECTED, ("model.pt",)),
    "truncated weights": Spoil(truncate_weights, REJECTED, ("truncated", "model.pt")),
    "empty weights": Spoil(lambda c: os.truncate(c / "model.pt", 0), REJECTED, ("truncated", "model.pt")),
    "config that is no YAML": Spoil(
        lambda c: (c / "config.yaml").write_text("model: {"), REJECTED, ("not a YAML file", "config.yaml")
    ),
    "date that is none in the config": Spoil(
        lambda c: (c / "config.yaml").write_text("when: 2024-13-45"), REJECTED, ("config.yaml",)
    ),
    "no mem_knum": Spoil(
        lambda c: remove_field(c, "mem_knum"), REJECTED, ("field 'mem_knum' is missing", "config.yaml")
    ),
    "mem_knum that contradicts the tensors": Spoil(
        lambda c: set_fields(c, mem_knum=17), REJECTED, ("shape", "the configuration says", "model.pt")
    ),
    "absurd mem_knum": Spoil(lambda c: set_fields(c, mem_knum=2**31), REJECTED, ("mem_knum", "2147483648")),
    "narrow table": Spoil(make_table_narrow, REJECTED, (VALUES, "[768, 16]", "[768, 32]")),
    "missing tensor": Spoil(remove_tensor, REJECTED, ("transformer.ln_f.weight",)),
    "unknown tensor": Spoil(add_tensor, UNSUPPORTED, ("transformer.gate.weight",)),
    "unknown field": Spoil(lambda c: set_fields(c, mem_gate=True), UNSUPPORTED, ("mem_gate", "config.yaml")),
    "field that is not implemented": Spoil(lambda c: set_fields(c, alibi=True), UNSUPPORTED, ("'alibi' is True",)),
    "int8 table": Spoil(make_table_int8, UNSUPPORTED, (VALUES, "int8")),
    "address that stands twice": Spoil(repeat_an_address, REJECTED, ("mem_blocks.0.shuffle_index", "permutation")),
    "missing rank": Spoil(remove_a_rank, REJECTED, ("rank_1/model.pt",)),
}


@pytest.mark.parametrize("command", ["onnx", "convert"])
@pytest.mark.parametrize("name", SPOILS)
def test_a_spoiled_checkpoint_is_refused(official: Path, output: Path, name: str, command: str) -> None:
    case = SPOILS[name]
    case.spoil(official)
    assert_refused(run_command(command, official, "-o", output), output, case.exit_code, *case.named)


@pytest.mark.parametrize("name", SPOILS)
def test_inspect_refuses_it_in_the_same_words(official: Path, name: str) -> None:
    case = SPOILS[name]
    case.spoil(official)
    result = run_command("inspect", official)
    assert result.exit_code == case.exit_code
    assert all(text in result.stderr for text in case.named)


@pytest.mark.parametrize("name", SPOILS)
def test_with_json_the_refusal_is_the_one_object_on_stdout(official: Path, output: Path, name: str) -> None:
    case = SPOILS[name]
    case.spoil(official)
    result = run_command("onnx", official, "-o", output, "--json")
    error = json.loads(result.stdout)["error"]
    assert result.exit_code == error["exit_code"] == case.exit_code
    assert all(text in " ".join(str(fact) for fact in error.values()) for text in case.named)
    assert not output.exists()


def test_a_file_instead_of_a_folder_says_which_folder_to_pass(official: Path, output: Path) -> None:
    result = run_command("onnx", official / "model.pt", "-o", output)
    assert_refused(result, output, REJECTED, "a checkpoint is a folder", f"pass {official}")


class Attack:
    """Unpickled, it runs a shell command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("command", ["onnx", "convert", "inspect"])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(
    official: Path, output: Path, tmp_path: Path, command: str
) -> None:
    marker = tmp_path / "pwned"
    torch.save({**load_golden(), "attack": Attack(f"touch {marker}")}, official / "model.pt")
    arguments = [] if command == "inspect" else ["-o", output]
    assert_refused(run_command(command, official, *arguments), output, REJECTED, "more than tensors", "run code")
    assert not marker.exists()


def test_control_characters_of_a_file_do_not_reach_the_terminal(official: Path, output: Path) -> None:
    set_fields(official, **{"\x1b[31mred\x1b]0;title\x07": 1})
    result = run_command("convert", official, "-o", output)
    assert_refused(result, output, UNSUPPORTED, "unknown field")
    assert "\x1b" not in result.stderr


def test_tables_of_two_dtypes_are_refused_or_kept_in_the_wider_one(official: Path) -> None:
    with changed_tensors(official) as state:
        state[VALUES] = state[VALUES].bfloat16()
    try:
        plan = plan_export(open_checkpoint(official), ExportOptions())
    except errors.Umv2Error:
        return
    assert plan.form.layout.dtype == torch.float32


# NaN.


@pytest.fixture
def with_nan(official: Path) -> Path:
    """A checkpoint whose values hold NaN in row 5."""
    with changed_tensors(official) as state:
        state[VALUES][5, 3] = float("nan")
    return official


def test_nan_in_a_table_is_reported_with_tensor_and_row(with_nan: Path, output: Path) -> None:
    result = run_command("convert", with_nan, "-o", output)
    assert_refused(result, output, REJECTED, f"tensor '{VALUES}' holds NaN in row 5", "--allow-non-finite")


def test_nan_stops_an_export_that_has_begun_to_write(
    with_nan: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The graph takes 10 s to trace, and is not looked at before all weights are written.
    monkeypatch.setattr("umv2_export.onnx.export.trace", lambda *args, **options: None)
    monkeypatch.setattr("umv2_export.onnx.export.simplify", lambda model: None)
    result = run_command("onnx", with_nan, "-o", output)
    assert_refused(result, output, REJECTED, f"tensor '{VALUES}' holds NaN in row 5")


@pytest.mark.parametrize("tensor", ["transformer.wte.weight", "transformer.mem_blocks.1.keys"])
def test_infinity_in_any_other_tensor_is_reported_too(official: Path, output: Path, tensor: str) -> None:
    with changed_tensors(official) as state:
        state[tensor][0, 1] = float("inf")
    result = run_command("convert", official, "-o", output)
    assert_refused(result, output, REJECTED, f"tensor '{tensor}' holds infinity in row 0")


def test_allow_non_finite_lets_nan_through(with_nan: Path, output: Path) -> None:
    assert run_command("convert", with_nan, "-o", output, "--allow-non-finite").exit_code == 0
    table = open_checkpoint(output, allow_non_finite=True).read(VALUES)
    assert torch.isnan(table).nonzero().tolist() == [[5, 3]]


# Requests that cannot be followed.


@pytest.mark.parametrize("size", ["0", "0GB", "-1", "2XB", "GB", "nan", "inf", "1e400", ""])
def test_a_shard_size_that_is_none_is_a_usage_error(output: Path, size: str) -> None:
    assert_refused(run_command("onnx", RING, "-o", output, "--shard-size", size), output, USAGE, "--shard-size")


def test_a_shard_that_holds_no_row_is_a_usage_error_with_the_size_of_a_row(output: Path) -> None:
    result = run_command("onnx", RING, "-o", output, "--shard-size", "223")
    assert_refused(result, output, USAGE, "223 bytes", "224 bytes", "--shard-size")


@pytest.mark.parametrize("opset", [-1, 0, 17, 25, 2**40])
def test_an_opset_out_of_range_is_a_usage_error_with_the_range(output: Path, opset: int) -> None:
    result = run_command("onnx", RING, "-o", output, "--opset", opset)
    assert_refused(result, output, USAGE, f"opset {opset}", "18", "24")


@pytest.mark.parametrize(
    "arguments",
    [
        ["onnx", RING, "--shard-size", "0", "-o", "output"],
        ["onnx", RING, "--opset", "x", "-o", "output"],
        ["onnx", RING],
        ["onnx", RING, "-o", "output", "--frobnicate"],
        ["init", "umv3", "-o", "output"],
        ["convert"],
    ],
    ids=lambda arguments: " ".join(arguments[:1] + arguments[2:]),
)
def test_with_json_a_usage_error_is_the_one_object_on_stdout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[object]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run_command(*arguments, "--json")
    assert result.exit_code == USAGE
    assert json.loads(result.stdout)["error"]["exit_code"] == USAGE
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [["onnx", RING], ["convert", RING], ["init", "umv2-tiny"]], ids=lambda c: c[0])
def test_an_output_folder_that_is_not_empty_needs_force(output: Path, command: list[object]) -> None:
    output.mkdir(parents=True)
    (output / "precious").write_text("kept")
    result = run_command(*command, "-o", output)
    assert result.exit_code == USAGE
    assert "not empty" in result.stderr
    assert "--force" in result.stderr
    assert [entry.name for entry in output.iterdir()] == ["precious"]


def test_force_replaces_it(output: Path) -> None:
    output.mkdir(parents=True)
    (output / "old").write_text("old")
    assert run_command("convert", RING, "-o", output, "--force").exit_code == 0
    assert sorted(entry.name for entry in output.iterdir()) == ["config.json", "model.safetensors"]
    assert not list(output.parent.glob(".*"))


def test_force_keeps_the_old_output_when_the_new_one_fails(with_nan: Path, output: Path) -> None:
    output.mkdir(parents=True)
    (output / "old").write_text("old")
    assert run_command("convert", with_nan, "-o", output, "--force").exit_code == REJECTED
    assert (output / "old").read_text() == "old"
    assert not list(output.parent.glob(".*"))


def test_force_does_not_delete_the_checkpoint_that_is_read(official: Path) -> None:
    result = run_command("convert", official, "-o", official.parent, "--force")
    assert result.exit_code == USAGE
    assert "--force would delete" in result.stderr
    assert (official / "model.pt").exists()


@pytest.mark.parametrize("command", ["convert", "onnx"])
@pytest.mark.parametrize("name", ["words.json", "tokenizer.json"])
def test_force_does_not_delete_the_tokenizer_that_is_read(output: Path, name: str, command: str) -> None:
    output.mkdir(parents=True)
    tokenizer = Path(shutil.copyfile(BYTES_TOKENIZER, output / name))
    result = run_command(command, RING, "-o", output, "--force", "--tokenizer", tokenizer, "--dry-run")
    assert result.exit_code == USAGE
    assert f"--force would delete {tokenizer}" in result.stderr


@pytest.mark.parametrize("path", ["model.pt", "model.pt/output"])
def test_an_output_that_is_or_lies_under_a_file_is_a_usage_error(official: Path, path: str) -> None:
    before = (official / "model.pt").read_bytes()
    assert run_command("convert", RING, "-o", official / path).exit_code == USAGE
    assert (official / "model.pt").read_bytes() == before


def test_the_current_folder_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run_command("init", "umv2-tiny", "-o", ".")
    assert result.exit_code == USAGE
    assert not list(tmp_path.iterdir())


def test_a_dry_run_writes_nothing(output: Path) -> None:
    for command in (["onnx", RING], ["convert", RING], ["init", "umv2-tiny"]):
        assert run_command(*command, "-o", output, "--dry-run").exit_code == 0
    assert not output.exists()


def test_a_dry_run_refuses_what_a_run_would_refuse(official: Path, output: Path) -> None:
    truncate_weights(official)
    assert_refused(run_command("onnx", official, "-o", output, "--dry-run"), output, REJECTED, "truncated")


# What is not implemented.


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--dtype", "bf16"], ("bf16", "--target gpu")),
        (["--table-dtype", "int8"], ("int8", "--table-dtype")),
    ],
    ids=str,
)
def test_a_dtype_that_no_runtime_here_can_run_is_unsupported(
    output: Path, options: list[str], named: tuple[str, ...]
) -> None:
    assert_refused(run_command("onnx", RING, "-o", output, *options), output, UNSUPPORTED, *named)


@pytest.mark.parametrize("preset", ["umv1-tiny", "moe-tiny-top8"])
def test_principled_initialisation_without_pre_values_is_unsupported(preset: str, output: Path) -> None:
    result = run_command("init", preset, "-o", output, "--scheme", "principled")
    assert_refused(result, output, UNSUPPORTED, "pre-values")


# Unfit machines.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB; a converted golden checkpoint needs 900 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("command", ["onnx", "convert"])
@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=str)
def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(
    small_disk: Path, command: str, options: list[str]
) -> None:
    result = run_command(command, RING, "-o", small_disk / "output", *options)
    assert_refused(result, small_disk / "output", ENVIRONMENT, "GB free", "needs", str(small_disk))


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("umv2_export.system.output.require_free_space", lambda target, size: None)
    result = run_command("convert", RING, "-o", small_disk / "output")
    assert_refused(result, small_disk / "output", ENVIRONMENT, "the disk is full", "No space left on device")
    assert shutil.disk_usage(small_disk).free > 200_000


def test_an_output_that_another_run_is_writing_is_refused(output: Path) -> None:
    with atomic_directory(output) as folder:
        result = run_command("convert", RING, "-o", output)
        assert folder.exists()
    assert result.exit_code == ENVIRONMENT
    assert "another run is writing this output" in result.stderr


def test_a_missing_package_is_noticed_before_the_export_begins(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trace(*args: object, **options: object) -> None:
        raise AssertionError("the export has begun")

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr("umv2_export.onnx.export.trace", trace)
    assert_refused(run_command("onnx", RING, "-o", output), output, ENVIRONMENT, "onnxruntime")


@pytest.mark.parametrize("name", [".output.partial", ".output.old"])
def test_a_checkpoint_under_a_name_like_a_temporary_one_is_an_input_like_any_other(tmp_path: Path, name: str) -> None:
    checkpoint = Path(shutil.copytree(RING, tmp_path / name))
    before = sorted(file.name for file in checkpoint.iterdir())
    assert run_command("convert", checkpoint, "-o", tmp_path / "output").exit_code == 0
    assert sorted(file.name for file in checkpoint.iterdir()) == before
    assert (tmp_path / "output" / "model.safetensors").is_file()


@pytest.mark.parametrize("options", [[], ["--force"]], ids=str)
def test_other_folders_beside_the_output_keep_what_they_hold(output: Path, options: list[str]) -> None:
    for name in (".output.partial", ".output.old", ".umv2-partial-12345678"):
        (output.parent / name).mkdir(parents=True)
        (output.parent / name / "thesis").write_text("kept")
    for _ in range(1 + len(options)):
        assert run_command("convert", RING, "-o", output, *options).exit_code == 0
    assert {file.read_text() for file in output.parent.glob(".*/thesis")} == {"kept"}
    assert len(list(output.parent.glob(".*/thesis"))) == 3


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """As a user whom file modes bind; root they do not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user may enter and write, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


def test_a_folder_that_may_not_be_written_is_named(public_folder: Path) -> None:
    run_command("init", "umv2-tiny", "-o", public_folder / "warm-up")
    (public_folder / "closed").mkdir(mode=0o555)
    with without_privileges():
        result = run_command("init", "umv2-tiny", "-o", public_folder / "closed" / "output")
    assert_refused(result, public_folder / "closed" / "output", ENVIRONMENT, "may not be written", "closed")


@pytest.mark.parametrize("name", ["config.yaml", "model.pt"])
def test_a_file_that_may_not_be_read_is_named(public_folder: Path, name: str) -> None:
    run_command("convert", RING, "-o", public_folder / "warm-up")
    official = copy_golden(public_folder)
    (official / name).chmod(0o000)
    with without_privileges():
        result = run_command("convert", official, "-o", public_folder / "output")
    assert result.exit_code in (REJECTED, ENVIRONMENT)
    assert name in result.stderr
    assert "Permission denied" in result.stderr
    assert not (public_folder / "output").exists()


# Interrupted.


def test_ctrl_c_ends_with_exit_code_130_and_leaves_nothing(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def press_ctrl_c(file: HashedFile, data: bytes | memoryview) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(HashedFile, "write", press_ctrl_c)
    assert_refused(run_command("convert", RING, "-o", output), output, INTERRUPTED, "interrupted")
