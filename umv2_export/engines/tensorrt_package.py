"""The package `tensorrt`, which users install themselves: NVIDIA serves its libraries from an index of its own."""

import importlib
from typing import Any

from umv2_export.errors import EnvironmentUnfit

__all__ = ["require_tensorrt"]


def require_tensorrt() -> Any:
    """The module `tensorrt`.

    Raises:
        EnvironmentUnfit: it is not installed, or its libraries do not load.
    """
    try:
        module = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        why: str | None = None if isinstance(error, ModuleNotFoundError) else str(error)
    else:
        # `tensorrt-stubs` leaves a folder of that name, which imports as an empty package.
        if hasattr(module, "__version__"):
            return module
        why = "a folder named tensorrt is installed, perhaps by tensorrt-stubs, which holds types alone"
    raise EnvironmentUnfit("TensorRT is not installed", why=why, fix="pip install tensorrt-cu13")
