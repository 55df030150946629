"""A bundle in one runtime, ready to be timed: its sessions, and calls whose inputs were bound beforehand."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime

from umv2_export import native_library
from umv2_export.bench.recording import Recording
from umv2_export.bench.subgraph import core_subgraph
from umv2_export.bench.traffic import Hits, Traffic, count_traffic
from umv2_export.bundle import Bundle
from umv2_export.interface import LOGITS, feed
from umv2_export.runtimes import empty_cache
from umv2_export.runtimes.base import Array
from umv2_export.runtimes.external_data import session_source
from umv2_export.runtimes.static_cache import StaticCache

__all__ = ["INPUTS", "STATIC_SPARE", "TimedModel"]

# Sets of sequences that calls take in turn; an odd number, for of two calls the second is timed. The largest batch has
# one set, and finds what its own last step left in the cache.
INPUTS = 7

# Positions of a static cache behind those of the past: for the new ones, and room for those to come.
STATIC_SPARE = 64


class TimedModel:
    """A bundle in one runtime; a session at a time: each packs the weights anew, 4.5 GB of experts."""

    def __init__(self, bundle: Bundle, runtime: str, recording: Recording) -> None:
        self.bundle, self.runtime, self.recording = bundle, runtime, recording
        self.name = bundle.path.resolve().name
        self._dtype = np.float16 if bundle.manifest.dtype == "fp16" else np.float32
        self._static = bundle.manifest.cache == "static"
        self._session: Any = None

    def open_step(self) -> None:
        """The whole graph."""
        self.close()
        self._session = self._open(self.bundle.graph().SerializeToString())

    def open_core(self) -> None:
        """The core alone."""
        self.close()
        self._session = self._open(core_subgraph(self.bundle).SerializeToString())

    def close(self) -> None:
        """Give the session's memory back."""
        self._session = None

    @property
    def native(self) -> bool:
        """The native ops run."""
        return self.runtime == "onnxruntime-native"

    def sets(self, batch: int) -> list[slice]:
        """Sequences of the text by which calls take turns."""
        count = min(INPUTS, self.recording.sequences // batch)
        return [slice(i * batch, (i + 1) * batch) for i in range(count if count % 2 else count - 1)]

    def decode_call(self, batch: int, past: int) -> Callable[[int], object]:
        """A decode step of the whole graph, after real text."""
        mask = np.ones((batch, past + 1), dtype=np.int64)
        bindings, kept = [], list[StaticCache]()
        for chosen in self.sets(batch):
            cache = [] if self._static else [(keys[chosen], values[chosen]) for keys, values in self.recording.past]
            bindings.append(self._bound(self.recording.token_ids[chosen], mask, cache))
            if self._static:
                kept.append(self._static_cache(bindings[-1], batch, past + STATIC_SPARE, chosen))
        return self._caller(bindings, kept)

    def prefill_call(self, length: int) -> Callable[[int], object]:
        """A prompt of one sequence, pieces of the text in turn."""
        config = self.bundle.config
        bindings, kept = [], list[StaticCache]()
        for start in np.linspace(0, len(self.recording.text) - length, INPUTS).astype(np.int64):
            ids = self.recording.text[None, start : start + length]
            bindings.append(self._bound(ids, np.ones_like(ids), [] if self._static else empty_cache(config, 1)))
            if self._static:
                kept.append(self._static_cache(bindings[-1], 1, length + STATIC_SPARE))
        return self._caller(bindings, kept)

    def _bound(self, ids: Array, mask: Array, past: Sequence[tuple[Array, Array]]) -> Any:
        binding = self._session.io_binding()
        cache = [(keys.astype(self._dtype), values.astype(self._dtype)) for keys, values in past]
        for name, array in feed(ids, mask, cache).items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        return binding

    def _static_cache(self, binding: Any, batch: int, length: int, chosen: slice | None = None) -> StaticCache:
        """A cache of those sequences, or an empty one, bound as input and output: each call writes the same into it."""
        cache = StaticCache(self.bundle.config, np.dtype(self._dtype), batch, length)
        if chosen is not None:
            cache.fill([(keys[chosen], values[chosen]) for keys, values in self.recording.past])
        cache.bind(binding)
        return cache

    def core_call(self, batch: int) -> Callable[[int], object]:
        """The core alone, on what it read in the traced text."""
        bindings = []
        # Token ids, mask and cache count by their shapes alone.
        one = np.ones((batch, 1), dtype=np.int64)
        shapes: dict[str, Array] = feed(one, one, empty_cache(self.bundle.config, batch))
        for chosen in self.sets(batch):
            binding = self._session.io_binding()
            for value in self._session.get_inputs():
                array = shapes[value.name] if value.name in shapes else self.recording.probes[value.name][chosen, None]
                array = array if array.dtype == np.int64 else array.astype(self._dtype)
                binding.bind_cpu_input(value.name, np.ascontiguousarray(array))
            bindings.append(binding)
        return self._caller(bindings)

    def traffic(self, batch: int, past: int) -> tuple[Traffic, list[Hits]]:
        """Bytes of the step that is timed: the mean of its sets of sequences."""
        hits = [self.recording.hits(self.bundle, chosen) for chosen in self.sets(batch)]
        counted = [count_traffic(self.bundle, one, batch=batch, past=past, native=self.native) for one in hits]
        return Traffic.mean(counted), hits

    def _open(self, graph: bytes) -> Any:
        options = onnxruntime.SessionOptions()
        options.use_per_session_threads = False
        options.log_severity_level = 3
        source, folder = session_source(self.bundle, graph)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        if self.native:
            options.register_custom_ops_library(native_library())
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    def _caller(self, bindings: list[Any], caches: Sequence[StaticCache] = ()) -> Callable[[int], object]:
        """Calls that take the bindings in turn.

        Args:
            bindings: of all inputs.
            caches: static ones, which are bound as outputs too; they live as long as the calls.
        """
        session = self._session
        names = [LOGITS] if caches else [output.name for output in session.get_outputs()]

        def call(number: int) -> None:
            binding = bindings[number % len(bindings)]
            for name in names:
                binding.bind_output(name)
            session.run_with_iobinding(binding)
            # Outputs of a large batch are gigabytes of cache: they go before the next contender makes its own.
            if not caches:
                binding.clear_binding_outputs()

        return call
