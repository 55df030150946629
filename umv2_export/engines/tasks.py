"""What a library is asked, in a worker or in a runtime: to build an engine, to load one, to give it weights."""

import hashlib
import os
from pathlib import Path
from typing import Any

from umv2_export.errors import BuildFailed, EnvironmentUnfit, InputRejected

__all__ = ["build", "dtype_name", "load_engine", "refit"]

# As the nodes of a bundle name their plugins: attributes plugin_version and plugin_namespace.
_VERSION, _NAMESPACE = "1", "umv2"


def build(trt: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Build the engine that a job describes.

    Args:
        trt: the module.
        job: model (path of the .onnx file, its data beside it), network_flags and builder_flags (names), profiles
            (input -> min, opt, max), engine (descriptor to write to), and where the library has such: plugins,
            serialized_plugins (paths), compute_capabilities, hardware_compatible, timing_cache (read and written:
            paths).

    Returns:
        version; inputs and outputs (name, dtype, dims) of the parsed network; layers, name and dtype of every value
        that a layer of it puts out.

    Raises:
        BuildFailed: the parser or the builder refuses the graph.
        EnvironmentUnfit: there is no plugin for an op.
        InputRejected: the timing cache was measured on another GPU.
        OSError: the engine cannot be written.
    """
    if job["plugins"] is not None:
        load_plugins(trt, job["plugins"])
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt, job["network_flags"]))
    parser = trt.OnnxParser(network, logger)
    # From the file: of a graph in memory, the parser would look for the weights in the current folder.
    if not parser.parse_from_file(job["model"]):
        errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
        raise BuildFailed("the parser refuses the graph", why="\n".join(errors))
    parsed = {
        "version": trt.__version__,
        "inputs": [_describe(trt, network.get_input(i)) for i in range(network.num_inputs)],
        "outputs": [_describe(trt, network.get_output(i)) for i in range(network.num_outputs)],
        "layers": _layer_dtypes(trt, network),
    }
    config = _configure(trt, builder, job)
    cache = job["timing_cache"]
    if cache is not None:
        _set_timing_cache(config, Path(cache["read"]).read_bytes())
    with os.fdopen(job["engine"], "wb") as out:
        writer = _stream_writer(trt, out)
        built = builder.build_serialized_network_to_stream(network, config, writer)
    if writer.error is not None:
        raise writer.error
    if not built:
        raise BuildFailed("the builder refuses the graph")
    if cache is not None:
        Path(cache["written"]).write_bytes(config.get_timing_cache().serialize())
    return parsed


def refit(trt: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Load an engine, give it the weights of a graph by their names, and write it with them.

    Args:
        trt: the module.
        job: stripped (path of the engine), sha256 (of it, or None), version (of the library that built it),
            version_compatible, plugins, model (path of the .onnx file that it was built from, with the weights beside
            it), engine (descriptor).

    Returns:
        version.

    Raises:
        BuildFailed: the engine cannot be loaded or refitted.
        EnvironmentUnfit: another version of the library built the engine.
        InputRejected: the engine has another hash.
        OSError: the engine cannot be written.
    """
    logger = trt.Logger(trt.Logger.WARNING)
    engine = load_engine(
        trt,
        logger,
        Path(job["stripped"]),
        sha256=job["sha256"],
        version=job["version"],
        version_compatible=job["version_compatible"],
        plugins=job["plugins"],
    )
    refitter = trt.Refitter(engine, logger)
    weights = trt.OnnxParserRefitter(refitter, logger)
    if not weights.refit_from_file(job["model"]):
        errors = [str(weights.get_error(i)) for i in range(weights.num_errors)]
        raise BuildFailed("the weights do not fit the engine", why="\n".join(errors))
    missing = refitter.get_missing_weights()
    if missing:
        raise BuildFailed(f"the bundle has no weights for {len(missing)} names of the engine", why=", ".join(missing))
    if not refitter.refit_cuda_engine():
        raise BuildFailed("the engine refuses the weights")
    config = engine.create_serialization_config()
    # Set for an engine that was built without weights.
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    with os.fdopen(job["engine"], "wb") as out:
        out.write(engine.serialize_with_config(config))
    return {"version": trt.__version__}


def load_engine(
    trt: Any,
    logger: Any,
    file: Path,
    *,
    sha256: str | None,
    version: str,
    version_compatible: bool,
    plugins: dict[str, Any] | None,
) -> Any:
    """Register the plugins of an engine, and deserialise it: code that it holds may run.

    Args:
        trt: the module.
        logger: of the library.
        file: the engine, which is trusted.
        sha256: of the bytes that were found to be trusted; None: the user vouches for any.
        version: of the library that built it.
        version_compatible: whether others may load it.
        plugins: what `load_plugins` takes; None: nothing has to be registered.

    Raises:
        BuildFailed: the engine cannot be loaded.
        EnvironmentUnfit: another version of the library built it, or a plugin is missing.
        InputRejected: the file has another hash.
    """
    if trt.__version__ != version and not version_compatible:
        raise EnvironmentUnfit(
            f"the engine was built by version {version}, {trt.__version__} is installed",
            why="an engine is loaded by the version that built it, unless it was built with --version-compatible",
        )
    if plugins is not None:
        load_plugins(trt, plugins)
    # The bytes that are loaded: the file may have been replaced since it was checked.
    content = file.read_bytes()
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise InputRejected(
            "the engine was changed since it was checked",
            where=file,
            why="an engine holds code that runs when it is loaded",
            fix="see what else writes this file, and try again",
        )
    runtime = trt.Runtime(logger)
    if version_compatible:
        # Such an engine brings a runtime of its own, which is code of the host.
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise BuildFailed("the engine cannot be loaded")
    return engine


def load_plugins(trt: Any, plugins: dict[str, Any]) -> None:
    """Register the plugins of a job, and see that every op has one.

    Args:
        trt: the module.
        plugins: ops (names); library (path), or None, and then kernels (folder), allow_jit and lookup_inputs (names of
            the inputs of MemoryLookup nodes).

    Raises:
        EnvironmentUnfit: the library cannot be loaded, or an op has no creator.
    """
    registry = trt.get_plugin_registry()
    library = plugins["library"]
    if library is None:
        from umv2_export.plugins.tensorrt.python_plugins import register_plugins  # noqa: PLC0415 - imports torch

        register_plugins(
            trt, Path(plugins["kernels"]), allow_jit=plugins["allow_jit"], lookup_inputs=plugins["lookup_inputs"]
        )
    elif registry.load_library(library) is None:
        raise EnvironmentUnfit(
            "the plugin library cannot be loaded",
            where=library,
            fix="build it against the TensorRT that is installed; see what the log above says",
        )
    for op in plugins["ops"]:
        if registry.get_creator(op, _VERSION, _NAMESPACE) is None:
            raise EnvironmentUnfit(
                f"no plugin for {_NAMESPACE}::{op}, version {_VERSION}",
                where=library,
                fix="pass a library that registers it, or leave out --plugin-library" if library else None,
            )


def _network_flags(trt: Any, names: list[str]) -> int:
    """Flags of a network; STRONGLY_TYPED is gone where a library knows nothing else (TensorRT 11)."""
    known = trt.NetworkDefinitionCreationFlag.__members__
    return sum(1 << int(known[name]) for name in names if name in known or name != "STRONGLY_TYPED")


def _configure(trt: Any, builder: Any, job: dict[str, Any]) -> Any:
    config = builder.create_builder_config()
    # On by default; products of 10 mantissa bits would swap rows of the retrieval that fp32 tells apart.
    config.clear_flag(trt.BuilderFlag.TF32)
    for name in job["builder_flags"]:
        config.set_flag(trt.BuilderFlag.__members__[name])
    if job["compute_capabilities"]:
        config.num_compute_capabilities = len(job["compute_capabilities"])
        for i, target in enumerate(job["compute_capabilities"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, "SM" + target.replace(".", "")), i)
    if job["hardware_compatible"]:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if job["serialized_plugins"]:
        config.plugins_to_serialize = job["serialized_plugins"]
    for shapes in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, bounds in shapes.items():
            profile.set_shape(name, bounds["min"], bounds["opt"], bounds["max"])
        if config.add_optimization_profile(profile) < 0:
            raise BuildFailed("the builder refuses an optimisation profile")
    return config


def _set_timing_cache(config: Any, content: bytes) -> None:
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        raise InputRejected(
            "the builder refuses the timing cache",
            why="it was measured on another GPU, driver or version",
            fix="delete the cache and its record, or name others",
        )


def _stream_writer(trt: Any, out: Any) -> Any:
    """Writes the engine in pieces of up to 64 MiB as it is serialised.

    A whole engine in memory would cost its size once more: 1.72 instead of 1.35 GB at the peak, for 0.51 GB of weights.
    """

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                out.write(data)
                out.flush()
            except OSError as error:  # it must not travel through the builder
                self.error = error
                return 0
            return len(data)

    return Writer()


def _layer_dtypes(trt: Any, network: Any) -> list[tuple[str, str]]:
    layers = (network.get_layer(i) for i in range(network.num_layers))
    tensors = (layer.get_output(i) for layer in layers for i in range(layer.num_outputs))
    return [(tensor.name, dtype_name(trt, tensor.dtype)) for tensor in tensors if tensor is not None]


def _describe(trt: Any, tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": dtype_name(trt, tensor.dtype), "dims": list(tensor.shape)}


def dtype_name(trt: Any, dtype: Any) -> str:
    """A dtype of the library by the names of ONNX."""
    names = {trt.DataType.HALF: "float16", trt.DataType.BF16: "bfloat16"}
    name: str = names.get(dtype, dtype.name.lower())
    return name
