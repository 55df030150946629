"""Plugins, as a worker registers them before it parses a graph or loads an engine."""

from pathlib import Path
from typing import Any

from umv2_export.errors import EnvironmentUnfit

__all__ = ["load_plugins"]

# As the nodes of a bundle name them: attributes plugin_version and plugin_namespace.
_VERSION, _NAMESPACE = "1", "umv2"


def load_plugins(trt: Any, plugins: dict[str, Any]) -> None:
    """Register the plugins of a job, and see that every op has one.

    Args:
        trt: the module.
        plugins: ops (names); library (path), or None, and then kernels (folder), allow_jit and lookup_inputs (names of
            the inputs of MemoryLookup nodes).

    Raises:
        EnvironmentUnfit: the library cannot be loaded, or an op has no creator.
    """
    registry = trt.get_plugin_registry()
    library = plugins["library"]
    if library is None:
        from umv2_export.plugins.tensorrt.python_plugins import register_plugins  # noqa: PLC0415 - imports torch

        register_plugins(
            trt, Path(plugins["kernels"]), allow_jit=plugins["allow_jit"], lookup_inputs=plugins["lookup_inputs"]
        )
    elif registry.load_library(library) is None:
        raise EnvironmentUnfit(
            "the plugin library cannot be loaded",
            where=library,
            fix="build it against the TensorRT that is installed; see what the log above says",
        )
    for op in plugins["ops"]:
        if registry.get_creator(op, _VERSION, _NAMESPACE) is None:
            raise EnvironmentUnfit(
                f"no plugin for {_NAMESPACE}::{op}, version {_VERSION}",
                where=library,
                fix="pass a library that registers it, or leave out --plugin-library" if library else None,
            )
