"""Alternating timing: contenders take turns, so that a machine whose speed drifts slows all of them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Timing", "time_in_turns"]

# ONNX Runtime's threads spin for a while after a run; a peer with threads of its own would share two cores with them.
PAUSE_SECONDS = 0.003

# Calls by which a contender is ahead of the one before it: a third of the inputs of `bench-op`, and a multiple of those
# of a decode step, whose contenders have tables of their own.
AHEAD = 21


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
    """Call each contender once a round, with another argument than the others of the round, so that inputs can change.

    With the same rows for all, the first contender reads them from memory and the others from the cache that it left:
    the lookup of one token took 32 us as the first of three, and 24 us as the third.
    """
    times: list[list[float]] = [[] for _ in contenders]
    for number in range(warmup + rounds):
        for place, (contender, seconds) in enumerate(zip(contenders, times, strict=True)):
            call = 2 * number + AHEAD * place
            time.sleep(PAUSE_SECONDS)
            # The second of two calls is timed: the first finds threads asleep and caches full of the other's data.
            contender(call)
            started = time.perf_counter()
            contender(call + 1)
            if number >= warmup:
                seconds.append(time.perf_counter() - started)
    return [Timing.of(seconds) for seconds in times]
