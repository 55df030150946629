"""A state dict of a file, mapped: model.pt of torch.save, or model.safetensors of unshard.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from umv2_export.checkpoint.pickle_reader import Call
from umv2_export.checkpoint.safetensors_files import map_tensors
from umv2_export.checkpoint.tensor_names import decoded_names, unwrapped_names
from umv2_export.checkpoint.torch_archive import Archive
from umv2_export.errors import InputRejected, located

__all__ = ["StateDict", "load_safetensors", "load_state_dict", "unwrapped"]

# Where trainers put the model beside their own state.
MODEL_KEYS = ("model", "state_dict", "model_state_dict", "module")

# {"model": {"state_dict": ...}}; more levels have not been seen.
MAX_LEVELS = 3


@dataclass(frozen=True)
class StateDict:
    """Named tensors of a model, mapped, and where they lie.

    Attributes:
        tensors: name -> tensor, by the model's own names.
        files: that hold them, in reading order.
        notes: what was done on the way that the user should know.
    """

    tensors: Mapping[str, torch.Tensor]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def load_state_dict(file: Path) -> StateDict:
    """The model in a file of torch.save: only what it needs is mapped, and nothing is run.

    Raises:
        InputRejected: the file is truncated, corrupt, holds no model, or more than tensors.
        Unsupported: the tensors are saved in a way that is not read.
    """
    archive = Archive(file)
    entries, notes = _model_entries(archive.content, file)
    tensors = {name: archive.tensor(name, value) for name, value in entries.items()}
    return unwrapped(tensors, (file,), notes)


def load_safetensors(path: Path) -> StateDict:
    """model.safetensors of a folder, its names plain or as unshard.py writes them.

    Raises:
        InputRejected: the file is truncated or corrupt, or a name cannot be read.
    """
    tensors, files = map_tensors(path)
    with located(files[0]):
        decoded = decoded_names(tensors)
    return unwrapped(decoded, tuple(files))


def unwrapped(tensors: Mapping[str, torch.Tensor], files: tuple[Path, ...], notes: tuple[str, ...] = ()) -> StateDict:
    """A state dict under the model's own names.

    Raises:
        InputRejected: two names are the same without their wrappers.
        Unsupported: a tensor holds several parameters, joined.
    """
    with located(files[0]):
        renamed, wrappers = unwrapped_names(tensors)
    if wrappers:
        notes = (*notes, f"{files[0].name}: names are read without {', '.join(wrappers)}")
    return StateDict(renamed, files, notes)


def _model_entries(content: Any, file: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The dictionary of tensors: the content itself, or what lies under such a key in it."""
    path: list[str] = []
    for _ in range(MAX_LEVELS + 1):
        if not isinstance(content, dict):
            break
        inner = [key for key in MODEL_KEYS if isinstance(content.get(key), dict)]
        if len(inner) > 1:
            raise InputRejected(f"the file holds both {inner[0]!r} and {inner[1]!r}", where=file, fix="save one alone")
        if not inner:
            if not content or not all(isinstance(k, str) and isinstance(v, Call) for k, v in content.items()):
                break
            notes = (f"{file.name}: the model lies under {'.'.join(path)}",) if path else ()
            return content, notes
        path.append(inner[0])
        content = content[inner[0]]
    raise InputRejected(
        "the file is not a state dict of named tensors",
        where=file,
        why=f"looked for one at the top, and under {', '.join(MODEL_KEYS)}",
        fix="save the state dict alone: torch.save(model.state_dict(), ...)",
    )
