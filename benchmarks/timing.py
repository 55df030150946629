"""Timing on a GPU: each contender's calls become one CUDA graph, so that no launch from Python is timed."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

__all__ = ["replay_in_turns"]

Calls = Sequence[Callable[[], object]]

ROUNDS = 20
WARMUP = 3


def replay_in_turns(contenders: Sequence[Calls], *, rounds: int = ROUNDS) -> list[float]:
    """Seconds of one call of each contender, the median of rounds in which they take turns.

    Args:
        contenders: the calls of each, on inputs of their own, so that no call finds its rows in a cache.
        rounds: that count.
    """
    replays = [_replay(calls) for calls in contenders]
    seconds: list[list[float]] = [[] for _ in contenders]
    for number in range(WARMUP + rounds):
        for replay, times in zip(replays, seconds, strict=True):
            elapsed = replay()
            if number >= WARMUP:
                times.append(elapsed)
    return [statistics.median(times) / len(calls) for times, calls in zip(seconds, contenders, strict=True)]


def _replay(calls: Calls) -> Callable[[], float]:
    """A function that runs all calls once and says how many seconds they took."""
    if not torch.cuda.is_available():
        return lambda: _elapsed_on_cpu(calls)
    for call in calls:  # kernels are compiled, and libraries choose theirs, before the graph is recorded
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    return replay


def _elapsed_on_cpu(calls: Calls) -> float:
    started = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - started
