"""A library that builds and runs engines, and what a build asks of it."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from umv2_export.bundle import Bundle
from umv2_export.engines.manifest import EngineManifest
from umv2_export.engines.timing_cache import TimingCache
from umv2_export.errors import EnvironmentUnfit

__all__ = ["Backend", "BuildOptions", "BuildTarget", "Plugins", "is_ampere"]

# Where the kernels of our ops come from: none are called, or they were compiled ahead of time, or are compiled by the
# process that loads the engine, or lie in a plugin library.
Plugins = Literal["none", "aot", "jit", "library"]

# A hardware-compatible engine runs from here on; our kernels in it are PTX, which newer GPUs translate.
AMPERE = "8.0"


def is_ampere(card: str) -> bool:
    """Whether a GPU builds and runs hardware-compatible engines, which are for Ampere and later."""
    return float(card) >= float(AMPERE)


@dataclass(frozen=True)
class BuildOptions:
    """What the user asks of a build.

    Attributes:
        compute_capability: architectures, separated by commas; None: the default of the backend.
        shapes: bound (min, opt, max) -> shapes as the user typed them, such as "input_ids:1x16".
        timing_cache: file that keeps what was timed.
        require_timing_cache: time nothing that is not in it.
        allow_jit: take the body of a plugin that Python compiles at run time, where there is no other.
        plugin_library: shared library with the plugins.
        version_compatible: the engine runs in later versions of the library too.
        hardware_compatible: the engine runs on all GPUs from Ampere on.
        strip_weights: leave out the weights; `refit` puts them in.
    """

    compute_capability: str | None = None
    shapes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    timing_cache: Path | None = None
    require_timing_cache: bool = False
    allow_jit: bool = False
    plugin_library: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    strip_weights: bool = False


@dataclass(frozen=True)
class BuildTarget:
    """What an engine is built for, and with.

    Attributes:
        architectures: compute capabilities.
        plugins: where the kernels of our ops come from.
        timing_cache: opened and checked.
    """

    architectures: tuple[str, ...]
    plugins: Plugins = "none"
    timing_cache: TimingCache | None = None


class Backend(ABC):
    """A library that builds and runs engines.

    Attributes:
        runtime: its name on the command line.
        title: its own name.
        module: of Python.
        architectures: compute capabilities that it, or the kernels of our ops, are compiled for.
        cross_compiles: it builds for architectures that are named, and not for the GPU of this machine.
        plugin_ops: ops of ours that it has plugins for.
        missing_ops: standard op -> why a graph of ours that holds it cannot be built.
    """

    runtime: ClassVar[str]
    title: ClassVar[str]
    module: ClassVar[str]
    architectures: ClassVar[Collection[str]]
    cross_compiles: ClassVar[bool] = False
    plugin_ops: ClassVar[Collection[str]] = ()
    missing_ops: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def load(self) -> Any:
        """The module, loaded into this process.

        Raises:
            EnvironmentUnfit: it is not installed, or its libraries do not load.
        """

    @abstractmethod
    def check_options(self, options: BuildOptions) -> None:
        """Refuse options that exclude each other, or that this library has not.

        Raises:
            InvalidRequest: an option cannot be followed.
            InputRejected: the file of an option is missing.
            Unsupported: the library has no such option.
        """

    @abstractmethod
    def choose_target(self, bundle: Bundle, ops: Collection[str], options: BuildOptions) -> BuildTarget:
        """What a bundle is built for on this machine.

        Args:
            bundle: to be built.
            ops: of ours, which its graph calls as plugins.
            options: of the user, checked.

        Raises:
            InvalidRequest: an option cannot be followed.
            InputRejected: the timing cache is corrupt or missing.
            EnvironmentUnfit: the library, a GPU of the named architecture, or Triton is missing.
            Unsupported: no kernels for this architecture.
        """

    def check_card(self, manifest: EngineManifest, card: str) -> None:
        """See that a GPU can load an engine.

        Args:
            manifest: of the engine.
            card: compute capability of the GPU.

        Raises:
            EnvironmentUnfit: it is none that the engine was built for.
        """
        if card in manifest.compute_capabilities or (manifest.hardware_compatible and is_ampere(card)):
            return
        raise EnvironmentUnfit(
            f"the GPU of this machine has compute capability {card}, the engine is for "
            + ", ".join(manifest.compute_capabilities),
            why="an engine is loaded to be run, and to be refitted, on the GPUs that it was built for",
            fix="take such a GPU, or build an engine for this one",
        )
