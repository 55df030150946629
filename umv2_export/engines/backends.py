"""TensorRT, which builds on the GPU that an engine is for; and TensorRT-RTX, which needs none."""

import importlib
import importlib.util
from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any, ClassVar

from umv2_export.bundle import Bundle
from umv2_export.compute_capability import parse_compute_capabilities
from umv2_export.engines.backend import AMPERE, Backend, BuildOptions, BuildTarget, Plugins, is_ampere
from umv2_export.engines.timing_cache import TimingCache, open_timing_cache
from umv2_export.errors import EnvironmentUnfit, InputRejected, InvalidRequest, Unsupported
from umv2_export.gpu import ahead_of_time, driver

__all__ = ["BACKENDS", "TENSORRT", "TENSORRT_RTX", "TensorRt", "TensorRtRtx"]

# Its interface is the one that the worker was compared with.
OLDEST_TENSORRT = (10, 13)


class TensorRt(Backend):
    """TensorRT, which users install themselves: NVIDIA serves its libraries from an index of its own."""

    runtime = "tensorrt"
    title = "TensorRT"
    module = "tensorrt"
    # Of our kernels; it builds for any GPU that it runs on.
    architectures = tuple(ahead_of_time.ARCHITECTURES)
    # KeyScores has no plugin: it is matrix products, which a builder does best itself.
    plugin_ops = ("MemoryLookup", "TuckerTopK")

    def load(self) -> Any:
        """See `Backend.load`."""
        try:
            module = importlib.import_module(self.module)
        except (ImportError, OSError) as error:
            why: str | None = None if isinstance(error, ModuleNotFoundError) else str(error)
        else:
            # `tensorrt-stubs` leaves a folder of that name, which imports as an empty package.
            if hasattr(module, "__version__"):
                return module
            why = "a folder named tensorrt is installed, perhaps by tensorrt-stubs, which holds types alone"
        raise EnvironmentUnfit("TensorRT is not installed", why=why, fix="pip install tensorrt-cu13")

    def check_options(self, options: BuildOptions) -> None:
        """See `Backend.check_options`."""
        if options.require_timing_cache and options.timing_cache is None:
            raise InvalidRequest("--require-timing-cache without a cache", fix="name it by --timing-cache")
        if options.allow_jit and options.plugin_library is not None:
            raise InvalidRequest(
                "--allow-jit and --plugin-library exclude each other",
                why="the library replaces the plugins of Python, with their compiled and their Python bodies",
            )
        if options.plugin_library is not None and not options.plugin_library.is_file():
            raise InputRejected("the plugin library is missing", where=options.plugin_library)

    def choose_target(self, bundle: Bundle, ops: Collection[str], options: BuildOptions) -> BuildTarget:
        """See `Backend.choose_target`."""
        version, card = self._version(), driver.compute_capability()
        architecture = self._architecture(options, card)
        plugins = self._plugins(bundle, ops, options, architecture)
        return BuildTarget((architecture,), plugins, _timing_cache(options, version, card))

    def _version(self) -> str:
        version = str(self.load().__version__)
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TENSORRT:
            raise EnvironmentUnfit(
                f"TensorRT {version} is installed",
                why="this tool was written for {}.{} and later".format(*OLDEST_TENSORRT),
                fix="pip install --upgrade 'umv2-export[tensorrt]'",
            )
        return version

    def _architecture(self, options: BuildOptions, card: str) -> str:
        """The compute capability that kernels are compiled for."""
        if options.compute_capability is not None:
            named = parse_compute_capabilities(options.compute_capability, {*self.architectures, card}, self.title)
            if named != (card,):
                raise EnvironmentUnfit(
                    f"compute capability {', '.join(named)} was asked for, the GPU of this machine has {card}",
                    why="TensorRT times its kernels on the GPU that it builds for",
                    fix="build on such a GPU, or leave out --compute-capability and pass --hardware-compatible",
                )
        if not options.hardware_compatible:
            return card
        if not is_ampere(card):
            raise Unsupported(
                f"a hardware-compatible engine on a GPU of compute capability {card}",
                why=f"TensorRT builds them on {AMPERE} and later",
                fix="leave out --hardware-compatible",
            )
        return AMPERE

    def _plugins(self, bundle: Bundle, ops: Collection[str], options: BuildOptions, architecture: str) -> Plugins:
        """Where the kernels come from, if the graph calls any."""
        if not ops:
            if options.plugin_library is not None or options.allow_jit:
                option = "--allow-jit" if options.allow_jit else "--plugin-library"
                raise InvalidRequest(
                    f"{option} has no effect here",
                    where=bundle.path,
                    why="the graph calls none of our ops: it was exported with --inline-functions, or has no memory "
                    "layers",
                    fix=f"leave out {option}",
                )
            return "none"
        if options.plugin_library is not None:
            return "library"
        ahead_of_time.require_triton()
        if ahead_of_time.compiled_for(architecture) is not None:
            return "aot"
        if bundle.manifest.table_dtype == "bf16":
            raise Unsupported(
                f"rows of bf16 on a GPU of compute capability {architecture}",
                where=bundle.path,
                why="no kernels are compiled ahead of time for it, and to those of Python TensorRT hands no bf16",
                fix="export with --table-dtype fp16 or fp32, or take a GPU of one of " + ", ".join(self.architectures),
            )
        if not options.allow_jit:
            raise Unsupported(
                f"no kernels are compiled ahead of time for compute capability {architecture}",
                why="they are for " + ", ".join(self.architectures),
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


class TensorRtRtx(Backend):
    """TensorRT-RTX 1.7. It has the flags for what is refused here, and what each does was tried."""

    runtime = "tensorrt-rtx"
    title = "TensorRT-RTX"
    module = "tensorrt_rtx"
    # It names 7.5 too, and refuses every fp32 product there.
    architectures = ("8.0", "8.6", "8.9", "12.0", "12.1")
    default_architectures = "8.6,8.9,12.0"
    cross_compiles = True
    missing_ops: ClassVar[Mapping[str, str]] = {
        "NonZero": "experts in standard ops find their tokens by it, and TensorRT-RTX's ONNX parser has none"
    }

    def require(self) -> None:
        """Notice that it is not installed, before work begins.

        Raises:
            EnvironmentUnfit: it is not.
        """
        # Found, not imported: its libraries of 200 MB belong to the worker alone.
        if importlib.util.find_spec(self.module) is None:
            raise EnvironmentUnfit("TensorRT-RTX is not installed", fix="pip install 'umv2-export[rtx]'")

    def load(self) -> ModuleType:
        """See `Backend.load`."""
        self.require()
        try:
            return importlib.import_module(self.module)
        except (ImportError, OSError) as error:
            raise EnvironmentUnfit(f"{self.title} does not load", why=str(error)) from error

    def check_options(self, options: BuildOptions) -> None:
        """See `Backend.check_options`."""
        self._architectures(options)
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
                fix = f"leave out {option}, or take --runtime tensorrt"
                raise Unsupported(f"TensorRT-RTX {what}", why=why, fix=fix)

    def choose_target(self, bundle: Bundle, ops: Collection[str], options: BuildOptions) -> BuildTarget:
        """See `Backend.choose_target`."""
        self.require()
        return BuildTarget(self._architectures(options))

    def _architectures(self, options: BuildOptions) -> tuple[str, ...]:
        named = options.compute_capability or self.default_architectures
        return parse_compute_capabilities(named, self.architectures, self.title)


TENSORRT, TENSORRT_RTX = TensorRt(), TensorRtRtx()

BACKENDS: Mapping[str, Backend] = {backend.runtime: backend for backend in (TENSORRT, TENSORRT_RTX)}
