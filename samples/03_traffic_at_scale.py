"""The claim, measured: a 227M/1.2B model of memory layers beside a mixture of experts of the same size.

Random weights; takes 20 GB of the output folder, and the better part of an hour on two cores. The pages with the plots
stay there: traffic.html for past 64, traffic-512.html for past 512.
"""

import shutil
import tempfile
from pathlib import Path

import click

from samples.command import ROOT, umv2_export


@click.command(help=__doc__)
@click.option("--small", is_flag=True, help="Tiny models, in half a minute: shows what is written, and proves nothing.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=ROOT / "build")
def main(small: bool, output: Path) -> None:
    """Initialise and export both models, the experts in both forms, and measure."""
    memory, experts = ("umv2-tiny", "moe-tiny-top2") if small else ("umv2-227m-1.2b", "olmoe-227m-1.2b")
    output.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="traffic-", dir=output))
    try:
        umv2_export("init", memory, "-o", folder / "checkpoint")
        umv2_export("onnx", folder / "checkpoint", "-o", folder / "umv2", "--no-validate")
        shutil.rmtree(folder / "checkpoint")
        umv2_export("init", experts, "-o", folder / "checkpoint")
        bench = ["bench", folder / "umv2"]
        for form in ("standard",) if small else ("contrib", "standard"):
            bundle = folder / f"olmoe-{form}"
            umv2_export("onnx", folder / "checkpoint", "-o", bundle, "--moe-form", form, "--no-validate")
            bench += ["--baseline", bundle]
        shutil.rmtree(folder / "checkpoint")
        bench += ["--iterations", 3 if small else 10, "--force", "--report"]
        if small:
            print(umv2_export(*bench, output / "traffic.html", "--batch", "1,2"))
        else:
            print(umv2_export(*bench, output / "traffic.html"))
            print(umv2_export(*bench, output / "traffic-512.html", "--past", 512, "--batch", "1,8"))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
