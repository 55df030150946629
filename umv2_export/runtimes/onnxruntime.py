"""ONNX Runtime: stock, where the function bodies run, with our library of native ops, or with that for CUDA."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from torch.utils.dlpack import from_dlpack

from umv2_export import cuda_library, native_library
from umv2_export.bundle import Bundle
from umv2_export.errors import EnvironmentUnfit, InputRejected, InvalidRequest, Unsupported
from umv2_export.interface import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    cache_of,
    feed,
    graph_inputs,
    inner_names,
    probe_names,
)
from umv2_export.onnx.minimum import PROBES_ONNXRUNTIME
from umv2_export.runtimes import cuda
from umv2_export.runtimes.base import Array, StepInput, StepOutput
from umv2_export.runtimes.decoding import Decoder, GrowingDecoder
from umv2_export.runtimes.external_data import session_source
from umv2_export.runtimes.static_cache import StaticCache, StaticDecoder, run_bound
from umv2_export.runtimes.versions import require_runtime
from umv2_export.system.host_memory import anonymous_memory, available_bytes

__all__ = ["OnnxRuntime"]


@dataclass(frozen=True)
class _Setup:
    """How sessions of one runtime are made.

    Attributes:
        provider: that computes; ONNX Runtime itself adds the CPU for what another lacks.
        options: of the provider.
        library: names our library of ops; None: their bodies run.
    """

    provider: str = "CPUExecutionProvider"
    options: Mapping[str, str] = field(default_factory=dict)
    library: Callable[[], str] | None = None

    @property
    def on_gpu(self) -> bool:
        """Computes on a GPU."""
        return self.provider == cuda.PROVIDER


_SETUPS = {
    "onnxruntime": _Setup(),
    "onnxruntime-native": _Setup(library=native_library),
    "onnxruntime-cuda": _Setup(cuda.PROVIDER, cuda.PROVIDER_OPTIONS, cuda_library),
}

# Behind the positions of a call, in a static cache that lives for that call: nothing may read them.
_SPARE_POSITIONS = 3

_NUMPY_DTYPES = {"int64": np.int64, "float": np.float32, "float16": np.float16}


class OnnxRuntime:
    """A session over a bundle's graph.

    Args:
        name: onnxruntime, onnxruntime-native or onnxruntime-cuda.
        bundle: what to run.
        preload: read all tables into memory of huge pages first, instead of mapping their files.

    Raises:
        EnvironmentUnfit: the package is not installed, or older than the bundle needs, memory does not hold the tables
            that are to be preloaded, or there is no GPU, CUDA provider or compiler for a runtime that needs them.
        Unsupported: the bundle has no ops for our library, or holds arithmetic that the provider lacks.
        InvalidRequest: this runtime does not preload.
        BuildFailed: the kernels of the GPU could not be compiled.
        InputRejected: ONNX Runtime refuses the graph.
    """

    def __init__(self, name: str, bundle: Bundle, *, preload: bool = False) -> None:
        self.name = name
        self._setup = _SETUPS[name]
        self._bundle = bundle
        self._dtypes = {value.name: value.dtype for value in graph_inputs(bundle.config, bundle.manifest.dtype)}
        self._static = bundle.manifest.cache == "static"
        self._refuse_what_it_cannot_run(preload=preload)
        bundle.graph()  # its external data lies in the files of the manifest
        require_runtime(name, bundle.manifest.min_onnxruntime, where=bundle.path)
        self._capability = cuda.require_cuda() if self._setup.on_gpu else None
        # Kept: sessions share this memory, they do not own it.
        self._tables = _preloaded_tables(bundle) if preload else {}
        self._sessions: dict[tuple[str, ...], Any] = {(): self._open()}

    def run(self, step: StepInput, *, probe: bool = False) -> StepOutput:
        """One forward.

        Raises:
            EnvironmentUnfit: ONNX Runtime is too old for probes.
            InputRejected: it cannot run the graph.
        """
        if probe:
            why = "inner values are looked at in a graph in memory, for which older releases find no external data"
            require_runtime(self.name, PROBES_ONNXRUNTIME, where=self._bundle.path, why=why)
        return self._run(step, probe_names(self._bundle.config) if probe else [])

    def run_parts(self, step: StepInput) -> StepOutput:
        """One forward that shows what every part puts out; nothing of it where ONNX Runtime is too old for that."""
        try:
            require_runtime(self.name, PROBES_ONNXRUNTIME)
        except EnvironmentUnfit:
            return self._run(step, [])
        return self._run(step, inner_names(self._bundle.config))

    def _run(self, step: StepInput, shown: Sequence[str]) -> StepOutput:
        key = tuple(shown)
        if key not in self._sessions:
            self._sessions[key] = self._open(self._graph_with_probes(shown))
        if self._static:
            return self._run_static(self._sessions[key], step, shown)
        arrays = feed(step.input_ids, step.attention_mask, step.past)
        inputs = {name: _value(array, self._dtypes[name]) for name, array in arrays.items()}
        session = self._sessions[key]
        try:
            results = session.run_with_ort_values(None, inputs)
        except Exception as error:  # its exception classes share no base but Exception
            raise InputRejected(
                "ONNX Runtime cannot run the graph", where=self._bundle.model_file, why=str(error).strip()
            ) from error
        names = [output.name for output in session.get_outputs()]
        outputs = {name: _array(result) for name, result in zip(names, results, strict=True)}
        present = [
            (keys.astype(np.float32), values.astype(np.float32)) for keys, values in cache_of(outputs, len(step.past))
        ]
        probes = {name: outputs[name] for name in shown if name in outputs}
        return StepOutput(outputs[LOGITS].astype(np.float32, copy=False), present, probes)

    def decoder(self, batch: int, length: int) -> Decoder:
        """See `umv2_export.runtimes.decoding.KeepsCache`.

        Raises:
            EnvironmentUnfit: memory does not hold a static cache of that size.
        """
        if not self._static:
            return GrowingDecoder(self, self._bundle.config, batch)
        return StaticDecoder(self._sessions[()], self._cache(batch, length), self._bundle.path)

    def _cache(self, batch: int, length: int) -> StaticCache:
        dtype = np.dtype(np.float16 if self._bundle.manifest.dtype == "fp16" else np.float32)
        return StaticCache(self._bundle.config, dtype, batch, length)

    def _run_static(self, session: Any, step: StepInput, shown: Sequence[str]) -> StepOutput:
        """The past in buffers that are a little longer than needed, as those of a user are."""
        batch, total = step.attention_mask.shape
        cache = self._cache(batch, total + _SPARE_POSITIONS)
        cache.fill(step.past)
        binding = session.io_binding()
        cache.bind(binding)
        declared = {output.name for output in session.get_outputs()}
        names = [LOGITS, *(name for name in shown if name in declared)]
        inputs = {INPUT_IDS: step.input_ids, ATTENTION_MASK: step.attention_mask}
        values = run_bound(session, binding, inputs, names, where=self._bundle.model_file)
        logits, *probes = (value.numpy() for value in values.values())
        return StepOutput(
            logits.astype(np.float32, copy=False), cache.used(total), dict(zip(names[1:], probes, strict=True))
        )

    def _refuse_what_it_cannot_run(self, *, preload: bool) -> None:
        bundle, setup = self._bundle, self._setup
        if preload and setup.on_gpu:
            raise InvalidRequest(
                f"the runtime {self.name} copies its tables to the GPU",
                fix="leave out --preload, or name another runtime",
            )
        if setup.library is not None and (bundle.manifest.functions == "inlined" or not bundle.config.memory.layers):
            raise Unsupported(
                "this bundle holds no ops for the native ones to replace",
                where=bundle.path,
                why="its functions were inlined" if bundle.config.memory.layers else "the model has no memory layers",
                fix="use --runtime onnxruntime, or export a model with memory layers without --inline-functions",
            )
        if self._static and setup.on_gpu:
            raise Unsupported(
                "this bundle has a static cache, which ONNX Runtime on a CPU alone runs",
                where=bundle.path,
                why="the CUDA kernel of com.microsoft::GroupQueryAttention was not tried",
                fix="use --runtime onnxruntime, or export with --cache growing",
            )
        if bundle.manifest.dtype == "bf16" and not setup.on_gpu:
            raise Unsupported(
                "this bundle computes in bf16, for GPU runtimes: stock ONNX Runtime on a CPU runs no bf16 arithmetic",
                where=bundle.path,
                fix="use --runtime onnxruntime-cuda, or export with --dtype fp16, or --dtype fp32 --table-dtype bf16",
            )

    def _open(self, model: bytes | None = None) -> Any:
        """A session over a changed graph; None: over the bundle's own."""
        import onnxruntime  # noqa: PLC0415 - an optional package

        setup = self._setup
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        source, folder = session_source(self._bundle, model)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        if setup.library is not None:
            options.register_custom_ops_library(setup.library())
        for name, table in self._tables.items():
            options.add_initializer(name, table)
        with contextlib.ExitStack() as stack:
            if self._capability is not None:
                stack.enter_context(cuda.kernels_of(self._bundle, self._capability))
            try:
                # Without its fallback: that would compute on the CPU what fails on the GPU.
                session = onnxruntime.InferenceSession(
                    source, options, providers=[(setup.provider, setup.options)], enable_fallback=0
                )
            except Exception as error:  # its exception classes share no base but Exception
                raise InputRejected(
                    "ONNX Runtime refuses the graph", where=self._bundle.model_file, why=str(error).strip()
                ) from error
        if setup.on_gpu:
            cuda.require_provider(session)
        return session

    def _graph_with_probes(self, shown: Sequence[str]) -> bytes:
        """The graph, its inner values declared as outputs too; those that it does not name are left out."""
        model = self._bundle.graph()
        named = {name for node in model.graph.node for name in node.output}
        for name in shown:
            if name in named:
                model.graph.output.add().name = name
        return bytes(model.SerializeToString())


def _value(array: Array, dtype: str) -> Any:
    """An array in a dtype of the graph, as ONNX Runtime takes it: of bf16 the bits."""
    import onnxruntime  # noqa: PLC0415 - an optional package

    if dtype == "bfloat16":
        bits = np.ascontiguousarray(array, ml_dtypes.bfloat16).view(np.uint16)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, onnx.TensorProto.BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, _NUMPY_DTYPES[dtype]))


def _array(value: Any) -> Array:
    """An output; bf16 becomes fp32."""
    if value.element_type() == onnx.TensorProto.BFLOAT16:
        return np.asarray(from_dlpack(value).float().numpy())
    return np.asarray(value.numpy())


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
