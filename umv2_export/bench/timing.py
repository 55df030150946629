"""Alternating timing: contenders take turns, so that a machine whose speed drifts slows all of them."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Timing", "time_in_turns"]

# ONNX Runtime's threads spin for a while after a run; a peer with threads of its own would share two cores with them.
PAUSE_SECONDS = 0.003


@dataclass(frozen=True)
class Timing:
    """Percentiles of one contender's calls, in ms."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """From the times of all counted calls."""
        p50, p90, p99 = np.percentile(np.asarray(seconds) * 1e3, (50, 90, 99))
        return cls(float(p50), float(p90), float(p99))

    def divided(self, parts: int) -> "Timing":
        """The share of one of `parts` equal parts of a call."""
        return Timing(self.p50 / parts, self.p90 / parts, self.p99 / parts)


def time_in_turns(contenders: Sequence[Callable[[int], object]], *, rounds: int, warmup: int = 3) -> list[Timing]:
    """Call each contender once a round; the argument is another one in each call, so that inputs can change.

    With the same rows for all, the first contender reads them from memory and the others from the cache that it left:
    the lookup of one token took 32 us as the first of three, and 24 us as the third.
    """
    times: list[list[float]] = [[] for _ in contenders]
    calls = itertools.count()
    for number in range(warmup + rounds):
        for contender, seconds in zip(contenders, times, strict=True):
            time.sleep(PAUSE_SECONDS)
            # The second of two calls is timed: the first finds threads asleep and caches full of the other's data.
            contender(next(calls))
            argument = next(calls)
            started = time.perf_counter()
            contender(argument)
            if number >= warmup:
                seconds.append(time.perf_counter() - started)
    return [Timing.of(seconds) for seconds in times]
