"""Greedy generation through the KV cache, in any runtime."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from umv2_export.config import ModelConfig
from umv2_export.errors import InvalidRequest
from umv2_export.runtimes import Runtime
from umv2_export.runtimes.decoding import open_decoder
from umv2_export.tokenizer import outside_vocabulary

__all__ = ["Generation", "generate_greedily"]


@dataclass(frozen=True)
class Generation:
    """A continuation.

    Attributes:
        token_ids: the new tokens, without the prompt.
        prefill_ms: time of the first forward, in ms.
        decode_ms: mean time of a later one, in ms; None when there was none.
    """

    token_ids: list[int]
    prefill_ms: float
    decode_ms: float | None


def generate_greedily(
    runtime: Runtime,
    config: ModelConfig,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    *,
    stop_at_eos: bool = True,
    cache_length: int | None = None,
) -> Generation:
    """Continue a prompt with the best token each time, until an end-of-sequence token or the limit.

    Raises:
        InvalidRequest: the prompt is empty or holds ids outside the vocabulary, or the cache is too short for it and
            what comes after.
        EnvironmentUnfit: memory does not hold the cache.
    """
    if not prompt_ids:
        raise InvalidRequest("the prompt is empty")
    bad = outside_vocabulary(prompt_ids, config.vocab_size)
    if bad is not None:
        raise InvalidRequest(f"prompt id {bad} is outside the vocabulary of {config.vocab_size}")
    ids = np.array([list(prompt_ids)], dtype=np.int64)
    positions = len(prompt_ids) + max_new_tokens - 1
    if cache_length is not None and positions > cache_length:
        raise InvalidRequest(
            f"a prompt of {len(prompt_ids)} tokens and {max_new_tokens} new ones take {positions} positions, the cache "
            f"has {cache_length}",
            fix="raise --cache-length, or lower --max-new-tokens",
        )
    decoder = open_decoder(runtime, config, 1, cache_length or positions)
    length, tokens, times = 0, list[int](), list[float]()
    while len(tokens) < max_new_tokens:
        length += ids.shape[1]
        started = time.perf_counter()
        logits = decoder.step(ids, np.ones((1, length), dtype=np.int64))
        times.append((time.perf_counter() - started) * 1e3)
        token = int(logits[0, -1, : config.vocab_size].argmax())
        tokens.append(token)
        if stop_at_eos and token in config.end_tokens:
            break
        ids = np.array([[token]], dtype=np.int64)
    return Generation(tokens, times[0], float(np.mean(times[1:])) if len(times) > 1 else None)
