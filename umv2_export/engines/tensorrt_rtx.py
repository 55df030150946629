"""TensorRT-RTX: what it can build. No GPU is needed: it compiles for architectures that are named."""

import importlib.util

from umv2_export.bundle import Bundle
from umv2_export.compute_capability import parse_compute_capabilities
from umv2_export.engines.checks import ARCHITECTURES, DEFAULT_ARCHITECTURES, check_profiles
from umv2_export.engines.graph import read_graph
from umv2_export.engines.plan import LIBRARIES, BuildOptions, BuildPlan
from umv2_export.engines.profiles import plan_profiles
from umv2_export.errors import EnvironmentUnfit, Unsupported

__all__ = ["LIBRARY", "plan_build", "require_tensorrt_rtx"]

LIBRARY = LIBRARIES["tensorrt-rtx"]


def require_tensorrt_rtx() -> None:
    """Notice that TensorRT-RTX is not installed before work begins.

    Raises:
        EnvironmentUnfit: it is not.
    """
    # Found, not imported: its libraries of 200 MB belong to the worker alone.
    if importlib.util.find_spec(LIBRARY.module) is None:
        raise EnvironmentUnfit("TensorRT-RTX is not installed", fix="pip install 'umv2-export[rtx]'")


def plan_build(bundle: Bundle, options: BuildOptions) -> BuildPlan:
    """Check a bundle and the options of a build.

    Raises:
        InvalidRequest: an option cannot be followed.
        InputRejected: the bundle is corrupt.
        EnvironmentUnfit: TensorRT-RTX is not installed.
        Unsupported: it has no such architecture, op, dtype, tensor size or option.
    """
    _refuse_options(options)
    architectures = parse_compute_capabilities(
        options.compute_capability or DEFAULT_ARCHITECTURES, ARCHITECTURES, LIBRARY.title
    )
    graph = read_graph(bundle, LIBRARY.title)
    profiles = plan_profiles(graph.inputs, bundle.config.max_sequence_length, options.shapes)
    check_profiles(profiles, [*graph.inputs, *graph.outputs], bundle.model_file)
    require_tensorrt_rtx()
    return BuildPlan(LIBRARY, bundle, options, architectures, profiles, graph)


def _refuse_options(options: BuildOptions) -> None:
    """Refuse what only TensorRT has; the flags exist in TensorRT-RTX 1.7, and what each does was tried."""
    for given, option, what, why in (
        (
            options.timing_cache is not None or options.require_timing_cache,
            "--timing-cache" if options.timing_cache else "--require-timing-cache",
            "has no timing cache",
            "since 1.2 it ignores one; what it compiles on the GPU goes into the runtime cache of the application",
        ),
        (
            options.allow_jit or options.plugin_library is not None,
            "--allow-jit" if options.allow_jit else "--plugin-library",
            "takes no plugins",
            "it compiles the bodies of our ops",
        ),
        (
            options.version_compatible,
            "--version-compatible",
            "builds no version-compatible engines",
            "its builder asks for a lean runtime that its packages do not hold",
        ),
        (
            options.hardware_compatible,
            "--hardware-compatible",
            "has no hardware compatibility level",
            "one engine holds code for every architecture that --compute-capability names",
        ),
        (
            options.strip_weights,
            "--strip-weights",
            "strips no weights without a GPU",
            "its builder compiles a refittable engine on the GPU, and ours shall need none",
        ),
    ):
        if given:
            raise Unsupported(f"TensorRT-RTX {what}", why=why, fix=f"leave out {option}, or take --runtime tensorrt")
