"""Real text before a decode step: its cache, and which rows and experts the step then hits."""

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from umv2_export.bench.traffic import Hits, hits_of
from umv2_export.bundle import Bundle
from umv2_export.errors import InvalidRequest
from umv2_export.interface import Inner
from umv2_export.runtimes import Runtime, StepInput, empty_cache
from umv2_export.runtimes.base import Array

__all__ = ["LONGER", "Recording", "default_text", "record_routing"]

# Tokens of one traced forward: bounds the memory of its logits and probes.
TRACED_TOKENS = 1024

LONGER = "pass a longer --text"

KEPT_PROBES = (Inner.ADDRESSES, Inner.ROUTER_LOGITS, Inner.NORMED)

# 2 MB of text: 256 sequences of 64 tokens and more in any tokenizer.
TEXT_BYTES = 2 * 2**20


@dataclass(frozen=True)
class Recording:
    """Many sequences of real text, ready for a decode step: the cache of all tokens but the last, and its routing.

    Attributes:
        token_ids: int64 [sequences, 1], the last token of each.
        probes: at that token: `addresses.{j}` [sequences, K], `router_logits.{i}` [sequences, E] and `normed.{i}`
            [sequences, hidden_size].
        past: of each block, rotated keys and values [sequences, heads, tokens - 1, head_size].
        text: int64 [tokens], from which the sequences were taken.
    """

    token_ids: Array
    probes: dict[str, Array]
    past: list[tuple[Array, Array]]
    text: Array

    @property
    def sequences(self) -> int:
        """How many."""
        return len(self.token_ids)

    def hits(self, bundle: Bundle, chosen: slice) -> Hits:
        """Of one decode step of some sequences."""
        probes = {name: probe[chosen] for name, probe in self.probes.items()}
        return hits_of(bundle, self.token_ids[chosen], probes)


def default_text() -> bytes:
    """The source text of Python's standard library, which is wherever this runs."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    pieces, size = [], 0
    for file in files:
        pieces.append(file.read_bytes())
        size += len(pieces[-1])
        if size >= TEXT_BYTES:
            break
    # The cut may fall into a character.
    return b"".join(pieces)[:TEXT_BYTES].decode("utf-8", "ignore").encode()


def record_routing(runtime: Runtime, bundle: Bundle, ids: Array, *, sequences: int, length: int) -> Recording:
    """Run `sequences` pieces of text of `length` tokens, evenly spread over it.

    Raises:
        InvalidRequest: the text is too short.
    """
    if len(ids) < sequences + length:
        raise InvalidRequest(
            f"the text has {len(ids)} tokens, {sequences} sequences of {length} tokens need {sequences + length}",
            fix=LONGER,
        )
    config = bundle.config
    starts = np.linspace(0, len(ids) - length, sequences).astype(np.int64)
    prompts = np.stack([ids[start : start + length] for start in starts])
    shape = (sequences, config.kv_heads, length - 1, config.head_size)
    past = [(np.empty(shape, dtype=np.float32), np.empty(shape, dtype=np.float32)) for _ in range(config.num_layers)]
    probes: dict[str, list[Array]] = {}
    size = max(1, TRACED_TOKENS // length)
    for start in range(0, sequences, size):
        chunk = prompts[start : start + size]
        output = runtime.run(StepInput(chunk, np.ones_like(chunk), empty_cache(config, len(chunk))), probe=True)
        for name, probe in output.probes.items():
            if Inner.of(name) in KEPT_PROBES:
                probes.setdefault(name, []).append(probe.reshape(len(chunk), length, -1)[:, -1].copy())
        for kept, made in zip(past, output.present, strict=True):
            for target, source in zip(kept, made, strict=True):
                target[start : start + size] = source[:, :, :-1]
    return Recording(
        prompts[:, -1:].copy(), {name: np.concatenate(pieces) for name, pieces in probes.items()}, past, ids
    )
