"""Runs models with a library of ops on the stand-in driver: python -m tests.plugins.run_cuda_ops LIBRARY FOLDER...

Each folder has model.txt (the path of a model), kernels.bin and feed.npz, and gets outputs.npz or error.txt.
"""

import os
import sys
from pathlib import Path

import numpy as np
import onnxruntime

from umv2_export.gpu.driver import open_device

__all__: list[str] = []


def run(library: str, folder: Path) -> None:
    """One model on one feed."""
    os.environ["UMV2_GPU_KERNELS"] = str(folder / "kernels.bin")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(library)
    model = (folder / "model.txt").read_text(encoding="utf-8")
    with np.load(folder / "feed.npz") as feed:
        try:
            session = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
            outputs = session.run(None, dict(feed))
        except Exception as error:  # its exception classes share no base but Exception
            (folder / "error.txt").write_text(str(error), encoding="utf-8")
            return
    names = (output.name for output in session.get_outputs())
    np.savez(folder / "outputs.npz", **dict(zip(names, outputs, strict=True)))


if __name__ == "__main__":
    # Its context is current in this thread, which runs the ops, as it is where ONNX Runtime computes on a GPU.
    with open_device():
        for argument in sys.argv[2:]:
            run(sys.argv[1], Path(argument))
