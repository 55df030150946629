"""What a worker does to put weights into an engine that was built without them."""

import os
from pathlib import Path
from typing import Any

from umv2_export.engines.worker_load import load_engine
from umv2_export.errors import BuildFailed

__all__ = ["refit"]


def refit(trt: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Load an engine, give it the weights of a graph by their names, and write it with them.

    Args:
        trt: the module.
        job: stripped (path of the engine), sha256 (of it, or None), version (of the library that built it),
            version_compatible, plugins, model (path of the .onnx file that it was built from, with the weights beside
            it), engine (descriptor).

    Returns:
        version.

    Raises:
        BuildFailed: the engine cannot be loaded or refitted.
        EnvironmentUnfit: another version of the library built the engine.
        InputRejected: the engine has another hash.
        OSError: the engine cannot be written.
    """
    logger = trt.Logger(trt.Logger.WARNING)
    engine = load_engine(
        trt,
        logger,
        Path(job["stripped"]),
        sha256=job["sha256"],
        version=job["version"],
        version_compatible=job["version_compatible"],
        plugins=job["plugins"],
    )
    refitter = trt.Refitter(engine, logger)
    weights = trt.OnnxParserRefitter(refitter, logger)
    if not weights.refit_from_file(job["model"]):
        errors = [str(weights.get_error(i)) for i in range(weights.num_errors)]
        raise BuildFailed("the weights do not fit the engine", why="\n".join(errors))
    missing = refitter.get_missing_weights()
    if missing:
        raise BuildFailed(f"the bundle has no weights for {len(missing)} names of the engine", why=", ".join(missing))
    if not refitter.refit_cuda_engine():
        raise BuildFailed("the engine refuses the weights")
    config = engine.create_serialization_config()
    # Set for an engine that was built without weights.
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    with os.fdopen(job["engine"], "wb") as out:
        out.write(engine.serialize_with_config(config))
    return {"version": trt.__version__}
