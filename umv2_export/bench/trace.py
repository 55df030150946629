"""Real routing: which rows and experts a model hits at the end of real text."""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from umv2_export.bench.traffic import Hits, hits_of
from umv2_export.bundle import Bundle
from umv2_export.errors import InvalidRequest
from umv2_export.runtimes import Runtime, StepInput, empty_cache
from umv2_export.runtimes.base import Array
from umv2_export.tokenizer import load_tokenizer

__all__ = ["Trace", "default_text", "text_ids", "trace_routing"]

# Tokens of one traced forward: bounds the memory of its logits and probes.
TRACED_TOKENS = 1024

# 2 MB of text: 256 sequences of 64 tokens and more in any tokenizer.
TEXT_BYTES = 2 * 2**20


@dataclass(frozen=True)
class Trace:
    """Routing of many sequences at their last position.

    Attributes:
        token_ids: int64 [sequences], the last token of each.
        probes: `addresses.{j}` [sequences, K] and `router_logits.{i}` [sequences, E].
    """

    token_ids: Array
    probes: dict[str, Array]

    def hits(self, bundle: Bundle, batch: int) -> Hits:
        """Of one decode step of the first `batch` sequences."""
        chosen = {name: probe[:batch] for name, probe in self.probes.items()}
        return hits_of(bundle, self.token_ids[:batch], chosen)


def default_text() -> bytes:
    """The source text of Python's standard library, which is wherever this runs."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    pieces, size = [], 0
    for file in files:
        pieces.append(file.read_bytes())
        size += len(pieces[-1])
        if size >= TEXT_BYTES:
            break
    return b"".join(pieces)[:TEXT_BYTES]


def text_ids(bundle: Bundle, text: bytes) -> Array:
    """Token ids of a text; of a bundle without a tokenizer, its bytes (modulo the vocabulary, if that is smaller)."""
    if bundle.tokenizer_file is not None:
        encoded = load_tokenizer(bundle.tokenizer_file).encode(text.decode("utf-8", "replace")).ids
        return np.asarray(encoded, dtype=np.int64)
    return np.frombuffer(text, dtype=np.uint8).astype(np.int64) % bundle.config.vocab_size


def trace_routing(runtime: Runtime, bundle: Bundle, ids: Array, *, sequences: int, length: int) -> Trace:
    """Run `sequences` pieces of text of `length` tokens, evenly spread over it, and keep the routing of the last token.

    Raises:
        InvalidRequest: the text is too short.
    """
    if len(ids) < sequences + length:
        raise InvalidRequest(
            f"the text has {len(ids)} tokens, {sequences} sequences of {length} tokens need {sequences + length}",
            fix="pass a longer --text",
        )
    starts = np.linspace(0, len(ids) - length, sequences).astype(np.int64)
    prompts = np.stack([ids[start : start + length] for start in starts])
    found: dict[str, list[Array]] = {}
    for chunk in _chunks(prompts):
        step = StepInput(chunk, np.ones_like(chunk), empty_cache(bundle.config, len(chunk)))
        for name, probe in runtime.run(step, probe=True).probes.items():
            if name.startswith(("addresses.", "router_logits.")):
                last = probe.reshape(len(chunk), length, -1)[:, -1]
                found.setdefault(name, []).append(last.copy())
    return Trace(prompts[:, -1].copy(), {name: np.concatenate(pieces) for name, pieces in found.items()})


def _chunks(prompts: Array) -> Iterator[Array]:
    size = max(1, TRACED_TOKENS // prompts.shape[1])
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]
