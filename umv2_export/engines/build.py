"""A checked plan becomes an engine on disk."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umv2_export import __version__
from umv2_export.bundle import MANIFEST_FILE, MODEL_FILE, Bundle
from umv2_export.engines import tensorrt, tensorrt_rtx
from umv2_export.engines.checks import check_layers, check_parsed
from umv2_export.engines.graph import write_graph
from umv2_export.engines.manifest import ENGINE_FILE, Engine, EngineManifest
from umv2_export.engines.plan import BuildOptions, BuildPlan, check_target_and_resources
from umv2_export.engines.plugins import prepare_plugins
from umv2_export.engines.worker_process import run_worker
from umv2_export.progress import Tracker, silent
from umv2_export.system.files import file_sha256
from umv2_export.system.output import atomic_directory

__all__ = ["BuildResult", "build_engine", "plan_build"]

_PLANNERS = {"tensorrt": tensorrt.plan_build, "tensorrt-rtx": tensorrt_rtx.plan_build}


@dataclass(frozen=True)
class BuildResult:
    """A finished build.

    Attributes:
        engine: under its final name.
        seconds: wall time of parser and builder.
        checked_values: float values of the parsed network whose dtypes were compared with the graph's.
    """

    engine: Engine
    seconds: float
    checked_values: int


def plan_build(runtime: str, bundle: Bundle, options: BuildOptions) -> BuildPlan:
    """Check a bundle, the options of a build and the machine, for one of `umv2_export.names.BUILD_RUNTIMES`.

    Raises:
        InvalidRequest: an option cannot be followed.
        InputRejected: the bundle or a file of an option is corrupt.
        EnvironmentUnfit: the library, a GPU or a compiler is missing.
        Unsupported: the library has no such architecture, op, dtype, tensor size or option.
    """
    return _PLANNERS[runtime](bundle, options)


def build_engine(
    plan: BuildPlan, target: Path, *, replace_target: bool = False, track: Tracker = silent
) -> BuildResult:
    """Build the engine of `plan` at `target`, replacing what is there only when it is written and checked.

    Args:
        plan: what to build.
        target: the engine's folder.
        replace_target: replace a folder that is not empty.
        track: progress.

    Raises:
        BuildFailed: the parser or the builder refused the graph, crashed, or read another graph than was given.
        EnvironmentUnfit: memory or disk is too small, or a plugin is missing.
        InputRejected: the builder refuses the timing cache.
        InvalidRequest: the timing cache lies in the target.
    """
    check_target_and_resources(plan, target)
    with (
        atomic_directory(target, replace=replace_target) as folder,
        tempfile.TemporaryDirectory(prefix="umv2-build-") as scratch,
    ):
        job = _job(plan, Path(scratch), track)
        done = track("building the engine", None)
        start = time.perf_counter()
        with (folder / ENGINE_FILE).open("xb") as engine:
            parsed = run_worker(plan.library, job, engine, Path(scratch), where=plan.bundle.model_file)
        seconds = time.perf_counter() - start
        done(1)
        check_parsed(plan.graph.inputs, plan.graph.outputs, parsed, plan.bundle.model_file)
        checked = check_layers(plan.graph.float_dtypes, parsed["layers"], plan.bundle.model_file)
        manifest = _manifest(plan, parsed["version"], folder / ENGINE_FILE)
        manifest.write(folder)
        timed = None if plan.timing_cache is None else Path(job["timing_cache"]["written"]).read_bytes()
    # Last: an engine that was built stays, even where the cache cannot be written.
    if plan.timing_cache is not None and timed is not None and not plan.options.require_timing_cache:
        plan.timing_cache.save(timed)
    return BuildResult(Engine(target, manifest), seconds, checked)


def _job(plan: BuildPlan, folder: Path, track: Tracker) -> dict[str, Any]:
    """What the worker reads, with the files that it needs in `folder`."""
    options = plan.options
    flags = [
        *(["REFIT", "STRIP_PLAN"] if options.strip_weights else []),
        *(["VERSION_COMPATIBLE"] if options.version_compatible else []),
        *(["ERROR_ON_TIMING_CACHE_MISS"] if options.require_timing_cache else []),
    ]
    preference = {"aot": ["PREFER_AOT_PYTHON_PLUGINS"], "jit": ["PREFER_JIT_PYTHON_PLUGINS"]}
    job: dict[str, Any] = {
        "task": "build",
        "model": str(write_graph(plan.graph, plan.bundle, folder / "graph")),
        # Precision comes from the dtypes of the graph, never from the builder.
        "network_flags": ["STRONGLY_TYPED", *preference.get(plan.plugins, [])],
        "builder_flags": flags,
        "compute_capabilities": plan.architectures if plan.library is tensorrt_rtx.LIBRARY else [],
        "hardware_compatible": options.hardware_compatible,
        "profiles": [profile.shapes(plan.graph.inputs) for profile in plan.profiles],
        "plugins": prepare_plugins(
            plan.plugins, plan.bundle, plan.graph.plugin_ops, plan.architectures, options.plugin_library, folder, track
        ),
        "serialized_plugins": [],
        "timing_cache": None,
    }
    if options.plugin_library is not None and options.version_compatible:
        job["serialized_plugins"] = [str(options.plugin_library.resolve())]
    if plan.timing_cache is not None:
        (folder / "timing.cache").write_bytes(plan.timing_cache.content)
        job["timing_cache"] = {"read": str(folder / "timing.cache"), "written": str(folder / "timed.cache")}
    return job


def _manifest(plan: BuildPlan, version: str, file: Path) -> EngineManifest:
    return EngineManifest(
        tool_version=__version__,
        runtime=plan.library.runtime,
        runtime_version=version,
        compute_capabilities=list(plan.architectures),
        version_compatible=plan.options.version_compatible,
        hardware_compatible=plan.options.hardware_compatible,
        plugins=plan.plugins,
        weights="stripped" if plan.options.strip_weights else "included",
        profiles=[{"name": profile.name, "shapes": profile.shapes(plan.graph.inputs)} for profile in plan.profiles],
        inputs=[tensor.as_dict() for tensor in plan.graph.inputs],
        outputs=[tensor.as_dict() for tensor in plan.graph.outputs],
        size=file.stat().st_size,
        sha256=file_sha256(file),
        bundle=file_sha256(plan.bundle.path / MANIFEST_FILE),
        graph=file_sha256(plan.bundle.path / MODEL_FILE),
        config=plan.bundle.config.as_dict(),
    )
