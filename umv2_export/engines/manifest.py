"""An engine on disk: the compiled file and engine.json. Nothing here deserialises an engine: it holds code."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umv2_export.config import ModelConfig
from umv2_export.errors import CheckFailed, InputRejected, shown
from umv2_export.interface_checks import VALUES
from umv2_export.records.documents import Document
from umv2_export.records.forms import anything, forms_of, integer, list_of, mapping, one_of, record, text
from umv2_export.system.files import file_sha256, inside

__all__ = [
    "ENGINE_FILE",
    "ENGINE_MANIFEST_FILE",
    "Engine",
    "EngineManifest",
    "describe_engine",
    "read_engine",
    "require_trusted",
    "verify_engine",
]

ENGINE_FILE = "model.engine"
ENGINE_MANIFEST_FILE = "engine.json"

DOCUMENT = Document(
    file=ENGINE_MANIFEST_FILE,
    title="the manifest of an engine",
    folder="engine",
    writer="umv2-export build",
    format="umv2-engine",
    version=2,
    renewal="build the engine again",
)


@dataclass(frozen=True)
class EngineManifest:
    """What an engine says of itself; field by field the content of engine.json.

    Attributes:
        tool_version: of the tool that wrote it.
        runtime: tensorrt or tensorrt-rtx.
        runtime_version: of the library that built it; it must be loaded by the same.
        compute_capabilities: of the GPUs that can run it.
        version_compatible: it can be loaded by later versions too, which must allow it to bring code of the host.
        hardware_compatible: newer GPUs can run it too.
        plugins: kernels of our ops: `none` are called; `aot`, they are in the engine; `jit`, whatever loads the engine
            compiles them, with Python and Triton; `library`, they lie in a plugin library.
        weights: `included`, or `stripped`: it cannot run before it is refitted.
        profiles: name, and shapes (input -> min, opt, max), in the order of the engine's profiles.
        inputs, outputs: name, dtype and axes of each; the parsed network agreed with them.
        size: bytes of the engine file.
        sha256: of the engine file.
        bundle: sha256 of the manifest of the bundle whose weights it has, or was built from.
        graph: sha256 of the graph of that bundle, which has all names and shapes, and no weights.
        config: the model, in the form of `ModelConfig.as_dict`.
    """

    tool_version: str
    runtime: str
    runtime_version: str
    compute_capabilities: list[str]
    version_compatible: bool
    hardware_compatible: bool
    plugins: str
    weights: str
    profiles: list[Mapping[str, Any]]
    inputs: list[Mapping[str, Any]]
    outputs: list[Mapping[str, Any]]
    size: int
    sha256: str
    bundle: str
    graph: str
    config: Mapping[str, Any]

    @property
    def needs_plugin_library(self) -> bool:
        """Whether a plugin library must be loaded before it; a version-compatible engine brings its own."""
        return self.plugins == "library" and not self.version_compatible

    def as_dict(self) -> dict[str, Any]:
        """The content of engine.json."""
        return DOCUMENT.content(dataclasses.asdict(self))

    def write(self, folder: Path) -> None:
        """Write engine.json; the last file of an engine."""
        DOCUMENT.write(folder, dataclasses.asdict(self))


_SHAPE = list_of(integer(0))

# The config is a `ModelConfig`'s to read.
SCHEMA = forms_of(
    EngineManifest,
    plugins=one_of("none", "aot", "jit", "library"),
    weights=one_of("included", "stripped"),
    profiles=list_of(record({"name": text, "shapes": mapping(record({"min": _SHAPE, "opt": _SHAPE, "max": _SHAPE}))})),
    inputs=VALUES,
    outputs=VALUES,
    size=integer(0),
    config=mapping(anything),
)


@dataclass(frozen=True)
class Engine:
    """An engine whose manifest was read, and whose file has the size and hash that it names, or is vouched for.

    Attributes:
        path: the folder.
        manifest: engine.json.
        vouched: the user vouches for the file, which may then be another than the manifest says.
    """

    path: Path
    manifest: EngineManifest
    vouched: bool = False

    @property
    def file(self) -> Path:
        """The compiled engine."""
        return self.path / ENGINE_FILE

    @property
    def expected_sha256(self) -> str | None:
        """What the file must have when it is loaded; None where any will do."""
        return None if self.vouched else self.manifest.sha256


def read_engine(path: Path) -> Engine:
    """Read the manifest of an engine and compare the file with it.

    Raises:
        InputRejected: it is not an engine, or its manifest is malformed.
        CheckFailed: the file is not the one that the manifest describes.
    """
    manifest = EngineManifest(**DOCUMENT.read(path, SCHEMA))
    difference = _difference(path, manifest)
    if difference is not None:
        raise CheckFailed(difference, where=path, fix="copy the engine again, or build it again")
    return Engine(path, manifest)


def verify_engine(path: Path) -> Engine:
    """Compare an engine with its manifest, and see that nothing else lies in its folder.

    Raises:
        InputRejected: it is not an engine, or its manifest is malformed.
        CheckFailed: the file is not the one that the manifest describes, or there are others.
    """
    engine = read_engine(path)
    strangers = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} - {ENGINE_FILE, ENGINE_MANIFEST_FILE}
    if strangers:
        raise CheckFailed(f"file {min(strangers)!r} is not in the manifest", where=path)
    return engine


def require_trusted(path: Path, *, trust: bool) -> Engine:
    """Open an engine that will be deserialised, which runs code that the file holds.

    Whatever loads engines takes its path from here, `engine = require_trusted(path, trust=trust_engine)`, and hands
    `engine.file` and `engine.expected_sha256` to `load_engine`.

    The manifest is not a signature: who replaces both files is not noticed. It tells an engine that this tool built
    from any other file.

    Args:
        path: folder of an engine.
        trust: the user vouches for the file (--trust-engine), which may then be another than the manifest says.

    Raises:
        InputRejected: the file is not the one that its manifest describes, and is not trusted; or there is no manifest.
    """
    try:
        manifest = EngineManifest(**DOCUMENT.read(path, SCHEMA))
    except InputRejected as error:
        raise InputRejected(
            f"this engine is not trusted: {error.what}",
            where=error.where,
            why="an engine holds code that runs when it is loaded, and nothing says what this one is",
            fix=error.fix,
        ) from error
    difference = None if trust else _difference(path, manifest)
    if difference is not None:
        raise InputRejected(
            f"this engine is not trusted: {difference}",
            where=path,
            why="an engine holds code that runs when it is loaded",
            fix="build it again; or, if you know where it comes from, pass --trust-engine",
        )
    inside(path, ENGINE_FILE)
    return Engine(path, manifest, vouched=trust)


def describe_engine(path: Path) -> dict[str, Any]:
    """What an engine is, for `umv2-export inspect`; it is hashed, never deserialised.

    Raises:
        InputRejected: it is not an engine, or its manifest is malformed.
        CheckFailed: the file is not the one that the manifest describes.
    """
    manifest = read_engine(path).manifest
    return {
        "kind": "engine",
        "runtime": manifest.runtime,
        "runtime_version": manifest.runtime_version,
        "compute_capabilities": list(manifest.compute_capabilities),
        "version_compatible": manifest.version_compatible,
        "hardware_compatible": manifest.hardware_compatible,
        "plugins": manifest.plugins,
        "weights": manifest.weights,
        "tool_version": manifest.tool_version,
        "config": ModelConfig.from_dict(manifest.config, where=path / ENGINE_MANIFEST_FILE).as_dict(),
        "profiles": {profile["name"]: profile["shapes"] for profile in manifest.profiles},
        "inputs": manifest.inputs,
        "outputs": manifest.outputs,
        "bundle": manifest.bundle,
        "graph": manifest.graph,
        "sha256": manifest.sha256,
        "files": {ENGINE_FILE: manifest.size},
        "size": manifest.size,
    }


def _difference(path: Path, manifest: EngineManifest) -> str | None:
    """How the engine file differs from what its manifest says."""
    file = inside(path, ENGINE_FILE)
    size = file.stat().st_size
    if size != manifest.size:
        return f"file {ENGINE_FILE!r} has {size} bytes, the manifest says {manifest.size}"
    digest = file_sha256(file)
    if digest != manifest.sha256:
        return f"file {ENGINE_FILE!r} has sha256 {digest}, the manifest says {shown(manifest.sha256)}"
    return None
