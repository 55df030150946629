"""Our format: `config.json` beside `*.safetensors`, with an index where there are several files.

Tensor names are those of `tensor_shapes`, the released state dict's.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from umv2_export.checkpoint.checkpoint import Checkpoint, CheckpointTensor, ReadOptions, validate_tensors
from umv2_export.checkpoint.fields import identifier, without_ignored
from umv2_export.checkpoint.safetensors_files import DTYPES, INDEX_FILE, WEIGHTS_FILE, map_tensors, weight_notes
from umv2_export.config import ModelConfig
from umv2_export.errors import InputRejected, Unsupported, located, shown
from umv2_export.progress import Advance, Tracker, silent
from umv2_export.records.forms import Fields, Form, list_of
from umv2_export.records.json_files import read_json
from umv2_export.records.tokenizer_files import copy_tokenizer_files, tokenizer_files
from umv2_export.system.output import HashedFile, atomic_directory, tensor_bytes

__all__ = [
    "CONFIG_FILE",
    "WRITER_MEMORY",
    "TensorStream",
    "checkpoint_facts",
    "checkpoint_streams",
    "read_checkpoint",
    "save_checkpoint",
]

CONFIG_FILE = "config.json"
FORMAT = "umv2-native"
FORMAT_VERSION = 1

# As the hub's tools cut: a file holds whole tensors, at most this many bytes of them unless one tensor is larger.
MAX_FILE_BYTES = 5 * 10**9

# Anonymous memory of a process that writes one: imports, and a few pieces of a table.
WRITER_MEMORY = 600 * 10**6

# What `convert` noted of the checkpoint that it read, however long.
_NOTE: Form[str] = Form("text", lambda value: isinstance(value, str))

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorStream:
    """A tensor to be written: its header entry, and its elements in pieces, in order.

    Attributes:
        name, shape, dtype: as in the file.
        pieces: slices along dim 0, made when they are asked for.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Iterable[torch.Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def read_checkpoint(path: Path, options: ReadOptions) -> Checkpoint:
    """Open a checkpoint in our format.

    Raises:
        InputRejected: a file is missing, corrupt, unsafe or contradicts the configuration.
        Unsupported: a field or tensor that is not implemented.
        InvalidRequest: a field that shall be ignored is not there, or is understood.
    """
    data = read_json(path / CONFIG_FILE)
    if data.get("format") != FORMAT or data.get("format_version") != FORMAT_VERSION:
        raise InputRejected(
            f"format is {data.get('format')!r} version {data.get('format_version')!r}, "
            f"expected {FORMAT!r} version {FORMAT_VERSION}",
            where=path / CONFIG_FILE,
        )
    unknown = sorted(data.keys() - {"format", "format_version", "model", "tokenizer", "ignored_fields", "never_added"})
    if unknown:
        raise Unsupported(f"unknown field {shown(unknown[0])}", where=path / CONFIG_FILE)
    model = data.get("model")
    if not isinstance(model, dict):
        raise InputRejected("section 'model' is missing", where=path / CONFIG_FILE)
    known = {field.name for field in fields(ModelConfig)}
    model = without_ignored(model, options.ignore_fields, known, where=path / CONFIG_FILE)
    config = ModelConfig.from_dict(model, where=path / CONFIG_FILE)
    if config.memory.layers:
        layout, kept = options.query_layout or config.memory.query_layout, options.row_topk or config.memory.row_topk
        config = replace(config, memory=replace(config.memory, query_layout=layout, row_topk=kept))
    mapped, files = map_tensors(path)
    tensors = {name: CheckpointTensor(name, [tensor], options.allow_non_finite) for name, tensor in mapped.items()}
    with located(path):
        validate_tensors(config, tensors)
    with located(path / CONFIG_FILE):
        # By `convert`, of the checkpoint that this one was made of.
        never_added, ignored = (
            Fields(data).get(name, list_of(_NOTE), []) for name in ("never_added", "ignored_fields")
        )
    return Checkpoint(
        path,
        "native",
        config,
        tensors,
        [path / CONFIG_FILE, *files],
        tokenizer_files(path),
        tokenizer=identifier(data.get("tokenizer")),
        ignored_fields=[*ignored, *options.ignore_fields],
        notes=[*weight_notes(path), *never_added],
        never_added=never_added,
    )


def checkpoint_streams(checkpoint: Checkpoint) -> list[TensorStream]:
    """The tensors of a checkpoint of any format, to be written in this one."""
    return [TensorStream(name, tensor.shape, tensor.dtype, tensor) for name, tensor in checkpoint.tensors.items()]


def checkpoint_facts(checkpoint: Checkpoint) -> dict[str, object]:
    """What config.json keeps of a checkpoint beside the model; nothing where there is nothing to keep."""
    facts = {
        "tokenizer": checkpoint.tokenizer,
        "ignored_fields": list(checkpoint.ignored_fields),
        "never_added": list(checkpoint.never_added),
    }
    return {name: value for name, value in facts.items() if value}


def save_checkpoint(
    target: Path,
    config: ModelConfig,
    tensors: Iterable[TensorStream],
    extra_files: Iterable[Path] = (),
    track: Tracker = silent,
    *,
    facts: Mapping[str, object] | None = None,
    replace_target: bool = False,
) -> None:
    """Write a checkpoint, one piece of a tensor in memory at a time; it appears whole or not at all.

    Args:
        target: folder.
        config: the model.
        tensors: all its tensors.
        extra_files: tokenizer files to copy along.
        track: progress.
        facts: further fields of config.json, as `checkpoint_facts` gives them.
        replace_target: replace a folder that is not empty.

    Raises:
        InputRejected: a weight is NaN or infinite, or a tokenizer file is not what its name says.
        EnvironmentUnfit: the disk is full.
    """
    groups: list[list[TensorStream]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(other.size for other in groups[-1]) + tensor.size > MAX_FILE_BYTES:
            groups.append([])
        groups[-1].append(tensor)
    total = sum(tensor.size for group in groups for tensor in group)
    advance = track("writing checkpoint", total)
    with atomic_directory(target, replace=replace_target) as folder:
        weight_map: dict[str, str] = {}
        for number, group in enumerate(groups, start=1):
            name = WEIGHTS_FILE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            _write_file(folder / name, group, advance)
            weight_map |= {tensor.name: name for tensor in group}
        if len(groups) > 1:
            _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
        copy_tokenizer_files(extra_files, folder)
        document = {"format": FORMAT, "format_version": FORMAT_VERSION, "model": config.as_dict(), **(facts or {})}
        _write_json(folder / CONFIG_FILE, document)


def _write_file(file: Path, tensors: list[TensorStream], advance: Advance) -> None:
    """A safetensors file: header length (u64), header (JSON, padded to 8 bytes), elements.

    The library's own writer wants every tensor in memory at once, 4.9 GB for the smallest published model.
    """
    header: dict[str, Any] = {}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with HashedFile(file) as out:
        out.write(len(head).to_bytes(8, "little"))
        out.write(head)
        for tensor in tensors:
            start = out.size
            for piece in tensor.pieces:
                out.write(tensor_bytes(piece))
                advance(piece.numel() * piece.element_size())
            if out.size - start != tensor.size:
                raise AssertionError(f"{tensor.name}: {out.size - start} bytes written, {tensor.size} announced")


def _write_json(file: Path, document: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
