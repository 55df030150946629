"""The main job: a checkpoint in the authors' format becomes one ONNX bundle that provably computes the same.

The checkpoint is a small UltraMemV2 with a shared ring of rows; `expected.npz` holds what the authors' own code
computed from it. Then two trained models of equal size, an UltraMemV2 and a mixture of 8 experts, are exported and
measured side by side. Everything runs on the CPU, in about two minutes.
"""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import onnxruntime

SAMPLES = Path(__file__).parent
CHECKPOINTS = SAMPLES / "checkpoints"
CHECKPOINT = CHECKPOINTS / "shared_ring"
OUTPUT = SAMPLES.parent / "build" / "demo"

# Held out when the trained models were trained.
TEXT = Path(sysconfig.get_path("stdlib")) / "pydoc.py"


def umv2_export(*arguments: object) -> str:
    """Run the command line, show the command, and return what it printed."""
    print("\n$ umv2-export", *(str(argument).replace(f"{SAMPLES.parent}/", "") for argument in arguments), flush=True)
    program = Path(sys.executable).with_name("umv2-export")
    return subprocess.run([program, *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Convert, export, and compare with the authors' outputs."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    expected = np.load(CHECKPOINT / "expected.npz")

    print("1. The authors' checkpoint becomes config.json + safetensors:")
    print(umv2_export("convert", CHECKPOINT, "-o", OUTPUT / "native").replace(f"{SAMPLES.parent}/", ""))

    print("2. The checkpoint becomes an ONNX bundle; it is written only if ONNX Runtime agrees with PyTorch:")
    print(umv2_export("onnx", OUTPUT / "native", "-o", OUTPUT / "bundle").replace(f"{SAMPLES.parent}/", ""))

    print("3. Stock ONNX Runtime, without this package, against the outputs of the authors' own code:")
    session = onnxruntime.InferenceSession(OUTPUT / "bundle" / "model.onnx")
    ids = expected["input_ids"]
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for tensor in session.get_inputs()[2:]:
        feed[tensor.name] = np.zeros((len(ids), tensor.shape[1], 0, tensor.shape[3]), dtype=np.float32)
    logits = session.run(["logits"], feed)[0]
    error = float(np.abs(logits - expected["logits"]).max())
    print(f"   logits {logits.shape}: largest difference {error:.1e}")

    print("\n4. A greedy continuation through the KV cache, against the authors' one:")
    same = error <= 2e-4
    for row, prompt in enumerate(ids):
        prompt_ids = ",".join(map(str, prompt))
        tokens = umv2_export(
            "generate", OUTPUT / "bundle", "--prompt-ids", prompt_ids, "--max-new-tokens", 8, "--ignore-eos"
        ).strip()
        authors = ",".join(map(str, expected["greedy"][row]))
        print(f"  exported: {tokens}\n   authors: {authors}")
        same = same and tokens == authors
    print("\nThe exported model computes the same." if same else "\nTHE EXPORTED MODEL DIFFERS.")

    print("\n5. A trained UltraMemV2 and a trained mixture of 8 experts of equal size, on text that neither saw:")
    for name, options in (("umv2", ["--table-dtype", "fp32"]), ("moe", [])):
        umv2_export("onnx", CHECKPOINTS / name, "-o", OUTPUT / name, *options)
        print(umv2_export("parity", OUTPUT / name, "--prompt-file", TEXT).splitlines()[-2])
    prompt = "def __init__(self, "
    print(prompt + umv2_export("generate", OUTPUT / "umv2", "--prompt", prompt, "--max-new-tokens", 80))
    umv2_export("onnx", CHECKPOINTS / "moe", "-o", OUTPUT / "moe-contrib", "--moe-form", "contrib")
    baselines = ("--baseline", OUTPUT / "moe", "--baseline", OUTPUT / "moe-contrib")
    bench = ("--batch", "1,8,64", "--iterations", 10, "--text", TEXT)
    print(umv2_export("bench", OUTPUT / "umv2", *baselines, *bench))
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
