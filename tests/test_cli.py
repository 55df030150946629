"""Commands that look at what was made, and the manners of all of them."""

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.command import run_command
from tests.golden import GOLDEN_CASES
from umv2_export.cli import COMMANDS

GOLDEN = {case.name: case for case in GOLDEN_CASES}
Exported = Callable[..., tuple[Path, dict[str, Any]]]
ROOT = Path(__file__).parent.parent


@pytest.fixture
def bundle(exported: Exported, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(exported("v2_shared_ring")[0], tmp_path / "bundle"))


def test_loading_the_command_line_imports_nothing_heavy() -> None:
    code = (
        "import sys; from umv2_export.cli import COMMANDS, cli; [cli.get_command(None, name) for name in COMMANDS];"
        "print([m for m in ('torch', 'onnx', 'numpy', 'rich') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


def test_verify_accepts_a_whole_bundle(bundle: Path) -> None:
    result = run_command("verify", bundle, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["passed"] is True


def test_verify_names_a_file_with_a_flipped_byte(bundle: Path) -> None:
    data = bytearray((bundle / "weights.data").read_bytes())
    data[1000] ^= 1
    (bundle / "weights.data").write_bytes(data)
    result = run_command("verify", bundle)
    assert result.exit_code == 1
    assert "weights.data" in result.stderr


def test_verify_names_a_file_that_the_manifest_does_not_know(bundle: Path) -> None:
    (bundle / "stranger.bin").write_bytes(b"x")
    result = run_command("verify", bundle)
    assert result.exit_code == 1
    assert "stranger.bin" in result.stderr


@pytest.mark.parametrize("command", ["verify", "parity", "inspect"])
def test_a_cut_file_is_rejected_before_anything_is_run(bundle: Path, command: str) -> None:
    with (bundle / "rows-00001-of-00001.data").open("r+b") as stream:
        stream.truncate(1000)
    result = run_command(command, bundle)
    assert result.exit_code == 3
    assert "rows-00001-of-00001.data" in result.stderr


def test_a_manifest_that_leads_out_of_its_folder_is_rejected(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"size": 1, "sha256": ""}
    (bundle.parent / "secret").write_bytes(b"x")
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    result = run_command("verify", bundle)
    assert result.exit_code == 3
    assert "leads out of its folder" in result.stderr


def test_external_data_outside_the_files_of_the_manifest_is_rejected(bundle: Path) -> None:
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    external = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in external.external_data if entry.key == "location").value = "/etc/passwd"
    data = model.SerializeToString()
    (bundle / "model.onnx").write_bytes(data)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["model.onnx"]["size"] = len(data)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    result = run_command("parity", bundle)
    assert result.exit_code == 3
    assert "/etc/passwd" in result.stderr


def test_parity_without_a_reference_rebuilds_the_model_from_the_bundle(bundle: Path) -> None:
    result = run_command("parity", bundle, "--layerwise", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert report["passed"]
    assert {check["output"] for check in report["checks"]} == {"logits", "present"}
    assert not any(layer["differs"] for layer in report["layerwise"])


def test_parity_with_the_checkpoint_finds_a_spoiled_row_and_exits_1(bundle: Path) -> None:
    """The whole table is scaled by 1.01 in place, so that every token meets it."""
    file = bundle / "rows-00001-of-00001.data"
    rows = memoryview(bytearray(file.read_bytes())).cast("f")
    for i in range(len(rows)):
        rows[i] *= 1.01
    file.write_bytes(rows)
    result = run_command("parity", bundle, "--reference", GOLDEN["v2_shared_ring"])
    assert result.exit_code == 1
    assert "fail" in result.stdout
    assert "tolerance that would have passed" in result.stdout


def test_parity_with_another_checkpoint_names_what_differs(bundle: Path) -> None:
    result = run_command("parity", bundle, "--reference", GOLDEN["v2_per_rank"])
    assert result.exit_code == 3
    assert "memory" in result.stderr


def test_parity_of_the_torch_runtime_checks_the_folds(bundle: Path) -> None:
    result = run_command("parity", bundle, "--reference", GOLDEN["v2_shared_ring"], "--runtime", "torch", "--json")
    assert result.exit_code == 0
    assert {check["runtime"] for check in json.loads(result.stdout)["checks"]} == {"torch"}


def test_inspect_describes_a_bundle(bundle: Path) -> None:
    facts = json.loads(run_command("inspect", bundle, "--json").stdout)
    assert facts["kind"] == "bundle"
    assert facts["ops"]["umv2::MemoryLookup"] == 3
    assert facts["parameters"]["rows"] == 768 * 56
    assert facts["query_layout"] == "released"


def test_inspect_describes_an_onnx_file(bundle: Path) -> None:
    facts = json.loads(run_command("inspect", bundle / "model.onnx", "--json").stdout)
    assert facts["kind"] == "onnx"
    assert facts["opsets"] == {"ai.onnx": 18, "umv2": 1}
    assert "umv2::TuckerTopK" in facts["functions"]
    assert facts["external_files"] == ["rows-00001-of-00001.data", "weights.data"]


def test_inspect_describes_a_checkpoint() -> None:
    facts = json.loads(run_command("inspect", GOLDEN["v1_skip_layer"], "--json").stdout)
    assert facts["kind"] == "checkpoint"
    assert facts["format"] == "official"
    assert facts["config"]["memory"]["placements"] == [[0, 1], [2, 2]]


def test_inspect_prints_readable_lines(bundle: Path) -> None:
    lines = run_command("inspect", bundle).stdout.splitlines()
    assert "kind: bundle" in lines
    assert "  rows: 43,008 (43.01K)" in lines


@pytest.mark.parametrize("name", ["noise.onnx", "noise.txt"])
def test_inspect_rejects_a_file_that_is_no_graph(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(bytes(range(256)))
    result = run_command("inspect", tmp_path / name)
    assert result.exit_code == 3


def test_env_lists_versions_features_and_runtimes() -> None:
    facts = json.loads(run_command("env", "--json").stdout)
    assert facts["packages"]["torch"]
    assert facts["cpu"]["cores"] >= 1
    runtimes = {name: facts["runtimes"][name] for name in ("torch", "onnxruntime", "onnxruntime-native")}
    assert all(runtimes.values())
    assert list(facts["runtimes"])[3:] == ["onnxruntime-cuda", "tensorrt", "tensorrt-rtx"]
    assert facts["native_library"]["kernels"] in ("portable", "avx2", "avx512")


def test_generate_prints_the_new_token_ids(bundle: Path) -> None:
    result = run_command("generate", bundle, "--prompt-ids", "1,2,3", "--max-new-tokens", "4", "--ignore-eos")
    assert result.exit_code == 0
    assert len(result.stdout.strip().split(",")) == 4


def test_generate_gives_the_same_tokens_in_torch_and_onnx_runtime(bundle: Path) -> None:
    arguments = ("--prompt-ids", "5,6,7", "--max-new-tokens", "6", "--ignore-eos", "--json")
    outputs = [
        json.loads(run_command("generate", bundle, "--runtime", runtime, *arguments).stdout)
        for runtime in ("torch", "onnxruntime")
    ]
    assert outputs[0]["token_ids"] == outputs[1]["token_ids"]


def test_generate_with_text_uses_the_tokenizer_that_came_with_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(GOLDEN["v2_no_pre_values"], tmp_path / "checkpoint"))
    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())[:250])}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    bundle = tmp_path / "bundle"
    assert run_command("onnx", checkpoint, "-o", bundle, "--no-validate").exit_code == 0
    result = run_command("generate", bundle, "--prompt", "hello", "--max-new-tokens", "3", "--ignore-eos", "--json")
    facts = json.loads(result.stdout)
    assert facts["prompt_ids"] == [alphabet[character] for character in "hello"]
    assert isinstance(facts["text"], str)
    assert len(facts["token_ids"]) == 3


def test_generate_with_text_but_no_tokenizer_says_what_to_pass(bundle: Path) -> None:
    result = run_command("generate", bundle, "--prompt", "hello")
    assert result.exit_code == 2
    assert "--prompt-ids" in result.stderr


@pytest.mark.parametrize("ids", ["1,999", "-1"])
def test_generate_refuses_ids_outside_the_vocabulary(bundle: Path, ids: str) -> None:
    result = run_command("generate", bundle, f"--prompt-ids={ids}")
    assert result.exit_code == 2
    assert "vocabulary of 250" in result.stderr


def test_a_wheel_holds_one_top_level_package_with_the_command_line(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True
    )
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"umv2_export"}
    assert "umv2_export/cli.py" in names
    assert {f"umv2_export/commands/{name.replace('-', '_')}.py" for name in COMMANDS} <= set(names)
    assert "umv2_export/onnx/export.py" in names
    assert {"umv2_export/libumv2_onnxruntime.so", "umv2_export/libumv2_onnxruntime_cuda.so"} <= set(names)
    assert "umv2_export/bench/page.html" in names


def test_a_runtime_is_not_compared_with_itself(bundle: Path) -> None:
    result = run_command("parity", bundle, "--runtime", "torch")
    assert result.exit_code == 2
    assert "--reference" in result.stderr


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "x"])
def test_a_tolerance_is_a_finite_number(bundle: Path, value: str) -> None:
    assert run_command("parity", bundle, f"--rtol={value}").exit_code == 2


def test_the_tolerance_that_is_printed_passes_when_it_is_typed(bundle: Path) -> None:
    report = run_command("parity", bundle, "--atol", "0", "--rtol", "0")
    assert report.exit_code == 1
    printed = report.stdout.splitlines()[-1].partition(": ")[2].split()
    assert run_command("parity", bundle, *printed).exit_code == 0


def test_a_path_that_looks_like_markup_is_printed_as_it_is(bundle: Path, tmp_path: Path) -> None:
    reference = shutil.copytree(GOLDEN["v2_shared_ring"], tmp_path / "ck[bold]x")
    result = run_command("parity", bundle, "--reference", reference)
    assert result.exit_code == 0
    assert "ck[bold]x" in result.stdout


def test_a_bug_of_ours_has_an_exit_code_of_its_own(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("umv2_export.bundle.Bundle.verify", lambda self: 1 / 0)
    result = run_command("verify", bundle)
    assert result.exit_code == 70
    assert "internal error" in result.stderr


def test_what_an_export_prints_of_a_model_without_memory_names_no_part_of_memory(
    exported: Exported, capsys: pytest.CaptureFixture[str]
) -> None:
    from umv2_export.bundle import Bundle
    from umv2_export.commands.onnx import print_export

    print_export(Bundle(exported("olmoe")[0]), None)
    (stored,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stored:")]
    assert "dense fp32" in stored
    assert not any(part in stored for part in ("keys", "tables", "query layout"))
