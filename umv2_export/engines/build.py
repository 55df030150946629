"""A checked plan becomes an engine on disk."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umv2_export import __version__
from umv2_export.bundle import MANIFEST_FILE, MODEL_FILE, Bundle
from umv2_export.engines.backend import BuildOptions
from umv2_export.engines.backends import BACKENDS
from umv2_export.engines.graph import read_graph, write_graph
from umv2_export.engines.manifest import ENGINE_FILE, Engine, EngineManifest
from umv2_export.engines.plan import BuildPlan, check_target_and_resources
from umv2_export.engines.plugins import prepare_plugins
from umv2_export.engines.profiles import ValueInfo, check_profiles, plan_profiles
from umv2_export.engines.worker import run_worker
from umv2_export.errors import BuildFailed
from umv2_export.progress import Tracker, silent
from umv2_export.system.files import file_sha256
from umv2_export.system.output import atomic_directory

__all__ = ["BuildResult", "build_engine", "check_layers", "check_parsed", "plan_build"]


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
    backend = BACKENDS[runtime]
    backend.check_options(options)
    graph = read_graph(bundle, backend)
    profiles = plan_profiles(graph.inputs, bundle.config.max_sequence_length, options.shapes)
    check_profiles(profiles, [*graph.inputs, *graph.outputs], bundle.model_file)
    target = backend.choose_target(bundle, graph.plugin_ops, options)
    return BuildPlan(backend, bundle, options, target, profiles, graph)


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
    cache = plan.target.timing_cache
    with (
        atomic_directory(target, replace=replace_target) as folder,
        tempfile.TemporaryDirectory(prefix="umv2-build-") as scratch,
    ):
        job = _job(plan, Path(scratch), track)
        done = track("building the engine", None)
        start = time.perf_counter()
        parsed = run_worker(plan.backend.title, job, folder / ENGINE_FILE, Path(scratch), where=plan.bundle.model_file)
        seconds = time.perf_counter() - start
        done(1)
        check_parsed(plan.graph.inputs, plan.graph.outputs, parsed, plan.bundle.model_file)
        checked = check_layers(plan.graph.float_dtypes, parsed["layers"], plan.bundle.model_file)
        manifest = _manifest(plan, parsed["version"], folder / ENGINE_FILE)
        manifest.write(folder)
        timed = None if cache is None else Path(job["timing_cache"]["written"]).read_bytes()
    # Last: an engine that was built stays, even where the cache cannot be written.
    if cache is not None and timed is not None and not plan.options.require_timing_cache:
        cache.save(timed)
    return BuildResult(Engine(target, manifest), seconds, checked)


def check_parsed(
    inputs: Sequence[ValueInfo], outputs: Sequence[ValueInfo], parsed: Mapping[str, Any], where: Path
) -> None:
    """Compare the inputs and outputs of the parsed network with those of the graph.

    Args:
        inputs: of the graph.
        outputs: of the graph.
        parsed: "inputs" and "outputs", each a list of name, dtype and dims (-1 where dynamic).
        where: the graph file.

    Raises:
        BuildFailed: they differ in number, order, name, dtype or shape.
    """
    for kind, expected in (("inputs", inputs), ("outputs", outputs)):
        wanted = [{"name": tensor.name, "dtype": tensor.dtype, "dims": tensor.dims} for tensor in expected]
        got = parsed[kind]
        if len(wanted) != len(got):
            raise BuildFailed(f"the parsed network has {len(got)} {kind}, the graph {len(wanted)}", where=where)
        for ours, theirs in zip(wanted, got, strict=True):
            if ours != theirs:
                raise BuildFailed(f"the parsed network has {theirs} among its {kind}, the graph {ours}", where=where)


def check_layers(float_dtypes: Mapping[str, str], layers: Sequence[Sequence[str]], where: Path) -> int:
    """Compare the dtypes that layers of the parsed network put out with those of the graph, where names are the same.

    A parser splits a node into layers with names of its own, and the value of the node keeps its name: of a model of
    three blocks, 479 of 544 values of TensorRT-RTX. This shows that no value was narrowed, or widened, on the way into
    the network. That the engine computes what the network says is what strong typing promises, and is not looked at.

    Args:
        float_dtypes: name -> dtype, of the graph.
        layers: name and dtype of each value of the network.
        where: the graph file.

    Returns:
        How many values were compared.

    Raises:
        BuildFailed: one has another dtype.
    """
    found = [(name, dtype) for name, dtype in layers if name in float_dtypes]
    for name, dtype in found:
        if dtype != float_dtypes[name]:
            raise BuildFailed(
                f"value {name!r} is {dtype} in the parsed network, {float_dtypes[name]} in the graph", where=where
            )
    return len(found)


def _job(plan: BuildPlan, folder: Path, track: Tracker) -> dict[str, Any]:
    """What the worker reads, with the files that it needs in `folder`."""
    options, target = plan.options, plan.target
    flags = [
        *(["REFIT", "STRIP_PLAN"] if options.strip_weights else []),
        *(["VERSION_COMPATIBLE"] if options.version_compatible else []),
        *(["ERROR_ON_TIMING_CACHE_MISS"] if options.require_timing_cache else []),
    ]
    preference = {"aot": ["PREFER_AOT_PYTHON_PLUGINS"], "jit": ["PREFER_JIT_PYTHON_PLUGINS"]}
    job: dict[str, Any] = {
        "task": "build",
        "module": plan.backend.module,
        "model": str(write_graph(plan.graph, plan.bundle, folder / "graph")),
        # Precision comes from the dtypes of the graph, never from the builder.
        "network_flags": ["STRONGLY_TYPED", *preference.get(target.plugins, [])],
        "builder_flags": flags,
        "compute_capabilities": target.architectures if plan.backend.cross_compiles else [],
        "hardware_compatible": options.hardware_compatible,
        "profiles": [profile.shapes(plan.graph.inputs) for profile in plan.profiles],
        "plugins": prepare_plugins(
            target.plugins,
            plan.bundle,
            plan.graph.plugin_ops,
            target.architectures,
            options.plugin_library,
            folder,
            track,
        ),
        "serialized_plugins": [],
        "timing_cache": None,
    }
    if options.plugin_library is not None and options.version_compatible:
        job["serialized_plugins"] = [str(options.plugin_library.resolve())]
    if target.timing_cache is not None:
        (folder / "timing.cache").write_bytes(target.timing_cache.content)
        job["timing_cache"] = {"read": str(folder / "timing.cache"), "written": str(folder / "timed.cache")}
    return job


def _manifest(plan: BuildPlan, version: str, file: Path) -> EngineManifest:
    return EngineManifest(
        tool_version=__version__,
        runtime=plan.backend.runtime,
        runtime_version=version,
        compute_capabilities=list(plan.target.architectures),
        version_compatible=plan.options.version_compatible,
        hardware_compatible=plan.options.hardware_compatible,
        plugins=plan.target.plugins,
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
