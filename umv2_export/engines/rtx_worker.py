"""Parse and build in a process of its own: python -m umv2_export.engines.rtx_worker JOB.

TensorRT-RTX can end a process (it does where its parser meets a plugin), and must not take the command line with it.
The engine goes to an inherited descriptor, not to a path: a worker that outlives its parent then writes to a file that
nobody can see any more, and not into the output of the next run.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

__all__ = ["main"]


def main(job_file: Path) -> None:
    """Build the engine that a job describes.

    Args:
        job_file: JSON: model (path of the .onnx file, its data beside it), compute_capabilities, profiles (input ->
            min, opt, max), engine (descriptor to write to), result (path).

    The result is JSON: version, inputs and outputs (name, dtype, dims) of the parsed network; or `failed`, lines of
    what went wrong; or `os_error`, number and text, where the engine could not be written.
    """
    job = json.loads(job_file.read_text(encoding="utf-8"))
    result = _build(importlib.import_module("tensorrt_rtx"), job)
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


def _build(trt: Any, job: dict[str, Any]) -> dict[str, Any]:
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    # Precision comes from the dtypes of the graph, never from the builder.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    # From the file: of a graph in memory, the parser would look for the weights in the current folder.
    if not parser.parse_from_file(job["model"]):
        return {"failed": [str(parser.get_error(i)) for i in range(parser.num_errors)]}
    config = builder.create_builder_config()
    # On by default; products of 10 mantissa bits would swap rows of the retrieval that fp32 tells apart.
    config.clear_flag(trt.BuilderFlag.TF32)
    targets = job["compute_capabilities"]
    config.num_compute_capabilities = len(targets)
    for i, target in enumerate(targets):
        config.set_compute_capability(getattr(trt.ComputeCapability, "SM" + target.replace(".", "")), i)
    for shapes in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, bounds in shapes.items():
            profile.set_shape(name, bounds["min"], bounds["opt"], bounds["max"])
        if config.add_optimization_profile(profile) < 0:
            return {"failed": ["the builder refused an optimisation profile"]}
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    with os.fdopen(job["engine"], "wb") as out:
        writer = _stream_writer(trt, out)
        built = builder.build_serialized_network_to_stream(network, config, writer)
    if writer.error is not None:
        return {"os_error": [writer.error.errno, writer.error.strerror]}
    if not built:
        return {"failed": []}
    return {
        "version": trt.__version__,
        "inputs": [_describe(trt, tensor) for tensor in inputs],
        "outputs": [_describe(trt, tensor) for tensor in outputs],
    }


def _stream_writer(trt: Any, out: Any) -> Any:
    """Writes the engine in pieces of up to 64 MiB as it is serialised.

    A whole engine in memory would cost its size once more: 1.72 instead of 1.35 GB at the peak, for 0.51 GB of weights.
    """

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                out.write(data)
                out.flush()
            except OSError as error:  # it must not travel through the builder
                self.error = error
                return 0
            return len(data)

    return Writer()


def _describe(trt: Any, tensor: Any) -> dict[str, Any]:
    """Name, dtype by the names of ONNX, and dims of a tensor of the network."""
    names = {trt.DataType.HALF: "float16", trt.DataType.BF16: "bfloat16"}
    dtype = names.get(tensor.dtype, tensor.dtype.name.lower())
    return {"name": tensor.name, "dtype": dtype, "dims": list(tensor.shape)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
