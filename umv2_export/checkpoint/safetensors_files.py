"""Safetensors files of a folder, one or several with an index; all of it untrusted."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from umv2_export.errors import InputRejected
from umv2_export.files import inside, read_json

__all__ = ["INDEX_FILE", "WEIGHTS_FILE", "map_tensors"]

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def map_tensors(path: Path) -> tuple[dict[str, torch.Tensor], list[Path]]:
    """All tensors of the folder by name, mapped, and the files that hold them.

    Raises:
        InputRejected: a file is missing, truncated or corrupt, or a tensor stands in two.
    """
    files = _weight_files(path)
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        for name, tensor in _map_file(file):
            if name in tensors:
                raise InputRejected(f"tensor {name!r} stands in two files", where=file)
            tensors[name] = tensor
    return tensors, files


def _weight_files(path: Path) -> list[Path]:
    if not (path / INDEX_FILE).exists():
        return [inside(path, WEIGHTS_FILE)]
    weight_map = read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputRejected("'weight_map' is missing or no mapping to file names", where=path / INDEX_FILE)
    return [inside(path, name) for name in sorted(set(weight_map.values()))]


def _map_file(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and mapped tensor; safetensors checks every offset against the file's size first."""
    try:
        with safe_open(file, framework="pt", device="cpu") as stream:
            for name in stream.keys():  # noqa: SIM118 - safe_open is no mapping
                yield name, stream.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputRejected("the file is truncated or corrupt", where=file, why=str(error)) from error
