"""Rows that two sides retrieved differently: were the scores nearly tied, or is one side wrong?

A row at rank K and one at rank K + 1 may swap when their scores are closer than rounding; the output then moves by the
whole difference of two rows. So outputs are compared once both sides use the same rows, and the swap itself is judged
by the scores: those of both sides must agree, and the runtime's choice must be right for its own scores.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import cast

import torch

from umv2_export.interface import Inner
from umv2_export.model import LanguageModel
from umv2_export.model.memory import MemoryLayer, scores_at
from umv2_export.ops import tucker_topk
from umv2_export.parity.compare import Tolerance, root_mean_square
from umv2_export.runtimes.base import Array

__all__ = ["RowSwap", "judge_routing", "retrieval_problems"]

# fp32 sums in another order: what separates two correct computations of a score, relative to its size.
SCORE_REORDERING = 1e-4

# Retrieval on equal scores differs by the order of a few fp32 additions only; relative to the largest score.
RETRIEVAL_REORDERING = 1e-5


@dataclass(frozen=True)
class RowSwap:
    """A token and head for which one memory layer retrieved other rows than the reference.

    Attributes:
        layer, token, head: where.
        stage: 1 if the sets of row or column keys differ already, else 2.
        only_reference, only_runtime: virtual addresses.
        gap: by how much the runtime's choice lies below the reference's threshold, in the reference's scores.
        threshold: the last score that the reference lets in.
    """

    layer: int
    token: int
    head: int
    stage: int
    only_reference: list[int]
    only_runtime: list[int]
    gap: float
    threshold: float

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def judge_routing(
    model: LanguageModel,
    reference: Mapping[str, Array],
    runtime: Mapping[str, Array],
    tolerance: Tolerance,
    real_tokens: Array,
    rounded: Mapping[str, Array] | None = None,
) -> tuple[list[RowSwap], str | None]:
    """Find the swaps of all memory layers, and what about them rounding does not explain.

    Args:
        model: the reference, for its Tucker cores.
        reference: probes of the reference, run with the runtime's rows.
        runtime: probes of the runtime.
        tolerance: for scores, through the dtype.
        real_tokens: boolean [T]; padding is not judged.
        rounded: probes of the reference with rounded products, which show how much the model amplifies rounding.

    Returns:
        swaps, and the problem in a sentence or None.
    """
    swaps: list[RowSwap] = []
    problem = None
    for j, layer in enumerate(cast("Iterable[MemoryLayer]", model.transformer.mem_blocks)):
        u, v, cores = layer.tucker()
        topk = (layer.memory.row_topk, layer.memory.topk)
        ours, theirs = _Scores(reference, j, u, v, cores, topk), _Scores(runtime, j, u, v, cores, topk)
        problem = problem or _score_problem(j, ours, theirs, tolerance, real_tokens, rounded)
        problem = problem or _retrieval_problem(j, theirs, runtime[Inner.ADDRESSES.at(j)], real_tokens)
        swaps += _layer_swaps(j, ours, theirs, runtime[Inner.ADDRESSES.at(j)], real_tokens)
    return swaps, problem


def retrieval_problems(model: LanguageModel, probes: Mapping[str, Array], real_tokens: Array) -> dict[int, str]:
    """Memory layers whose rows are not the best of the layer's own scores, and why.

    Args:
        model: for its Tucker cores.
        probes: of a runtime.
        real_tokens: boolean [T]; padding is not judged.
    """
    found = {}
    for j, layer in enumerate(cast("Iterable[MemoryLayer]", model.transformer.mem_blocks)):
        if Inner.ROW_SCORES.at(j) in probes and Inner.COL_SCORES.at(j) in probes:
            scores = _Scores(probes, j, *layer.tucker(), (layer.memory.row_topk, layer.memory.topk))
            problem = _retrieval_problem(j, scores, probes[Inner.ADDRESSES.at(j)], real_tokens)
            if problem is not None:
                found[j] = problem
    return found


class _Scores:
    """Both stages of one layer's retrieval, recomputed from its key scores."""

    def __init__(
        self,
        probes: Mapping[str, Array],
        layer: int,
        u: torch.Tensor,
        v: torch.Tensor,
        cores: torch.Tensor,
        topk: tuple[int, int],
    ) -> None:
        self.row_topk = topk[0]
        u, v, cores = u.cpu(), v.cpu(), cores.cpu()
        row, col = (torch.from_numpy(probes[kind.at(layer)]).float() for kind in (Inner.ROW_SCORES, Inner.COL_SCORES))
        self.keys = (row, col)
        self.merged_THN = [(keys * vector[:, None]).sum(-1) for keys, vector in zip(self.keys, (u, v), strict=True)]
        self.cores = cores
        addresses, scores = tucker_topk(*self.keys, u, v, cores, *topk)
        heads = u.shape[0]
        self.addresses_THK = addresses.unflatten(1, (heads, -1))
        self.totals_THK = scores.sum(-1).unflatten(1, (heads, -1))

    def totals_at(self, addresses_TK: torch.Tensor) -> torch.Tensor:
        """Sum over the cores of the scores at virtual addresses: [T, H, K]."""
        totals_TK = scores_at(addresses_TK, *self.keys, self.cores).sum(-1)
        return totals_TK.reshape(*self.addresses_THK.shape[:2], -1)

    def allows(self, token: int, head: int, addresses: torch.Tensor, topk: int) -> bool:
        """Whether a choice is right for some order of the keys that are tied at the edge of stage 1.

        Only tied keys may be let in beside those that are better than the edge, and no row may be left out that is
        better than a chosen one whatever the ties.
        """
        allowed, certain = [], []
        for merged_THN in self.merged_THN:
            merged = merged_THN[token, head]
            edge, rounding = merged.topk(self.row_topk).values[-1], RETRIEVAL_REORDERING * merged.abs().max()
            allowed.append(merged >= edge - rounding)
            # With no contender for the last place, its key is as certain as the others.
            tied = int(allowed[-1].sum()) > self.row_topk
            certain.append((merged > edge + rounding if tied else allowed[-1]).nonzero()[:, 0])
        keys_per_side = len(allowed[0])
        rows, cols = addresses // keys_per_side, addresses % keys_per_side
        if not bool((allowed[0][rows] & allowed[1][cols]).all()) or len(addresses.unique()) < len(addresses):
            return False
        cells = (certain[0][:, None] * keys_per_side + certain[1]).flatten()
        chosen, candidates = (self._totals(token, head, index) for index in (addresses, cells))
        best = candidates.topk(min(topk, len(candidates))).values
        tolerance = RETRIEVAL_REORDERING * self.totals_THK.abs().amax()
        return bool((chosen.sort(descending=True).values[: len(best)] >= best - tolerance).all())

    def _totals(self, token: int, head: int, addresses: torch.Tensor) -> torch.Tensor:
        """Totals [K] of virtual addresses [K] of one token and head."""
        row, col = (keys[token, head][None, None] for keys in self.keys)
        return scores_at(addresses[None], row, col, self.cores[:, head : head + 1])[0].sum(-1)


def _score_problem(
    j: int,
    ours: _Scores,
    theirs: _Scores,
    tolerance: Tolerance,
    real_tokens: Array,
    rounded: Mapping[str, Array] | None,
) -> str | None:
    real = torch.from_numpy(real_tokens)
    names = (Inner.ROW_SCORES.at(j), Inner.COL_SCORES.at(j))
    for side, name, mine, other in zip(("row", "column"), names, ours.keys, theirs.keys, strict=True):
        error = float((mine - other)[real].abs().max())
        allowed = max(SCORE_REORDERING, tolerance.relative_rounding) * root_mean_square(mine[real].numpy())
        if rounded is not None:
            moved = tolerance.moved(rounded[name], mine.numpy())[real_tokens]
            allowed = max(allowed, float(moved.max(initial=0.0)))
        if not error <= allowed:
            return f"memory layer {j}: {side} scores differ by {error:.3g}, rounding explains {allowed:.3g}"
    return None


def _retrieval_problem(j: int, theirs: _Scores, addresses: Array, real_tokens: Array) -> str | None:
    """Is the runtime's choice the top-k of its own scores?"""
    heads, topk = theirs.addresses_THK.shape[1:]
    chosen_THK = torch.from_numpy(addresses).reshape(-1, heads, topk)
    totals_THK = theirs.totals_at(torch.from_numpy(addresses)).sort(-1).values
    best_THK = theirs.totals_THK.sort(-1).values
    wrong_TH = (best_THK - totals_THK).abs().amax(-1) > RETRIEVAL_REORDERING * best_THK.abs().amax()
    # A row counts once, also in place of another with the same score.
    sorted_THK = chosen_THK.sort(-1).values
    wrong_TH |= (sorted_THK[..., 1:] == sorted_THK[..., :-1]).any(-1)
    wrong_TH &= torch.from_numpy(real_tokens)[:, None]
    for token, head in wrong_TH.nonzero().tolist():
        if not theirs.allows(token, head, chosen_THK[token, head], topk):
            return f"memory layer {j}: token {token}, head {head} did not retrieve the best rows of its own scores"
    return None


def _layer_swaps(j: int, ours: _Scores, theirs: _Scores, addresses: Array, real_tokens: Array) -> list[RowSwap]:
    heads = ours.addresses_THK.shape[1]
    chosen_THK = torch.from_numpy(addresses).unflatten(1, (heads, -1))
    chosen_totals_THK = ours.totals_at(torch.from_numpy(addresses))
    different = (ours.addresses_THK.sort(-1).values != chosen_THK.sort(-1).values).any(-1)
    swaps = []
    for token, head in different.nonzero().tolist():
        if not real_tokens[token]:
            continue
        mine, other = ours.addresses_THK[token, head], chosen_THK[token, head]
        only_reference = sorted(set(mine.tolist()) - set(other.tolist()))
        only_runtime = sorted(set(other.tolist()) - set(mine.tolist()))
        stage1 = [
            _stage1_gap(merged[token, head], runtime_merged[token, head], ours.row_topk)
            for merged, runtime_merged in zip(ours.merged_THN, theirs.merged_THN, strict=True)
        ]
        gap, threshold = max(stage1)
        if gap > 0:
            swaps.append(RowSwap(j, token, head, 1, only_reference, only_runtime, gap, threshold))
            continue
        threshold = float(ours.totals_THK[token, head].min())
        gap = threshold - float(chosen_totals_THK[token, head].min())
        swaps.append(RowSwap(j, token, head, 2, only_reference, only_runtime, gap, threshold))
    return swaps


def _stage1_gap(reference: torch.Tensor, runtime: torch.Tensor, row_topk: int) -> tuple[float, float]:
    """How far below the reference's threshold the worst key lies that the runtime let in; and the threshold."""
    threshold = float(reference.topk(row_topk).values[-1])
    let_in = runtime.topk(row_topk).indices
    return max(0.0, threshold - float(reference[let_in].min())), threshold
