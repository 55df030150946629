"""UltraMemV2, UltraMem V1 and the two custom ops in float64 numpy: the ground truth of the tests.

Written only from the specification ("spec N" below is section N of ``ultramemv2.md``) and the op contract of the
architecture document. It shares no code with the package under test, imports no torch, and prefers a loop that can be
checked by eye to a fast expression. What the specification does not define is refused, never guessed.

Shape suffixes: B batch, S sequence, T tokens (B*S), D hidden, A attention heads, F attention head size, H memory heads,
N keys per side, R Tucker rank, C cores, K hits per token, P pre-value size, V value size, G value groups, Q key size,
J positions of the attention prefix, M hits per side (``row_topk``). A digit is an axis of that size (2: row, column).
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["forward", "memory_lookup", "tucker_topk"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Tensors = Mapping[str, npt.NDArray[Any]]

# Spec 1 and 9 define the model for these values only. A field that is absent has its value here.
_ONLY_VALUES: dict[str, tuple[object, ...]] = {
    "activation_type": ("swiglu",),
    "alibi": (False,),
    "attention_layer_norm": (True,),
    "attention_layer_norm_with_affine": (True,),
    "bias_for_layer_norm": (False, None),
    "block_group_size": (1,),
    "block_type": ("sequential",),
    "clip_qkv": (None,),
    "convert2fp32": (True,),
    "embedding_layer_norm": (False,),
    "include_bias": (False,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "multi_query_attention": (None, False),
    "norm_after": (False,),
    "rope": (True,),
    "scale_logits": (False,),
}


def key_scores(
    queries: npt.NDArray[Any],
    row_keys: Sequence[npt.NDArray[Any]],
    col_keys: Sequence[npt.NDArray[Any]],
    chunks: Sequence[int],
    *,
    key_dim: int,
    heads: int,
    ranks: int,
    by_rank: bool,
    epsilon: float,
) -> tuple[Floats, Floats]:
    """Normalised queries times keys, one number at a time: [T, H, N, R] of both sides."""
    x_TXK = _float64(queries).reshape(len(queries), queries.shape[1] // key_dim, key_dim)
    x_TXK = x_TXK / np.sqrt((x_TXK**2).sum(-1, keepdims=True) / key_dim + epsilon)
    sides = []
    for offset, matrices in ((0, row_keys), (len(row_keys), col_keys)):
        keys_per_side = sum(matrix.shape[1] for matrix in matrices) // (heads * ranks)
        result = np.zeros((len(queries), heads, keys_per_side, ranks))
        head = 0
        for i, matrix in enumerate(matrices):
            flat = x_TXK[:, chunks[offset + i]] @ _float64(matrix)
            if by_rank:
                for h in range(heads):
                    result[:, h, :, i] = flat[:, h * keys_per_side : (h + 1) * keys_per_side]
                continue
            held = matrix.shape[1] // (keys_per_side * ranks)
            for column in range(matrix.shape[1]):
                h, rest = divmod(column, keys_per_side * ranks)
                result[:, head + h, rest // ranks, rest % ranks] = flat[:, column]
            head += held
        sides.append(result)
    return sides[0], sides[1]


def tucker_topk(
    row_scores: npt.NDArray[Any],
    col_scores: npt.NDArray[Any],
    u: npt.NDArray[Any],
    v: npt.NDArray[Any],
    cores: npt.NDArray[Any],
    *,
    row_topk: int,
    topk: int,
) -> tuple[Integers, Floats]:
    """Select the ``topk`` best cells of a Tucker-decomposed score grid (spec 3; op contract, TuckerTopK).

    Stage 1 keeps ``row_topk`` rows and columns by their rank-1 merged scores (``u`` merges rows, ``v`` columns).
    Stage 2 scores the kept grid exactly, one grid per core, and keeps the cells with the largest sum over the cores.
    Ties go to the lower number: in stage 1 of the key, in stage 2 of the address. The result is in descending order of
    that sum, which the contract leaves free.

    Args:
        row_scores: [T, H, N, R].
        col_scores: [T, H, N, R].
        u: [H, R].
        v: [H, R].
        cores: [C, H, R, R], row rank first.
        row_topk: kept rows, and kept columns.
        topk: kept cells per head.

    Returns:
        addresses, int64 [T, H*topk], head-major, virtual (row * N + column);
        scores, float64 [T, H*topk, C], raw, one per core.

    Raises:
        ValueError: there are fewer than ``row_topk`` keys or fewer than ``topk`` cells.
    """
    row_scores_THNR, col_scores_THNR = _float64(row_scores), _float64(col_scores)
    u_HR, v_HR, cores_CHRR = _float64(u), _float64(v), _float64(cores)
    tokens, heads, keys, _ = row_scores_THNR.shape
    if not 1 <= row_topk <= keys:
        raise ValueError(f"row_topk must be in 1..{keys} (keys per side), got {row_topk}.")
    if not 1 <= topk <= row_topk**2:
        raise ValueError(f"topk must be in 1..{row_topk**2} (row_topk squared), got {topk}.")

    addresses_TK = np.zeros((tokens, heads * topk), dtype=np.int64)
    scores_TKC = np.zeros((tokens, heads * topk, len(cores_CHRR)), dtype=np.float64)
    for t in range(tokens):
        for h in range(heads):
            rows_M = np.sort(_largest(row_scores_THNR[t, h] @ u_HR[h], row_topk))
            cols_M = np.sort(_largest(col_scores_THNR[t, h] @ v_HR[h], row_topk))
            a_MR, b_MR = row_scores_THNR[t, h, rows_M], col_scores_THNR[t, h, cols_M]
            grids_CMM = np.stack([a_MR @ core_RR @ b_MR.T for core_RR in cores_CHRR[:, h]])
            best = _largest(grids_CMM.sum(axis=0).reshape(-1), topk)
            for k, cell in enumerate(best):
                i, j = divmod(int(cell), row_topk)
                addresses_TK[t, h * topk + k] = rows_M[i] * keys + cols_M[j]
                scores_TKC[t, h * topk + k] = grids_CMM[:, i, j]
    return addresses_TK, scores_TKC


def memory_lookup(
    indices: npt.NDArray[Any],
    scores: npt.NDArray[Any],
    *,
    rows: Sequence[npt.NDArray[Any]],
    pre_value_dim: int,
    rows_per_shard: int,
    activation: str = "none",
    groups: int = 1,
    group: npt.NDArray[Any] | None = None,
    query: npt.NDArray[Any] | None = None,
    row_scales: npt.NDArray[Any] | None = None,
) -> Floats:
    """Sum the looked-up rows, each a one-neuron expert (spec 3; op contract, MemoryLookup).

    output = sum_k act(rows[i_k, :P] . query) * scores[k, part] * rows[i_k, P:], where each of the C contiguous parts of
    V has its own score. Without pre-values (P = 0) the factor act(...) is 1, whatever ``activation`` says.

    Args:
        indices: int64 [T, K], physical rows.
        scores: [T, K, C].
        rows: shards [R_s, P+V]; row i is row ``i % rows_per_shard`` of shard ``i // rows_per_shard``.
        pre_value_dim: P.
        rows_per_shard: rows of every shard but the last, which may be shorter.
        activation: "none" or "gelu" (exact).
        groups: G.
        group: int64 [T, K], the output group of each hit; present when G > 1.
        query: [T, P]; present when P > 0.
        row_scales: [all rows, 2], the scale of the pre-value part and of the value part; present when rows are int8.

    Returns:
        float64 [T, G*V], group-major.

    Raises:
        ValueError: an optional input is present without need or missing, or a value is out of range.
    """
    if (group is not None) != (groups > 1):
        raise ValueError(f"group goes with groups > 1, got groups {groups} and group {group is not None}.")
    if (query is not None) != (pre_value_dim > 0):
        raise ValueError(f"query goes with pre_value_dim > 0, got {pre_value_dim} and query {query is not None}.")
    if (row_scales is not None) != (rows[0].dtype == np.int8):
        raise ValueError(f"row_scales go with int8 rows, got {rows[0].dtype} and row_scales {row_scales is not None}.")
    if activation not in ("none", "gelu"):
        raise ValueError(f"activation must be 'none' or 'gelu', got {activation!r}.")

    scores_TKC = _float64(scores)
    tokens, hits, cores = scores_TKC.shape
    value_dim = rows[0].shape[1] - pre_value_dim
    if value_dim % cores:
        raise ValueError(f"the value size must be a multiple of the number of cores, got {value_dim} and {cores}.")
    part = value_dim // cores

    output_TGV = np.zeros((tokens, groups, value_dim), dtype=np.float64)
    for t in range(tokens):
        for k in range(hits):
            index = int(indices[t, k])
            row = _sharded_row(rows, rows_per_shard, index)
            pre_value_P, value_V = row[:pre_value_dim], row[pre_value_dim:]
            if row_scales is not None:
                pre_value_P = pre_value_P * float(row_scales[index, 0])
                value_V = value_V * float(row_scales[index, 1])

            factor = 1.0
            if query is not None:
                factor = float(pre_value_P @ _float64(query[t]))
                if activation == "gelu":
                    factor = _gelu(factor)

            g = 0 if group is None else int(group[t, k])
            if not 0 <= g < groups:
                raise ValueError(f"group[{t}, {k}] must be in 0..{groups - 1}, got {g}.")
            for c in range(cores):
                columns = slice(c * part, (c + 1) * part)
                output_TGV[t, g, columns] += factor * scores_TKC[t, k, c] * value_V[columns]
    return output_TGV.reshape(tokens, groups * value_dim)


def _sharded_row(rows: Sequence[npt.NDArray[Any]], rows_per_shard: int, index: int) -> Floats:
    """Row ``index`` of a table in shards, [P+V]."""
    shard, local = divmod(index, rows_per_shard)
    # Checked, because numpy would read a negative index from the end.
    if not (0 <= shard < len(rows) and local < len(rows[shard])):
        raise ValueError(f"row {index} is outside the table: {len(rows)} shards of {rows_per_shard} rows.")
    return _float64(rows[shard][local])


def forward(
    config: Mapping[str, Any],
    tensors: Tensors,
    input_ids: npt.NDArray[Any],
    *,
    query_layout: str = "released",
    row_topk: int | None = None,
) -> tuple[Floats, list[Floats]]:
    """Run a whole model without padding and without a cache (spec 1 to 5, names from spec 9).

    Args:
        config: the ``model:`` section of an official ``config.yaml``.
        tensors: the official state dict.
        input_ids: integers [B, S].
        query_layout: "released" or "per_rank" (spec 3, query layouts).
        row_topk: kept rows and columns of stage 1; None means ``mem_knn``.

    Returns:
        logits, float64 [B, S, embedding_size];
        hidden states, float64 [B, S, D] each: the input of every block, then the output of ``ln_f``.

    Raises:
        ValueError: the model or the layout is outside the specification, or config and tensors disagree.
    """
    for field, allowed in _ONLY_VALUES.items():
        if config.get(field, allowed[0]) not in allowed:
            raise ValueError(f"{field} must be one of {allowed}, got {config[field]!r}.")
    if config.get("n_kv_heads") not in (None, config["n_heads"]):
        raise ValueError(f"n_kv_heads must be n_heads = {config['n_heads']}, got {config['n_kv_heads']}.")
    if config["mem_type"] not in ("ultramem_v1", "ultramem_v2"):
        raise ValueError(f"mem_type must be 'ultramem_v1' or 'ultramem_v2', got {config['mem_type']!r}.")
    if query_layout not in ("released", "per_rank"):
        raise ValueError(f"query_layout must be 'released' or 'per_rank', got {query_layout!r}.")

    eps = float(config["layer_norm_eps"])
    placement = _memory_placement(config)
    x_BSD = _float64(tensors["transformer.wte.weight"])[input_ids]
    hidden_states: list[Floats] = []
    pending: dict[int, Floats] = {}  # Outputs of the memory layers that were read and not yet added.
    for block in range(config["n_layers"]):
        hidden_states.append(x_BSD)
        prefix = f"transformer.blocks.{block}."
        attn_in_BSD = _rms_norm(x_BSD, tensors[prefix + "attn_norm.weight"], eps)
        a_BSD = x_BSD + np.stack([_attention(config, tensors, prefix, x_SD) for x_SD in attn_in_BSD])
        hn_BSD = _rms_norm(a_BSD, tensors[prefix + "ff_norm.weight"], eps)
        x_BSD = a_BSD + _swiglu_ffn(tensors, prefix, hn_BSD)
        for layer, (read_block, add_block) in enumerate(placement):
            if read_block == block:
                hn_TD = hn_BSD.reshape(-1, hn_BSD.shape[-1])
                y_TD = _memory_layer(
                    config, tensors, layer, len(placement), hn_TD, query_layout=query_layout, row_topk=row_topk
                )
                pending[layer] = y_TD.reshape(hn_BSD.shape)
            if add_block == block:
                x_BSD = x_BSD + pending.pop(layer)
    x_BSD = _rms_norm(x_BSD, tensors["transformer.ln_f.weight"], eps)
    hidden_states.append(x_BSD)
    head = tensors["transformer.wte.weight" if config["weight_tying"] else "transformer.ff_out.weight"]
    return _linear(x_BSD, head), hidden_states


def _memory_placement(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The (read block, add block) of each memory layer, by memory layer index (spec 4)."""
    blocks: int = config["n_layers"]
    way = config["mem_insert_way"]
    if way == "full":
        return [(block, block) for block in range(blocks)]
    # YAML 1.1 reads an unquoted 1:2 as the base-60 number 62, so a number here is a damaged map.
    if not re.fullmatch(r"\d+:\d+(/\d+:\d+)*", str(way)):
        raise ValueError(f"mem_insert_way must be 'full' or of the form 'a:b/c:d', got {way!r}.")
    placement = []
    for pair in way.split("/"):
        read_block, add_block = (int(number) for number in pair.split(":"))
        if not 0 <= read_block <= add_block < blocks:
            raise ValueError(f"mem_insert_way {way!r}: {pair!r} must hold 0 <= read <= add < {blocks}.")
        placement.append((read_block, add_block))
    return placement


def _attention(config: Mapping[str, Any], tensors: Tensors, prefix: str, x_SD: Floats) -> Floats:
    """Causal attention of one sequence [S, D] -> [S, D]; q and k normed per head, then rotated (spec 1)."""
    sequence, hidden = x_SD.shape
    heads: int = config["n_heads"]
    eps = float(config["layer_norm_eps"])
    theta = float(config["rope_theta"])
    qkv = _linear(x_SD, tensors[prefix + "att_proj.weight"])
    q_SAF, k_SAF, v_SAF = (part.reshape(sequence, heads, hidden // heads) for part in np.split(qkv, 3, axis=-1))
    q_SAF = _rope(_rms_norm(q_SAF, tensors[prefix + "q_norm.weight"], eps), theta)
    k_SAF = _rope(_rms_norm(k_SAF, tensors[prefix + "k_norm.weight"], eps), theta)
    output_SAF = np.zeros_like(q_SAF)
    for a in range(heads):
        for s in range(sequence):
            logits_J = k_SAF[: s + 1, a] @ q_SAF[s, a] / math.sqrt(hidden // heads)
            weights_J = np.exp(logits_J - logits_J.max())
            output_SAF[s, a] = (weights_J / weights_J.sum()) @ v_SAF[: s + 1, a]
    return _linear(output_SAF.reshape(sequence, hidden), tensors[prefix + "attn_out.weight"])


def _rope(x_SAF: Floats, theta: float) -> Floats:
    """Rotate [S, A, F] by position: dimension i and i + F/2 form a pair ("rotate half", spec 1)."""
    half = x_SAF.shape[-1] // 2
    rotated_SAF = np.zeros_like(x_SAF)
    for position in range(len(x_SAF)):
        for i in range(half):
            angle = position * theta ** (-i / half)
            first_A, second_A = x_SAF[position, :, i], x_SAF[position, :, i + half]
            rotated_SAF[position, :, i] = first_A * math.cos(angle) - second_A * math.sin(angle)
            rotated_SAF[position, :, i + half] = second_A * math.cos(angle) + first_A * math.sin(angle)
    return rotated_SAF


def _swiglu_ffn(tensors: Tensors, prefix: str, hn_BSD: Floats) -> Floats:
    """Dense FFN [B, S, D] -> [B, S, D]; the second half of ``ff_proj`` is the gate (spec 1)."""
    linear, gate = np.split(_linear(hn_BSD, tensors[prefix + "ff_proj.weight"]), 2, axis=-1)
    # sigmoid(x) = (1 + tanh(x/2)) / 2: the usual form overflows in exp for a large negative x.
    silu = gate * (1.0 + np.tanh(gate / 2.0)) / 2.0
    return _linear(silu * linear, tensors[prefix + "ff_out.weight"])


@dataclasses.dataclass(frozen=True)
class _Pool:
    """The rows that one memory layer can reach, and how virtual addresses fall on them (spec 2 and 5).

    Attributes:
        rows: [pool rows, P+V], pre-value before value.
        pre_value_dim: P.
        keys_per_side: N, the stored keys e * n1.
        visible_rows: N_l = n1^2.
        offset: first physical row of this layer.
        groups: G.
    """

    rows: Floats
    pre_value_dim: int
    keys_per_side: int
    visible_rows: int
    offset: int
    groups: int


def _pool(config: Mapping[str, Any], tensors: Tensors, layer: int, layers: int) -> _Pool:
    """The pool of memory layer ``layer`` of ``layers``: one ring for all in V2, its own table in V1."""
    nominal_rows: int = config["mem_knum"] ** 2
    groups: int = config["mem_value_expand_time"]
    if config["mem_type"] == "ultramem_v1":
        expansion = math.isqrt(groups)
        visible_keys: int = config["mem_knum"]
        pre_value_dim, offset, pool_rows = 0, 0, nominal_rows
        rows = _float64(tensors[f"transformer.mem_blocks.{layer}.values_for_look_up"])
    else:
        expansion = config["mem_key_expand_time"]
        pool_rows = nominal_rows * layers
        # Float square root, then truncation: part of the format. The offset uses the nominal size (spec 3, trap 2).
        visible_keys = int((pool_rows * config.get("mem_share_ratio", 1.0)) ** 0.5)
        pre_value_dim, offset = config["mem_pre_vdim"], layer * nominal_rows
        rows = _float64(tensors["transformer.full_memory_layer.values_for_look_up"])
        if pre_value_dim > 0:
            pre_values = _float64(tensors["transformer.full_memory_layer.pre_values_for_look_up"])
            rows = np.concatenate([pre_values, rows], axis=1)
    if groups not in (1, expansion**2):
        raise ValueError(f"mem_value_expand_time must be 1 or {expansion**2} (key expansion squared), got {groups}.")
    if rows.shape != (pool_rows, pre_value_dim + config["mem_vdim"]):
        raise ValueError(f"the tables have {rows.shape}, the config says {pool_rows} rows.")
    return _Pool(rows, pre_value_dim, expansion * visible_keys, visible_keys**2, offset, groups)


def _memory_layer(
    config: Mapping[str, Any],
    tensors: Tensors,
    layer: int,
    layers: int,
    hn_TD: Floats,
    *,
    query_layout: str,
    row_topk: int | None,
) -> Floats:
    """Memory layer ``layer`` of ``layers``: [T, D] -> [T, D] (spec 3)."""
    prefix = f"transformer.mem_blocks.{layer}."
    pool = _pool(config, tensors, layer, layers)
    topk: int = config["mem_knn"]

    keys = _float64(tensors[prefix + "keys"])  # [H, 2, N, Q, R]
    if keys.shape[:4] != (config["mem_head"], 2, pool.keys_per_side, config["mem_kdim"]):
        raise ValueError(f"{prefix}keys has {keys.shape}, the config says {pool.keys_per_side} keys per side.")
    heads, rank = keys.shape[0], keys.shape[-1]
    keys_H2NRQ = np.swapaxes(keys, 3, 4)
    keys_H2NRQ = _rms_norm(keys_H2NRQ, tensors[prefix + "keys_norm.weight"], float(config["layer_norm_eps"]))
    row_query_THRQ, col_query_THRQ = _queries(
        config, tensors, prefix, hn_TD, heads=heads, rank=rank, query_layout=query_layout
    )

    # No config field holds the number of cores (spec 2).
    core_count = sum(name.startswith(prefix + "tucker_core.") for name in tensors)
    addresses_TK, scores_TKC = tucker_topk(
        np.einsum("hnrq,thrq->thnr", keys_H2NRQ[:, 0], row_query_THRQ),
        np.einsum("hnrq,thrq->thnr", keys_H2NRQ[:, 1], col_query_THRQ),
        # The stored vectors, never a fresh SVD (spec 3, trap 1). Stored as [1, H, 1, R].
        tensors[prefix + "tucker_core_u"].reshape(heads, rank),
        tensors[prefix + "tucker_core_v"].reshape(heads, rank),
        np.stack([tensors[prefix + f"tucker_core.{c}"] for c in range(core_count)]),
        row_topk=topk if row_topk is None else row_topk,
        topk=topk,
    )

    shuffle = tensors[prefix + "shuffle_index"]
    if len(shuffle) != pool.keys_per_side**2:
        raise ValueError(f"{prefix}shuffle_index has {len(shuffle)} entries, expected {pool.keys_per_side}^2.")
    shuffled_TK = shuffle[addresses_TK]
    group_TK = shuffled_TK // pool.visible_rows
    row_TK = (shuffled_TK % pool.visible_rows + pool.offset) % len(pool.rows)

    query_TP = None
    if pool.pre_value_dim > 0:
        query_TP = _linear(hn_TD, tensors[prefix + "pre_values_proj.weight"])
    output = memory_lookup(
        row_TK,
        scores_TKC,
        rows=[pool.rows],
        pre_value_dim=pool.pre_value_dim,
        rows_per_shard=len(pool.rows),
        activation="gelu" if config["mem_use_glu_act"] else "none",
        groups=pool.groups,
        group=group_TK if pool.groups > 1 else None,
        query=query_TP,
    )
    return _linear(output, tensors[prefix + "values_proj.weight"])


def _queries(
    config: Mapping[str, Any],
    tensors: Tensors,
    prefix: str,
    hn_TD: Floats,
    *,
    heads: int,
    rank: int,
    query_layout: str,
) -> tuple[Floats, Floats]:
    """The normed row and column query of each head and rank, [T, H, R, Q] each (spec 3, query layouts; spec 5)."""
    is_v1 = config["mem_type"] == "ultramem_v1"
    query_dim: int = config["mem_kdim"]
    per_rank = bool(config["mem_q_for_each_tucker_rank"]) and not is_v1
    q = _linear(hn_TD, tensors[prefix + "query_proj.weight"]).reshape(len(hn_TD), 2, rank if per_rank else 1, query_dim)
    q = _rms_norm(q, tensors[prefix + "query_norm.weight"], float(config["layer_norm_eps"]))  # q[t, g, i]
    if is_v1 and heads > 2:
        raise ValueError(f"ultramem_v1 has one query group, which serves 2 heads, got {heads} heads.")
    if per_rank and query_layout == "released" and (rank != 2 or heads > 4):
        raise ValueError(f"the released layout serves rank 2 and up to 4 heads, got rank {rank} and {heads} heads.")

    row_THRQ = np.zeros((len(hn_TD), heads, rank, query_dim), dtype=np.float64)
    col_THRQ = np.zeros_like(row_THRQ)
    for h in range(heads):
        for i in range(rank):
            if not per_rank:
                row_THRQ[:, h, i], col_THRQ[:, h, i] = q[:, 0, 0], q[:, 1, 0]
            elif query_layout == "per_rank":
                row_THRQ[:, h, i], col_THRQ[:, h, i] = q[:, 0, i], q[:, 1, i]
            else:
                row_THRQ[:, h, i], col_THRQ[:, h, i] = q[:, h // 2, 0], q[:, h // 2, 1]
    return row_THRQ, col_THRQ


def _linear(x: Floats, weight: npt.NDArray[Any]) -> Floats:
    """Project the last axis by a weight [outputs, inputs], without a bias."""
    output: Floats = x @ _float64(weight).T
    return output


def _rms_norm(x: Floats, weight: npt.NDArray[Any], eps: float) -> Floats:
    """Normalise over the last axis: x / sqrt(mean(x^2) + eps) * weight (spec 1)."""
    mean_square: Floats = np.mean(x * x, axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + eps) * _float64(weight)


def _gelu(x: float) -> float:
    """Exact GELU, x * Phi(x)."""
    return x * 0.5 * (1.0 + math.erf(x / math.sqrt(2.0)))


def _largest(values: Floats, count: int) -> Integers:
    """Indices of the ``count`` largest of a vector, largest first, ties by lower index."""
    order: Integers = np.argsort(-values, kind="stable").astype(np.int64)
    return order[:count]


def _float64(array: npt.NDArray[Any]) -> Floats:
    return np.asarray(array, dtype=np.float64)
