"""The claim, measured: a 227M/1.2B model of memory layers beside a mixture of experts of the same size.

Random weights; writes 20 GB below the folder that is named (default: build), and takes the better part of an hour on
two cores. The pages with the plots stay there: traffic.html for past 64, traffic-512.html for past 512.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FORMS = ("contrib", "standard")


def umv2_export(*arguments: object) -> None:
    """Run the command line, and show the command."""
    print("\n$ umv2-export", *arguments, flush=True)
    subprocess.run([Path(sys.executable).with_name("umv2-export"), *map(str, arguments)], check=True)


def main() -> None:
    """Initialise and export both models, the experts in both forms, and measure."""
    parent = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("build")
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="traffic-", dir=parent))
    try:
        umv2_export("init", "umv2-227m-1.2b", "-o", folder / "checkpoint")
        umv2_export("onnx", folder / "checkpoint", "-o", folder / "umv2", "--no-validate")
        shutil.rmtree(folder / "checkpoint")
        umv2_export("init", "olmoe-227m-1.2b", "-o", folder / "checkpoint")
        for form in FORMS:
            name = folder / f"olmoe-{form}"
            umv2_export("onnx", folder / "checkpoint", "-o", name, "--moe-form", form, "--no-validate")
        shutil.rmtree(folder / "checkpoint")
        baselines = [part for form in FORMS for part in ("--baseline", folder / f"olmoe-{form}")]
        report = ("--iterations", 10, "--force", "--report")
        umv2_export("bench", folder / "umv2", *baselines, *report, parent / "traffic.html")
        long = ("--past", 512, "--batch", "1,8")
        umv2_export("bench", folder / "umv2", *baselines, *long, *report, parent / "traffic-512.html")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
