"""A build that was checked: what is built, with which options, and what it takes."""

from dataclasses import dataclass
from pathlib import Path

from umv2_export.bundle import Bundle
from umv2_export.engines.backend import Backend, BuildOptions, BuildTarget
from umv2_export.engines.graph import Graph
from umv2_export.engines.profiles import Profile
from umv2_export.errors import EnvironmentUnfit, InvalidRequest
from umv2_export.system.host_memory import available_bytes
from umv2_export.system.output import require_free_space

__all__ = ["BASE_MEMORY", "BuildPlan", "check_target_and_resources", "require_memory"]

# Kernels of one profile, a block: 7.4 MB were measured for decode, 8.9 MB for prefill, of a model of 3 blocks.
# Architectures and profiles share the weights.
KERNEL_BYTES = 3 * 10**6

# Measured of TensorRT-RTX; TensorRT could not be.
BASE_MEMORY = 10**9


@dataclass(frozen=True)
class BuildPlan:
    """A build that passed every check that needs no compiler.

    Attributes:
        backend: that builds.
        bundle: what is built.
        options: of the user.
        target: for which it builds, and with what.
        profiles: in the order that the engine numbers them.
        graph: as the builder gets it.
    """

    backend: Backend
    bundle: Bundle
    options: BuildOptions
    target: BuildTarget
    profiles: list[Profile]
    graph: Graph

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
    cache = plan.target.timing_cache
    if cache is not None and target.resolve() in cache.file.resolve().parents:
        raise InvalidRequest(
            "the timing cache lies in the output folder",
            where=cache.file,
            why="an output folder is replaced as a whole, and an engine's folder holds nothing else",
            fix="name a file outside it",
        )
    require_memory(plan.memory_bytes, f"a build by {plan.backend.title}")
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
