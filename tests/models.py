"""Golden and random models for tests, and their official-style description for the oracle."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests import oracle
from tests.golden import GOLDEN_CASES
from umv2_export.checkpoint import Checkpoint, open_checkpoint
from umv2_export.checkpoint.own_format import TensorStream, save_checkpoint
from umv2_export.config import TABLES, ModelConfig
from umv2_export.model.initialization import random_tensors

__all__ = ["GOLDEN", "expected", "oracle_logits", "random_checkpoint"]

Array = npt.NDArray[Any]

GOLDEN = {case.name: case for case in GOLDEN_CASES}

# Tables as drawn hardly move the logits; so scaled, a wrong row moves them by a standard deviation.
TABLE_SCALE = 40.0


def expected(name: str) -> dict[str, Array]:
    """Outputs of the authors' own code."""
    with np.load(GOLDEN[name] / "expected.npz") as arrays:
        return dict(arrays)


def random_checkpoint(folder: Path, config: ModelConfig, seed: int = 0) -> Checkpoint:
    """A native checkpoint of random weights whose memory layers matter."""
    streams = []
    for stream in random_tensors(config, seed=seed):
        scale = TABLE_SCALE if stream.name.endswith(TABLES) else 1.0
        pieces = [piece * scale if piece.is_floating_point() else piece for piece in stream.pieces]
        streams.append(TensorStream(stream.name, stream.shape, stream.dtype, pieces))
    save_checkpoint(folder, config, streams)
    return open_checkpoint(folder)


def oracle_logits(checkpoint: Checkpoint, input_ids: Array) -> Array:
    """Logits of the independent float64 reading, whose input is the authors' description of a model."""
    config, memory = checkpoint.config, checkpoint.config.memory
    fields = {
        "d_model": config.hidden_size,
        "n_heads": config.num_heads,
        "n_layers": config.num_layers,
        "mlp_hidden_size": 2 * config.ffn_size,
        "rope_theta": config.rope_theta,
        "layer_norm_eps": config.norm_eps,
        "vocab_size": config.vocab_size,
        "embedding_size": config.embedding_size,
        "weight_tying": config.tie_embeddings,
        "mem_type": memory.kind,
        "mem_knum": memory.keys_per_side,
        "mem_kdim": memory.key_dim,
        "mem_vdim": memory.value_dim,
        "mem_pre_vdim": memory.pre_value_dim,
        "mem_knn": memory.topk,
        "mem_head": memory.heads,
        "mem_insert_way": "/".join(f"{read}:{add}" for read, add in memory.placements),
        "mem_share_ratio": memory.share_ratio,
        "mem_value_expand_time": memory.value_groups,
        "mem_key_expand_time": memory.key_expansion,
        "mem_q_for_each_tucker_rank": memory.query_per_rank,
        "mem_use_glu_act": memory.activation == "gelu",
    }
    tensors = {
        name: tensor.read().numpy().astype(np.int64 if name.endswith("shuffle_index") else np.float64)
        for name, tensor in checkpoint.tensors.items()
    }
    logits, _ = oracle.forward(fields, tensors, input_ids, query_layout=memory.query_layout, row_topk=memory.row_topk)
    return logits
