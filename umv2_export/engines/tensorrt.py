"""TensorRT: what it can build, on the GPU that the engine is for."""

import dataclasses

from umv2_export.bundle import Bundle
from umv2_export.compute_capability import parse_compute_capabilities
from umv2_export.engines.checks import check_profiles
from umv2_export.engines.graph import Graph, read_graph
from umv2_export.engines.plan import LIBRARIES, BuildOptions, BuildPlan, Plugins
from umv2_export.engines.plugins import PLUGIN_OPS
from umv2_export.engines.profiles import plan_profiles
from umv2_export.engines.tensorrt_package import require_tensorrt
from umv2_export.engines.timing_cache import TimingCache, open_timing_cache
from umv2_export.errors import EnvironmentUnfit, InputRejected, InvalidRequest, Unsupported
from umv2_export.gpu import driver
from umv2_export.gpu.ahead_of_time import ARCHITECTURES, compiled_for, require_triton

__all__ = ["LIBRARY", "is_compatible", "plan_build"]

LIBRARY = LIBRARIES["tensorrt"]

# Its interface is the one that the worker was compared with.
OLDEST_VERSION = (10, 13)

# A hardware-compatible engine runs from Ampere on; our kernels in it are PTX, which newer GPUs translate.
OLDEST_COMPATIBLE = "8.0"


def plan_build(bundle: Bundle, options: BuildOptions) -> BuildPlan:
    """Check a bundle, the options of a build, and this machine.

    Raises:
        InvalidRequest: an option cannot be followed.
        InputRejected: the bundle, the timing cache or the plugin library is corrupt or missing.
        EnvironmentUnfit: TensorRT, a GPU of the named architecture, or Triton is missing.
        Unsupported: no kernels for this architecture; no such op, dtype or tensor size.
    """
    _check_options(options)
    graph = read_graph(bundle, LIBRARY.title, PLUGIN_OPS)
    profiles = plan_profiles(graph.inputs, bundle.config.max_sequence_length, options.shapes)
    check_profiles(profiles, [*graph.inputs, *graph.outputs], bundle.model_file)
    version = _version()
    card = driver.compute_capability()
    architecture = _architecture(options, card)
    plan = BuildPlan(LIBRARY, bundle, options, (architecture,), profiles, graph)
    return dataclasses.replace(
        plan, plugins=_plugins(graph, bundle, options, architecture), timing_cache=_timing_cache(options, version, card)
    )


def _version() -> str:
    """The version of TensorRT."""
    version = str(require_tensorrt().__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_VERSION:
        raise EnvironmentUnfit(
            f"TensorRT {version} is installed",
            why="this tool was written for {}.{} and later".format(*OLDEST_VERSION),
            fix="pip install --upgrade 'umv2-export[tensorrt]'",
        )
    return version


def _check_options(options: BuildOptions) -> None:
    if options.require_timing_cache and options.timing_cache is None:
        raise InvalidRequest("--require-timing-cache without a cache", fix="name it by --timing-cache")
    if options.allow_jit and options.plugin_library is not None:
        raise InvalidRequest(
            "--allow-jit and --plugin-library exclude each other",
            why="the library replaces the plugins of Python, with their compiled and their Python bodies",
        )
    if options.plugin_library is not None and not options.plugin_library.is_file():
        raise InputRejected("the plugin library is missing", where=options.plugin_library)


def _architecture(options: BuildOptions, card: str) -> str:
    """The compute capability that kernels are compiled for."""
    if options.compute_capability is not None:
        named = parse_compute_capabilities(options.compute_capability, {*ARCHITECTURES, card}, LIBRARY.title)
        if named != (card,):
            raise EnvironmentUnfit(
                f"compute capability {', '.join(named)} was asked for, the GPU of this machine has {card}",
                why="TensorRT times its kernels on the GPU that it builds for",
                fix="build on such a GPU, or leave out --compute-capability and pass --hardware-compatible",
            )
    if not options.hardware_compatible:
        return card
    if not is_compatible(card):
        raise Unsupported(
            f"a hardware-compatible engine on a GPU of compute capability {card}",
            why=f"TensorRT builds them on {OLDEST_COMPATIBLE} and later",
            fix="leave out --hardware-compatible",
        )
    return OLDEST_COMPATIBLE


def is_compatible(card: str) -> bool:
    """Whether a GPU builds and runs hardware-compatible engines."""
    return float(card) >= float(OLDEST_COMPATIBLE)


def _plugins(graph: Graph, bundle: Bundle, options: BuildOptions, architecture: str) -> Plugins:
    """Where the kernels come from, if the graph calls any."""
    if not graph.plugin_ops:
        if options.plugin_library is not None or options.allow_jit:
            option = "--allow-jit" if options.allow_jit else "--plugin-library"
            raise InvalidRequest(
                f"{option} has no effect here",
                where=bundle.path,
                why="the graph calls none of our ops: it was exported with --inline-functions, or has no memory layers",
                fix=f"leave out {option}",
            )
        return "none"
    if options.plugin_library is not None:
        return "library"
    require_triton()
    if compiled_for(architecture) is not None:
        return "aot"
    if bundle.manifest.table_dtype == "bf16":
        raise Unsupported(
            f"rows of bf16 on a GPU of compute capability {architecture}",
            where=bundle.path,
            why="no kernels are compiled ahead of time for it, and to those of Python TensorRT hands no bf16",
            fix="export with --table-dtype fp16 or fp32, or take a GPU of one of " + ", ".join(ARCHITECTURES),
        )
    if not options.allow_jit:
        raise Unsupported(
            f"no kernels are compiled ahead of time for compute capability {architecture}",
            why="they are for " + ", ".join(ARCHITECTURES),
            fix="pass --allow-jit, if whatever loads the engine may run Python and Triton",
        )
    return "jit"


def _timing_cache(options: BuildOptions, version: str, card: str) -> TimingCache | None:
    if options.timing_cache is None:
        return None
    return open_timing_cache(
        options.timing_cache,
        tensorrt_version=version,
        compute_capability=card,
        required=options.require_timing_cache,
    )
