"""Keys and values in buffers of fixed length, which ONNX Runtime reads and writes in place."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from umv2_export.config import ModelConfig
from umv2_export.errors import EnvironmentUnfit, InputRejected, InvalidRequest
from umv2_export.interface import ATTENTION_MASK, INPUT_IDS, LOGITS, cache_names, cache_of
from umv2_export.runtimes.base import Array, Cache
from umv2_export.system.host_memory import available_bytes

__all__ = ["StaticCache", "StaticDecoder", "run_bound"]


class StaticCache:
    """Buffers of zeros [B, K, length, head_size], one for each tensor of the cache; all are bound to input and output.

    Args:
        config: of the model.
        dtype: of the cache.
        batch: sequences.
        length: positions of each.

    Raises:
        EnvironmentUnfit: memory does not hold them.
    """

    def __init__(self, config: ModelConfig, dtype: "np.dtype[Any]", batch: int, length: int) -> None:
        self.batch, self.length, self._blocks = batch, length, config.num_layers
        shape = (batch, config.kv_heads, length, config.head_size)
        names = cache_names(config.num_layers)
        needed, available = len(names) * int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, available_bytes()
        if available is not None and needed > available:
            raise EnvironmentUnfit(
                f"a cache of {batch} x {length} positions needs {needed} bytes of memory, {available} are free",
                fix="a shorter cache, or fewer sequences",
            )
        self._buffers = {pair: np.zeros(shape, dtype) for pair in names}

    def fill(self, past: Cache) -> None:
        """Copy a cache of some positions to the beginning; the positions behind it become NaN, which nothing may read.

        Args:
            past: in fp32, of at most `length` positions.
        """
        tensors = [tensor for key_value in past for tensor in key_value]
        for buffer, tensor in zip(self._buffers.values(), tensors, strict=True):
            buffer[:, :, : tensor.shape[2]] = tensor
            buffer[:, :, tensor.shape[2] :] = np.nan

    def used(self, total: int) -> Cache:
        """A copy of the first positions, in fp32."""
        outputs = {name: buffer[:, :, :total].astype(np.float32) for (_, name), buffer in self._buffers.items()}
        return cache_of(outputs, self._blocks)

    def bind(self, binding: Any) -> None:
        """Let one buffer be input and output of each tensor."""
        for (past, present), buffer in self._buffers.items():
            place = ("cpu", 0, buffer.dtype, list(buffer.shape), buffer.ctypes.data)
            binding.bind_input(past, *place)
            binding.bind_output(present, *place)


class StaticDecoder:
    """A session whose cache was bound once: a step makes and copies nothing of the cache's length.

    Args:
        session: of ONNX Runtime.
        cache: as long as the sequences may become.
        where: the bundle.
    """

    def __init__(self, session: Any, cache: StaticCache, where: object) -> None:
        self._session, self._cache, self._where = session, cache, where
        self._binding = session.io_binding()
        cache.bind(self._binding)

    def step(self, input_ids: Array, attention_mask: Array) -> Array:
        """See `umv2_export.runtimes.decoding.Decoder`.

        Raises:
            InvalidRequest: of another number of sequences than the cache, or longer than it.
            InputRejected: ONNX Runtime cannot run the graph.
        """
        (batch, total), cache = attention_mask.shape, self._cache
        if batch != cache.batch or total > cache.length:
            raise InvalidRequest(
                f"{batch} sequences of {total} positions, the cache has {cache.batch} of {cache.length}",
                where=self._where,
                fix="a longer cache (--cache-length), or fewer and shorter sequences",
            )
        inputs = {INPUT_IDS: input_ids, ATTENTION_MASK: attention_mask}
        logits: Array = run_bound(self._session, self._binding, inputs, [LOGITS], where=self._where)[LOGITS].numpy()
        return logits


def run_bound(
    session: Any, binding: Any, inputs: Mapping[str, Array], shown: Sequence[str], *, where: object
) -> dict[str, Any]:
    """One forward whose cache is bound already; the values of the outputs `shown`.

    Raises:
        InputRejected: ONNX Runtime cannot run the graph.
    """
    for name, array in inputs.items():
        binding.bind_cpu_input(name, np.ascontiguousarray(array))
    for name in shown:
        binding.bind_output(name)
    try:
        session.run_with_iobinding(binding)
    except Exception as error:  # its exception classes share no base but Exception
        raise InputRejected("ONNX Runtime cannot run the graph", where=where, why=str(error).strip()) from error
    # In the order in which they were bound, the cache first.
    return dict(zip(shown, binding.get_outputs()[-len(shown) :], strict=True))
