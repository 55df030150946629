"""umv2::StaticAttention: causal attention over a cache of fixed length, which is written in place.

    present[:, :, past : past + S] = new keys and values,   output = softmax(q k^T / sqrt(D) + bias) v

T = past + S positions of the cache are in use; the bias [B, 1, S, T] says by its shape which, and by its values which
of them a query may not read. Nothing behind them is read. Bound to one buffer, past and present are one: nothing of the
cache's length is then made or copied, but in a chunk of several sequences; see `_BODY`.

Its body is one com.microsoft::GroupQueryAttention. The standard form (TensorScatter and Attention of opset 24) reads
the whole buffer, in use or not: see docs/decoding.md for the times. In attention H is heads of queries, K those of keys
and values, D the size of one, M the length of the cache.
"""

from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx.defs import OpSchema

from umv2_export.ops.domain import op_schema, parse_body

__all__ = ["HEAD_SIZE_MULTIPLE", "NAME", "AttentionSignature", "static_attention"]

NAME = "StaticAttention"

# GroupQueryAttention refuses others when it runs.
HEAD_SIZE_MULTIPLE = 8


@torch.library.custom_op(f"umv2::{NAME}", mutates_args=())
def static_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eager reference; it returns new caches.

    Args:
        query: [B, S, H*D], rotated.
        key: [B, S, K*D], rotated.
        value: [B, S, K*D].
        past_key: [B, K, M, D].
        past_value: likewise.
        bias: [B, 1, S, T]; T - S positions are in the cache already, and T is at most M.

    Returns:
        output: [B, S, H*D].
        present_key, present_value: [B, K, M, D].

    Raises:
        ValueError: T is above M.
    """
    (batch, kv_heads, length, size), (new, total) = past_key.shape, bias.shape[2:]
    if total > length:
        raise ValueError(f"{total} positions do not fit into a cache of {length}")
    present_key, present_value = past_key.clone(), past_value.clone()
    for present, part in ((present_key, key), (present_value, value)):
        present[:, :, total - new : total] = part.unflatten(-1, (kv_heads, size)).transpose(1, 2)
    query_BKGSD = query.unflatten(-1, (kv_heads, -1, size)).permute(0, 2, 3, 1, 4)
    keys_BK1TD, values_BK1TD = (present[:, :, None, :total].float() for present in (present_key, present_value))
    scores_BKGST = query_BKGSD.float() @ keys_BK1TD.transpose(-2, -1) * size**-0.5 + bias[:, :, None]
    output_BKGSD = torch.softmax(scores_BKGST, -1) @ values_BK1TD
    output = output_BKGSD.permute(0, 3, 1, 2, 4).reshape(batch, new, -1).to(query.dtype)
    return output, present_key, present_value


@static_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), torch.empty_like(past_key), torch.empty_like(past_value)


@dataclass(frozen=True)
class AttentionSignature:
    """What the nodes of one model have in common.

    Attributes:
        heads, kv_heads, head_size: of the attention.
        dtype: float or float16.
    """

    heads: int
    kv_heads: int
    head_size: int
    dtype: str

    def schema(self) -> OpSchema:
        """The ONNX schema. No plugin attributes: no engine has the op of the body."""
        inputs = ("query", "key", "value", "past_key", "past_value", "bias")
        return op_schema(
            NAME,
            "Causal attention over a cache that is written in place.",
            inputs=[(name, "T") for name in inputs],
            outputs=[(name, "T") for name in ("output", "present_key", "present_value")],
            type_constraints={"T": ("float", "float16")},
            attributes={},
            plugin=False,
        )

    def function_body(self, *, opset: int) -> ir.Function:
        """The op by com.microsoft::GroupQueryAttention and standard ops."""
        text = _BODY.format(
            heads=self.heads,
            kv_heads=self.kv_heads,
            width=self.heads * self.head_size,
            kv_width=self.kv_heads * self.head_size,
            scale=self.head_size**-0.5,
            dtype=self.dtype,
        )
        return parse_body(self.schema(), text, opset=opset, contrib=True)


# GroupQueryAttention takes S > 1 tokens of several sequences only where the cache is empty. A chunk on a cache puts the
# `again` positions in use before its own tokens, once more, as if it were all of the prompt, and drops what comes out
# of them. In any other call `again` is 0, and what stands for them is empty: 7 us a node. GroupQueryAttention is causal
# by itself; its bias is for padding.
_BODY = """
    shape = Shape (bias)
    batch, single, new, total = Split <axis = 0, num_outputs = 4> (shape)
    past = Sub (total, new)
    more_sequences = Sub (batch, single)
    more_tokens = Sub (new, single)
    both = Mul (more_sequences, more_tokens)
    chunk = Min (both, single)
    again = Mul (chunk, past)

    first = Constant <value = int64[1] {{0}}> ()
    axis_1 = Constant <value = int64[1] {{1}}> ()
    axis_2 = Constant <value = int64[1] {{2}}> ()
    width = Constant <value = int64[1] {{{width}}}> ()
    kv_width = Constant <value = int64[1] {{{kv_width}}}> ()
    kv_shape = Concat <axis = 0> (batch, again, kv_width)
    key_BKLD = Slice (past_key, first, again, axis_2)
    key_BLKD = Transpose <perm = [0, 2, 1, 3]> (key_BKLD)
    key_BLX = Reshape (key_BLKD, kv_shape)
    all_keys = Concat <axis = 1> (key_BLX, key)
    value_BKLD = Slice (past_value, first, again, axis_2)
    value_BLKD = Transpose <perm = [0, 2, 1, 3]> (value_BKLD)
    value_BLX = Reshape (value_BLKD, kv_shape)
    all_values = Concat <axis = 1> (value_BLX, value)
    query_shape = Concat <axis = 0> (batch, again, width)
    query_BLX = ConstantOfShape <value = {dtype}[1] {{0}}> (query_shape)
    all_queries = Concat <axis = 1> (query_BLX, query)
    bias_shape = Concat <axis = 0> (batch, single, again, total)
    bias_B1LT = ConstantOfShape <value = {dtype}[1] {{0}}> (bias_shape)
    all_bias = Concat <axis = 2> (bias_B1LT, bias)

    last = Sub (total, single)
    last_index = Cast <to = 6> (last)
    lengths = Expand (last_index, batch)
    total_index = Cast <to = 6> (total)
    scalar = Constant <value = int64[0] {{}}> ()
    total_length = Reshape (total_index, scalar)
    all_outputs, present_key, present_value = com.microsoft.GroupQueryAttention
        <num_heads = {heads}, kv_num_heads = {kv_heads}, scale = {scale!r}>
        (all_queries, all_keys, all_values, past_key, past_value, lengths, total_length, "", "", "", all_bias)
    output = Slice (all_outputs, again, total, axis_1)
"""
