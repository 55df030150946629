"""Three trained models of one size: UltraMemV2, a mixture of 8 experts, UltraMem V1.

Each checkpoint below samples/checkpoints was trained by samples/training/train.py on the source of Python's standard
library, byte by byte. Here each is exported in three precisions; bits per byte of a module that none of them saw are
measured in ONNX Runtime, parity is checked on that text, and the first two are timed side by side. About four minutes
on two cores.
"""

import math
import shutil
import sysconfig
from pathlib import Path

import click
import numpy as np

from samples.command import ROOT, umv2_export
from umv2_export.bundle import Bundle
from umv2_export.runtimes import StepInput, empty_cache, open_runtime

CHECKPOINTS = ROOT / "samples" / "checkpoints"

# Of the held-out modules (samples/training/corpus.py), the largest in every version of Python.
HELD_OUT = Path(sysconfig.get_path("stdlib")) / "pydoc.py"

LENGTH = 256

PRECISIONS = {
    "fp32": ("--table-dtype", "fp32"),
    "fp32, rows and keys fp16": ("--table-dtype", "fp16", "--key-dtype", "fp16"),
    "fp16": ("--dtype", "fp16", "--table-dtype", "fp16"),
}

# It has neither keys nor tables.
MOE_PRECISIONS: dict[str, tuple[str, ...]] = {"fp32": (), "fp16": ("--dtype", "fp16")}


def bits_per_byte(bundle: Bundle, sequences: int) -> float:
    """Of sequences evenly spread over the text, each predicted from its own start, in ONNX Runtime."""
    runtime = open_runtime("onnxruntime", bundle)
    ids = np.frombuffer(HELD_OUT.read_bytes(), dtype=np.uint8).astype(np.int64)
    losses = []
    for start in np.linspace(0, len(ids) - LENGTH - 1, sequences).astype(int):
        piece = ids[None, start : start + LENGTH + 1]
        step = StepInput(piece[:, :-1], np.ones_like(piece[:, :-1]), empty_cache(bundle.config, 1))
        logits = runtime.run(step).logits[0].astype(np.float64)
        log_total = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        losses.append(np.mean(log_total - np.take_along_axis(logits, piece[0, 1:, None], -1)[:, 0]))
    return float(np.mean(losses)) / math.log(2)


@click.command(help=__doc__)
@click.option("--small", is_flag=True, help="UltraMemV2 alone, in fp32, on a quarter of the text.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=ROOT / "build" / "trained")
def main(small: bool, output: Path) -> None:
    """Export, measure, and print one table."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    table: list[tuple[str, str, float]] = []
    fp32: dict[str, Path] = {}
    for name in ("umv2",) if small else ("umv2", "moe", "umv1"):
        for precision, options in (MOE_PRECISIONS if name == "moe" else PRECISIONS).items():
            if precision != "fp32" and small:
                continue
            bundle = output / f"{name}-{len(table)}"
            umv2_export("onnx", CHECKPOINTS / name, "-o", bundle, *options, "--no-validate")
            table.append((name, precision, bits_per_byte(Bundle(bundle), 16 if small else 64)))
            if precision == "fp32":
                fp32[name] = bundle
    for name, bundle in fp32.items():
        checked = umv2_export("parity", bundle, "--reference", CHECKPOINTS / name, "--prompt-file", HELD_OUT)
        print(checked.splitlines()[-2])
    prompt = "    def __init__(self, "
    for bundle in fp32.values():
        print(prompt + umv2_export("generate", bundle, "--prompt", prompt, "--max-new-tokens", 100))
    if not small:
        umv2_export("onnx", CHECKPOINTS / "moe", "-o", output / "moe-contrib", "--moe-form", "contrib")
        baselines = ("--baseline", fp32["moe"], "--baseline", output / "moe-contrib")
        bench = ("--batch", "1,8,64", "--iterations", 10, "--text", HELD_OUT)
        print(umv2_export("bench", fp32["umv2"], *baselines, *bench))
    print(f"{'':8}{'':28}bits per byte of {HELD_OUT.name}")
    for name, precision, bits in table:
        print(f"{name:8}{precision:28}{bits:.4f}")


if __name__ == "__main__":
    main()
