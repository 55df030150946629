"""From the logits of a position to the next token: the best one, or one drawn."""

from dataclasses import dataclass

import numpy as np

from umv2_export.errors import InputRejected
from umv2_export.runtimes.base import Array

__all__ = ["GREEDY", "Sampler", "Sampling"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the filters act in the order in which they stand here.

    Attributes:
        temperature: divides the logits; 0: the best token, always.
        top_k: only that many of the best; None: all.
        top_p: only the fewest of the best whose probabilities sum to that.
        seed: of the draws.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


class Sampler:
    """Chooses the tokens of one sequence; each has draws of its own, so that no other sequence changes them.

    Args:
        sampling: how.
        row: number of the sequence.
    """

    def __init__(self, sampling: Sampling, row: int) -> None:
        self._sampling = sampling
        self._generator = np.random.default_rng([sampling.seed, row])

    def choose(self, logits: Array) -> int:
        """The next token.

        Args:
            logits: [vocab_size].

        Raises:
            InputRejected: they are NaN, or the best is infinite.
        """
        best = logits.max()
        if not np.isfinite(best):
            kind = "NaN" if np.isnan(best) else "infinite"
            raise InputRejected(f"the model computes {kind} logits", fix="umv2-export parity --layerwise shows where")
        if not self._sampling.temperature:
            return int(logits.argmax())
        probabilities = self.probabilities(logits)
        return int(self._generator.choice(len(probabilities), p=probabilities))

    def probabilities(self, logits: Array) -> Array:
        """Of all tokens [vocab_size], in float64; those that were left out have 0."""
        chosen = self._sampling
        order = np.argsort(-logits, kind="stable")[: chosen.top_k]
        # The best first, so that no temperature, however low, divides by more than floats hold.
        best = logits[order].astype(np.float64)
        weights = np.exp((best - best[0]) / chosen.temperature)
        weights /= weights.sum()
        # What comes before a token is short of top_p, so it is needed; the first always is.
        needed = np.concatenate([[True], np.cumsum(weights)[:-1] < chosen.top_p])
        weights = np.where(needed, weights, 0.0)
        probabilities = np.zeros(len(logits))
        probabilities[order] = weights / weights.sum()
        return probabilities
