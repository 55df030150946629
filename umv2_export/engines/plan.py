"""A build that was checked: what is built, with which options, and what it takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from umv2_export.bundle import Bundle
from umv2_export.engines.graph import Graph
from umv2_export.engines.profiles import Profile
from umv2_export.engines.timing_cache import TimingCache
from umv2_export.errors import EnvironmentUnfit, InvalidRequest
from umv2_export.system.host_memory import available_bytes
from umv2_export.system.output import require_free_space

__all__ = [
    "BASE_MEMORY",
    "LIBRARIES",
    "BuildOptions",
    "BuildPlan",
    "Library",
    "Plugins",
    "check_target_and_resources",
    "require_memory",
]

# Kernels of one profile, a block: 7.4 MB were measured for decode, 8.9 MB for prefill, of a model of 3 blocks.
# Architectures and profiles share the weights.
KERNEL_BYTES = 3 * 10**6

# Measured of TensorRT-RTX; TensorRT could not be.
BASE_MEMORY = 10**9

# Where the kernels of our ops come from: none are called, or they were compiled ahead of time, or are compiled by the
# process that loads the engine, or lie in a plugin library.
Plugins = Literal["none", "aot", "jit", "library"]


@dataclass(frozen=True)
class Library:
    """A library that builds engines.

    Attributes:
        runtime: its name on the command line.
        title: its own name.
        module: of Python.
    """

    runtime: str
    title: str
    module: str


LIBRARIES: Mapping[str, Library] = {
    library.runtime: library
    for library in (
        Library("tensorrt", "TensorRT", "tensorrt"),
        Library("tensorrt-rtx", "TensorRT-RTX", "tensorrt_rtx"),
    )
}


@dataclass(frozen=True)
class BuildOptions:
    """What the user asks of a build.

    Attributes:
        compute_capability: architectures, separated by commas; None: the default of the library.
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
class BuildPlan:
    """A build that passed every check that needs no compiler.

    Attributes:
        library: that builds.
        bundle: what is built.
        options: of the user.
        architectures: compute capabilities.
        profiles: in the order that the engine numbers them.
        graph: as the builder gets it.
        plugins: where the kernels of our ops come from.
        timing_cache: opened and checked.
    """

    library: Library
    bundle: Bundle
    options: BuildOptions
    architectures: tuple[str, ...]
    profiles: list[Profile]
    graph: Graph
    plugins: Plugins = "none"
    timing_cache: TimingCache | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the bundle."""
        return sum(facts["size"] for facts in self.bundle.manifest.files.values())

    @property
    def disk_bytes(self) -> int:
        """Estimated size of the engine."""
        kernels = KERNEL_BYTES * self.bundle.config.num_layers * len(self.profiles)
        return kernels if self.options.strip_weights else kernels + self.weight_bytes

    @property
    def memory_bytes(self) -> int:
        """Estimated peak of the builder: it maps the weights, and holds them once more while it serialises them."""
        return BASE_MEMORY + 2 * self.weight_bytes


def check_target_and_resources(plan: BuildPlan, target: Path) -> None:
    """Refuse to begin what memory or disk cannot hold, or what would replace its own timing cache.

    Raises:
        EnvironmentUnfit: memory or disk is too small.
        InvalidRequest: the timing cache lies in the target.
    """
    if plan.timing_cache is not None and target.resolve() in plan.timing_cache.file.resolve().parents:
        raise InvalidRequest(
            "the timing cache lies in the output folder",
            where=plan.timing_cache.file,
            why="an output folder is replaced as a whole, and an engine's folder holds nothing else",
            fix="name a file outside it",
        )
    require_memory(plan.memory_bytes, f"a build by {plan.library.title}")
    require_free_space(target, plan.disk_bytes)


def require_memory(size: int, what: str) -> None:
    """Refuse to begin what needs more than `size` bytes of memory that can be had.

    Raises:
        EnvironmentUnfit: fewer are available.
    """
    available = available_bytes()
    if available is not None and available < size:
        raise EnvironmentUnfit(
            f"{what} needs about {size / 1e9:.3f} GB of memory, {available / 1e9:.3f} GB are available",
            why="it would be ended by the system after it has worked for long",
            fix="end other processes, or take a machine with more memory",
        )
