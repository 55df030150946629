"""The decoder: attention, SwiGLU and memory layers, for prefill and decode in one forward.

Shape suffixes: see `umv2_export.ops`; in attention H is attention heads, D the size of one, T past + S.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import nn

from umv2_export.checkpoint import Checkpoint, CheckpointTensor
from umv2_export.config import ModelConfig, Role, checkpoint_tensors
from umv2_export.interface import Inner, inner_names
from umv2_export.model.experts import Experts
from umv2_export.model.memory import MemoryLayer, MemoryPool, ReferenceMemoryLayer
from umv2_export.model.norm import RMSNorm
from umv2_export.ops import static_attention

__all__ = ["KeyValue", "LanguageModel", "ModelOutput", "empty_past", "reference_model"]

KeyValue = tuple[torch.Tensor, torch.Tensor]


class ModelOutput(NamedTuple):
    """Result of one forward.

    Attributes:
        logits: [B, S, embedding_size].
        present: per block, rotated keys and values [B, H, past + S, head_size].
        inner: inner values by name, in the order of `umv2_export.interface.inner_names`.
    """

    logits: torch.Tensor
    present: list[KeyValue]
    inner: dict[str, torch.Tensor]

    def of(self, kind: Inner) -> list[torch.Tensor]:
        """The inner values of one kind, by block or memory layer."""
        return [value for name, value in self.inner.items() if Inner.of(name) is kind]


class LanguageModel(nn.Module):
    """A language model with memory layers; parameter names are those of the released state dict."""

    def __init__(
        self,
        config: ModelConfig,
        memory_layer: Callable[[ModelConfig, int], MemoryLayer],
        pool: nn.Module,
        experts: Callable[[ModelConfig], nn.Module] = Experts,
        *,
        static_cache: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config, memory_layer, pool, experts, static_cache=static_cache)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past: Sequence[KeyValue],
        forced_addresses: Sequence[torch.Tensor] | None = None,
        given: Mapping[str, torch.Tensor] | None = None,
    ) -> ModelOutput:
        """Run prefill (past of length 0) or decode.

        Args:
            input_ids: int64 [B, S].
            attention_mask: int64 [B, past + S]; 0 marks padding, on the left.
            past: per block, rotated keys and values [B, H, past, head_size]; a static cache is of any length that
                holds past + S.
            forced_addresses: per memory layer, virtual addresses int64 [B*S, hits] to use instead of the top-k ones.
            given: inner values by the names of the graph (`hidden.0`) from which the parts behind them go on; the
                output still holds what was computed in their place.
        """
        output: ModelOutput = self.transformer(input_ids, attention_mask, past, forced_addresses, given)
        return output


class Transformer(nn.Module):
    """Blocks and memory layers, side by side as in the released state dict."""

    def __init__(
        self,
        config: ModelConfig,
        memory_layer: Callable[[ModelConfig, int], MemoryLayer],
        pool: nn.Module,
        experts: Callable[[ModelConfig], nn.Module],
        *,
        static_cache: bool,
    ) -> None:
        super().__init__()
        self.config, self.static_cache = config, static_cache
        d = config.hidden_size
        self.wte = nn.Embedding(config.embedding_size, d)
        self.blocks = nn.ModuleList(Block(config, experts, static_cache=static_cache) for _ in range(config.num_layers))
        self.mem_blocks = nn.ModuleList(memory_layer(config, j) for j in range(config.memory.layers))
        self.full_memory_layer = pool
        self.ln_f = RMSNorm(d, config.norm_eps)
        self.ff_out = None if config.tie_embeddings else nn.Linear(d, config.embedding_size, bias=False)

    def forward(
        self,
        input_ids_BS: torch.Tensor,
        attention_mask_BT: torch.Tensor,
        past: Sequence[KeyValue],
        forced_addresses: Sequence[torch.Tensor] | None,
        given: Mapping[str, torch.Tensor] | None = None,
    ) -> ModelOutput:
        """See `LanguageModel.forward`."""
        inner: dict[str, torch.Tensor] = {}

        def onward(name: str, computed: torch.Tensor) -> torch.Tensor:
            inner[name] = computed
            return computed if given is None else given.get(name, computed)

        x_BSD = self.wte(input_ids_BS)
        positions = Positions(
            attention_mask_BT, input_ids_BS.shape[1], self.config, x_BSD.dtype, 2 if self.static_cache else 1
        )
        present = []
        pending: dict[int, torch.Tensor] = {}
        for i, block in enumerate(cast("Iterable[Block]", self.blocks)):
            x_BSD = onward(Inner.HIDDEN.at(i), x_BSD)
            attended_BSD, key_value = block.attention(x_BSD, positions, past[i])
            present.append(key_value)
            after_attention_BSD = x_BSD + onward(Inner.ATTENTION.at(i), attended_BSD)
            normed_BSD = onward(Inner.NORMED.at(i), block.ff_norm(after_attention_BSD))
            if block.router is None:
                ffn_BSD = block.swiglu(normed_BSD)
            else:
                router_logits_TE = onward(Inner.ROUTER_LOGITS.at(i), block.router(normed_BSD.flatten(0, 1)))
                ffn_BSD = block.experts(normed_BSD.flatten(0, 1), router_logits_TE).reshape(normed_BSD.shape)
            x_BSD = after_attention_BSD + onward(Inner.FFN.at(i), ffn_BSD)
            for j, (read, add) in enumerate(self.config.memory.placements):
                if read == i:
                    forced = None if forced_addresses is None else forced_addresses[j]
                    output_TD, routing = self.mem_blocks[j](normed_BSD.flatten(0, 1), self.full_memory_layer, forced)
                    inner[Inner.ROW_SCORES.at(j)], inner[Inner.COL_SCORES.at(j)] = (
                        routing.row_scores,
                        routing.col_scores,
                    )
                    inner[Inner.ADDRESSES.at(j)] = routing.addresses
                    pending[add] = onward(Inner.MEMORY.at(j), output_TD.reshape(normed_BSD.shape))
            if i in pending:
                x_BSD = x_BSD + pending.pop(i)
        head_XD = self.wte.weight if self.ff_out is None else self.ff_out.weight
        last_BSD = onward(Inner.HIDDEN.at(len(self.blocks)), self.ln_f(x_BSD))
        logits_BSX = nn.functional.linear(last_BSD, head_XD)
        if self.config.logits_scale != 1.0:
            logits_BSX = logits_BSX * self.config.logits_scale
        return ModelOutput(logits_BSX, present, {name: inner[name] for name in inner_names(self.config)})


class Block(nn.Module):
    """Pre-norm attention, and SwiGLU or experts; a memory layer that reads the same normed input stands beside it."""

    def __init__(self, config: ModelConfig, experts: Callable[[ModelConfig], nn.Module], *, static_cache: bool) -> None:
        super().__init__()
        self.static_cache = static_cache
        d, self.heads, self.head_size = config.hidden_size, config.num_heads, config.head_size
        self.kv_heads, self.qk_norm, self.clip_qkv = config.kv_heads, config.qk_norm, config.clip_qkv
        kv_size = self.kv_heads * self.head_size
        self.attn_norm = RMSNorm(d, config.norm_eps)
        self.qkv_sizes = [d, kv_size, kv_size]
        self.att_proj = nn.Linear(d, sum(self.qkv_sizes), bias=False)
        if self.qk_norm != "none":
            query_size, key_size = (self.head_size,) * 2 if self.qk_norm == "head" else (d, kv_size)
            self.q_norm = RMSNorm(query_size, config.norm_eps)
            self.k_norm = RMSNorm(key_size, config.norm_eps)
        self.attn_out = nn.Linear(d, d, bias=False)
        self.ff_norm = RMSNorm(d, config.norm_eps)
        self.router = None if config.experts is None else nn.Linear(d, config.experts.count, bias=False)
        if config.experts is None:
            self.ff_proj = nn.Linear(d, 2 * config.ffn_size, bias=False)
            self.ff_out = nn.Linear(config.ffn_size, d, bias=False)
        else:
            self.experts = experts(config)

    def attention(self, x_BSD: torch.Tensor, positions: "Positions", past: KeyValue) -> tuple[torch.Tensor, KeyValue]:
        """What attention adds to the residual stream, and the cache with the new positions."""
        batch, sequence = x_BSD.shape[:2]
        parts = (
            part.reshape(batch, sequence, -1, self.head_size)
            for part in self.queries_keys_values(self.attn_norm(x_BSD))
        )
        q, k, v = parts if self.static_cache else (part.transpose(1, 2) for part in parts)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = positions.rotate(q), positions.rotate(k)
        if self.static_cache:
            q_BSX, k_BSX, v_BSX = q.flatten(2), k.flatten(2), v.flatten(2)
            out_BSD, *present = static_attention(q_BSX, k_BSX, v_BSX, *past, positions.bias_B1ST)
            return self.attn_out(out_BSD), (present[0], present[1])
        out_BHSD, key_value = self.attend(q, k, v, past, positions.bias_B1ST)
        out_BSD = out_BHSD.transpose(1, 2).reshape(batch, sequence, -1)
        return self.attn_out(out_BSD), key_value

    def attend(
        self, q_BHSD: torch.Tensor, k_BHSD: torch.Tensor, v_BHSD: torch.Tensor, past: KeyValue, bias: torch.Tensor
    ) -> tuple[torch.Tensor, KeyValue]:
        """Attention over a cache that grows, [B, H, S, D], and the cache with the new positions."""
        k_BHTD, v_BHTD = torch.cat([past[0], k_BHSD], 2), torch.cat([past[1], v_BHSD], 2)
        # Written out: at opset 18 the decomposed scaled_dot_product_attention took 36 % more time a step.
        keys, values = k_BHTD, v_BHTD
        if self.kv_heads != self.heads:
            # A dimension of query heads that read one head of keys: the product broadcasts, nothing is repeated.
            q_BHSD = q_BHSD.unflatten(1, (self.kv_heads, -1))
            bias, keys, values = bias[:, :, None], keys[:, :, None], values[:, :, None]
        scores = q_BHSD @ keys.transpose(-2, -1) * self.head_size**-0.5 + bias
        weights = torch.softmax(scores.float(), -1).to(v_BHTD.dtype)
        out = weights @ values
        return out if self.kv_heads == self.heads else out.flatten(1, 2), (k_BHTD, v_BHTD)

    def queries_keys_values(self, normed_BSD: torch.Tensor) -> Sequence[torch.Tensor]:
        """The three projections, [B, S, heads * D] each: normalised here if over all heads together, and clipped."""
        q_BSD, k_BSD, v_BSD = self.att_proj(normed_BSD).split(self.qkv_sizes, -1)
        if self.qk_norm == "full":
            q_BSD, k_BSD = self.q_norm(q_BSD), self.k_norm(k_BSD)
        parts = (q_BSD, k_BSD, v_BSD)
        return parts if self.clip_qkv is None else [part.clamp(-self.clip_qkv, self.clip_qkv) for part in parts]

    def swiglu(self, normed_BSD: torch.Tensor) -> torch.Tensor:
        """The first half of `ff_proj` is the linear part, the second the gate."""
        linear, gate = self.ff_proj(normed_BSD).chunk(2, dim=-1)
        output: torch.Tensor = self.ff_out(nn.functional.silu(gate) * linear)
        return output


class Positions:
    """Rotary angles and the causal mask of one call, shared by all blocks.

    Positions count the attended tokens, so left padding shifts nothing.

    Args:
        attention_mask_BT: int64; 0 marks padding.
        sequence: tokens of the call.
        config: of the model.
        dtype: of the bias.
        head_axis: of the tensors that are rotated: [B, H, S, D] or [B, S, H, D].
    """

    def __init__(
        self, attention_mask_BT: torch.Tensor, sequence: int, config: ModelConfig, dtype: torch.dtype, head_axis: int
    ) -> None:
        total = attention_mask_BT.shape[1]
        position_BS = (attention_mask_BT.cumsum(1) - 1)[:, total - sequence :].clamp(min=0).float()
        exponent = torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size
        frequency = position_BS[:, :, None] * (1.0 / config.rope_theta**exponent)
        angle_BSD = torch.cat([frequency, frequency], -1)
        angle = angle_BSD[:, None] if head_axis == 1 else angle_BSD[:, :, None]
        self._cos, self._sin = angle.cos(), angle.sin()
        query_index = torch.arange(total - sequence, total)[:, None]
        key_index = torch.arange(total)[None]
        allowed_B1ST = (key_index <= query_index)[None, None] & (attention_mask_BT[:, None, None, :] > 0)
        # Not -inf: a padded query position, which may attend nothing, must stay finite. Half of the lowest value:
        # adding a score to it cannot overflow in fp16.
        self.bias_B1ST = torch.where(allowed_B1ST, 0.0, torch.finfo(dtype).min / 2).to(dtype)

    def rotate(self, heads: torch.Tensor) -> torch.Tensor:
        """Apply rotary embeddings (rotate-half) in fp32."""
        x = heads.float()
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], -1)
        return (x * self._cos + turned * self._sin).to(heads.dtype)


def empty_past(config: ModelConfig, batch: int, dtype: torch.dtype = torch.float32) -> list[KeyValue]:
    """A cache of length 0."""
    shape = (batch, config.kv_heads, 0, config.head_size)
    return [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(config.num_layers)]


class _TableInParts:
    """A table that several files hold, indexed like a tensor: joined, the parts would be a copy in anonymous memory."""

    def __init__(self, table: CheckpointTensor) -> None:
        self._table = table
        self.shape = table.shape

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        """The rows `index`, of any shape."""
        return self._table.rows(index.flatten().cpu()).reshape(*index.shape, -1).to(index.device)


# No export stores them in 16 bits: they are folded into the keys, which the layer rounds, or stay as they are.
_NEVER_ROUNDED = (Role.KEY, Role.KEY_NORM, Role.CORE, Role.ROW_VECTOR, Role.COL_VECTOR, Role.PERMUTATION)


def reference_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype = torch.float32,
    key_dtype: torch.dtype | None = None,
    table_dtype: torch.dtype | None = None,
) -> LanguageModel:
    """The literal model of a checkpoint. It computes in fp32; its tables stay mapped, in as many parts as they have.

    Args:
        checkpoint: the model.
        dtype: round dense weights to it, as an export in that dtype stores them.
        key_dtype: round keys to it; None: to `dtype`.
        table_dtype: round rows to it; None keeps those of the checkpoint.

    Raises:
        InputRejected: a weight is NaN or infinite.
    """
    config = checkpoint.config
    layer = partial(ReferenceMemoryLayer, key_dtype=key_dtype or dtype, table_dtype=table_dtype)
    with torch.device("meta"):
        model = LanguageModel(config, layer, MemoryPool(config))
    state = {}
    for spec in checkpoint_tensors(config):
        name = spec.name
        if spec.role.is_table:
            # Unchecked: the check reads the whole table, and a NaN row that is hit shows in the output.
            table = checkpoint.tensors[name]
            if len(table.parts) == 1:
                state[name] = table.joined()
            else:
                owner, _, leaf = name.rpartition(".")
                delattr(model.get_submodule(owner), leaf)
                setattr(model.get_submodule(owner), leaf, _TableInParts(table))
        elif spec.role in _NEVER_ROUNDED:
            tensor = checkpoint.read(name)
            state[name] = tensor.float() if tensor.is_floating_point() else tensor
        else:
            state[name] = checkpoint.read(name).to(dtype).float()
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)
