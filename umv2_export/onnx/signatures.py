"""The arity of the custom ops' nodes in a model, from its configuration."""

import torch

from umv2_export.config import ModelConfig
from umv2_export.layout import FoldedForm, TableLayout
from umv2_export.model.folded import joined_by_rank, key_matrices, used_chunks
from umv2_export.ops import AttentionSignature, ExpertsSignature, KeyScoresSignature, LookupSignature, OpSignatures

__all__ = ["form_signatures", "op_signatures"]


def form_signatures(form: FoldedForm) -> OpSignatures:
    """The arity of the custom ops' nodes in an export."""
    config = form.config
    signatures = op_signatures(config, form.layout)
    if form.cache == "growing":
        return signatures
    dtype = "float16" if form.dtype == torch.float16 else "float"
    return signatures._replace(attention=AttentionSignature(config.num_heads, config.kv_heads, config.head_size, dtype))


def op_signatures(config: ModelConfig, layout: TableLayout) -> OpSignatures:
    """The arity of the custom ops' nodes in the model."""
    memory = config.memory
    if config.experts is not None:
        chosen = config.experts
        return OpSignatures(experts=ExpertsSignature(chosen.count, chosen.topk, chosen.normalize_topk))
    if not memory.layers:
        return OpSignatures()
    row_matrices, col_matrices = key_matrices(memory)
    return OpSignatures(
        KeyScoresSignature(
            row_chunks=tuple(matrix.chunk for matrix in row_matrices),
            col_chunks=tuple(matrix.chunk for matrix in col_matrices),
            row_heads=tuple(len(matrix.heads) for matrix in row_matrices),
            col_heads=tuple(len(matrix.heads) for matrix in col_matrices),
            query_chunks=len(used_chunks(memory)),
            key_dim=memory.key_dim,
            keys_per_side=memory.stored_side,
            heads=memory.heads,
            ranks=memory.tucker_rank,
            by_rank=joined_by_rank(memory),
            epsilon=config.norm_eps,
        ),
        LookupSignature(
            shards=layout.shards,
            grouped=memory.value_groups > 1,
            pre_values=memory.pre_value_dim > 0,
            activation=memory.activation,
        ),
    )
