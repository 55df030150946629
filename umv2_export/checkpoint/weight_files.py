"""Which files of a step's folder hold the weights, by the layout that the trainer's checkpointer left.

What else lies there is never opened: optim.pt, train.pt, other.pt, train/, optim/, rng states.
"""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from umv2_export.checkpoint import distributed, olmo_core
from umv2_export.checkpoint.official_config import SIZE
from umv2_export.checkpoint.safetensors_files import WEIGHTS_FILE as SAFETENSORS_FILE
from umv2_export.checkpoint.state_dict import StateDict, load_safetensors, load_state_dict
from umv2_export.config import TABLES
from umv2_export.errors import InputRejected, Unsupported
from umv2_export.records.forms import Fields
from umv2_export.system.files import inside

__all__ = ["WEIGHTS_FILE", "has_weights", "is_sharded", "load_weights"]

WEIGHTS_FILE = "model.pt"
FIRST_RANK = f"rank_0/{WEIGHTS_FILE}"

Loader = Callable[[Path], StateDict]


def load_weights(path: Path, fields: Mapping[str, Any]) -> list[StateDict]:
    """The state dicts of a step: one, or one a rank where each rank saved its own slice of the tables.

    Args:
        path: the step's folder.
        fields: the `model:` section.

    Raises:
        InputRejected: a file is missing, corrupt or unsafe, or what the model needs was not saved.
        Unsupported: a sharded layout that is not joined here; the message has the command that joins it.
    """
    if _exists(path / WEIGHTS_FILE):
        whole = load_state_dict(inside(path, WEIGHTS_FILE))
        if _exists(path / SAFETENSORS_FILE):
            whole = replace(whole, notes=(*whole.notes, f"{SAFETENSORS_FILE} is not read: {WEIGHTS_FILE} is there"))
        return _with_tables_of_ranks(path, fields, whole) if _exists(path / FIRST_RANK) else [whole]
    if _exists(path / FIRST_RANK):
        return _load_ranks(path, fields)
    if _exists(path / SAFETENSORS_FILE):
        return [load_safetensors(path)]
    for marker, load in _SHARDED.items():
        if next(path.glob(marker), None) is not None:
            return [load(path)]
    raise InputRejected(f"neither {WEIGHTS_FILE} nor {FIRST_RANK} is there", where=path)


def is_sharded(path: Path) -> bool:
    """Whether a step's folder holds shards and no whole weights."""
    whole = any(_exists(path / name) for name in (WEIGHTS_FILE, FIRST_RANK, SAFETENSORS_FILE))
    return not whole and any(next(path.glob(marker), None) is not None for marker in _SHARDED)


def has_weights(path: Path) -> bool:
    """Whether a folder holds weights in any layout that is known."""
    return any(_exists(path / name) for name in (WEIGHTS_FILE, FIRST_RANK, SAFETENSORS_FILE)) or is_sharded(path)


def _exists(file: Path) -> bool:
    """A link that leads nowhere counts: the file is missing, not another layout meant."""
    return file.exists() or file.is_symlink()


def _load_ranks(path: Path, fields: Mapping[str, Any]) -> list[StateDict]:
    """rank_0/model.pt .. rank_{P-1}/model.pt: more ranks hold copies of these slices."""
    ranks = Fields(fields).read("mem_parallel_size", SIZE)
    # Looked for before any is opened: a size of billions would otherwise be a long list.
    for rank in range(ranks):
        if not _exists(path / f"rank_{rank}" / WEIGHTS_FILE):
            raise InputRejected(
                f"rank_{rank}/{WEIGHTS_FILE} is missing",
                where=path,
                why=f"mem_parallel_size is {ranks}",
                fix="copy the folders of all ranks: each holds its own slice of the tables",
            )
    loaded = [load_state_dict(inside(path, f"rank_{rank}/{WEIGHTS_FILE}")) for rank in range(ranks)]
    _require_one_step(path, loaded)
    return loaded


def _require_one_step(path: Path, ranks: list[StateDict]) -> None:
    """All but the tables is equal on every rank; weights of norms, few and changed by each step, show a mix."""
    first = ranks[0].tensors
    norms = [name for name, tensor in first.items() if tensor.dim() == 1 and tensor.is_floating_point()]
    for rank, state in enumerate(ranks):
        for name in norms:
            if name in state.tensors and not _same_bytes(state.tensors[name], first[name]):
                raise _of_different_steps(path, name, FIRST_RANK, f"rank_{rank}/{WEIGHTS_FILE}")


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal where both hold NaN, too: that is refused elsewhere, in its own words."""
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


def _of_different_steps(path: Path, tensor: str, one: str, other: str) -> InputRejected:
    return InputRejected(
        f"tensor {tensor!r} differs between {one} and {other}",
        where=path,
        why="they belong to different steps",
        fix="copy the folder of one step again",
    )


def _with_tables_of_ranks(path: Path, fields: Mapping[str, Any], whole: StateDict) -> list[StateDict]:
    """model.pt of FSDP (a full state dict) beside the tables of each rank, which FSDP does not manage."""
    tables = [name for name in whole.tensors if name.rpartition(".")[2] in TABLES]
    first = load_state_dict(inside(path, FIRST_RANK)).tensors
    if any(name not in first or first[name].shape != whole.tensors[name].shape for name in tables):
        # A slice of another width is found by its shape.
        note = f"the folders rank_N are not read: {WEIGHTS_FILE} holds whole tables"
        return [replace(whole, notes=(*whole.notes, note))]
    ranks = _load_ranks(path, fields)
    for name in tables:
        if not torch.equal(first[name], whole.tensors[name]):
            raise InputRejected(
                f"tensor {name!r} of {WEIGHTS_FILE} is neither a whole table nor the slice of {FIRST_RANK}",
                where=path,
                why="they belong to different steps",
            )
    managed = {name: tensor for name, tensor in whole.tensors.items() if name not in tables}
    for name, tensor in first.items():
        if name.rpartition(".")[2] not in TABLES and name in managed and not torch.equal(managed[name], tensor):
            raise _of_different_steps(path, name, WEIGHTS_FILE, FIRST_RANK)
    merged = StateDict({**first, **managed}, (*whole.files, *ranks[0].files), (*whole.notes, *ranks[0].notes))
    return [merged, *ranks[1:]]


def _unshard_command(path: Path, kind: str) -> str:
    return shlex.join(["python", "scripts/unshard.py", str(path), f"{path}-unsharded", "--type", kind, "--model-only"])


def _refuse_legacy(path: Path) -> StateDict:
    raise Unsupported(
        "the checkpoint is sharded (torch_legacy): rank0.pt, rank1.pt, ... hold pickled objects of torch.distributed",
        where=path,
        why="to load them is to run what is in them; nothing is unpickled here",
        fix=f"join them with the training code: {_unshard_command(path, 'torch_legacy')}; then pass {path}-unsharded",
    )


def _refuse_local(path: Path) -> StateDict:
    raise Unsupported(
        "the checkpoint is sharded (local): model/rank0.pt, ... hold FSDP's flat parameters in pickled objects",
        where=path,
        why="to load them is to run what is in them; and they hold no buffers: shuffle_index of memory layers is lost",
        fix="a model with memory layers must be saved by the run itself: save_interval_unsharded (the folders "
        f"stepN-unsharded); any other is joined by the training code: {_unshard_command(path, 'local')}",
    )


# By a file that only this layout has. Later ones are looked for where earlier ones are not found.
_SHARDED: Mapping[str, Loader] = {
    "rank[0-9]*.pt": _refuse_legacy,
    "model/rank[0-9]*.pt": _refuse_local,
    olmo_core.METADATA_FILE: olmo_core.read_olmo_core,
    "model_and_optim": lambda path: distributed.read_distributed(path / "model_and_optim"),
    "*.distcp": distributed.read_distributed,
    distributed.METADATA_FILE: distributed.read_distributed,
}
