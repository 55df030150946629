"""Three trained models of one size, exported in three precisions: UltraMemV2, a mixture of 8 experts, UltraMem V1.

Each checkpoint below samples/checkpoints was trained by samples/training/train.py on the source of Python's standard
library, byte by byte. Here each is exported in three precisions; bits per byte of a module that none of them saw are
measured in ONNX Runtime, and parity is checked on that text. About three minutes on two cores.
"""

import math
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np

from umv2_export.bundle import Bundle
from umv2_export.runtimes import StepInput, empty_cache, open_runtime

SAMPLES = Path(__file__).parent
OUTPUT = SAMPLES.parent / "build" / "trained"
NAMES = ("umv2", "moe", "umv1")

# Of the held-out modules (samples/training/corpus.py), the largest in every version of Python.
HELD_OUT = "pydoc.py"

SEQUENCES, LENGTH = 64, 256

PRECISIONS = {
    "fp32": ("--table-dtype", "fp32"),
    "fp32, rows and keys fp16": ("--table-dtype", "fp16", "--key-dtype", "fp16"),
    "fp16": ("--dtype", "fp16", "--table-dtype", "fp16"),
}

# It has neither keys nor tables.
MOE_PRECISIONS: dict[str, tuple[str, ...]] = {"fp32": (), "fp16": ("--dtype", "fp16")}


def umv2_export(*arguments: object) -> str:
    """Run the command line, show the command, and return what it printed."""
    print("\n$ umv2-export", *(str(argument).replace(f"{SAMPLES.parent}/", "") for argument in arguments), flush=True)
    program = Path(sys.executable).with_name("umv2-export")
    return subprocess.run([program, *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True).stdout


def bits_per_byte(bundle: Bundle, text: bytes) -> float:
    """Of sequences evenly spread over a text, each predicted from its own start, in ONNX Runtime."""
    runtime = open_runtime("onnxruntime", bundle)
    ids = np.frombuffer(text, dtype=np.uint8).astype(np.int64)
    losses = []
    for start in np.linspace(0, len(ids) - LENGTH - 1, SEQUENCES).astype(int):
        piece = ids[None, start : start + LENGTH + 1]
        step = StepInput(piece[:, :-1], np.ones_like(piece[:, :-1]), empty_cache(bundle.config, 1))
        logits = runtime.run(step).logits[0].astype(np.float64)
        log_total = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        losses.append(np.mean(log_total - np.take_along_axis(logits, piece[0, 1:, None], -1)[:, 0]))
    return float(np.mean(losses)) / math.log(2)


def main() -> None:
    """Export, measure, and print one table."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    text_file = Path(sysconfig.get_path("stdlib")) / HELD_OUT
    text = text_file.read_bytes()
    table: list[tuple[str, str, float, Path]] = []
    for name in NAMES:
        for precision, options in (MOE_PRECISIONS if name == "moe" else PRECISIONS).items():
            bundle = OUTPUT / f"{name}-{len(table)}"
            umv2_export("onnx", SAMPLES / "checkpoints" / name, "-o", bundle, *options, "--no-validate")
            table.append((name, precision, bits_per_byte(Bundle(bundle), text), bundle))
    fp32 = {name: bundle for name, precision, _, bundle in table if precision == "fp32"}
    for bundle in fp32.values():
        print(umv2_export("parity", bundle, "--prompt-file", text_file).splitlines()[-2])
    for name, bundle in fp32.items():
        prompt = "    def __init__(self, "
        print(f"{name}:\n{prompt}" + umv2_export("generate", bundle, "--prompt", prompt, "--max-new-tokens", 100))
    print(f"{'':8}{'':28}bits per byte of {HELD_OUT}")
    for name, precision, bits, _ in table:
        print(f"{name:8}{precision:28}{bits:.4f}")


if __name__ == "__main__":
    main()
