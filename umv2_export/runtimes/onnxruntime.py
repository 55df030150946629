"""ONNX Runtime on the CPU: stock, where the function bodies run, or with our library of native ops."""

import math
from typing import Any

import numpy as np

from umv2_export import native_library
from umv2_export.bundle import Bundle
from umv2_export.errors import EnvironmentUnfit, InputRejected, Unsupported
from umv2_export.memory import anonymous_memory, available_bytes
from umv2_export.onnx.trace import probe_names
from umv2_export.runtimes.base import Array, StepInput, StepOutput, require_runtime

__all__ = ["OnnxRuntime"]

PROVIDER = "CPUExecutionProvider"


class OnnxRuntime:
    """A session over a bundle's graph.

    Args:
        bundle: what to run.
        native: register the library of native ops.
        preload: read all tables into memory of huge pages first, instead of mapping their files.

    Raises:
        EnvironmentUnfit: the package is not installed, or memory does not hold the tables that are to be preloaded.
        Unsupported: the bundle holds arithmetic that the CPU provider lacks.
        InputRejected: ONNX Runtime refuses the graph.
    """

    def __init__(self, bundle: Bundle, *, native: bool = False, preload: bool = False) -> None:
        self.name = "onnxruntime-native" if native else "onnxruntime"
        self._native = native
        if native and (bundle.manifest.functions == "inlined" or not bundle.config.memory.layers):
            raise Unsupported(
                "this bundle holds no ops for the native ones to replace",
                where=bundle.path,
                why="its functions were inlined" if bundle.config.memory.layers else "the model has no memory layers",
                fix="use --runtime onnxruntime, or export a model with memory layers without --inline-functions",
            )
        if bundle.manifest.dtype == "bf16":
            raise Unsupported(
                "this bundle computes in bf16, for GPU runtimes: stock ONNX Runtime on a CPU runs no bf16 arithmetic",
                where=bundle.path,
                fix="export with --dtype fp16, or --dtype fp32 --table-dtype bf16",
            )
        self._bundle = bundle
        self._cache_dtype = {"fp32": np.float32, "fp16": np.float16}[bundle.manifest.dtype]
        bundle.graph()  # its external data lies in the files of the manifest
        require_runtime(self.name)
        # Kept: sessions share this memory, they do not own it.
        self._tables = _preloaded_tables(bundle) if preload else {}
        self._session = self._open(bundle.model_file)
        self._probe_session: Any = None

    def run(self, step: StepInput, *, probe: bool = False) -> StepOutput:
        """One forward."""
        if probe and self._probe_session is None:
            self._probe_session = self._open(self._graph_with_probes())
        feed: dict[str, Array] = {"input_ids": step.input_ids, "attention_mask": step.attention_mask}
        for i, (keys, values) in enumerate(step.past):
            feed[f"past_key_values.{i}.key"] = keys.astype(self._cache_dtype)
            feed[f"past_key_values.{i}.value"] = values.astype(self._cache_dtype)
        session = self._probe_session if probe else self._session
        try:
            values = session.run(None, feed)
        except Exception as error:  # its exception classes share no base but Exception
            raise InputRejected(
                "ONNX Runtime cannot run the graph", where=self._bundle.model_file, why=str(error).strip()
            ) from error
        outputs = dict(zip((output.name for output in session.get_outputs()), values, strict=True))
        present = [
            (outputs[f"present.{i}.key"].astype(np.float32), outputs[f"present.{i}.value"].astype(np.float32))
            for i in range(len(step.past))
        ]
        probes = {name: outputs[name] for name in outputs if probe and name in probe_names(self._bundle.config)}
        return StepOutput(outputs["logits"].astype(np.float32), present, probes)

    def _open(self, model: Any) -> Any:
        import onnxruntime  # noqa: PLC0415 - an optional package

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # A graph given as bytes finds its external data here.
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self._bundle.path.resolve())
        )
        if self._native:
            options.register_custom_ops_library(native_library())
        for name, table in self._tables.items():
            options.add_initializer(name, table)
        source = model if isinstance(model, bytes) else str(model)
        try:
            return onnxruntime.InferenceSession(source, options, providers=[PROVIDER])
        except Exception as error:  # its exception classes share no base but Exception
            raise InputRejected(
                "ONNX Runtime refuses the graph", where=self._bundle.model_file, why=str(error).strip()
            ) from error

    def _graph_with_probes(self) -> bytes:
        """The graph, its inner values declared as outputs too."""
        model = self._bundle.graph()
        for name in probe_names(self._bundle.config):
            model.graph.output.add().name = name
        return bytes(model.SerializeToString())


def _preloaded_tables(bundle: Bundle) -> dict[str, Any]:
    """Every shard of rows as a value in anonymous memory, read from its file in one pass.

    Raises:
        EnvironmentUnfit: they do not fit into the memory that is free.
    """
    import onnxruntime  # noqa: PLC0415 - an optional package

    files = list(bundle.tables())
    needed, available = sum(file.size for file in files), available_bytes()
    if available is not None and needed > available:
        raise EnvironmentUnfit(
            f"the tables need {needed} bytes of memory, {available} are free",
            where=bundle.path,
            fix="leave out --preload: the tables then stay in their files, and only the rows that are hit are read",
        )
    tables = {}
    for file in files:
        memory = anonymous_memory(file.size)
        with file.path.open("rb", buffering=0) as source:
            source.seek(file.offset)
            view = memoryview(memory)
            while view:
                read = source.readinto(view)
                if not read:
                    raise InputRejected("the file ended early", where=file.path)
                view = view[read:]
        # numpy knows no bf16: of 16-bit rows it holds the bits.
        array = np.frombuffer(memory, dtype=np.float32 if file.size == 4 * math.prod(file.shape) else np.uint16)
        tables[file.name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
            array.reshape(file.shape), file.onnx_type
        )
    return tables
