"""Decode steps and prefill of exported models, side by side: latency, and the bytes that each step moves."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import onnxruntime

from umv2_export import native_library
from umv2_export.bench.ceilings import gather_rate, streaming_rate, table_of_words
from umv2_export.bench.cut import part_graph
from umv2_export.bench.one_node import share_threads
from umv2_export.bench.timing import Timing, alternate
from umv2_export.bench.trace import LONGER, Trace, trace_routing
from umv2_export.bench.traffic import Hits, Traffic, count_traffic, expected_hits
from umv2_export.bundle import Bundle
from umv2_export.errors import EnvironmentUnfit, InvalidRequest, Unsupported
from umv2_export.names import BUILD_RUNTIMES
from umv2_export.progress import Advance, Tracker, silent
from umv2_export.runtimes import open_runtime, require_runtime
from umv2_export.runtimes.base import Array
from umv2_export.runtimes.external_data import session_source
from umv2_export.system.host_memory import available_bytes

__all__ = ["BenchOptions", "BenchResult", "Ceilings", "StepResult", "benchmark_steps"]

# A gather ceiling on less would be one of the cache.
CEILING_BYTES = 2 * 2**30
SMALLEST_ROW = 256

# Sets of sequences that calls take in turn; an odd number, for of two calls the second is timed. Batches up to 16 have
# them all; the largest batch has one, and finds what its own last step left in the cache.
INPUTS = 7
FULL_SETS = 16


@dataclass(frozen=True)
class BenchOptions:
    """What the user chooses.

    Attributes:
        batches: sequences of a decode step.
        past: cached positions of each sequence.
        prefill: tokens of a prompt of one sequence.
        rounds: counted calls of each contender.
        threads: of the machine.
        runtimes: of the model, and of each baseline; see `choose_runtimes`.
    """

    batches: Sequence[int]
    past: int
    prefill: int
    rounds: int
    threads: int
    runtimes: Sequence[str]


@dataclass(frozen=True)
class StepResult:
    """One forward of one model.

    Attributes:
        model: name of the bundle's folder.
        runtime: that ran it.
        batch, sequence, past: shape of the forward.
        latency: of the whole forward.
        core_latency: of FFNs and memory layers, or experts, alone; None for prefill.
        traffic: bytes, from traced routing; of prefill expected ones.
        expected: bytes under uniform routing.
        unique_rows, unique_experts: distinct ones that were hit, over all layers.
        density: their share of all rows that layers see, or of all experts; 1 in a model that has neither.
    """

    model: str
    runtime: str
    batch: int
    sequence: int
    past: int
    latency: Timing
    core_latency: Timing | None
    traffic: Traffic
    expected: Traffic
    unique_rows: int
    unique_experts: int
    density: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens."""
        return self.batch * self.sequence / self.latency.p50 * 1e3

    @property
    def gigabytes_per_second(self) -> float:
        """Of all counted bytes."""
        return self.traffic.total / self.latency.p50 / 1e6

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "model": self.model,
            "runtime": self.runtime,
            "batch": self.batch,
            "sequence": self.sequence,
            "past": self.past,
            "latency_ms": asdict(self.latency),
            "core_latency_ms": None if self.core_latency is None else asdict(self.core_latency),
            "tokens_per_second": self.tokens_per_second,
            "bytes": self.traffic.as_dict(),
            "expected_bytes": self.expected.as_dict(),
            "unique_rows": self.unique_rows,
            "unique_experts": self.unique_experts,
            "density": self.density,
            "gigabytes_per_second": self.gigabytes_per_second,
        }


Pair = tuple[StepResult, StepResult | None]


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second that this machine reads: from end to end, and whole rows or experts at random."""

    streaming: float
    gather: float
    row_bytes: int


@dataclass
class BenchResult:
    """All of a run.

    Attributes:
        ceilings: of the machine.
        decode: (model, fastest baseline or None) for each batch.
        prefill: likewise, once.
        warnings: what makes a comparison unfair.
    """

    ceilings: Ceilings | None = None
    decode: list[Pair] = field(default_factory=list)
    prefill: list[Pair] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """For JSON; the baseline of a batch is the fastest of all that were given, and says which."""
        fastest = [baseline for _, baseline in self.decode if baseline is not None]
        return {
            "ceilings": None if self.ceilings is None else asdict(self.ceilings),
            "warnings": self.warnings,
            "batches": [model.as_dict() for model, _ in self.decode],
            "baseline": {"batches": [baseline.as_dict() for baseline in fastest]} if fastest else None,
            "ratios": [_ratios(model, baseline) for model, baseline in self.decode if baseline is not None],
            "prefill": [
                {"model": model.as_dict(), "baseline": None if baseline is None else baseline.as_dict()}
                for model, baseline in self.prefill
            ],
        }


def _ratios(model: StepResult, baseline: StepResult) -> dict[str, object]:
    """Baseline over model: above 1 the model is faster, or moves fewer bytes."""
    cores = (model.core_latency, baseline.core_latency)
    return {
        "batch": model.batch,
        "baseline": baseline.model,
        "latency": baseline.latency.p50 / model.latency.p50,
        "core_latency": None if cores[0] is None or cores[1] is None else cores[1].p50 / cores[0].p50,
        "bytes": baseline.traffic.total / model.traffic.total,
        "core_bytes": baseline.traffic.core / model.traffic.core,
        "expected_core_bytes": baseline.expected.core / model.expected.core,
    }


class _Contender:
    """A bundle in one runtime; a session at a time: each packs the weights anew, 4.5 GB of experts."""

    def __init__(self, bundle: Bundle, runtime: str, trace: Trace) -> None:
        self.bundle, self.runtime, self.trace = bundle, runtime, trace
        self.name = bundle.path.resolve().name
        self._dtype = np.float16 if bundle.manifest.dtype == "fp16" else np.float32
        self._session: Any = None

    def open_step(self) -> None:
        """The whole graph."""
        self.close()
        self._session = self._open(self.bundle.graph().SerializeToString())

    def open_core(self) -> None:
        """The core alone."""
        self.close()
        self._session = self._open(part_graph(self.bundle).SerializeToString())

    def close(self) -> None:
        """Give the session's memory back."""
        self._session = None

    @property
    def native(self) -> bool:
        """The native ops run."""
        return self.runtime == "onnxruntime-native"

    def sets(self, batch: int) -> list[slice]:
        """Sequences of the text by which calls take turns."""
        count = min(INPUTS, self.trace.sequences // batch)
        return [slice(i * batch, (i + 1) * batch) for i in range(count if count % 2 else count - 1)]

    def decode_call(self, batch: int, past: int) -> Callable[[int], object]:
        """A decode step of the whole graph, after real text."""
        mask = np.ones((batch, past + 1), dtype=np.int64)
        bindings = []
        for chosen in self.sets(batch):
            binding = self._session.io_binding()
            binding.bind_cpu_input("input_ids", np.ascontiguousarray(self.trace.token_ids[chosen]))
            binding.bind_cpu_input("attention_mask", mask)
            for i, pair in enumerate(self.trace.past):
                for kind, cache in zip(("key", "value"), pair, strict=True):
                    binding.bind_cpu_input(
                        f"past_key_values.{i}.{kind}", np.ascontiguousarray(cache[chosen], self._dtype)
                    )
            bindings.append(binding)
        return self._caller(bindings)

    def prefill_call(self, length: int) -> Callable[[int], object]:
        """A prompt of one sequence, pieces of the text in turn."""
        config = self.bundle.config
        empty = np.empty((1, config.kv_heads, 0, config.head_size), dtype=self._dtype)
        bindings = []
        for start in np.linspace(0, len(self.trace.text) - length, INPUTS).astype(np.int64):
            ids = np.ascontiguousarray(self.trace.text[None, start : start + length])
            binding = self._session.io_binding()
            binding.bind_cpu_input("input_ids", ids)
            binding.bind_cpu_input("attention_mask", np.ones_like(ids))
            for layer in range(config.num_layers):
                for kind in ("key", "value"):
                    binding.bind_cpu_input(f"past_key_values.{layer}.{kind}", empty)
            bindings.append(binding)
        return self._caller(bindings)

    def core_call(self, batch: int) -> Callable[[int], object]:
        """The core alone, on what it read in the traced text."""
        bindings = []
        for chosen in self.sets(batch):
            binding = self._session.io_binding()
            for name in (value.name for value in self._session.get_inputs()):
                if name.startswith("normed."):
                    normed = self.trace.probes[name][chosen, None].astype(self._dtype)
                    binding.bind_cpu_input(name, np.ascontiguousarray(normed))
                elif name.startswith("past_key_values."):
                    shape = (batch, self.bundle.config.kv_heads, 0, self.bundle.config.head_size)
                    binding.bind_cpu_input(name, np.empty(shape, dtype=self._dtype))
                else:  # token ids or mask: of their shape alone
                    binding.bind_cpu_input(name, np.ones((batch, 1), dtype=np.int64))
            bindings.append(binding)
        return self._caller(bindings)

    def traffic(self, batch: int, past: int) -> tuple[Traffic, list[Hits]]:
        """Bytes of the step that is timed: the mean of its sets of sequences."""
        hits = [self.trace.hits(self.bundle, chosen) for chosen in self.sets(batch)]
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

    def _caller(self, bindings: list[Any]) -> Callable[[int], object]:
        session = self._session
        names = [output.name for output in session.get_outputs()]

        def call(number: int) -> None:
            binding = bindings[number % len(bindings)]
            for name in names:
                binding.bind_output(name)
            session.run_with_iobinding(binding)
            # Outputs of a large batch are gigabytes of cache: they go before the next contender makes its own.
            binding.clear_binding_outputs()

        return call


def benchmark_steps(
    bundle: Bundle,
    baselines: Sequence[Bundle],
    text: Callable[[Bundle], Array],
    options: BenchOptions,
    track: Tracker = silent,
) -> BenchResult:
    """Time a model and its baselines in alternation, and count their bytes on real text.

    Args:
        bundle: the model.
        baselines: what it is compared with; several are exports of one model in different forms, of which the fastest
            counts at each batch.
        text: makes the token ids of the traced text.
        options: of the run.
        track: progress.

    Raises:
        InvalidRequest: the text is too short.
        EnvironmentUnfit: the caches do not fit into memory, or ONNX Runtime is older than a bundle needs.
        InputRejected: a runtime refuses a bundle.
        Unsupported: a runtime computes on a GPU.
    """
    if set(options.runtimes) & {"onnxruntime-cuda", *BUILD_RUNTIMES}:
        raise Unsupported(
            "bench times processors, and no GPU",
            why="threads, bytes and the ceilings beside them are those of the machine's memory",
            fix="--runtime onnxruntime-native or onnxruntime; `generate --json` gives the times of single steps",
        )
    result = BenchResult(warnings=[line for baseline in baselines for line in _unfair(bundle, baseline)])
    models = list(zip([bundle, *baselines], options.runtimes, strict=True))
    for one, runtime in models:
        require_runtime(runtime, one.manifest.min_onnxruntime, where=one.path)
    _require_memory([model for model, _ in models], options)
    # Before threads are shared: from then on no session of the process has threads of its own.
    traces = _traces(models, text, options, track)
    share_threads(options.threads)
    result.ceilings = _ceilings(bundle, options.threads)
    model, *others = (_Contender(one, runtime, trace) for (one, runtime), trace in zip(models, traces, strict=True))
    done = track("timing", len(options.batches) * max(1, len(others)))
    # One baseline after the other: three models with packed weights, and their caches, would not fit into 24 GB.
    pairs = [_time_pair([model, other], options, done) for other in others] or [_time_pair([model], options, done)]
    result.decode = [_fastest(steps) for steps in zip(*(decode for decode, _ in pairs), strict=True)]
    result.prefill = [_fastest([prefill for _, prefill in pairs])]
    return result


def _time_pair(contenders: Sequence[_Contender], options: BenchOptions, done: Advance) -> tuple[list[Pair], Pair]:
    """Decode at each batch, and prefill, of a model and at most one baseline in alternation."""
    warmup = (INPUTS + 1) // 2
    for contender in contenders:
        contender.open_step()
    latencies, cores = [], []
    for batch in options.batches:
        calls = [contender.decode_call(batch, options.past) for contender in contenders]
        latencies.append(alternate(calls, rounds=options.rounds, warmup=warmup))
        del calls
        done(1)
    calls = [contender.prefill_call(options.prefill) for contender in contenders]
    prefill = [
        _prefill_result(contender, options.prefill, latency)
        for contender, latency in zip(contenders, alternate(calls, rounds=options.rounds, warmup=warmup), strict=True)
    ]
    del calls
    for contender in contenders:
        contender.open_core()
    for batch in options.batches:
        calls = [contender.core_call(batch) for contender in contenders]
        cores.append(alternate(calls, rounds=options.rounds, warmup=warmup))
    for contender in contenders:
        contender.close()
    decode = [
        _pair(
            [_decode_result(c, batch, options.past, *times) for c, *times in zip(contenders, whole, core, strict=True)]
        )
        for batch, whole, core in zip(options.batches, latencies, cores, strict=True)
    ]
    return decode, _pair(prefill)


def _pair(results: Sequence[StepResult]) -> Pair:
    return results[0], results[1] if len(results) > 1 else None


def _fastest(pairs: Sequence[Pair]) -> Pair:
    """The pair with the fastest baseline: a model's time counts with that of the peer in its alternation."""
    return min(pairs, key=lambda pair: math.inf if pair[1] is None else pair[1].latency.p50)


def _traces(
    models: Sequence[tuple[Bundle, str]], text: Callable[[Bundle], Array], options: BenchOptions, track: Tracker
) -> list[Trace]:
    """Of each model; two exports of one checkpoint have the same."""
    done = track("reading real text", len(models))
    sequences = _sequences(options)
    found: dict[str, Trace] = {}
    traces = []
    for model, runtime in models:
        key = _traced_as(model)
        if key not in found:
            ids = text(model)
            if len(ids) < options.prefill:
                raise InvalidRequest(f"the text has {len(ids)} tokens, the prompt {options.prefill}", fix=LONGER)
            opened = open_runtime(runtime, model)
            found[key] = trace_routing(opened, model, ids, sequences=sequences, length=options.past + 1)
            del opened
        traces.append(found[key])
        done(1)
    return traces


def _sequences(options: BenchOptions) -> int:
    """Traced ones: the largest batch once, and batches up to 16 as often as calls take turns."""
    largest = max(options.batches)
    return max(largest, INPUTS * min(largest, FULL_SETS))


def _traced_as(bundle: Bundle) -> str:
    """What decides routing: two forms of one model of experts have the same."""
    stored = bundle.manifest
    return json.dumps([stored.source, bundle.config.as_dict(), stored.dtype, stored.key_dtype, stored.table_dtype])


def _require_memory(models: Sequence[Bundle], options: BenchOptions) -> None:
    """Room for the traced caches of all models, the cache that a step of the largest batch returns, and packed weights.

    Raises:
        EnvironmentUnfit: there is none.
    """
    positions = _sequences(options) * options.past + 2 * max(options.batches) * (options.past + 1)
    configs = {_traced_as(model): model.config for model in models}
    caches = {name: 8 * one.kv_heads * one.head_size * one.num_layers for name, one in configs.items()}
    # ONNX Runtime packs what GEMMs read; one baseline is open at a time.
    packed = [model.manifest.bytes["dense"] + model.manifest.bytes["experts"] for model in models]
    needed = positions * sum(caches.values()) + packed[0] + max(packed[1:], default=0)
    available = available_bytes()
    if available is not None and needed > available:
        raise EnvironmentUnfit(
            f"weights and caches of past {options.past} at batch {max(options.batches)} need {needed} bytes, "
            f"{available} are free",
            fix="lower --batch or --past",
        )


def _decode_result(contender: _Contender, batch: int, past: int, latency: Timing, core: Timing) -> StepResult:
    traffic, hits = contender.traffic(batch, past)
    expected = expected_hits(contender.bundle, batch)
    return StepResult(
        contender.name,
        contender.runtime,
        batch,
        1,
        past,
        latency,
        core,
        traffic,
        count_traffic(contender.bundle, expected, batch=batch, past=past, native=contender.native),
        round(sum(sum(one.rows) for one in hits) / len(hits)),
        round(sum(sum(one.experts) for one in hits) / len(hits)),
        sum(_density(contender.bundle, one) for one in hits) / len(hits),
    )


def _ceilings(bundle: Bundle, threads: int) -> Ceilings:
    row_bytes = max(bundle.layout.row_size * bundle.layout.dtype.itemsize, SMALLEST_ROW)
    words = table_of_words(CEILING_BYTES)
    return Ceilings(streaming_rate(words, threads), gather_rate(words, row_bytes, threads), row_bytes)


def _prefill_result(contender: _Contender, length: int, latency: Timing) -> StepResult:
    hits = expected_hits(contender.bundle, length)
    traffic = count_traffic(contender.bundle, hits, batch=1, past=0, native=contender.native)
    return StepResult(
        contender.name,
        contender.runtime,
        1,
        length,
        0,
        latency,
        None,
        traffic,
        traffic,
        round(sum(hits.rows)),
        round(sum(hits.experts)),
        _density(contender.bundle, hits),
    )


def _density(bundle: Bundle, hits: Hits) -> float:
    config = bundle.config
    if config.experts is not None:
        return sum(hits.experts) / (config.num_layers * config.experts.count)
    if not config.memory.layers:
        return 1.0
    # A dense model reads all that it has.
    return sum(hits.rows) / (config.memory.layers * config.memory.visible_rows) if config.memory.layers else 1.0


def _unfair(bundle: Bundle, baseline: Bundle) -> list[str]:
    """Sizes of the two models that differ by more than 5 %."""
    ours, theirs = bundle.manifest.parameters, baseline.manifest.parameters
    return [
        f"{kind} parameters: {ours[kind]:,} in {bundle.path.name}, {theirs[kind]:,} in {baseline.path.name}"
        for kind in ("total", "activated")
        if abs(ours[kind] / theirs[kind] - 1) > 0.05
    ]
