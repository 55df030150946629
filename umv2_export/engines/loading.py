"""What must hold before an engine is loaded, to be refitted or to be run."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from umv2_export.bundle import Bundle
from umv2_export.engines import tensorrt
from umv2_export.engines.manifest import EngineManifest
from umv2_export.engines.plan import Library, Plugins
from umv2_export.engines.plugins import prepare_plugins
from umv2_export.engines.tensorrt_package import require_tensorrt
from umv2_export.engines.tensorrt_rtx import require_tensorrt_rtx
from umv2_export.errors import EnvironmentUnfit, InputRejected, InvalidRequest
from umv2_export.progress import Tracker

__all__ = ["check_card", "check_plugin_library", "plugins_to_load", "require_library"]


def require_library(library: Library) -> Any:
    """The module of a library, loaded into this process.

    Raises:
        EnvironmentUnfit: it is not installed, or its libraries do not load.
    """
    if library.runtime == tensorrt.LIBRARY.runtime:
        return require_tensorrt()
    require_tensorrt_rtx()
    try:
        return importlib.import_module(library.module)
    except (ImportError, OSError) as error:
        raise EnvironmentUnfit(f"{library.title} does not load", why=str(error)) from error


def check_plugin_library(manifest: EngineManifest, plugin_library: Path | None) -> None:
    """See that a plugin library is named where an engine needs one, and nowhere else.

    Raises:
        InvalidRequest: it is missing, or there is no use for it.
        InputRejected: there is no such file.
    """
    if manifest.needs_plugin_library and plugin_library is None:
        raise InvalidRequest(
            "the engine was built with a plugin library, which must be loaded before it",
            fix="name it by --plugin-library",
        )
    if plugin_library is not None and not manifest.needs_plugin_library:
        raise InvalidRequest("the engine needs no plugin library", fix="leave out --plugin-library")
    if plugin_library is not None and not plugin_library.is_file():
        raise InputRejected("the plugin library is missing", where=plugin_library)


def check_card(manifest: EngineManifest, card: str) -> None:
    """See that a GPU can load an engine.

    Args:
        manifest: of the engine.
        card: compute capability of the GPU.

    Raises:
        EnvironmentUnfit: it is none that the engine was built for.
    """
    if card in manifest.compute_capabilities or (manifest.hardware_compatible and tensorrt.is_compatible(card)):
        return
    raise EnvironmentUnfit(
        f"the GPU of this machine has compute capability {card}, the engine is for "
        + ", ".join(manifest.compute_capabilities),
        why="an engine is loaded to be run, and to be refitted, on the GPUs that it was built for",
        fix="take such a GPU, or build an engine for this one",
    )


def plugins_to_load(
    manifest: EngineManifest,
    bundle: Bundle,
    ops: Sequence[str],
    plugin_library: Path | None,
    folder: Path,
    track: Tracker,
) -> dict[str, Any] | None:
    """What `load_plugins` is given before an engine is loaded; None where the engine needs nothing.

    Args:
        manifest: of the engine.
        bundle: whose ops the plugins compute.
        ops: of the graph that are plugins.
        plugin_library: that the user named.
        folder: for an index of kernels.
        track: progress.
    """
    # Kernels that were compiled ahead of time lie in the engine: nothing has to be registered before it is loaded.
    kind: Plugins = "jit" if manifest.plugins == "jit" else "library" if plugin_library is not None else "none"
    return prepare_plugins(kind, bundle, ops, manifest.compute_capabilities, plugin_library, folder, track)
