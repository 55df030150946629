"""A table that several files hold is read row by row by the reference: joining it would copy 20 GB at 1B/7B."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.checkpoint.variants import VALUES, copy_golden, split_into_ranks
from tests.limits import resident_bytes
from tests.models import GOLDEN, expected
from umv2_export.checkpoint import CheckpointTensor, open_checkpoint
from umv2_export.model import reference_model
from umv2_export.model.transformer import empty_past


def logits(folder: Path) -> torch.Tensor:
    ids = torch.from_numpy(expected("v2_shared_ring")["input_ids"])
    model = reference_model(open_checkpoint(folder))
    output: torch.Tensor = model(ids, torch.ones_like(ids), empty_past(model.config, len(ids))).logits
    return output


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_checkpoint_in_ranks_computes_what_the_whole_one_does(tmp_path: Path, ranks: int) -> None:
    whole = copy_golden(tmp_path)
    before = logits(whole)
    split_into_ranks(whole, ranks)
    assert torch.equal(logits(whole), before)
    np.testing.assert_allclose(before, expected("v2_shared_ring")["logits"], rtol=0, atol=1e-4)


def test_no_part_of_a_table_is_copied_into_memory(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(GOLDEN["v2_shared_ring"])
    parts = []
    for number in range(2):
        file, rows = tmp_path / str(number), 4_000_000
        with file.open("wb") as stream:
            stream.truncate(rows * 16 * 4)
        parts.append(torch.from_file(str(file), shared=True, size=rows * 16).reshape(rows, 16))
    table = CheckpointTensor(VALUES, parts)
    assert table.shape == (4_000_000, 32)
    large = replace(checkpoint, tensors={**checkpoint.tensors, VALUES: table})
    before = resident_bytes()
    model = reference_model(large)
    ids = torch.zeros((1, 5), dtype=torch.int64)
    model(ids, torch.ones_like(ids), empty_past(model.config, 1))
    assert resident_bytes() - before < 100_000_000  # the table has 512 MB


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_of_parts_are_those_of_the_whole(axis: int) -> None:
    whole = torch.arange(60.0).reshape(10, 6)
    parts = [whole[:3], whole[3:4], whole[4:]] if axis == 0 else [whole[:, :2], whole[:, 2:]]
    index = torch.tensor([9, 0, 3, 3, 4, 2])
    assert torch.equal(CheckpointTensor("table", parts, axis=axis).rows(index), whole[index])
