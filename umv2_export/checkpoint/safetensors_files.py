"""Safetensors files of a folder, one or several with an index; all of it untrusted."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from umv2_export.errors import InputRejected, Unsupported, shown
from umv2_export.records.json_files import read_json
from umv2_export.system.files import inside

__all__ = ["DTYPES", "INDEX_FILE", "WEIGHTS_FILE", "map_file", "map_tensors", "weight_notes"]

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# As headers name them; the package's own table is private.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}

_PICKLED = (".bin", ".pt", ".pth", ".bin.index.json")


def map_tensors(path: Path) -> tuple[dict[str, torch.Tensor], list[Path]]:
    """All tensors of the folder by name, mapped, and the files that hold them.

    Raises:
        InputRejected: a file is missing, truncated or corrupt, or a tensor stands in two.
        Unsupported: there are weights, but not in safetensors.
    """
    files = _weight_files(path)
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        for name, tensor in map_file(file):
            if name in tensors:
                raise InputRejected(f"tensor {name!r} stands in two files", where=file)
            tensors[name] = tensor
    return tensors, files


def weight_notes(path: Path) -> list[str]:
    """What a user may not expect of the choice of files."""
    if (path / WEIGHTS_FILE).exists() and (path / INDEX_FILE).exists():
        return [
            f"{WEIGHTS_FILE} is read; {INDEX_FILE} beside it and the files that it names are not, as in transformers"
        ]
    return []


def _weight_files(path: Path) -> list[Path]:
    """One file comes before an index, as in transformers: the index is what an earlier save in several files left."""
    if (path / WEIGHTS_FILE).exists():
        return [inside(path, WEIGHTS_FILE)]
    if not (path / INDEX_FILE).exists():
        raise _no_weights(path)
    weight_map = read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputRejected("'weight_map' is missing or not a mapping to file names", where=path / INDEX_FILE)
    if not weight_map:
        raise InputRejected("'weight_map' is empty", where=path / INDEX_FILE)
    return [inside(path, name) for name in sorted(set(weight_map.values()))]


def _no_weights(path: Path) -> InputRejected | Unsupported:
    names = sorted(entry.name for entry in path.iterdir())
    pickled = [name for name in names if name.endswith(_PICKLED)]
    others = [name for name in names if name.endswith((".safetensors", ".gguf", ".h5", ".msgpack"))]
    if others:
        return InputRejected(
            f"file {WEIGHTS_FILE!r} is missing, and so is {INDEX_FILE!r}",
            where=path,
            why=f"there is {shown(others[0])}" + (f" and {len(others) - 1} more" if others[1:] else ""),
            fix="take the folder as it was saved: several files need their index",
        )
    if pickled:
        return Unsupported(
            f"the weights are in {shown(pickled[0])}: only safetensors are read",
            where=path,
            why="that file is a pickle, which can run code when it is loaded",
            fix='if you trust it: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{path}', torch_dtype='auto').save_pretrained('{path.name}-safetensors')\"",
        )
    return InputRejected(f"file {WEIGHTS_FILE!r} is missing", where=path)


def map_file(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and mapped tensor; safetensors checks every offset against the file's size first.

    Raises:
        InputRejected: the file is truncated or corrupt.
    """
    try:
        with safe_open(file, framework="pt", device="cpu") as stream:
            for name in stream.keys():  # noqa: SIM118 - safe_open is not a mapping
                yield name, stream.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputRejected("the file is truncated or corrupt", where=file, why=str(error)) from error
