"""Quality and bytes of trained contenders, side by side.

    python -m samples.training.compare umv2-trained moe-trained ...

Each folder is one that train.py wrote. A contender is exported, its routing on held-out text is traced in ONNX Runtime,
and the bytes of a decode step are counted from what it hits.
"""

import json
import tempfile
from pathlib import Path

import click
import numpy as np

from samples.training.corpus import standard_library
from umv2_export.bench.recording import record_routing
from umv2_export.bench.traffic import Traffic, count_traffic
from umv2_export.bundle import Bundle
from umv2_export.checkpoint import open_checkpoint
from umv2_export.onnx.export import ExportOptions, export_bundle, plan_export
from umv2_export.runtimes import open_runtime

BATCHES = (1, 8, 64)
SEQUENCES, LENGTH = 512, 65

HEADING = """| trained | what | bits per byte | parameters | activated | core KB a step, batch 1 / 8 / 64 |
|---|---|---|---|---|---|"""


@click.command(help=__doc__)
@click.argument("folders", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)
def main(folders: tuple[Path, ...]) -> None:
    """Print a table."""
    text = standard_library().held_out.numpy().astype(np.int64)
    click.echo(HEADING)
    for folder in folders:
        record = json.loads((folder / "training.json").read_text())
        bytes_text = " / ".join(f"{size / 1000:.0f}" for size in core_bytes(folder, text))
        counts = record["parameters"]
        click.echo(
            f"| `{record['name']}` | {record['about']} | {record['bits_per_byte']:.3f} | {counts['total'] / 1e6:.3f} M "
            f"| {counts['activated'] / 1e3:.0f} K | {bytes_text} |"
        )


def core_bytes(folder: Path, text: np.ndarray) -> list[int]:
    """Mean bytes of FFN and memory, or of experts, in a decode step of each batch; past 64."""
    checkpoint = open_checkpoint(folder)
    with tempfile.TemporaryDirectory() as scratch:
        plan = plan_export(checkpoint, ExportOptions(table_dtype="fp32"))
        bundle = Bundle(export_bundle(plan, Path(scratch) / "bundle").bundle.path)
        trace = record_routing(open_runtime("onnxruntime", bundle), bundle, text, sequences=SEQUENCES, length=LENGTH)
        sizes = []
        for batch in BATCHES:
            hits = [trace.hits(bundle, slice(start, start + batch)) for start in range(0, SEQUENCES, batch)]
            steps = [count_traffic(bundle, hit, batch=batch, past=LENGTH - 1, native=True) for hit in hits]
            sizes.append(Traffic.mean(steps).core)
        return sizes


if __name__ == "__main__":
    main()
