"""The CPU kernels of the ops as functions over numpy arrays, with no runtime around them.

A model calls them through its runtime. What the ops mean is said in `umv2_export.ops`.
"""

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from umv2_export import cpu_kernels

__all__ = [
    "CPU_TARGETS",
    "key_scores",
    "memory_lookup",
    "narrow",
    "normalize",
    "runnable_targets",
    "tucker_topk",
    "widen",
]

Array = npt.NDArray[Any]

CPU_TARGETS = ("portable", "avx2", "avx512")

# Of kernels/cpu/kernels.h, and of the processor.
_PANEL_KEYS, _CACHE_LINE = 16, 64

_STORAGES = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3}


class _LookupArgs(ctypes.Structure):
    """LookupArgs of kernels/cpu/kernels.h."""

    _fields_ = (
        ("row_scales", ctypes.c_void_p),
        ("shards", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("rows_per_shard", ctypes.c_int64),
        ("hits", ctypes.c_int64),
        ("cores", ctypes.c_int64),
        ("pre_value_dim", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("gelu", ctypes.c_bool),
        ("row_type", ctypes.c_int),
    )


class _LookupToken(ctypes.Structure):
    """LookupToken of kernels/cpu/kernels.h; here of the first of several tokens."""

    _fields_ = (
        ("indices", ctypes.c_void_p),
        ("scores", ctypes.c_void_p),
        ("group", ctypes.c_void_p),
        ("query", ctypes.c_void_p),
    )


class _TuckerArgs(ctypes.Structure):
    """TuckerArgs of kernels/cpu/kernels.h."""

    _fields_ = (
        ("u", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("cores", ctypes.c_void_p),
        ("heads", ctypes.c_int64),
        ("keys_per_side", ctypes.c_int64),
        ("ranks", ctypes.c_int64),
        ("core_count", ctypes.c_int64),
        ("row_topk", ctypes.c_int64),
        ("topk", ctypes.c_int64),
    )


class _KeyScoresArgs(ctypes.Structure):
    """KeyScoresArgs of kernels/cpu/kernels.h."""

    _fields_ = (
        ("queries", ctypes.c_void_p),
        ("panels", ctypes.c_void_p),
        ("scores", ctypes.c_void_p),
        ("joined", ctypes.c_int64),
        ("query_size", ctypes.c_int64),
        ("key_dim", ctypes.c_int64),
        ("key_count", ctypes.c_int64),
        ("scores_size", ctypes.c_int64),
        ("key_type", ctypes.c_int),
    )


def runnable_targets() -> list[str]:
    """The targets of CPU_TARGETS whose kernels this processor runs."""
    return [target for target in CPU_TARGETS if cpu_kernels.load_kernels().umv2_kernels(target.encode()) is not None]


def memory_lookup(
    target: str,
    indices: Array,
    scores: Array,
    rows: Sequence[Array],
    *,
    pre_value_dim: int = 0,
    gelu: bool = False,
    groups: int = 1,
    group: Array | None = None,
    query: Array | None = None,
    row_scales: Array | None = None,
    row_dtype: str = "float32",
) -> Array:
    """umv2::MemoryLookup: fp32 [T, G*V].

    Args:
        target: one of CPU_TARGETS.
        indices: int64 [T, K].
        scores: fp32 [T, K, C].
        rows: shards [R_s, P + V]; bf16 as its uint16 bits.
        pre_value_dim: P.
        gelu: apply the exact GELU to the pre-score.
        groups: G.
        group: int64 [T, K], given when groups > 1.
        query: fp32 [T, P], given when P > 0.
        row_scales: fp32 [rows, 2], given when rows are int8.
        row_dtype: float32, float16, bfloat16 or int8.

    Raises:
        ValueError: an index or a group is out of range, or a score is NaN.
    """
    tokens, hits, cores = scores.shape
    pointers = (ctypes.c_void_p * len(rows))(*(shard.ctypes.data for shard in rows))
    value_dim = rows[0].shape[1] - pre_value_dim
    output = np.full((tokens, groups * value_dim), np.nan, dtype=np.float32)
    arguments = _LookupArgs(
        row_scales=_address(row_scales, np.float32),
        shards=ctypes.cast(pointers, ctypes.c_void_p),
        rows=sum(len(shard) for shard in rows),
        rows_per_shard=len(rows[0]),
        hits=hits,
        cores=cores,
        pre_value_dim=pre_value_dim,
        value_dim=value_dim,
        groups=groups,
        gelu=gelu,
        row_type=_STORAGES[row_dtype],
    )
    all_tokens = _LookupToken(
        indices=_address(indices, np.int64),
        scores=_address(scores, np.float32),
        group=_address(group, np.int64),
        query=_address(query, np.float32),
    )
    accepted = cpu_kernels.load_kernels().umv2_memory_lookup(
        cpu_kernels.kernels_of(target),
        ctypes.byref(arguments),
        ctypes.byref(all_tokens),
        ctypes.c_int64(tokens),
        ctypes.c_void_p(output.ctypes.data),
    )
    _require_accepted(accepted)
    return output


def tucker_topk(
    target: str, row_scores: Array, col_scores: Array, u: Array, v: Array, cores: Array, *, row_topk: int, topk: int
) -> tuple[Array, Array]:
    """umv2::TuckerTopK in fp32: addresses int64 [T, H*K] and scores [T, H*K, C]; shapes as in `umv2_export.ops`.

    Raises:
        ValueError: a score is NaN.
    """
    tokens, heads, keys_per_side, ranks = row_scores.shape
    addresses = np.full((tokens, heads * topk), -1, dtype=np.int64)
    scores = np.full((tokens, heads * topk, len(cores)), np.nan, dtype=np.float32)
    arguments = _TuckerArgs(
        u=_address(u, np.float32),
        v=_address(v, np.float32),
        cores=_address(cores, np.float32),
        heads=heads,
        keys_per_side=keys_per_side,
        ranks=ranks,
        core_count=len(cores),
        row_topk=row_topk,
        topk=topk,
    )
    accepted = cpu_kernels.load_kernels().umv2_tucker_topk(
        cpu_kernels.kernels_of(target),
        ctypes.byref(arguments),
        ctypes.c_void_p(_address(row_scores, np.float32)),
        ctypes.c_void_p(_address(col_scores, np.float32)),
        ctypes.c_int64(tokens),
        ctypes.c_void_p(addresses.ctypes.data),
        ctypes.c_void_p(scores.ctypes.data),
    )
    _require_accepted(accepted)
    return addresses, scores


def normalize(target: str, values: Array, epsilon: float) -> Array:
    """Each row of fp32 [rows, size], divided by its root mean square."""
    result = np.full(values.shape, np.nan, dtype=np.float32)
    for row, out in zip(values, result, strict=True):
        cpu_kernels.load_kernels().umv2_normalize(
            cpu_kernels.kernels_of(target),
            ctypes.c_void_p(_address(row, np.float32)),
            ctypes.c_int64(row.size),
            ctypes.byref(ctypes.c_float(epsilon)),
            ctypes.c_void_p(out.ctypes.data),
        )
    return result


def key_scores(target: str, queries: Array, keys: Sequence[Array], *, key_dtype: str = "float32") -> Array:
    """Scores of matrices of keys that are joined by rank: fp32 [T, N, R].

    Args:
        target: one of CPU_TARGETS.
        queries: fp32 [T, R * D], normalised; a chunk of D for each matrix.
        keys: R matrices [D, N]; bf16 as its uint16 bits.
        key_dtype: float32, float16 or bfloat16.
    """
    key_dim, key_count = keys[0].shape
    tokens, joined = len(queries), len(keys)
    if queries.shape[1] != joined * key_dim or any(matrix.shape != keys[0].shape for matrix in keys):
        raise TypeError(f"keys {[matrix.shape for matrix in keys]} do not fit queries {queries.shape}")
    scores = np.full((tokens, key_count, joined), np.nan, dtype=np.float32)
    panels = [_panels(matrix, key_dtype) for matrix in keys]
    first = _address(queries, np.float32) or 0
    arguments = _KeyScoresArgs(
        queries=ctypes.cast(_pointers(first + r * key_dim * 4 for r in range(joined)), ctypes.c_void_p),
        panels=ctypes.cast(_pointers(panel.ctypes.data for panel in panels), ctypes.c_void_p),
        scores=scores.ctypes.data,
        joined=joined,
        query_size=queries.shape[1],
        key_dim=key_dim,
        key_count=key_count,
        scores_size=key_count * joined,
        key_type=_STORAGES[key_dtype],
    )
    cpu_kernels.load_kernels().umv2_key_scores(
        cpu_kernels.kernels_of(target), ctypes.byref(arguments), ctypes.c_int64(tokens)
    )
    return scores


def _panels(keys: Array, key_dtype: str) -> Array:
    """A matrix [D, N] in the order in which the kernel reads it, at the beginning of a cache line."""
    key_dim, key_count = keys.shape
    stored = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[key_dtype]
    address = _address(keys, stored)
    size = -(-key_count // _PANEL_KEYS) * _PANEL_KEYS * key_dim * keys.itemsize
    memory = np.zeros(size + _CACHE_LINE, dtype=np.uint8)
    panels = memory[-memory.ctypes.data % _CACHE_LINE :][:size]
    cpu_kernels.load_kernels().umv2_pack_panels(
        ctypes.c_void_p(address),
        ctypes.c_int64(keys.itemsize),
        ctypes.c_int64(key_dim),
        ctypes.c_int64(key_count),
        ctypes.c_void_p(panels.ctypes.data),
    )
    return panels


def widen(target: str, halves: Array) -> Array:
    """fp16 of one axis as fp32."""
    result = np.full(halves.shape, np.nan, dtype=np.float32)
    cpu_kernels.load_kernels().umv2_widen(
        cpu_kernels.kernels_of(target),
        ctypes.c_void_p(_address(halves, np.float16)),
        ctypes.c_int64(halves.size),
        ctypes.c_void_p(result.ctypes.data),
    )
    return result


def narrow(target: str, values: Array) -> Array:
    """fp32 of one axis as fp16, rounded to nearest even."""
    result = np.full(values.shape, np.nan, dtype=np.float16)
    cpu_kernels.load_kernels().umv2_narrow(
        cpu_kernels.kernels_of(target),
        ctypes.c_void_p(_address(values, np.float32)),
        ctypes.c_int64(values.size),
        ctypes.c_void_p(result.ctypes.data),
    )
    return result


def _address(array: Array | None, dtype: type) -> int | None:
    return None if array is None else cpu_kernels.address(array, dtype)


def _pointers(addresses: Iterable[int]) -> "ctypes.Array[ctypes.c_void_p]":
    listed = list(addresses)
    return (ctypes.c_void_p * len(listed))(*listed)


def _require_accepted(accepted: bool) -> None:
    if not accepted:
        raise ValueError("the kernel refuses its inputs: an index out of range, or NaN among the scores")
