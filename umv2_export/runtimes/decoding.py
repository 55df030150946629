"""Sequences that go on, call by call: the cache of one is kept where it is computed, or handed in and out."""

from typing import Protocol, runtime_checkable

from umv2_export.config import ModelConfig
from umv2_export.runtimes.base import Array, Runtime, StepInput, empty_cache

__all__ = ["Decoder", "GrowingDecoder", "KeepsCache", "open_decoder"]


class Decoder(Protocol):
    """A batch of sequences and their cache."""

    def step(self, input_ids: Array, attention_mask: Array) -> Array:
        """One forward, prefill, chunk or decode.

        Args:
            input_ids: int64 [B, S], the next tokens.
            attention_mask: int64 [B, T], of these and of all before them; 0 marks padding.

        Returns:
            logits: fp32 [B, S, columns].
        """
        ...


@runtime_checkable
class KeepsCache(Protocol):
    """A runtime that keeps caches by itself."""

    def decoder(self, batch: int, length: int) -> Decoder:
        """A decoder of `batch` sequences of at most `length` tokens."""
        ...


class GrowingDecoder:
    """A cache that a runtime takes and gives back, longer, in each call."""

    def __init__(self, runtime: Runtime, config: ModelConfig, batch: int) -> None:
        self._runtime, self._past = runtime, empty_cache(config, batch)

    def step(self, input_ids: Array, attention_mask: Array) -> Array:
        """See `Decoder`."""
        output = self._runtime.run(StepInput(input_ids, attention_mask, self._past))
        self._past = output.present
        return output.logits


def open_decoder(runtime: Runtime, config: ModelConfig, batch: int, length: int) -> Decoder:
    """The decoder that a runtime has by itself, or one on top of it.

    Args:
        runtime: which.
        config: of its model.
        batch: sequences.
        length: most tokens of each, prompt and padding included; a cache that grows has no use for it.

    Raises:
        EnvironmentUnfit: memory does not hold a cache of that size.
    """
    if isinstance(runtime, KeepsCache):
        return runtime.decoder(batch, length)
    return GrowingDecoder(runtime, config, batch)
