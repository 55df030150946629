"""An engine into the memory of this process, in a worker or in a runtime."""

import hashlib
from pathlib import Path
from typing import Any

from umv2_export.engines.worker_plugins import load_plugins
from umv2_export.errors import BuildFailed, EnvironmentUnfit, InputRejected

__all__ = ["load_engine"]


def load_engine(
    trt: Any,
    logger: Any,
    file: Path,
    *,
    sha256: str | None,
    version: str,
    version_compatible: bool,
    plugins: dict[str, Any] | None,
) -> Any:
    """Register the plugins of an engine, and deserialise it: code that it holds may run.

    Args:
        trt: the module.
        logger: of the library.
        file: the engine, which is trusted.
        sha256: of the bytes that were found to be trusted; None: the user vouches for any.
        version: of the library that built it.
        version_compatible: whether others may load it.
        plugins: what `load_plugins` takes; None: nothing has to be registered.

    Raises:
        BuildFailed: the engine cannot be loaded.
        EnvironmentUnfit: another version of the library built it, or a plugin is missing.
        InputRejected: the file has another hash.
    """
    if trt.__version__ != version and not version_compatible:
        raise EnvironmentUnfit(
            f"the engine was built by version {version}, {trt.__version__} is installed",
            why="an engine is loaded by the version that built it, unless it was built with --version-compatible",
        )
    if plugins is not None:
        load_plugins(trt, plugins)
    # The bytes that are loaded: the file may have been replaced since it was checked.
    content = file.read_bytes()
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise InputRejected(
            "the engine was changed since it was checked",
            where=file,
            why="an engine holds code that runs when it is loaded",
            fix="see what else writes this file, and try again",
        )
    runtime = trt.Runtime(logger)
    if version_compatible:
        # Such an engine brings a runtime of its own, which is code of the host.
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise BuildFailed("the engine cannot be loaded")
    return engine
