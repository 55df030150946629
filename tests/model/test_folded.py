"""The folds of the export: the folded model computes what the literal one does."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.model.test_reference import VARIANTS
from tests.models import GOLDEN, random_checkpoint
from umv2_export.checkpoint import Checkpoint, open_checkpoint
from umv2_export.errors import InputRejected
from umv2_export.model import LanguageModel, reference_model
from umv2_export.model.folded import TableLayout, folded_model
from umv2_export.model.transformer import empty_past
from umv2_export.onnx.fold import fold_checkpoint


def folded(checkpoint: Checkpoint, *, shard_bytes: int, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The folded model of a checkpoint in fp32 arithmetic, its dense weights rounded to `dtype`."""
    layout = TableLayout.of(checkpoint.config.memory, torch.float32, shard_bytes)
    state = {}
    for tensor in fold_checkpoint(checkpoint, layout, dtype):
        joined = torch.cat(list(tensor.pieces()))
        assert joined.shape == tensor.shape
        assert joined.dtype == tensor.dtype
        state[tensor.name] = joined.float() if joined.is_floating_point() else joined
    model = folded_model(checkpoint.config, layout, torch.float32)
    model.load_state_dict(state)
    return model


def logits(model: LanguageModel) -> torch.Tensor:
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 250, (2, 9)))
    result: torch.Tensor = model(ids, torch.ones_like(ids), empty_past(model.config, 2)).logits
    return result


@pytest.mark.parametrize("shard_bytes", [10**9, 9000])
@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_the_folded_model_of_a_golden_checkpoint_computes_the_same(name: str, shard_bytes: int) -> None:
    checkpoint = open_checkpoint(GOLDEN[name])
    model = folded(checkpoint, shard_bytes=shard_bytes)
    np.testing.assert_allclose(logits(model), logits(reference_model(checkpoint)), rtol=0, atol=5e-5)


@pytest.mark.parametrize("label", sorted(VARIANTS))
def test_the_folded_model_of_other_variants_computes_the_same(label: str, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "checkpoint", VARIANTS[label])
    literal = logits(reference_model(checkpoint))
    atol = 2e-5 * max(1.0, float(literal.abs().max()))
    np.testing.assert_allclose(logits(folded(checkpoint, shard_bytes=9000)), literal, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["v2_per_rank", "v2_expanded_keys", "v1_skip_layer"])
def test_weights_in_half_precision_are_rounded_where_they_are_stored(name: str) -> None:
    checkpoint = open_checkpoint(GOLDEN[name])
    rounded = logits(reference_model(checkpoint, dtype=torch.float16))
    model = folded(checkpoint, shard_bytes=10**9, dtype=torch.float16)
    np.testing.assert_allclose(logits(model), rounded, rtol=0, atol=1e-4)
    assert float((rounded - logits(reference_model(checkpoint))).abs().max()) > 1e-4


@pytest.mark.parametrize(("name", "owns"), [("v2_per_rank", True), ("v2_shared_ring", False), ("v1_skip_layer", False)])
def test_a_layer_that_owns_its_rows_needs_no_address_map(name: str, owns: bool) -> None:
    checkpoint = open_checkpoint(GOLDEN[name])
    layout = TableLayout.of(checkpoint.config.memory, torch.float32, 10**9)
    names = [tensor.name for tensor in fold_checkpoint(checkpoint, layout, torch.float32)]
    assert any(name.endswith("address_map") for name in names) is not owns
    assert any(name.endswith("group_map") for name in names) is (name == "v1_skip_layer")


def test_shards_have_equal_size_but_the_last_and_keep_within_the_limit() -> None:
    memory = open_checkpoint(GOLDEN["v2_shared_ring"]).config.memory
    layout = TableLayout.of(memory, torch.float32, 30_000)
    sizes = [len(layout.shard_rows(s)) for s in range(layout.shards)]
    assert sum(sizes) == 768
    assert len(set(sizes[:-1])) == 1
    assert sizes[-1] <= sizes[0]
    assert sizes[0] * 56 * 4 <= 30_000


def test_a_weight_outside_the_range_of_half_precision_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(GOLDEN["v2_per_rank"])
    name = "transformer.blocks.1.ff_out.weight"
    checkpoint.tensors[name].parts[0][0, 0] = 70_000.0  # mapped copy-on-write: the file stays as it is
    layout = TableLayout.of(checkpoint.config.memory, torch.float32, 10**9)
    tensor = next(t for t in fold_checkpoint(checkpoint, layout, torch.float16) if t.name == name)
    with pytest.raises(InputRejected, match=name):
        list(tensor.pieces())
