"""Decode steps and prefill of exported models, side by side: latency, and the bytes that each step moves."""

import math
from collections.abc import Callable, Sequence

from umv2_export.bench.ceilings import measure_ceilings
from umv2_export.bench.options import BenchOptions
from umv2_export.bench.preparation import differences_in_size, record_all, require_memory
from umv2_export.bench.results import BenchResult, Pair, StepResult
from umv2_export.bench.sessions import share_threads
from umv2_export.bench.timed_model import INPUTS, TimedModel
from umv2_export.bench.timing import Timing, time_in_turns
from umv2_export.bench.traffic import count_traffic, density, expected_hits
from umv2_export.bundle import Bundle
from umv2_export.errors import Unsupported
from umv2_export.names import BUILD_RUNTIMES
from umv2_export.progress import Advance, Tracker, silent
from umv2_export.runtimes import require_runtime
from umv2_export.runtimes.base import Array

__all__ = ["benchmark_steps"]


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
    result = BenchResult(warnings=[line for baseline in baselines for line in differences_in_size(bundle, baseline)])
    models = list(zip([bundle, *baselines], options.runtimes, strict=True))
    for one, runtime in models:
        require_runtime(runtime, one.manifest.min_onnxruntime, where=one.path)
    require_memory([model for model, _ in models], options)
    # Before threads are shared: from then on no session of the process has threads of its own.
    recordings = record_all(models, text, options, track)
    share_threads(options.threads)
    result.ceilings = measure_ceilings(bundle.layout.row_size * bundle.layout.dtype.itemsize, options.threads)
    model, *others = (
        TimedModel(one, runtime, recording) for (one, runtime), recording in zip(models, recordings, strict=True)
    )
    done = track("timing", len(options.batches) * max(1, len(others)))
    # One baseline after the other: three models with packed weights, and their caches, would not fit into 24 GB.
    pairs = [_time_pair([model, other], options, done) for other in others] or [_time_pair([model], options, done)]
    result.decode = [_fastest(steps) for steps in zip(*(decode for decode, _ in pairs), strict=True)]
    result.prefill = [_fastest([prefill for _, prefill in pairs])]
    return result


def _time_pair(models: Sequence[TimedModel], options: BenchOptions, done: Advance) -> tuple[list[Pair], Pair]:
    """Decode at each batch, and prefill, of a model and at most one baseline in alternation."""
    warmup = (INPUTS + 1) // 2
    for model in models:
        model.open_step()
    latencies, cores = [], []
    for batch in options.batches:
        calls = [model.decode_call(batch, options.past) for model in models]
        latencies.append(time_in_turns(calls, rounds=options.rounds, warmup=warmup))
        del calls
        done(1)
    calls = [model.prefill_call(options.prefill) for model in models]
    prefill = [
        _prefill_result(model, options.prefill, latency)
        for model, latency in zip(models, time_in_turns(calls, rounds=options.rounds, warmup=warmup), strict=True)
    ]
    del calls
    for model in models:
        model.open_core()
    for batch in options.batches:
        calls = [model.core_call(batch) for model in models]
        cores.append(time_in_turns(calls, rounds=options.rounds, warmup=warmup))
    for model in models:
        model.close()
    decode = [
        _pair([_decode_result(c, batch, options.past, *times) for c, *times in zip(models, whole, core, strict=True)])
        for batch, whole, core in zip(options.batches, latencies, cores, strict=True)
    ]
    return decode, _pair(prefill)


def _pair(results: Sequence[StepResult]) -> Pair:
    return results[0], results[1] if len(results) > 1 else None


def _fastest(pairs: Sequence[Pair]) -> Pair:
    """The pair with the fastest baseline: a model's time counts with that of the peer in its alternation."""
    return min(pairs, key=lambda pair: math.inf if pair[1] is None else pair[1].latency.p50)


def _decode_result(model: TimedModel, batch: int, past: int, latency: Timing, core: Timing) -> StepResult:
    traffic, hits = model.traffic(batch, past)
    expected = expected_hits(model.bundle, batch)
    return StepResult(
        model.name,
        model.runtime,
        batch,
        1,
        past,
        latency,
        core,
        traffic,
        count_traffic(model.bundle, expected, batch=batch, past=past, native=model.native),
        round(sum(sum(one.rows) for one in hits) / len(hits)),
        round(sum(sum(one.experts) for one in hits) / len(hits)),
        sum(density(model.bundle, one) for one in hits) / len(hits),
    )


def _prefill_result(model: TimedModel, length: int, latency: Timing) -> StepResult:
    hits = expected_hits(model.bundle, length)
    traffic = count_traffic(model.bundle, hits, batch=1, past=0, native=model.native)
    return StepResult(
        model.name,
        model.runtime,
        1,
        length,
        0,
        latency,
        None,
        traffic,
        traffic,
        round(sum(hits.rows)),
        round(sum(hits.experts)),
        density(model.bundle, hits),
    )
