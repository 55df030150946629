"""Generation through the KV cache, in any runtime: one prompt, or several of different lengths at once."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from umv2_export.config import ModelConfig
from umv2_export.errors import InvalidRequest
from umv2_export.runtimes import Runtime
from umv2_export.runtimes.base import Array
from umv2_export.runtimes.decoding import open_decoder
from umv2_export.sampling import GREEDY, Sampler, Sampling
from umv2_export.tokenizer import outside_vocabulary

__all__ = ["Generation", "check_prompts", "generate", "positions_needed"]


@dataclass(frozen=True)
class Generation:
    """Continuations of one or several prompts.

    Attributes:
        token_ids: of each prompt, the new tokens.
        prefill_ms: time of the first forward, in ms.
        decode_ms: mean time of a later one, in ms; None when there was none.
        tokens_per_second: of the later ones, all sequences together; None when there was none.
    """

    token_ids: list[list[int]]
    prefill_ms: float
    decode_ms: float | None
    tokens_per_second: float | None


def positions_needed(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """Of a cache: shorter prompts are padded to the longest, and the last token is never read."""
    return max(map(len, prompts), default=0) + max_new_tokens - 1


def check_prompts(
    prompts: Sequence[Sequence[int]], config: ModelConfig, max_new_tokens: int, cache_length: int | None
) -> None:
    """Refuse what could not be run to its end, before anything is.

    Raises:
        InvalidRequest: a prompt is empty or holds ids outside the vocabulary, or the cache is too short for the longest
            one and what comes after it.
    """
    for number, prompt in enumerate(prompts, 1):
        which = "the prompt" if len(prompts) == 1 else f"prompt {number}"
        if not prompt:
            raise InvalidRequest(f"{which} is empty")
        bad = outside_vocabulary(prompt, config.vocab_size)
        if bad is not None:
            raise InvalidRequest(f"{which}: id {bad} is outside the vocabulary of {config.vocab_size}")
    needed = positions_needed(prompts, max_new_tokens)
    if cache_length is not None and needed > cache_length:
        raise InvalidRequest(
            f"a prompt of {max(map(len, prompts))} tokens and {max_new_tokens} new ones take {needed} positions, the "
            f"cache has {cache_length}",
            fix="raise --cache-length, or lower --max-new-tokens",
        )


def generate(
    runtime: Runtime,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    stop_at_eos: bool = True,
    cache_length: int | None = None,
    show: Callable[[int, int], None] = lambda row, token: None,
) -> Generation:
    """Continue prompts token by token, each until an end-of-sequence token or the limit.

    Args:
        runtime: computes.
        config: of its model.
        prompts: token ids; shorter ones are padded on the left.
        max_new_tokens: of each.
        sampling: how tokens are chosen.
        stop_at_eos: end at the model's end-of-sequence tokens.
        cache_length: positions of a static cache; None: as many as are needed.
        show: called with the number of the prompt and its next token, as it comes.

    Raises:
        InvalidRequest: see `check_prompts`.
        InputRejected: the model computes NaN.
        EnvironmentUnfit: memory does not hold the cache.
    """
    check_prompts(prompts, config, max_new_tokens, cache_length)
    length = cache_length or positions_needed(prompts, max_new_tokens)
    decoder = open_decoder(runtime, config, len(prompts), length)
    samplers = [Sampler(sampling, row) for row in range(len(prompts))]
    tokens: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    ids, mask = _padded(prompts)
    times = list[float]()
    while any(running):
        started = time.perf_counter()
        logits = decoder.step(ids, mask)
        # A sequence that has ended goes on with its last token, for the others; what comes out of it is dropped.
        for row in (row for row, goes_on in enumerate(running) if goes_on):
            token = samplers[row].choose(logits[row, -1, : config.vocab_size])
            tokens[row].append(token)
            ended = stop_at_eos and token in config.end_tokens
            running[row] = not ended and len(tokens[row]) < max_new_tokens
        times.append((time.perf_counter() - started) * 1e3)
        _show_last(tokens, len(times), show)
        ids = np.array([[row[-1]] for row in tokens], dtype=np.int64)
        mask = np.concatenate([mask, np.ones((len(prompts), 1), dtype=np.int64)], axis=1)
    later = sum(times[1:])
    return Generation(
        tokens,
        times[0],
        later / (len(times) - 1) if len(times) > 1 else None,
        sum(len(row) - 1 for row in tokens) / later * 1e3 if len(times) > 1 else None,
    )


def _show_last(tokens: Sequence[Sequence[int]], steps: int, show: Callable[[int, int], None]) -> None:
    """Of the sequences that went on in this step."""
    for row, own in enumerate(tokens):
        if len(own) == steps:
            show(row, own[-1])


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[Array, Array]:
    """Ids and mask [B, longest]; padding, on the left, is token 0."""
    longest = max(map(len, prompts))
    ids, mask = (np.zeros((len(prompts), longest), dtype=np.int64) for _ in range(2))
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask
