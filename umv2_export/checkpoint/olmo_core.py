"""A checkpoint that olmo_core sharded: `model/metadata.json` beside `model/rank_N.safetensors`.

Each file holds, of every tensor, a run of its elements in row-major order. Only parameters are saved, no buffers.
"""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from umv2_export.checkpoint.safetensors_files import DTYPES, map_file
from umv2_export.checkpoint.state_dict import StateDict, unwrapped
from umv2_export.errors import InputRejected, Unsupported, located, shown
from umv2_export.records.json_files import read_json
from umv2_export.system.files import inside
from umv2_export.system.links import require_own_links

__all__ = ["METADATA_FILE", "read_olmo_core"]

METADATA_FILE = "model/metadata.json"


def read_olmo_core(path: Path) -> StateDict:
    """Join the tensors; those that several files hold are copied, the others are mapped.

    Raises:
        InputRejected: buffers of memory layers are missing, or files are, or they contradict each other.
        Unsupported: the tensors are cut in another way.
    """
    file = path / METADATA_FILE
    require_own_links(path, METADATA_FILE)
    described = read_json(file).get("tensors")
    with located(file):
        if not isinstance(described, dict) or not described:
            raise InputRejected("'tensors' is missing or not a mapping")
        _check_buffers(described)
        names = {name for facts in described.values() for name in _specification(facts)}
        parts = {name: dict(map_file(inside(path / "model", name))) for name in sorted(names)}
        tensors = {name: _joined(name, facts, parts) for name, facts in described.items()}
    return unwrapped(tensors, (file, *(path / "model" / name for name in sorted(names))))


# Last parts of names of tensors that are not parameters: the permutation of a layer's addresses, and the vectors that
# merge ranks in stage 1.
_BUFFERS = ("shuffle_index", "tucker_core_u", "tucker_core_v")


def _check_buffers(described: Mapping[str, Any]) -> None:
    layers = sorted({name.partition(".tucker_core.")[0] for name in described if ".tucker_core." in name})
    lost = [f"{layer}.{leaf}" for layer in layers for leaf in _BUFFERS if f"{layer}.{leaf}" not in described]
    if lost:
        raise InputRejected(
            f"tensor {lost[0]!r} and {len(lost) - 1} more of {len(layers)} memory layers are not in this checkpoint",
            why="olmo_core's checkpointer saves parameters, and these are buffers; shuffle_index is the random order "
            "of the values in training, which nothing else can tell",
            fix="the run itself must save them: save_interval_unsharded (the folders stepN-unsharded), or "
            "sharded_checkpointer torch_new or torch_legacy; a run that is resumed from here has lost them too",
        )


def _specification(facts: Any) -> Mapping[str, Any]:
    specification = facts.get("shard_spec_per_file") if isinstance(facts, dict) else None
    if not isinstance(specification, dict) or not all(isinstance(name, str) for name in specification):
        raise InputRejected("'shard_spec_per_file' of a tensor is missing or not a mapping")
    return specification


def _joined(name: str, facts: Any, files: Mapping[str, Mapping[str, torch.Tensor]]) -> torch.Tensor:
    shape, dtype = facts.get("shape"), DTYPES.get(str(facts.get("dtype")))
    if not isinstance(shape, list) or not all(type(n) is int and 0 < n < 2**31 for n in shape) or len(shape) > 8:
        raise InputRejected(f"tensor {name!r} has shape {shown(shape)}")
    if dtype is None:
        raise Unsupported(f"tensor {name!r} has dtype {shown(facts.get('dtype'))}")
    runs: list[tuple[int, int, torch.Tensor]] = []
    for file, specification in _specification(facts).items():
        held = files[file].get(name)
        if held is not None and list(held.shape) == shape and held.dtype == dtype and len(shape) > 1:
            return held  # whole, as it was not sharded
        bounds = _bounds(name, specification)
        if held is None or held.dtype != dtype or held.dim() != 1 or len(held) != sum(b - a for a, b in bounds):
            raise InputRejected(f"tensor {name!r} is not in model/{shown(file)} as its metadata says")
        starts = itertools.accumulate((b - a for a, b in bounds), initial=0)
        runs += [(a, b, held[start : start + b - a]) for start, (a, b) in zip(starts, bounds, strict=False) if b > a]
    runs.sort(key=lambda run: run[0])
    ends = [0, *(stop for _, stop, _ in runs)]
    if [start for start, _, _ in runs] != ends[:-1] or ends[-1] != math.prod(shape):
        raise InputRejected(
            f"the parts of tensor {name!r} do not make up its {math.prod(shape)} elements",
            why="a file of one rank is missing, or belongs to another run",
        )
    whole = runs[0][2] if len(runs) == 1 else torch.cat([part for _, _, part in runs])
    return whole.reshape(shape)


def _bounds(name: str, specification: Any) -> list[tuple[int, int]]:
    """First and last element (exclusive) of each run in a file."""
    offsets = specification.get("flattened_offsets") if isinstance(specification, dict) else None
    if not isinstance(offsets, list):
        raise Unsupported(
            f"tensor {name!r} is cut along its dimensions, not flat",
            fix="save an unsharded checkpoint: save_interval_unsharded",
        )
    bounds = []
    for pair in offsets:
        match pair:
            case [int(start), int(stop)] if 0 <= start <= stop < 2**62:
                bounds.append((start, stop))
            case _:
                raise InputRejected(f"tensor {name!r} has offsets {shown(pair)}")
    return bounds
