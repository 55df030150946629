"""What scripts rely on is frozen in interface.json: flags, keys of `--json`, exit codes. Changes are made by hand.

Keys are those of real runs on small models. Three runs are not real: kernels are not compiled and ops not timed, for
that takes minutes, and TensorRT is a stand-in.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from tests.command import run_command
from tests.engines.conftest import StandIn
from tests.golden import GOLDEN_CASES
from tests.parity.spoil import spoiled
from umv2_export import __main__, errors
from umv2_export.bench import ops
from umv2_export.bench.timing import Timing
from umv2_export.cli import cli
from umv2_export.gpu import ahead_of_time
from umv2_export.gpu.index import CompiledKernel
from umv2_export.system import exits

Exported = Callable[..., tuple[Path, dict[str, Any]]]
Document = dict[str, Any]

INTERFACE: Document = json.loads((Path(__file__).parent / "interface.json").read_text(encoding="utf-8"))

RING = next(case for case in GOLDEN_CASES if case.name == "v2_shared_ring")

OLMOE = Path(__file__).parents[1] / "data" / "olmoe" / "plain"

# Objects whose keys are names of files, ops, inputs and the like.
BY_NAME = {"decode", "files", "not_shown", "ops", "opsets", "prefill", "resident_bytes", "sha256", "shapes"}

# Of a type of a parameter; names of classes and defaults of click are left out.
LIMITS = ("choices", "min", "max", "exists", "dir_okay", "file_okay")


def flags(command: click.Command) -> Document:
    """Of every parameter: its name in Python, spellings, type with its limits, default and how it is given."""
    found = {}
    for parameter in command.params:
        facts = parameter.to_info_dict()
        limits = {name: facts["type"][name] for name in LIMITS if name in facts["type"]}
        manner = {name: facts[name] for name in ("required", "multiple", "nargs", "default")}
        found[facts["name"]] = {
            "spellings": [*facts["opts"], *facts["secondary_opts"]],
            "type": facts["type"]["name"],
            **limits,
            **manner,
            "is_flag": facts.get("is_flag", False),
        }
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def keys(value: object, path: str = "") -> Iterator[str]:
    """Paths of all keys, such as `checks[].swaps[].layer`; the configuration of a model has a test of its own."""
    if isinstance(value, list):
        for entry in value:
            yield from keys(entry, f"{path}[]")
    if isinstance(value, dict):
        by_name = path.rpartition(".")[2] in BY_NAME
        for name, entry in value.items():
            inner = f"{path}.{'*' if by_name else name}".lstrip(".")
            yield inner
            if inner != "config":
                yield from keys(entry, inner)


def assert_frozen(run: str, *documents: Document) -> None:
    assert sorted({key for document in documents for key in keys(document)}) == INTERFACE["json"][run]


def document(*arguments: object, exit_code: int = 0) -> Document:
    result = run_command(*arguments, "--json")
    assert result.exit_code == exit_code, result.stderr
    return json.loads(result.stdout)  # type: ignore[no-any-return]


# Flags.


def test_the_commands_are_those_that_are_frozen() -> None:
    assert sorted(cli.list_commands(click.Context(cli))) == sorted(INTERFACE["flags"])


@pytest.mark.parametrize("name", INTERFACE["flags"])
def test_the_flags_of_a_command_are_frozen(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert flags(command) == INTERFACE["flags"][name]


# Exit codes.


def test_the_exit_codes_are_frozen() -> None:
    classes = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.Umv2Error)]
    codes = {one.__name__: one.exit_code for one in classes}
    codes |= {name: getattr(exits, name) for name in vars(exits) if name.startswith("EXIT_")}
    assert codes == INTERFACE["exit_codes"]
    assert __main__.EXIT_INTERRUPTED == exits.EXIT_INTERRUPTED


@pytest.mark.parametrize("name", INTERFACE["without_arguments"])
def test_a_command_that_lacks_an_argument_ends_with_a_frozen_exit_code(name: str) -> None:
    assert run_command(name).exit_code == INTERFACE["without_arguments"][name]


@pytest.mark.parametrize("name", INTERFACE["missing_input"])
def test_a_command_whose_input_is_missing_ends_with_a_frozen_exit_code(name: str, tmp_path: Path) -> None:
    more = {
        "build": ("-o", tmp_path / "output", "--runtime", "tensorrt-rtx"),
        "generate": ("--prompt-ids", "1"),
        "refit": (tmp_path / "nothing", "-o", tmp_path / "output"),
        **dict.fromkeys(("convert", "kernels", "onnx"), ("-o", tmp_path / "output")),
    }
    result = run_command(name, tmp_path / "missing", *more.get(name, ()), "--json")
    assert result.exit_code == INTERFACE["missing_input"][name], result.stderr
    assert json.loads(result.stdout)["error"]["exit_code"] == result.exit_code


# Keys of --json.


def test_the_keys_of_an_error_are_frozen() -> None:
    error = errors.InputRejected("what", where="where", why="why", fix="fix")
    assert_frozen("an error", error.as_json())


def test_the_keys_of_env_are_frozen() -> None:
    assert_frozen("env", document("env"))


def test_the_keys_of_inspect_are_frozen(exported: Exported) -> None:
    bundle, _ = exported("v2_shared_ring")
    assert_frozen("inspect a checkpoint", document("inspect", RING))
    assert_frozen("inspect a bundle", document("inspect", bundle))
    assert_frozen("inspect an onnx file", document("inspect", bundle / "model.onnx"))


def test_the_keys_of_a_configuration_are_frozen(exported: Exported) -> None:
    of_memory, of_experts = (document("inspect", checkpoint)["config"] for checkpoint in (RING, OLMOE))
    assert_frozen("the configuration of a model", of_memory, of_experts)
    assert document("inspect", exported("v2_shared_ring")[0])["config"] == of_memory


def test_the_keys_of_convert_and_init_are_frozen(tmp_path: Path) -> None:
    assert_frozen("convert", document("convert", RING, "-o", tmp_path / "converted"))
    assert_frozen("init", document("init", "umv2-tiny", "-o", tmp_path / "new"))
    assert_frozen("a dry run", document("convert", RING, "-o", tmp_path / "planned", "--dry-run"))


def test_the_keys_of_onnx_are_frozen(exported: Exported, tmp_path: Path) -> None:
    assert_frozen("onnx", exported("v2_shared_ring")[1])
    assert_frozen("a dry run of onnx", document("onnx", RING, "-o", tmp_path / "planned", "--dry-run"))


def test_the_keys_of_parity_are_frozen(exported: Exported, tmp_path: Path) -> None:
    """Of a bundle with other keys, so that rows are swapped and stored tensors differ."""
    keys_of_rows = "transformer.mem_blocks.0.row_keys.0"
    bundle = spoiled(exported("v2_shared_ring")[0], tmp_path / "bundle", keys_of_rows, torch.neg)
    options = ("--reference", RING, "--layerwise")
    assert_frozen("parity", document("parity", bundle.path, *options, exit_code=1))


def test_the_keys_of_generate_and_verify_are_frozen(exported: Exported) -> None:
    bundle, _ = exported("v2_shared_ring")
    assert_frozen("generate", document("generate", bundle, "--prompt-ids", "1,2", "--max-new-tokens", "2"))
    assert_frozen("verify a bundle", document("verify", bundle))


def test_the_keys_of_bench_are_frozen(exported: Exported) -> None:
    """In a process of its own, for it gives all sessions one pool of threads."""
    bundle, _ = exported("v2_shared_ring")
    options = ("--batch", "1", "--past", "1", "--prefill", "1", "--iterations", "3", "--json")
    command = [sys.executable, "-m", "umv2_export", "bench", str(bundle), "--baseline", str(bundle), *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_frozen("bench", json.loads(done.stdout))


def test_the_keys_of_bench_op_are_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = Timing(1.0, 1.0, 1.0)
    result = ops.OpResult("lookup", 1, native=timing, peer=timing, ratio=1.0, target=1.0)
    monkeypatch.setattr(ops, "benchmark_ops", lambda **options: iter([result]))
    assert_frozen("bench-op", document("bench-op"))


def test_the_keys_of_kernels_are_frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argument = {"name": "rows", "kind": "input", "dtype": "float32", "divisor": 16}
    kernel = CompiledKernel(
        "lookup", "MemoryLookup", {}, "8.9", "sm_89", "lookup", [argument], ("tokens", "1", "1"), (1, 1, 1),
        0, 0, 0, 0, 80, "lookup.ptx", "lookup.cubin", {"lookup.ptx": ""},
    )  # fmt: skip
    monkeypatch.setattr(ahead_of_time, "build_kernels", lambda *arguments, **options: [kernel])
    assert_frozen("kernels", document("kernels", "-o", tmp_path / "kernels"))


def test_the_keys_of_engines_are_frozen(exported: Exported, tmp_path: Path, stand_in: StandIn) -> None:
    bundle, _ = exported("v2_shared_ring")
    built, whole = tmp_path / "built", tmp_path / "whole"
    assert_frozen("build", document("build", bundle, "-o", built, "--runtime", "tensorrt", "--strip-weights"))
    assert_frozen("refit", document("refit", built, bundle, "-o", whole))
    assert_frozen("inspect an engine", document("inspect", whole))
    assert_frozen("verify an engine", document("verify", whole))
