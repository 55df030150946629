"""What whatever builds or loads an engine is told of plugins, and the kernels that it registers, compiled before."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from umv2_export.bundle import Bundle
from umv2_export.engines.backend import Plugins
from umv2_export.engines.manifest import EngineManifest
from umv2_export.errors import InputRejected, InvalidRequest
from umv2_export.gpu.ahead_of_time import build_kernels, compiled_for
from umv2_export.gpu.lookup_variants import LookupVariant
from umv2_export.gpu.variants import node_variants, without_splits
from umv2_export.progress import Tracker

__all__ = ["check_plugin_library", "plugins_to_load", "prepare_plugins"]


def prepare_plugins(
    kind: Plugins,
    bundle: Bundle,
    ops: Sequence[str],
    architectures: Sequence[str],
    library: Path | None,
    folder: Path,
    track: Tracker,
) -> dict[str, Any] | None:
    """The entry `plugins` of a job; kernels are compiled into `folder`.

    Args:
        kind: where kernels come from.
        bundle: whose ops call them.
        ops: that need a plugin.
        architectures: compute capabilities of the GPUs.
        library: shared library with the plugins.
        folder: for the kernels.
        track: progress.

    Raises:
        BuildFailed: a kernel does not compile.
        EnvironmentUnfit: Triton is not installed.
    """
    if kind == "none":
        return None
    if library is not None:
        return {"library": str(library.resolve()), "ops": list(ops)}
    variants = without_splits(node_variants(bundle.config, bundle.layout.shards, bundle.layout.dtype))
    [lookup] = [variant for variant in variants if isinstance(variant, LookupVariant)]
    # Of bodies that Python compiles where the engine is loaded, nothing is made before: the index is empty.
    compiled = [name for name in map(compiled_for, architectures) if name is not None] if kind == "aot" else []
    build_kernels(folder / "kernels", variants, compiled, track)
    return {
        "library": None,
        "ops": list(ops),
        "kernels": str(folder / "kernels"),
        "allow_jit": kind == "jit",
        "lookup_inputs": [argument.name for argument in lookup.arguments if argument.kind == "input"],
    }


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
