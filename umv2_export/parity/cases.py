"""The calls at which parity is checked: every one that serves a user of the graph."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from umv2_export.config import ModelConfig
from umv2_export.errors import InvalidRequest
from umv2_export.runtimes import Runtime, StepInput, empty_cache
from umv2_export.runtimes.base import Array, Cache

__all__ = ["Case", "parity_cases"]

LONGEST_PROMPT = 17

# One call of many tokens, for the rows that it reaches: at 227M parameters it takes two seconds in either runtime.
WIDE_BATCH, WIDE_PROMPT = 4, 64

# Of the wide call: a run holds ten copies, which at a vocabulary of 50,000 and 256 tokens took 0.7 GB.
MOST_LOGITS = 2**22


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        name: shown in reports.
        step: the input; a past comes from the reference, so that both sides continue from the same cache.
    """

    name: str
    step: StepInput

    @property
    def real_tokens(self) -> Array:
        """Boolean [B, S]: positions that are not padding."""
        sequence = self.step.input_ids.shape[1]
        return np.asarray(self.step.attention_mask[:, -sequence:] > 0)


def parity_cases(
    config: ModelConfig, reference: Runtime, *, seed: int = 0, text: Array | None = None, wide: bool = True
) -> Iterator[Case]:
    """Prefill at batch 1 and 3, decode, a chunk on a cache, a padded batch, a decode step after it, a wide prefill.

    Random tokens do not repeat before all of the vocabulary have come: other tokens reach other rows.

    Args:
        config: the model.
        reference: computes the caches.
        seed: of the tokens, or of the places in the text.
        text: token ids [tokens] of a text whose pieces are the prompts; None: random tokens.
        wide: whether to end with a prefill of 4 x 64 tokens.

    Raises:
        InvalidRequest: the text is shorter than the longest prompt.
    """
    if text is not None and len(text) < LONGEST_PROMPT:
        raise InvalidRequest(f"the text has {len(text)} tokens, the longest prompt takes {LONGEST_PROMPT}")
    rng = np.random.default_rng(seed)

    drawn = np.empty(0, dtype=np.int64)

    def tokens(batch: int, sequence: int) -> Array:
        nonlocal drawn
        if text is None:
            while len(drawn) < batch * sequence:
                drawn = np.concatenate([drawn, rng.permutation(config.vocab_size)])
            chosen, drawn = np.split(drawn, [batch * sequence])
            return chosen.reshape(batch, sequence)
        return np.stack([text[start : start + sequence] for start in rng.integers(0, len(text) - sequence + 1, batch)])

    def step(ids: Array, mask: Array | None = None, past: Cache | None = None) -> StepInput:
        batch = len(ids)
        cache = empty_cache(config, batch) if past is None else past
        length = cache[0][0].shape[2]
        ones = np.ones((batch, length + ids.shape[1]), dtype=np.int64)
        return StepInput(ids, ones if mask is None else mask, cache)

    yield Case("prefill 1x1", step(tokens(1, 1)))
    yield Case(f"prefill 1x{LONGEST_PROMPT}", step(tokens(1, LONGEST_PROMPT)))
    prefill = step(tokens(3, 9))
    yield Case("prefill 3x9", prefill)
    past = reference.run(prefill).present
    yield Case("decode 3x1, past 9", step(tokens(3, 1), past=past))
    yield Case("chunk 3x4, past 9", step(tokens(3, 4), past=past))
    padded = step(tokens(3, 8), mask=np.array([[0] * pad + [1] * (8 - pad) for pad in (0, 3, 7)], dtype=np.int64))
    yield Case("left-padded 3x8", padded)
    mask = np.concatenate([padded.attention_mask, np.ones((3, 1), dtype=np.int64)], axis=1)
    yield Case("decode after padding", step(tokens(3, 1), mask=mask, past=reference.run(padded).present))
    if wide:
        room = max(1, MOST_LOGITS // (WIDE_BATCH * config.embedding_size))
        length = min(WIDE_PROMPT, room, config.max_sequence_length, WIDE_PROMPT if text is None else len(text))
        yield Case(f"prefill {WIDE_BATCH}x{length}", step(tokens(WIDE_BATCH, length)))
