"""What a worker does to put weights into an engine that was built without them."""

import os
from pathlib import Path
from typing import Any

from umv2_export.engines.worker_plugins import load_plugins
from umv2_export.errors import BuildFailed, EnvironmentUnfit

__all__ = ["refit"]


def refit(trt: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Load an engine, give it the weights of a graph by their names, and write it with them.

    Args:
        trt: the module.
        job: stripped (path of the engine), version (of the library that built it), version_compatible, plugins, model
            (path of the .onnx file that it was built from, with the weights beside it), engine (descriptor).

    Returns:
        version.

    Raises:
        BuildFailed: the engine cannot be loaded or refitted.
        EnvironmentUnfit: another version of the library built the engine.
        OSError: the engine cannot be written.
    """
    if trt.__version__ != job["version"] and not job["version_compatible"]:
        raise EnvironmentUnfit(
            f"the engine was built by version {job['version']}, {trt.__version__} is installed",
            why="an engine is loaded by the version that built it, unless it was built with --version-compatible",
        )
    if job["plugins"] is not None:
        load_plugins(trt, job["plugins"])
    logger = trt.Logger(trt.Logger.WARNING)
    runtime = trt.Runtime(logger)
    if job["version_compatible"]:
        # Such an engine brings a runtime of its own, which is code of the host.
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(Path(job["stripped"]).read_bytes())
    if engine is None:
        raise BuildFailed("the engine cannot be loaded")
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
