"""The weights of a bundle into an engine that was built without them."""

import dataclasses
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umv2_export import __version__
from umv2_export.bundle import MANIFEST_FILE, Bundle
from umv2_export.engines.backends import TENSORRT
from umv2_export.engines.graph import Graph, read_graph, write_graph
from umv2_export.engines.manifest import ENGINE_FILE, Engine, require_trusted
from umv2_export.engines.plan import BASE_MEMORY, require_memory
from umv2_export.engines.plugins import check_plugin_library, plugins_to_load
from umv2_export.engines.worker import run_worker
from umv2_export.errors import InputRejected, Unsupported, shown
from umv2_export.gpu import driver
from umv2_export.progress import Tracker, silent
from umv2_export.system.files import file_sha256
from umv2_export.system.output import atomic_directory, require_free_space

__all__ = ["RefitPlan", "RefitResult", "plan_refit", "refit_engine"]


@dataclass(frozen=True)
class RefitPlan:
    """A refit that passed every check that does not load the engine.

    Attributes:
        engine: without weights; trusted.
        bundle: that has them.
        graph: from which the engine was built.
        plugin_library: to be loaded before the engine.
    """

    engine: Engine
    bundle: Bundle
    graph: Graph
    plugin_library: Path | None

    @property
    def disk_bytes(self) -> int:
        """Estimated size of the engine with its weights."""
        weights: int = sum(facts["size"] for facts in self.bundle.manifest.files.values())
        return self.engine.manifest.size + weights

    @property
    def memory_bytes(self) -> int:
        """Estimated peak: the engine, its weights as the parser reads them, and both once more as they are written."""
        return BASE_MEMORY + 2 * self.disk_bytes


@dataclass(frozen=True)
class RefitResult:
    """A finished refit.

    Attributes:
        engine: with weights, under its final name.
        seconds: wall time of the library.
    """

    engine: Engine
    seconds: float


def plan_refit(engine: Path, bundle: Bundle, *, trust: bool = False, plugin_library: Path | None = None) -> RefitPlan:
    """Check an engine, the bundle whose weights it shall get, and this machine.

    Args:
        engine: folder of an engine that was built with --strip-weights.
        bundle: the one that it was built from, or another with the same graph: another training of the same model.
        trust: the user vouches for the engine.
        plugin_library: with the plugins, where the engine was built with one.

    Raises:
        InvalidRequest: a plugin library is missing, or there is no use for it.
        InputRejected: the engine is not trusted, has its weights, or was built from another graph.
        EnvironmentUnfit: TensorRT or a GPU that can load the engine is missing.
        Unsupported: it is not an engine of TensorRT.
    """
    opened = require_trusted(engine, trust=trust)
    manifest = opened.manifest
    if manifest.runtime != TENSORRT.runtime:
        raise Unsupported(f"refitting an engine of {shown(manifest.runtime)}", where=engine)
    if manifest.weights != "stripped":
        raise InputRejected("the engine has its weights", where=engine, fix="build it with --strip-weights")
    digest = file_sha256(bundle.model_file)
    if digest != manifest.graph:
        raise InputRejected(
            f"the engine was built from a graph of sha256 {shown(manifest.graph)}, that of the bundle has {digest}",
            where=bundle.path,
            fix="name the bundle that it was built from, or one that was exported from the same model with the same "
            "options",
        )
    check_plugin_library(manifest, plugin_library)
    TENSORRT.load()
    TENSORRT.check_card(manifest, driver.compute_capability())
    return RefitPlan(opened, bundle, read_graph(bundle, TENSORRT), plugin_library)


def require_resources(plan: RefitPlan, target: Path) -> None:
    """Refuse to begin what memory or disk cannot hold.

    Raises:
        EnvironmentUnfit: memory or disk is too small.
    """
    require_memory(plan.memory_bytes, "a refit by TensorRT")
    require_free_space(target, plan.disk_bytes)


def refit_engine(
    plan: RefitPlan, target: Path, *, replace_target: bool = False, track: Tracker = silent
) -> RefitResult:
    """Write the engine of `plan` with its weights at `target`.

    Args:
        plan: what to refit.
        target: the new engine's folder.
        replace_target: replace a folder that is not empty.
        track: progress.

    Raises:
        BuildFailed: the engine cannot be loaded, or the weights do not fit it.
        EnvironmentUnfit: another version of TensorRT built it; memory or disk is too small; a plugin is missing.
        InputRejected: the engine was changed since it was checked.
    """
    require_resources(plan, target)
    with (
        atomic_directory(target, replace=replace_target) as folder,
        tempfile.TemporaryDirectory(prefix="umv2-refit-") as scratch,
    ):
        job = _job(plan, Path(scratch), track)
        done = track("refitting the engine", None)
        start = time.perf_counter()
        file = folder / ENGINE_FILE
        run_worker(TENSORRT.title, job, file, Path(scratch), where=plan.engine.path)
        seconds = time.perf_counter() - start
        done(1)
        manifest = dataclasses.replace(
            plan.engine.manifest,
            tool_version=__version__,
            weights="included",
            size=file.stat().st_size,
            sha256=file_sha256(file),
            bundle=file_sha256(plan.bundle.path / MANIFEST_FILE),
        )
        manifest.write(folder)
    return RefitResult(Engine(target, manifest), seconds)


def _job(plan: RefitPlan, folder: Path, track: Tracker) -> Mapping[str, Any]:
    manifest = plan.engine.manifest
    return {
        "task": "refit",
        "module": TENSORRT.module,
        "stripped": str(plan.engine.file),
        "sha256": plan.engine.expected_sha256,
        "version": manifest.runtime_version,
        "version_compatible": manifest.version_compatible,
        "model": str(write_graph(plan.graph, plan.bundle, folder / "graph")),
        "plugins": plugins_to_load(manifest, plan.bundle, plan.graph.plugin_ops, plan.plugin_library, folder, track),
    }
