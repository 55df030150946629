"""Tables of each rank beside a full state dict of FSDP: joined where the slices say where they belong."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.checkpoint.variants import GOLDEN, changed_tensors, copy_golden, load_golden, set_fields, split_into_ranks
from umv2_export.checkpoint import open_checkpoint
from umv2_export.errors import InputRejected


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """model.pt without tables, rank_N/model.pt with slices of the tables alone."""
    official = copy_golden(tmp_path)
    state = load_golden()
    split_into_ranks(official)
    for rank in range(2):
        slices = torch.load(official / f"rank_{rank}" / "model.pt", weights_only=True)
        torch.save(
            {name: tensor for name, tensor in slices.items() if "full_memory_layer" in name},
            official / f"rank_{rank}" / "model.pt",
        )
        (official / f"rank_{rank}" / "optim.pt").write_bytes(b"garbage")
    torch.save(
        {f"_fsdp_wrapped_module.{n}": tensor for n, tensor in state.items() if "full_memory_layer" not in n},
        official / "model.pt",
    )
    return official


def assert_is_golden(official: Path) -> None:
    checkpoint, expected = open_checkpoint(official), load_golden()
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in expected.items())


def test_tables_of_each_rank_beside_the_rest_are_joined(beside: Path) -> None:
    assert_is_golden(beside)


def test_the_slice_of_rank_0_may_lie_in_both(beside: Path) -> None:
    first = torch.load(beside / "rank_0" / "model.pt", weights_only=True)
    with changed_tensors(beside) as state:
        state.update(first)
    assert_is_golden(beside)


def test_slices_of_another_step_are_refused(beside: Path) -> None:
    first = torch.load(beside / "rank_0" / "model.pt", weights_only=True)
    with changed_tensors(beside) as state:
        state.update({name: tensor + 1 for name, tensor in first.items()})
    with pytest.raises(InputRejected, match="neither a whole table nor the slice"):
        open_checkpoint(beside)


def test_ranks_of_different_steps_are_refused(tmp_path: Path) -> None:
    checkpoint = copy_golden(tmp_path)
    split_into_ranks(checkpoint)
    state = torch.load(checkpoint / "rank_1" / "model.pt", weights_only=True)
    torch.save(
        {name: t + 1 if t.is_floating_point() else t for name, t in state.items()}, checkpoint / "rank_1/model.pt"
    )
    with pytest.raises(InputRejected, match=r"differs between rank_0/model\.pt and rank_1/model\.pt"):
        open_checkpoint(checkpoint)


def test_whole_tables_in_one_file_are_read_and_the_ranks_are_told(beside: Path) -> None:
    shutil.copy(GOLDEN["v2_shared_ring"] / "model.pt", beside)
    assert_is_golden(beside)
    assert "the folders rank_N are not read: model.pt holds whole tables" in open_checkpoint(beside).notes


def test_a_rank_beside_the_rest_that_is_missing_is_named(beside: Path) -> None:
    shutil.rmtree(beside / "rank_1")
    with pytest.raises(InputRejected, match=r"rank_1/model\.pt is missing"):
        open_checkpoint(beside)


def test_slices_that_do_not_make_up_the_table_are_refused(beside: Path) -> None:
    set_fields(beside, mem_parallel_size=1)
    with pytest.raises(InputRejected, match="has shape"):
        open_checkpoint(beside)
