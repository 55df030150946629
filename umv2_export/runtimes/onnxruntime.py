"""ONNX Runtime on the CPU: stock, where the function bodies run, or with our library of native ops."""

from typing import Any

import numpy as np

from umv2_export import native_library
from umv2_export.bundle import Bundle
from umv2_export.errors import InputRejected, Unsupported
from umv2_export.onnx.trace import probe_names
from umv2_export.runtimes.base import Array, StepInput, StepOutput, require_runtime

__all__ = ["OnnxRuntime"]

PROVIDER = "CPUExecutionProvider"


class OnnxRuntime:
    """A session over a bundle's graph.

    Args:
        bundle: what to run.
        native: register the library of native ops.

    Raises:
        EnvironmentUnfit: the package is not installed.
        Unsupported: the bundle holds arithmetic that the CPU provider lacks.
        InputRejected: ONNX Runtime refuses the graph.
    """

    def __init__(self, bundle: Bundle, *, native: bool = False) -> None:
        self.name = "onnxruntime-native" if native else "onnxruntime"
        self._native = native
        if native and bundle.manifest.functions == "inlined":
            raise Unsupported(
                "this bundle holds standard ops only: there is nothing for the native ops to replace",
                where=bundle.path,
                fix="export without --inline-functions, or use --runtime onnxruntime",
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
        require_runtime(self.name)
        import onnxruntime  # noqa: PLC0415 - an optional package

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # A graph given as bytes finds its external data here.
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self._bundle.path.resolve())
        )
        if self._native:
            options.register_custom_ops_library(native_library())
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
