"""A user's view of a bundle with a static cache: a session, and one buffer bound as input and output of each tensor."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from tests.onnx.sessions import Array

__all__ = ["BoundSession", "greedy_tokens"]


class BoundSession:
    """ONNX Runtime on the graph of a bundle, stock or with a library of ops.

    Args:
        model: the graph.
        batch: sequences.
        length: positions of the cache.
        library: of ops.
        fill: what the cache holds before the first call.
    """

    def __init__(
        self, model: Path, batch: int, length: int, library: str | None = None, *, fill: float = np.nan
    ) -> None:
        options = onnxruntime.SessionOptions()
        if library is not None:
            options.register_custom_ops_library(library)
        self._session: Any = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._binding = self._session.io_binding()
        self.cache: dict[str, Array] = {}
        for value in self._session.get_inputs()[2:]:
            dtype = np.float16 if value.type == "tensor(float16)" else np.float32
            buffer = np.full((batch, value.shape[1], length, value.shape[3]), fill, dtype)
            place = ("cpu", 0, dtype, buffer.shape, buffer.ctypes.data)
            self._binding.bind_input(value.name, *place)
            self._binding.bind_output(value.name.replace("past_key_values", "present"), *place)
            self.cache[value.name] = buffer

    def __call__(self, ids: Array, mask: Array) -> Array:
        """Logits of one forward."""
        self._binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids))
        self._binding.bind_cpu_input("attention_mask", np.ascontiguousarray(mask))
        self._binding.bind_output("logits")
        self._session.run_with_iobinding(self._binding)
        logits: Array = self._binding.get_outputs()[-1].numpy()
        return logits


def greedy_tokens(step: BoundSession, ids: Array, mask: Array, *, vocab_size: int, count: int) -> Array:
    """Greedy continuation of all rows; the last token of each is real."""
    tokens = []
    for _ in range(count):
        best = step(ids, mask)[:, -1, :vocab_size].argmax(-1)
        tokens.append(best)
        ids, mask = best[:, None], np.concatenate([mask, np.ones((len(best), 1), np.int64)], axis=1)
    return np.stack(tokens, axis=1)
