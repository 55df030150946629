"""umv2::StaticAttention: torch op and body against attention in float64, written out."""

from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch

from tests.ops.bodies import Array, run_body
from umv2_export.ops import AttentionSignature, static_attention

ATOL = {np.float32: 2e-6, np.float16: 4e-3}

# Batch, heads, heads of keys, head size, new tokens, past, length.
SHAPES = [
    (1, 4, 4, 16, 1, 0, 1),
    (3, 4, 2, 16, 9, 0, 9),
    (3, 4, 2, 8, 1, 9, 32),
    (1, 4, 1, 24, 4, 9, 13),
    (3, 6, 2, 16, 4, 9, 32),
    (2, 4, 4, 16, 5, 1, 6),
]


def model_of(signature: AttentionSignature) -> onnx.ModelProto:
    t, kv = signature.dtype, f"{signature.kv_heads}, M, {signature.head_size}"
    names = "query, key, value, past_key, past_value, bias"
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 18, "umv2": 1, "com.microsoft": 1]>\n'
        f"g ({t}[B, S, X] query, {t}[B, S, Y] key, {t}[B, S, Y] value, {t}[B, {kv}] past_key, {t}[B, {kv}] past_value, "
        f"{t}[B, 1, S, T] bias) => ({t}[B, S, X] output, {t}[B, {kv}] present_key, {t}[B, {kv}] present_value) {{\n"
        f"output, present_key, present_value = umv2.StaticAttention ({names})\n}}"
    )
    proto.functions.append(ir.serde.serialize_function(signature.function_body(opset=18)))
    return proto


def feed_of(shape: tuple[int, ...], dtype: Any) -> dict[str, Array]:
    """Row b of the batch has b positions of padding on the left; what is behind the positions in use is NaN."""
    batch, heads, kv_heads, size, new, past, length = shape
    rng = np.random.default_rng(0)
    total = past + new
    attended = np.arange(total)[None] >= np.minimum(np.arange(batch), past)[:, None]
    causal = np.arange(total)[None] <= np.arange(past, total)[:, None]
    bias = np.where(causal & attended[:, None], 0, np.finfo(dtype).min / 2)[:, None]
    cache = rng.standard_normal((2, batch, kv_heads, length, size))
    cache[:, :, :, past:] = np.nan
    feed = {
        "query": rng.standard_normal((batch, new, heads * size)),
        "key": rng.standard_normal((batch, new, kv_heads * size)),
        "value": rng.standard_normal((batch, new, kv_heads * size)),
        "past_key": cache[0],
        "past_value": cache[1],
        "bias": bias,
    }
    return {name: value.astype(dtype) for name, value in feed.items()}


def truth(shape: tuple[int, ...], feed: dict[str, Array]) -> list[Array]:
    batch, heads, kv_heads, size, new, past, _ = shape
    f = {name: value.astype(np.float64) for name, value in feed.items()}
    caches = [f["past_key"].copy(), f["past_value"].copy()]
    for cache, name in zip(caches, ("key", "value"), strict=True):
        cache[:, :, past : past + new] = f[name].reshape(batch, new, kv_heads, size).swapaxes(1, 2)
    output = np.empty((batch, new, heads, size))
    for b in range(batch):
        for h in range(heads):
            keys, values = (cache[b, h * kv_heads // heads, : past + new] for cache in caches)
            query = f["query"].reshape(batch, new, heads, size)[b, :, h]
            scores = query @ keys.T / np.sqrt(size) + f["bias"][b, 0]
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            output[b, :, h] = weights / weights.sum(-1, keepdims=True) @ values
    return [output.reshape(batch, new, -1), *caches]


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_and_cache_are_those_of_the_definition(shape: tuple[int, ...], dtype: Any) -> None:
    feed = feed_of(shape, dtype)
    signature = AttentionSignature(shape[1], shape[2], shape[3], "float" if dtype == np.float32 else "float16")
    computed = {
        "torch": [value.numpy() for value in static_attention(*map(torch.from_numpy, feed.values()))],
        "body": run_body(model_of(signature), feed),
    }
    used = shape[4] + shape[5]
    expected = truth(shape, feed)
    for found in computed.values():
        np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=ATOL[dtype])
        for cache, wanted in zip(found[1:], expected[1:], strict=True):
            np.testing.assert_array_equal(cache[:, :, :used], wanted[:, :, :used])


def test_more_positions_than_the_cache_has_are_refused() -> None:
    feed = feed_of((1, 2, 2, 8, 4, 0, 3 + 1), np.float32)
    short = {**feed, "past_key": feed["past_key"][:, :, :3], "past_value": feed["past_value"][:, :, :3]}
    with pytest.raises(ValueError, match="4 positions do not fit into a cache of 3"):
        static_attention(*map(torch.from_numpy, short.values()))
