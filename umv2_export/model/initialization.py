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
from umv2_export.config import TABLES, ModelConfig, tensor_shapes
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
        TensorStream(
            name,
            shape,
            torch.int64 if name.endswith("shuffle_index") else torch.float32,
            _Pieces(partial(_pieces, config, name, shape, seed, std)),
        )
        for name, shape in tensor_shapes(config).items()
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


def _pieces(
    config: ModelConfig, name: str, shape: tuple[int, ...], seed: int, table_std: float
) -> Iterator[torch.Tensor]:
    leaf = name.rpartition(".")[2]
    if leaf not in TABLES:
        yield _small_tensor(config, name, shape, seed)
        return
    generator = _generator(seed, name)
    step = max(1, PIECE_BYTES // (4 * shape[1]))
    for start in range(0, shape[0], step):
        yield torch.randn((min(step, shape[0] - start), shape[1]), generator=generator) * table_std


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _small_tensor(config: ModelConfig, name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    m = config.memory
    generator = _generator(seed, name)
    layer, _, leaf = name.partition("mem_blocks.")[2].partition(".")
    if leaf in ("query_norm.weight", "keys_norm.weight"):
        return torch.full(shape, m.key_dim ** (-0.4 if m.kind == "ultramem_v2" else -0.33))
    if leaf.startswith("tucker_core."):
        return torch.rand(shape, generator=generator)
    if leaf in ("tucker_core_u", "tucker_core_v"):
        cores = [f"transformer.mem_blocks.{layer}.tucker_core.{k}" for k in range(m.tucker_cores)]
        core_shape = (m.heads, m.tucker_rank, m.tucker_rank)
        summed_HRR = torch.stack([_small_tensor(config, core, core_shape, seed) for core in cores]).sum(0)
        u_HRR, _, v_HRR = torch.linalg.svd(summed_HRR)
        leading: torch.Tensor = u_HRR[:, :, 0] if leaf.endswith("u") else v_HRR[:, 0]
        return leading.reshape(shape)
    if leaf == "shuffle_index":
        return torch.randperm(shape[0], generator=generator)
    if name.endswith(("norm.weight", "ln_f.weight")):
        return torch.ones(shape)
    std = math.sqrt(2 / (5 * config.hidden_size))
    if leaf in ("query_proj.weight", "keys"):
        std = m.key_dim**-0.5
    elif leaf == "values_proj.weight":
        std = (m.value_dim * m.value_groups) ** -0.5
    elif leaf == "pre_values_proj.weight":
        std = config.hidden_size**-0.5
    return torch.randn(shape, generator=generator).mul_(std)


def _top_score_variance(config: ModelConfig, seed: int) -> float:
    """Variance over squared mean of the scores that layer 0 retrieves for random queries.

    Keys after their norm are random directions of one length, and so are queries: scores need no input.
    """
    m = config.memory
    generator = _generator(seed, "top score variance")
    gain = m.key_dim ** (-0.4 if m.kind == "ultramem_v2" else -0.33)
    shape = (SAMPLE_TOKENS, m.heads, m.stored_side, m.tucker_rank)
    # The product of two vectors of Dk unit components, scaled by both gains, has this standard deviation.
    row, col = (torch.randn(shape, generator=generator) * gain**2 * math.sqrt(m.key_dim) for _ in range(2))
    prefix = "transformer.mem_blocks.0."
    core_shape = (m.heads, m.tucker_rank, m.tucker_rank)
    cores = torch.stack(
        [_small_tensor(config, f"{prefix}tucker_core.{k}", core_shape, seed) for k in range(m.tucker_cores)]
    )
    u, v = (
        _small_tensor(config, f"{prefix}tucker_core_{side}", (1, m.heads, 1, m.tucker_rank), seed)[0, :, 0]
        for side in ("u", "v")
    )
    scores = tucker_topk(row, col, u, v, cores, m.row_topk, m.topk)[1]
    return float(scores.var() / scores.mean().square())
