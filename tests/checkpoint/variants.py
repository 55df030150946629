"""Golden checkpoints, copied and changed."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.golden import GOLDEN_CASES

__all__ = [
    "GOLDEN",
    "PRE_VALUES",
    "VALUES",
    "changed_tensors",
    "copy_golden",
    "load_golden",
    "mapped_file",
    "read_fields",
    "remove_field",
    "set_fields",
    "split_into_ranks",
]

GOLDEN = {case.name: case for case in GOLDEN_CASES}

VALUES = "transformer.full_memory_layer.values_for_look_up"
PRE_VALUES = "transformer.full_memory_layer.pre_values_for_look_up"


def copy_golden(folder: Path, case: str | Path = "v2_shared_ring") -> Path:
    """A copy of a golden checkpoint, `folder/official`, that a test may spoil."""
    return Path(shutil.copytree(GOLDEN[case] if isinstance(case, str) else case, folder / "official"))


def load_golden(name: str = "v2_shared_ring") -> dict[str, torch.Tensor]:
    """The state dict of a golden checkpoint, read by torch alone."""
    state: dict[str, torch.Tensor] = torch.load(GOLDEN[name] / "model.pt", weights_only=True)
    return state


def read_fields(checkpoint: Path) -> dict[str, Any]:
    """The `model:` section of config.yaml."""
    fields: dict[str, Any] = yaml.safe_load((checkpoint / "config.yaml").read_text())["model"]
    return fields


def set_fields(checkpoint: Path, **fields: object) -> None:
    """Set fields of the `model:` section."""
    (checkpoint / "config.yaml").write_text(yaml.safe_dump({"model": {**read_fields(checkpoint), **fields}}))


def remove_field(checkpoint: Path, field: str) -> None:
    """Remove a field of the `model:` section."""
    fields = {name: value for name, value in read_fields(checkpoint).items() if name != field}
    (checkpoint / "config.yaml").write_text(yaml.safe_dump({"model": fields}))


@contextlib.contextmanager
def changed_tensors(checkpoint: Path) -> Iterator[dict[str, Any]]:
    """The state dict of a copied checkpoint, saved again with the changes that the block makes."""
    state: dict[str, Any] = torch.load(checkpoint / "model.pt", weights_only=True)
    yield state
    torch.save(state, checkpoint / "model.pt")


def split_into_ranks(checkpoint: Path, ranks: int = 2) -> None:
    """Save as a vertical-parallel run does: each rank its own slice of the tables along dim 1, and all the rest."""
    state = torch.load(checkpoint / "model.pt", weights_only=True)
    (checkpoint / "model.pt").unlink()
    for rank in range(ranks):
        mine = {
            # Without the copy, torch saves the whole storage that a slice looks into.
            name: tensor.chunk(ranks, dim=1)[rank].clone() if name.endswith("values_for_look_up") else tensor
            for name, tensor in state.items()
        }
        (checkpoint / f"rank_{rank}").mkdir()
        torch.save(mine, checkpoint / f"rank_{rank}" / "model.pt")
    set_fields(checkpoint, vertical_parallel=True, mem_parallel_size=ranks)


def mapped_file(tensor: torch.Tensor) -> Path | None:
    """The file whose mapping holds the first element of a tensor, None for memory of the process itself."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            bounds, *_, name = line.split(maxsplit=5) if line.count("/") else [line.split()[0], ""]
            start, stop = (int(bound, 16) for bound in bounds.split("-"))
            if start <= tensor.data_ptr() < stop:
                return Path(name.strip()) if name else None
    return None
