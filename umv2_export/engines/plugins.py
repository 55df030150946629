"""What a worker is told of plugins, with the kernels that it will register compiled before."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from umv2_export.bundle import Bundle
from umv2_export.engines.plan import Plugins
from umv2_export.gpu.ahead_of_time import build_kernels, compiled_for
from umv2_export.gpu.lookup_variants import LookupVariant
from umv2_export.gpu.variants import node_variants, without_splits
from umv2_export.progress import Tracker

__all__ = ["PLUGIN_OPS", "prepare_plugins"]

# KeyScores has no plugin: it is matrix products, which a builder does best itself.
PLUGIN_OPS = ("MemoryLookup", "TuckerTopK")


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
