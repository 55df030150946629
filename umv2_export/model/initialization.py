"""Random initialisation of a checkpoint, tensor by tensor and piece by piece.

Sources: the released code for the memory layers; UltraMemV2, arXiv 2508.18756, appendix A, for the other linears and
for the principled scale of the tables.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch

from umv2_export.checkpoint.own_format import TensorStream
from umv2_export.config import ModelConfig, Role, TensorSpec, checkpoint_tensors
from umv2_export.dtypes import torch_dtype
from umv2_export.errors import Unsupported
from umv2_export.ops import tucker_topk

__all__ = ["Scheme", "random_tensors", "table_std"]

Scheme = Literal["released", "principled"]

RELEASED_TABLE_STD = 0.02

# Tokens on which the variance of the top scores is estimated.
SAMPLE_TOKENS = 256

PIECE_BYTES = 64 * 2**20


def random_tensors(config: ModelConfig, *, seed: int, scheme: Scheme = "released") -> list[TensorStream]:
    """All tensors of a freshly initialised checkpoint in fp32, each drawn from its own generator when it is asked for.

    Args:
        config: the model.
        seed: the same seed gives the same checkpoint.
        scheme: of the tables' scale; everything else is the same.

    Raises:
        Unsupported: the principled scheme for a model without pre-values.
    """
    if scheme == "principled" and not config.memory.pre_value_dim:
        raise Unsupported("the principled initialisation is defined for models with pre-values")
    std = RELEASED_TABLE_STD if scheme == "released" else table_std(config, _top_score_variance(config, seed))
    return [
        TensorStream(spec.name, spec.shape, torch_dtype(spec.dtype), _Pieces(partial(_pieces, config, spec, seed, std)))
        for spec in checkpoint_tensors(config)
    ]


def table_std(config: ModelConfig, score_variance: float) -> float:
    """The principled scale of values and pre-values: memory and FFN then add equally much to the residual stream.

    Args:
        config: the model, with pre-values.
        score_variance: variance of the top scores once their mean is 1.
    """
    m = config.memory
    expansion = config.ffn_size / config.hidden_size
    hits = m.hits * (1 + score_variance)
    return float(
        (0.2 * expansion * config.hidden_size / (hits * m.pre_value_dim * m.value_dim * config.num_layers)) ** 0.25
    )


class _Pieces:
    """An iterable that starts anew each time."""

    def __init__(self, start: Callable[[], Iterator[torch.Tensor]]) -> None:
        self._start = start

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self._start()


def _pieces(config: ModelConfig, spec: TensorSpec, seed: int, table_std: float) -> Iterator[torch.Tensor]:
    if not spec.role.is_table:
        yield _small_tensor(config, spec, seed)
        return
    generator = _generator(seed, spec.name)
    rows, width = spec.shape
    step = max(1, PIECE_BYTES // (4 * width))
    for start in range(0, rows, step):
        yield torch.randn((min(step, rows - start), width), generator=generator) * table_std


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _small_tensor(config: ModelConfig, spec: TensorSpec, seed: int) -> torch.Tensor:
    m, role = config.memory, spec.role
    generator = _generator(seed, spec.name)
    if role is Role.KEY_NORM:
        return torch.full(spec.shape, _gain(config))
    if role is Role.NORM:
        return torch.ones(spec.shape)
    if role is Role.CORE:
        return torch.rand(spec.shape, generator=generator)
    if role in (Role.ROW_VECTOR, Role.COL_VECTOR):
        u_HRR, _, v_HRR = torch.linalg.svd(_cores(config, spec.name.rpartition(".")[0], seed).sum(0))
        leading: torch.Tensor = u_HRR[:, :, 0] if role is Role.ROW_VECTOR else v_HRR[:, 0]
        return leading.reshape(spec.shape)
    if role is Role.PERMUTATION:
        return torch.randperm(spec.shape[0], generator=generator)
    std = math.sqrt(2 / (5 * config.hidden_size))
    if role in (Role.QUERY, Role.KEY):
        std = m.key_dim**-0.5
    elif role is Role.OUTPUT:
        std = (m.value_dim * m.value_groups) ** -0.5
    elif role is Role.PRE_VALUE_QUERY:
        std = config.hidden_size**-0.5
    return torch.randn(spec.shape, generator=generator).mul_(std)


def _gain(config: ModelConfig) -> float:
    """Weights of the norms of queries and keys."""
    return float(config.memory.key_dim ** (-0.4 if config.memory.kind == "ultramem_v2" else -0.33))


def _cores(config: ModelConfig, layer: str, seed: int) -> torch.Tensor:
    """The cores [C, H, R, R] of the memory layer of that name."""
    specs = [s for s in checkpoint_tensors(config) if s.role is Role.CORE and s.name.startswith(f"{layer}.")]
    return torch.stack([_small_tensor(config, spec, seed) for spec in specs])


def _top_score_variance(config: ModelConfig, seed: int) -> float:
    """Variance over squared mean of the scores that layer 0 retrieves for random queries.

    Keys after their norm are random directions of one length, and so are queries: scores need no input.
    """
    m = config.memory
    generator = _generator(seed, "top score variance")
    gain = _gain(config)
    shape = (SAMPLE_TOKENS, m.heads, m.stored_side, m.tucker_rank)
    # The product of two vectors of Dk unit components, scaled by both gains, has this standard deviation.
    row, col = (torch.randn(shape, generator=generator) * gain**2 * math.sqrt(m.key_dim) for _ in range(2))
    cores = _cores(config, "transformer.mem_blocks.0", seed)
    vectors = [s for s in checkpoint_tensors(config) if s.role in (Role.ROW_VECTOR, Role.COL_VECTOR)][:2]
    u, v = (_small_tensor(config, spec, seed)[0, :, 0] for spec in vectors)
    scores = tucker_topk(row, col, u, v, cores, m.row_topk, m.topk)[1]
    return float(scores.var() / scores.mean().square())
