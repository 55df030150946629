"""Memory and speed of a large export: umv2-227m-1.2b, 4.9 GB in fp32, random weights.

Prints the peak of anonymous memory (mapped pages of files apart), the rate of the phase that writes the weights, hashes
included, and beside it the disk's sequential rate, measured before and after with blocks of zeros.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from samples.command import ROOT

POLL_SECONDS = 0.02


def disk_rate(folder: Path, size: int) -> float:
    """Sequential write rate in bytes/s: blocks of 8 MiB, on disk when the clock stops."""
    block, file = bytes(2**23), folder / "disk-rate"
    started = time.perf_counter()
    with file.open("wb", buffering=0) as stream:
        for _ in range(size // len(block)):
            stream.write(block)
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - started
    file.unlink()
    return size // len(block) * len(block) / seconds


def run_measured(*arguments: object) -> tuple[dict[str, dict[str, float]], dict[str, int], float]:
    """Run a command with --json: its result, the peaks of RssAnon and RssFile in bytes, and seconds."""
    program = Path(sys.executable).with_name("umv2-export")
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([program, *map(str, arguments), "--json"], stdout=output)
        peaks = {"RssAnon": 0, "RssFile": 0}
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                break
            for line in status.splitlines():
                name, _, value = line.partition(":")
                if name in peaks:
                    peaks[name] = max(peaks[name], int(value.split()[0]) * 1024)
            time.sleep(POLL_SECONDS)
        if process.wait():
            sys.exit(process.returncode)
        output.seek(0)
        return json.load(output), peaks, time.perf_counter() - started


@click.command(help=__doc__)
@click.option("--small", is_flag=True, help="A model of 0.2 MB, in seconds: shows what is printed, and says nothing.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=ROOT / "build", help="For temporary files.")
def main(small: bool, output: Path) -> None:
    """Initialise, export, report."""
    preset, disk_bytes = ("umv2-tiny", 2**24) if small else ("umv2-227m-1.2b", 2 * 10**9)
    output.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="scale-", dir=output))
    try:
        _, peaks, seconds = run_measured("init", preset, "-o", folder / "checkpoint")
        print(f"init {preset}: {seconds:.1f} s, anonymous peak {peaks['RssAnon'] / 1e9:.2f} GB")
        before = disk_rate(folder, disk_bytes)
        result, peaks, seconds = run_measured("onnx", folder / "checkpoint", "-o", folder / "bundle", "--no-validate")
        after = disk_rate(folder, disk_bytes)
        phases = result["seconds"]
        size = sum(file.stat().st_size for file in (folder / "bundle").iterdir())
        rate, disk = size / phases["weights"], min(before, after)
        print(f"export without validation: {seconds:.1f} s, bundle {size / 1e9:.2f} GB")
        print(f"  anonymous peak {peaks['RssAnon'] / 1e9:.2f} GB, mapped files peak {peaks['RssFile'] / 1e9:.2f} GB")
        print(f"  phases in s: {', '.join(f'{name} {value:.1f}' for name, value in phases.items())}")
        print(
            f"  weights with hashes {rate / 1e6:.0f} MB/s, disk {before / 1e6:.0f} and {after / 1e6:.0f} MB/s: ", end=""
        )
        print(f"ratio {rate / disk:.2f} to the slower")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
