"""The numbered samples run, the long ones in their small form, and say what they are for."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_sample(name: str, output: Path, *options: str) -> str:
    """What a sample prints."""
    command = [sys.executable, "-m", f"samples.{name}", "-o", str(output), *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_each_sample_is_run_here_and_reads_in_fewer_than_100_lines() -> None:
    samples = sorted((ROOT / "samples").glob("[0-9]*.py"))
    assert len(samples) == 4
    here = Path(__file__).read_text(encoding="utf-8")
    for sample in samples:
        assert f'run_sample("{sample.stem}"' in here
        assert len(sample.read_text(encoding="utf-8").splitlines()) < 100


def test_an_exported_checkpoint_computes_what_the_authors_code_computed(tmp_path: Path) -> None:
    printed = run_sample("01_export_and_prove", tmp_path / "demo")
    continuations = re.findall(r"exported: ([\d,]+)\n +authors: ([\d,]+)\n", printed)
    assert len(continuations) == 2
    assert all(exported == authors for exported, authors in continuations)
    assert printed.endswith("The exported model computes the same.\n")


def test_memory_and_rates_of_an_export_are_measured(tmp_path: Path) -> None:
    printed = run_sample("02_export_at_scale", tmp_path, "--small")
    assert 0.05 < float(re.findall(r"anonymous peak ([\d.]+) GB, mapped", printed)[0]) < 4
    assert re.search(r"phases in s: trace \d+\.\d, weights \d", printed)
    assert re.search(r"\d+ MB/s, disk [1-9]\d* and [1-9]\d* MB/s: ratio \d", printed)
    assert not list(tmp_path.iterdir())


def test_memory_layers_are_measured_beside_experts(tmp_path: Path) -> None:
    printed = run_sample("03_traffic_at_scale", tmp_path, "--small")
    assert printed.count("baseline / model") == 2
    assert [file.name for file in tmp_path.iterdir()] == ["traffic.html"]


def test_a_trained_model_is_checked_on_text_and_continues_text(tmp_path: Path) -> None:
    printed = run_sample("04_trained_models", tmp_path / "trained", "--small")
    assert "\nparity passed: " in printed
    assert re.search(r"\n    def __init__\(self, \w+", printed)
    # Of all held-out modules 1.69 bits a byte; the 4 KB of this one differ.
    assert 1.2 < float(re.findall(r"\numv2 +fp32 +([\d.]+)\n", printed)[0]) < 2.2
