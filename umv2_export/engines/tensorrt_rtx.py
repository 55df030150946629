"""A bundle becomes an engine of TensorRT-RTX. No GPU is needed: it compiles for architectures that are named."""

import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from umv2_export import __version__
from umv2_export.bundle import MANIFEST_FILE, MODEL_FILE, Bundle
from umv2_export.compute_capability import parse_compute_capabilities
from umv2_export.engines.checks import ARCHITECTURES, check_graph, check_parsed, check_profiles, tensor_spec
from umv2_export.engines.manifest import ENGINE_FILE, Engine, EngineManifest
from umv2_export.engines.profiles import Profile, TensorSpec, plan_profiles
from umv2_export.errors import BuildFailed, EnvironmentUnfit, Unsupported
from umv2_export.files import atomic_directory, file_sha256, inside, require_free_space
from umv2_export.onnx.passes import inline_bodies
from umv2_export.progress import Tracker, silent

__all__ = ["BuildPlan", "BuildResult", "build_engine", "plan_build", "require_tensorrt_rtx"]

RUNTIME = "tensorrt-rtx"

WORKER = (sys.executable, "-m", "umv2_export.engines.rtx_worker")

# Shown of the worker's log where it failed.
LOG_LINES = 12

# Kernels of one profile, a block: 7.4 MB were measured for decode, 8.9 MB for prefill, of a model of 3 blocks.
# Architectures and profiles share the weights.
KERNEL_BYTES = 3 * 10**6

BASE_MEMORY = 10**9


@dataclass(frozen=True)
class BuildPlan:
    """A build that passed every check that needs no compiler.

    Attributes:
        bundle: what is built.
        architectures: compute capabilities.
        profiles: in the order that the engine numbers them.
        model: the graph with its functions expanded.
        inputs, outputs: of the graph.
    """

    bundle: Bundle
    architectures: tuple[str, ...]
    profiles: list[Profile]
    model: ir.Model
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the bundle."""
        return sum(facts["size"] for facts in self.bundle.manifest.files.values())

    @property
    def disk_bytes(self) -> int:
        """Estimated size of the engine."""
        return self.weight_bytes + KERNEL_BYTES * self.bundle.config.num_layers * len(self.profiles)

    @property
    def memory_bytes(self) -> int:
        """Estimated peak of the compiler: it maps the weights, and holds them once more while it serialises them."""
        return BASE_MEMORY + 2 * self.weight_bytes


@dataclass(frozen=True)
class BuildResult:
    """A finished build.

    Attributes:
        engine: under its final name.
        seconds: wall time of parser and builder.
    """

    engine: Engine
    seconds: float


def require_tensorrt_rtx() -> None:
    """Notice that TensorRT-RTX is not installed before work begins.

    Raises:
        EnvironmentUnfit: it is not.
    """
    # Found, not imported: its libraries of 200 MB belong to the worker alone.
    if importlib.util.find_spec("tensorrt_rtx") is None:
        raise EnvironmentUnfit("TensorRT-RTX is not installed", fix="pip install 'umv2-export[rtx]'")


def plan_build(
    bundle: Bundle,
    *,
    compute_capability: str,
    shapes: Mapping[str, Sequence[str]],
    timing_cache: Path | None = None,
) -> BuildPlan:
    """Check a bundle and the options of a build.

    Args:
        bundle: what to build.
        compute_capability: architectures, separated by commas.
        shapes: bound (min, opt, max) -> shapes as the user typed them, such as "input_ids:1x16".
        timing_cache: always refused.

    Raises:
        InvalidRequest: an option cannot be followed.
        InputRejected: the bundle is corrupt.
        Unsupported: TensorRT-RTX has no such architecture, op, dtype, tensor size, or no timing cache.
    """
    if timing_cache is not None:
        raise Unsupported(
            "TensorRT-RTX has no timing cache",
            where=timing_cache,
            why="since 1.2 it ignores one; what it compiles on the GPU goes into the runtime cache of the application",
            fix="leave out --timing-cache",
        )
    architectures = parse_compute_capabilities(compute_capability, ARCHITECTURES, "TensorRT-RTX")
    model = ir.from_proto(bundle.graph())
    inline_bodies(model)
    check_graph(model, bundle.model_file)
    inputs, outputs = ([tensor_spec(value) for value in values] for values in (model.graph.inputs, model.graph.outputs))
    profiles = plan_profiles(inputs, bundle.config.max_sequence_length, shapes)
    check_profiles(profiles, [*inputs, *outputs], bundle.model_file)
    return BuildPlan(bundle, architectures, profiles, model, inputs, outputs)


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
        EnvironmentUnfit: TensorRT-RTX is not installed, or the disk is full.
    """
    require_tensorrt_rtx()
    require_free_space(target, plan.disk_bytes)
    with atomic_directory(target, replace=replace_target) as folder:
        done = track("building the engine", None)
        start = time.perf_counter()
        parsed = _run_worker(plan, folder / ENGINE_FILE)
        seconds = time.perf_counter() - start
        done(1)
        check_parsed(plan.inputs, plan.outputs, parsed, plan.bundle.model_file)
        manifest = EngineManifest(
            tool_version=__version__,
            runtime=RUNTIME,
            runtime_version=parsed["version"],
            compute_capabilities=list(plan.architectures),
            profiles=[{"name": profile.name, "shapes": profile.shapes(plan.inputs)} for profile in plan.profiles],
            inputs=[tensor.as_dict() for tensor in plan.inputs],
            outputs=[tensor.as_dict() for tensor in plan.outputs],
            size=(folder / ENGINE_FILE).stat().st_size,
            sha256=file_sha256(folder / ENGINE_FILE),
            bundle=file_sha256(plan.bundle.path / MANIFEST_FILE),
            config=plan.bundle.config.as_dict(),
        )
        manifest.write(folder)
    return BuildResult(Engine(target, manifest), seconds)


def _run_worker(plan: BuildPlan, engine_file: Path) -> dict[str, Any]:
    """Parse and build in another process; returns version, inputs and outputs of the parsed network."""
    with tempfile.TemporaryDirectory(prefix="umv2-build-") as scratch, engine_file.open("xb") as engine:
        folder = Path(scratch)
        _write_graph(plan, folder)
        result_file = folder / "result.json"
        job = {
            "model": str(folder / MODEL_FILE),
            "compute_capabilities": plan.architectures,
            "profiles": [profile.shapes(plan.inputs) for profile in plan.profiles],
            "engine": engine.fileno(),
            "result": str(result_file),
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        process = subprocess.run(
            [*WORKER, str(folder / "job.json")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[engine.fileno()],
            check=False,
        )
        log = process.stdout.decode(errors="replace").strip().splitlines()[-LOG_LINES:]
        # Without a result it crashed; one that was written counts, even where the library dies as it is unloaded.
        if not result_file.is_file():
            raise BuildFailed(
                f"TensorRT-RTX {_ending(process.returncode)}", where=plan.bundle.model_file, why="\n".join(log)
            )
        result: dict[str, Any] = json.loads(result_file.read_text(encoding="utf-8"))
    if "os_error" in result:
        raise OSError(*result["os_error"], str(engine_file))
    if "failed" in result:
        why = "\n".join([*result["failed"][:LOG_LINES], *log])
        raise BuildFailed("TensorRT-RTX refuses the graph", where=plan.bundle.model_file, why=why)
    return result


def _write_graph(plan: BuildPlan, folder: Path) -> None:
    """The graph with its functions expanded, and links to its weights: external data may not leave the folder."""
    ir.save(plan.model, folder / MODEL_FILE)
    for name in plan.bundle.manifest.files:
        if name != MODEL_FILE:
            link = folder / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(inside(plan.bundle.path, name).resolve())


def _ending(returncode: int) -> str:
    """How a process ended that left no result."""
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    name = signal.Signals(-returncode).name
    return f"was ended by {name}" + (", which is often the lack of memory" if name == "SIGKILL" else "")
