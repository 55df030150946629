"""What a user chooses of a benchmark of decode steps."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["BenchOptions"]


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
