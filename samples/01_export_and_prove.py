"""The main job: a checkpoint in the authors' format becomes one ONNX bundle that provably computes the same.

The checkpoint is a small UltraMemV2 with a shared ring of rows; `expected.npz` holds what the authors' own code
computed from it. Everything runs on the CPU, in about half a minute.
"""

import shutil
import sys
from pathlib import Path

import click
import numpy as np
import onnxruntime

from samples.command import ROOT, umv2_export

CHECKPOINT = ROOT / "samples" / "checkpoints" / "shared_ring"


@click.command(help=__doc__)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=ROOT / "build" / "demo")
def main(output: Path) -> None:
    """Convert, export, and compare with the authors' outputs."""
    shutil.rmtree(output, ignore_errors=True)
    expected = np.load(CHECKPOINT / "expected.npz")

    print("1. The authors' checkpoint becomes config.json + safetensors:")
    print(umv2_export("convert", CHECKPOINT, "-o", output / "native"))

    print("2. The checkpoint becomes an ONNX bundle; it is written only if ONNX Runtime agrees with PyTorch:")
    print(umv2_export("onnx", output / "native", "-o", output / "bundle"))

    print("3. Stock ONNX Runtime, without this package, against the outputs of the authors' own code:")
    session = onnxruntime.InferenceSession(output / "bundle" / "model.onnx")
    ids = expected["input_ids"]
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for tensor in session.get_inputs()[2:]:
        feed[tensor.name] = np.zeros((len(ids), tensor.shape[1], 0, tensor.shape[3]), dtype=np.float32)
    logits = session.run(["logits"], feed)[0]
    error = float(np.abs(logits - expected["logits"]).max())
    print(f"   logits {logits.shape}: largest difference {error:.1e}")
    same = error <= 2e-4

    print("\n4. A greedy continuation through the KV cache, against the authors' one:")
    for prompt, continuation in zip(ids, expected["greedy"], strict=True):
        ids_text, authors = (",".join(map(str, tokens)) for tokens in (prompt, continuation))
        options = ("--prompt-ids", ids_text, "--max-new-tokens", len(continuation), "--ignore-eos")
        tokens = umv2_export("generate", output / "bundle", *options).strip()
        print(f"  exported: {tokens}\n   authors: {authors}")
        same = same and tokens == authors
    print("\nThe exported model computes the same." if same else "\nTHE EXPORTED MODEL DIFFERS.")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
