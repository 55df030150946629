"""The PyTorch reference against the authors' own outputs, and against the float64 oracle where there are none."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models import GOLDEN, Array, expected, oracle_logits, random_checkpoint
from umv2_export.checkpoint import open_checkpoint
from umv2_export.config import MemoryConfig, ModelConfig
from umv2_export.interface import Inner
from umv2_export.model import LanguageModel, ModelOutput, reference_model
from umv2_export.model.transformer import KeyValue, empty_past
from umv2_export.presets import PRESETS

GOLDEN_ATOL = 1e-4

each_golden = pytest.mark.parametrize("name", sorted(GOLDEN))


def golden_model(name: str) -> LanguageModel:
    return reference_model(open_checkpoint(GOLDEN[name]))


def forward(
    model: LanguageModel, ids: torch.Tensor, past: list[KeyValue] | None = None, mask: torch.Tensor | None = None
) -> ModelOutput:
    cache = empty_past(model.config, len(ids)) if past is None else past
    length = cache[0][0].shape[2] + ids.shape[1]
    attended = torch.ones((len(ids), length), dtype=torch.int64) if mask is None else mask
    output: ModelOutput = model(ids, attended, cache)
    return output


@each_golden
def test_logits_and_every_hidden_state_are_those_of_the_authors_code(name: str) -> None:
    authors = expected(name)
    output = forward(golden_model(name), torch.from_numpy(authors["input_ids"]))
    np.testing.assert_allclose(output.logits, authors["logits"], rtol=0, atol=GOLDEN_ATOL)
    assert len(output.of(Inner.HIDDEN)) == 4
    for i, hidden in enumerate(output.of(Inner.HIDDEN)):
        np.testing.assert_allclose(hidden, authors[f"hidden_{i}"], rtol=0, atol=GOLDEN_ATOL, err_msg=f"hidden_{i}")


@each_golden
def test_greedy_tokens_through_the_cache_are_those_of_the_authors_code(name: str) -> None:
    authors, model = expected(name), golden_model(name)
    output = forward(model, torch.from_numpy(authors["input_ids"]))
    tokens = []
    for _ in range(8):
        best = output.logits[:, -1, : model.config.vocab_size].argmax(-1)
        tokens.append(best)
        output = forward(model, best[:, None], output.present)
    np.testing.assert_array_equal(torch.stack(tokens, 1), authors["greedy"])


def test_a_prompt_in_two_chunks_gives_the_logits_of_the_whole() -> None:
    model, ids = golden_model("v2_shared_ring"), torch.from_numpy(expected("v2_shared_ring")["input_ids"])
    first = forward(model, ids[:, :9])
    second = forward(model, ids[:, 9:], first.present)
    np.testing.assert_allclose(second.logits, forward(model, ids).logits[:, 9:], rtol=0, atol=GOLDEN_ATOL)


def test_left_padding_changes_neither_prefill_nor_decode() -> None:
    model, ids = golden_model("v2_glu_two_heads"), torch.from_numpy(expected("v2_glu_two_heads")["input_ids"])
    pad = 5
    padded = torch.cat([torch.full((2, pad), 1), ids], 1)
    mask = torch.cat([torch.zeros((2, pad), dtype=torch.int64), torch.ones_like(ids)], 1)
    plain, shifted = forward(model, ids), forward(model, padded, mask=mask)
    np.testing.assert_allclose(shifted.logits[:, pad:], plain.logits, rtol=0, atol=GOLDEN_ATOL)
    step = torch.tensor([[3], [4]])
    longer = torch.cat([mask, torch.ones((2, 1), dtype=torch.int64)], 1)
    decoded = forward(model, step, shifted.present, longer)
    np.testing.assert_allclose(decoded.logits, forward(model, step, plain.present).logits, rtol=0, atol=GOLDEN_ATOL)
    assert bool(torch.isfinite(shifted.logits).all())


def variant(preset: str, **memory: object) -> ModelConfig:
    config = PRESETS[preset]
    changed: MemoryConfig = replace(config.memory, **memory)  # type: ignore[arg-type]  # names vary with the test
    return replace(config, memory=changed)


VARIANTS = {
    "a query per Tucker rank": variant("umv2-tiny"),
    "one query for both ranks": variant("umv2-tiny", query_per_rank=False),
    "fewer row keys than hits": variant("umv2-tiny", row_topk=4, topk=11),
    "more row keys than hits": variant("umv2-tiny", row_topk=16, topk=3),
    "rank 3, four cores, two heads": variant("umv2-tiny", tucker_rank=3, tucker_cores=4, heads=2),
    "rank 1, one core": variant("umv2-tiny", tucker_rank=1, tucker_cores=1),
    "three heads in the released layout": variant("umv2-tiny", heads=3, query_layout="released"),
    "ring, expanded keys, one group": variant("umv2-tiny-shared"),
    "ring, expanded keys, four groups": variant("umv2-tiny-shared", value_groups=4),
    "unsorted placements": variant("umv2-tiny", placements=((2, 2), (0, 1))),
    "UltraMem V1": variant("umv1-tiny"),
    "UltraMem V1 in every block": variant("umv1-tiny", placements=((0, 0), (1, 1), (2, 2))),
    "UltraMem V1 without expansion": variant("umv1-tiny", key_expansion=1, value_groups=1),
}


@pytest.mark.parametrize("label", sorted(VARIANTS))
def test_what_no_golden_file_covers_agrees_with_the_oracle(label: str, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "checkpoint", VARIANTS[label])
    ids = np.random.default_rng(0).integers(0, 250, (2, 11))
    logits = forward(reference_model(checkpoint), torch.from_numpy(ids)).logits
    truth: Array = oracle_logits(checkpoint, ids)
    np.testing.assert_allclose(logits, truth, rtol=0, atol=1e-5 * max(1.0, float(np.abs(truth).max())))


def test_the_query_layout_changes_what_is_computed(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "checkpoint", PRESETS["umv2-tiny"])
    ids = torch.arange(8)[None]
    per_rank = forward(reference_model(checkpoint), ids).logits
    released = forward(reference_model(checkpoint.with_query_layout("released")), ids).logits
    assert float((per_rank - released).abs().max()) > 0.01 * float(per_rank.std())
