"""The folds of the export: the folded model computes what the literal one does."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.model.test_reference import VARIANTS
from tests.models import GOLDEN, random_checkpoint
from umv2_export.checkpoint import Checkpoint, open_checkpoint
from umv2_export.errors import InputRejected
from umv2_export.layout import FoldedForm, TableLayout
from umv2_export.model import LanguageModel, reference_model
from umv2_export.model.folded import folded_model
from umv2_export.model.transformer import empty_past
from umv2_export.onnx.fold import fold_checkpoint


def folded(
    checkpoint: Checkpoint,
    *,
    shard_bytes: int,
    dtype: torch.dtype = torch.float32,
    table_dtype: torch.dtype = torch.float32,
) -> LanguageModel:
    """The folded model of a checkpoint in fp32 arithmetic, its dense weights rounded to `dtype`."""
    layout = TableLayout.of(checkpoint.config.memory, table_dtype, shard_bytes)
    state = {}
    for tensor in fold_checkpoint(checkpoint, FoldedForm(checkpoint.config, layout, dtype, dtype)):
        joined = torch.cat(list(tensor.pieces()))
        assert joined.shape == tensor.shape
        assert joined.dtype == tensor.dtype
        state[tensor.name] = joined if tensor.kind in ("rows", "map") else joined.float()
    model = folded_model(FoldedForm(checkpoint.config, layout, torch.float32, torch.float32))
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


@pytest.mark.parametrize("table_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["v2_per_rank", "v2_shared_ring", "v1_skip_layer"])
def test_tables_in_16_bits_are_rounded_where_they_are_stored(name: str, table_dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(GOLDEN[name])
    rounded = logits(reference_model(checkpoint, table_dtype=table_dtype))
    model = folded(checkpoint, shard_bytes=9000, table_dtype=table_dtype)
    np.testing.assert_allclose(logits(model), rounded, rtol=0, atol=5e-5)
    assert float((rounded - logits(reference_model(checkpoint))).abs().max()) > 1e-4


@pytest.mark.parametrize("name", ["v2_per_rank", "v2_shared_ring"])
def test_the_rows_of_a_shard_are_the_same_however_many_pieces_they_come_in(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(GOLDEN[name])
    layout = TableLayout.of(checkpoint.config.memory, torch.float32, 9000)

    def tables() -> list[list[torch.Tensor]]:
        tensors = fold_checkpoint(checkpoint, FoldedForm(checkpoint.config, layout, torch.float32, torch.float32))
        return [list(tensor.pieces()) for tensor in tensors if tensor.kind == "rows"]

    whole = tables()
    monkeypatch.setattr("umv2_export.onnx.fold.PIECE_BYTES", 7 * 56 * 4)
    cut = tables()
    assert {len(pieces) for pieces in whole} == {1}
    assert all(len(piece) <= 7 for pieces in cut for piece in pieces)
    for one, many in zip(whole, cut, strict=True):
        torch.testing.assert_close(torch.cat(many), one[0], rtol=0, atol=0)


@pytest.mark.parametrize(("name", "owns"), [("v2_per_rank", True), ("v2_shared_ring", False), ("v1_skip_layer", False)])
def test_a_layer_that_owns_its_rows_needs_no_address_map(name: str, owns: bool) -> None:
    checkpoint = open_checkpoint(GOLDEN[name])
    layout = TableLayout.of(checkpoint.config.memory, torch.float32, 10**9)
    names = [
        tensor.name
        for tensor in fold_checkpoint(checkpoint, FoldedForm(checkpoint.config, layout, torch.float32, torch.float32))
    ]
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
    tensor = next(
        t
        for t in fold_checkpoint(checkpoint, FoldedForm(checkpoint.config, layout, torch.float16, torch.float16))
        if t.name == name
    )
    with pytest.raises(InputRejected, match=name):
        list(tensor.pieces())


@pytest.mark.parametrize("table", ["values_for_look_up", "pre_values_for_look_up"])
def test_a_row_outside_the_range_of_half_precision_is_refused_by_the_name_of_its_table(table: str) -> None:
    checkpoint = open_checkpoint(GOLDEN["v2_per_rank"])
    name = f"transformer.full_memory_layer.{table}"
    checkpoint.tensors[name].parts[0][0, 0] = 70_000.0  # mapped copy-on-write
    layout = TableLayout.of(checkpoint.config.memory, torch.float16, 10**9)
    rows = [
        tensor
        for tensor in fold_checkpoint(checkpoint, FoldedForm(checkpoint.config, layout, torch.float32, torch.float32))
        if tensor.kind == "rows"
    ]
    with pytest.raises(InputRejected, match=rf"'{name}' reaches 7e\+04"):
        list(rows[0].pieces())
