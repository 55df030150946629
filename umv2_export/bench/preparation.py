"""Before a benchmark: sizes that make it unfair, memory that it takes, and the text whose routing is recorded."""

import json
from collections.abc import Callable, Sequence

from umv2_export.bench.options import BenchOptions
from umv2_export.bench.recording import LONGER, Recording, record_routing
from umv2_export.bench.timed_model import INPUTS, STATIC_SPARE
from umv2_export.bundle import Bundle
from umv2_export.errors import EnvironmentUnfit, InvalidRequest
from umv2_export.progress import Tracker
from umv2_export.runtimes import open_runtime
from umv2_export.runtimes.base import Array
from umv2_export.system.host_memory import available_bytes

__all__ = ["differences_in_size", "record_all", "require_memory"]

# Batches up to this have all sets of sequences by which calls take turns; the largest batch has one.
FULL_SETS = 16


def differences_in_size(bundle: Bundle, baseline: Bundle) -> list[str]:
    """Sizes of the two models that differ by more than 5 %."""
    ours, theirs = bundle.manifest.parameters, baseline.manifest.parameters
    return [
        f"{kind} parameters: {ours[kind]:,} in {bundle.path.name}, {theirs[kind]:,} in {baseline.path.name}"
        for kind in ("total", "activated")
        if abs(ours[kind] / theirs[kind] - 1) > 0.05
    ]


def require_memory(models: Sequence[Bundle], options: BenchOptions) -> None:
    """Room for the traced caches of all models, the cache that a step of the largest batch returns, and packed weights.

    Raises:
        EnvironmentUnfit: there is none.
    """
    positions = _sequences(options) * options.past + 2 * max(options.batches) * (options.past + 1)
    configs = {_routed_as(model): model.config for model in models}
    caches = {name: 8 * one.kv_heads * one.head_size * one.num_layers for name, one in configs.items()}
    # One for each set of sequences, beside what was recorded; at most two models take turns.
    kept = _sequences(options) * (options.past + STATIC_SPARE)
    static = [kept * caches[_routed_as(model)] for model in models if model.manifest.cache == "static"]
    # ONNX Runtime packs what GEMMs read; one baseline is open at a time.
    packed = [model.manifest.bytes["dense"] + model.manifest.bytes["experts"] for model in models]
    needed = positions * sum(caches.values()) + packed[0] + max(packed[1:], default=0) + sum(static[:2])
    available = available_bytes()
    if available is not None and needed > available:
        raise EnvironmentUnfit(
            f"weights and caches of past {options.past} at batch {max(options.batches)} need {needed} bytes, "
            f"{available} are free",
            fix="lower --batch or --past",
        )


def record_all(
    models: Sequence[tuple[Bundle, str]], text: Callable[[Bundle], Array], options: BenchOptions, track: Tracker
) -> list[Recording]:
    """Of each model; two exports of one checkpoint have the same."""
    done = track("reading real text", len(models))
    sequences = _sequences(options)
    found: dict[str, Recording] = {}
    recordings = []
    for model, runtime in models:
        key = _routed_as(model)
        if key not in found:
            ids = text(model)
            if len(ids) < options.prefill:
                raise InvalidRequest(f"the text has {len(ids)} tokens, the prompt {options.prefill}", fix=LONGER)
            opened = open_runtime(runtime, model)
            found[key] = record_routing(opened, model, ids, sequences=sequences, length=options.past + 1)
            del opened
        recordings.append(found[key])
        done(1)
    return recordings


def _sequences(options: BenchOptions) -> int:
    """Traced ones: the largest batch once, and batches up to 16 as often as calls take turns."""
    largest = max(options.batches)
    return max(largest, INPUTS * min(largest, FULL_SETS))


def _routed_as(bundle: Bundle) -> str:
    """What decides routing: two forms of one model of experts have the same."""
    stored = bundle.manifest
    return json.dumps([stored.source, bundle.config.as_dict(), stored.dtype, stored.key_dtype, stored.table_dtype])
