"""A checkpoint of torch.distributed.checkpoint: `.metadata` beside `__N_M.distcp`.

`.metadata` is a pickle of dataclasses, which torch's own reader unpickles, code and all. Its names and numbers are
read here instead; each piece of a tensor is an archive of torch.save inside of a `.distcp` file.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from umv2_export.checkpoint.pickle_reader import Call, read_pickle
from umv2_export.checkpoint.state_dict import MODEL_KEYS, StateDict, unwrapped
from umv2_export.checkpoint.torch_archive import Archive
from umv2_export.errors import InputRejected, Umv2Error, shown
from umv2_export.system.files import inside
from umv2_export.system.links import require_own_links

__all__ = ["METADATA_FILE", "read_distributed"]

METADATA_FILE = ".metadata"

# 50 operations and 300 bytes a piece: 300 tensors and their two moments, cut by 64 ranks, are 57,600 pieces.
MAX_METADATA_BYTES = 64 * 2**20
MAX_OPERATIONS = 5 * 10**6

_MODULE = "torch.distributed.checkpoint.metadata."
_TENSOR = f"{_MODULE}TensorStorageMetadata"
_DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
_ALLOWED = frozenset(
    {
        *(f"{_MODULE}{name}" for name in ("Metadata", "TensorStorageMetadata", "TensorProperties")),
        *(f"{_MODULE}{name}" for name in ("ChunkStorageMetadata", "BytesStorageMetadata", "MetadataIndex")),
        *(f"{_MODULE}{name}" for name in ("StorageMeta", "_MEM_FORMAT_ENCODING")),
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        *("torch.Size", "torch.serialization._get_layout", "collections.OrderedDict"),
        *("pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath"),
        *(f"torch.{name}" for name in _DTYPES),
    }
)


@dataclass(frozen=True)
class _Piece:
    """A block of a tensor: where it begins, its size, and the archive that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


def read_distributed(folder: Path) -> StateDict:
    """Read the model; a tensor of one piece is mapped, one of several is joined in memory.

    Raises:
        InputRejected: something is missing, corrupt, or more than tensors.
    """
    metadata = folder / METADATA_FILE
    try:
        return _read(folder, metadata)
    except InputRejected as error:
        error.where = error.where or str(metadata)
        step = folder.parent if folder.name == "model_and_optim" else folder
        source, whole = shlex.quote(str(folder)), shlex.quote(f"{step}-unsharded")
        error.fix = (
            f"copy the folder again; or let torch convert it, which runs what is pickled in it: mkdir {whole} && "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {source} {whole}/model.pt && "
            f"cp {shlex.quote(str(step))}/config.yaml {whole}"
        )
        raise


def _read(folder: Path, metadata: Path) -> StateDict:
    require_own_links(metadata.parent, metadata.name)
    if not metadata.is_file() or not metadata.stat().st_size:
        raise InputRejected(
            f"{METADATA_FILE} is {'empty' if metadata.is_file() else 'missing'}",
            why="it tells which piece of which tensor lies where (some tools do not copy hidden files)",
        )
    if metadata.stat().st_size > MAX_METADATA_BYTES:
        raise InputRejected(f"the file is larger than {MAX_METADATA_BYTES} bytes")
    state = _state(read_pickle(metadata.read_bytes(), _ALLOWED, most_operations=MAX_OPERATIONS), "Metadata")
    described, stored = state.get("state_dict_metadata"), state.get("storage_data")
    if not isinstance(described, dict) or not isinstance(stored, dict):
        raise InputRejected("the metadata describes no tensors")
    places = _places(stored)
    mappings: dict[Path, torch.UntypedStorage] = {}
    tensors = {}
    for name, full in _model_names(described).items():
        if not isinstance(described[full], Call) or described[full].function != _TENSOR:
            raise InputRejected(f"{full!r} is not a tensor", why="a model's state dict holds tensors alone")
        facts = _state(described[full], "TensorStorageMetadata")
        pieces = _pieces(full, facts, places)
        tensors[name] = _joined(full, _sizes(facts.get("size")), pieces, folder, mappings)
    return unwrapped(tensors, (metadata, *sorted(mappings)))


def _state(value: Any, kind: str) -> Mapping[str, Any]:
    """The fields of a dataclass."""
    fields = value.state if isinstance(value, Call) and value.function.endswith(f".{kind}") else None
    if not isinstance(fields, dict):
        raise InputRejected("the metadata is of an unknown form", why=f"expected a {kind}")
    return fields


def _sizes(value: Any) -> tuple[int, ...]:
    """Numbers of a torch.Size."""
    match value:
        case Call("torch.Size", (tuple(numbers),)) if len(numbers) <= 8 and all(
            type(number) is int and 0 <= number < 2**40 for number in numbers
        ):
            return numbers
    raise InputRejected(f"the metadata holds {shown(value)} where a size belongs")


def _model_names(described: Mapping[Any, Any]) -> dict[str, str]:
    """Names of the model's tensors -> names in the checkpoint, where the optimizer lies beside it."""
    names = [name for name in described if isinstance(name, str)]
    for key in MODEL_KEYS:
        chosen = {name.removeprefix(f"{key}."): name for name in names if name.startswith(f"{key}.")}
        if chosen:
            return chosen
    return {name: name for name in names}


def _places(stored: Mapping[Any, Any]) -> dict[tuple[str, tuple[int, ...]], tuple[str, int, int]]:
    """Tensor and offsets of a piece -> file, start and length."""
    places: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]] = {}
    taken = set()
    for entry in stored.values():
        if not isinstance(entry, tuple):
            raise InputRejected("the metadata is of an unknown form", why="a place without its tensor")
        index, place = _state(entry[0], "MetadataIndex"), _state(entry[1], "_StorageInfo")
        if index.get("offset") is None:  # bytes of the optimizer
            continue
        name, file = index.get("fqn"), place.get("relative_path")
        start, length = place.get("offset"), place.get("length")
        if not isinstance(name, str) or not isinstance(file, str) or place.get("transform_descriptors"):
            raise InputRejected("a piece is stored in no known way", why=shown(place))
        if not isinstance(start, int) or not isinstance(length, int):
            raise InputRejected("a piece is stored in no known way", why=shown(place))
        # Pieces are copied: one that stood for many would take more memory than the files have bytes.
        if (file, start) in taken:
            raise InputRejected(f"two pieces are stored in {shown(file)} at byte {start}")
        taken.add((file, start))
        places[name, _sizes(index["offset"])] = (file, start, length)
    return places


def _pieces(name: str, facts: Mapping[str, Any], places: Mapping[Any, tuple[str, int, int]]) -> list[_Piece]:
    chunks = facts.get("chunks")
    if not isinstance(chunks, list) or not chunks:
        raise InputRejected(f"tensor {name!r} has no pieces")
    pieces = []
    for chunk in chunks:
        fields = _state(chunk, "ChunkStorageMetadata")
        offsets, sizes = _sizes(fields.get("offsets")), _sizes(fields.get("sizes"))
        if (name, offsets) not in places:
            raise InputRejected(f"the piece of tensor {name!r} at {list(offsets)} is stored nowhere")
        pieces.append(_Piece(offsets, sizes, *places[name, offsets]))
    return pieces


def _joined(
    name: str, shape: tuple[int, ...], pieces: list[_Piece], folder: Path, mappings: dict[Path, torch.UntypedStorage]
) -> torch.Tensor:
    """Rows laid one after the other: FSDP cuts dim 0 alone."""
    pieces = sorted(pieces, key=lambda piece: piece.offsets)
    row = 0
    for piece in pieces:
        if len(piece.sizes) != len(shape) or piece.offsets[:1] != (row,)[: len(shape)] or piece.sizes[1:] != shape[1:]:
            break
        row += piece.sizes[0] if shape else 0
    else:
        if not shape or row == shape[0]:
            parts = [_map_piece(name, piece, folder, mappings) for piece in pieces]
            if len({part.dtype for part in parts}) > 1:
                raise InputRejected(f"the pieces of tensor {name!r} differ in dtype")
            return parts[0] if len(parts) == 1 else torch.cat(parts)
    raise InputRejected(
        f"the pieces of tensor {name!r} do not make up its shape {list(shape)}",
        why="pieces of whole rows are read, which follow one another",
    )


def _map_piece(name: str, piece: _Piece, folder: Path, mappings: dict[Path, torch.UntypedStorage]) -> torch.Tensor:
    file = inside(folder, piece.file)
    try:
        archive = Archive(file, start=piece.start, size=piece.length, mapping=mappings.get(file))
    except Umv2Error as error:
        error.why = f"{error.why or error.what} (piece of {shown(name)} at byte {piece.start})"
        raise
    mappings[file] = archive.mapping
    part = archive.tensor(name, archive.content)
    if tuple(part.shape) != piece.sizes:
        raise InputRejected(
            f"the piece of tensor {name!r} at {list(piece.offsets)} has shape {list(part.shape)}, the metadata says "
            f"{list(piece.sizes)}",
            where=file,
        )
    return part
