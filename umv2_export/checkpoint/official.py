"""The authors' format: `config.yaml` beside `model.pt`, or beside `rank_{g}/model.pt` of a vertical-parallel run.

Source: the released training code (an OLMoE fork).
"""

import contextlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from umv2_export.checkpoint.checkpoint import Checkpoint, CheckpointTensor, validate_tensors
from umv2_export.checkpoint.fields import identifier, without_ignored
from umv2_export.checkpoint.official_config import FieldReader, read_fields
from umv2_export.checkpoint.official_fields import UNDERSTOOD
from umv2_export.checkpoint.official_tensors import our_tensors, tensor_facts
from umv2_export.config import TABLES, QueryLayout
from umv2_export.errors import InputRejected, Umv2Error
from umv2_export.files import inside, tokenizer_files

__all__ = ["CONFIG_FILE", "read_checkpoint"]

CONFIG_FILE = "config.yaml"
WEIGHTS_FILE = "model.pt"

# A real config.yaml has 10 KB and a real state dict's pickle 200 KB; more is an attack or another file.
MAX_CONFIG_BYTES = 2**20
MAX_PICKLE_BYTES = 64 * 2**20


def read_checkpoint(
    path: Path,
    *,
    query_layout: QueryLayout | None,
    row_topk: int | None,
    allow_non_finite: bool,
    ignore_fields: Sequence[str] = (),
) -> Checkpoint:
    """Open a checkpoint in the authors' format.

    Raises:
        InputRejected: a file is missing, corrupt, unsafe or contradicts the configuration.
        Unsupported: a field or tensor that is not implemented.
        InvalidRequest: a field that shall be ignored is not there, or is understood.
    """
    config_file = path / CONFIG_FILE
    document = _read_document(config_file)
    fields = without_ignored(_model_fields(document, config_file), ignore_fields, UNDERSTOOD, where=config_file)
    # Before any tensor: what is not implemented is named as such, not as a tensor of an odd shape.
    with _located(config_file):
        model = read_fields(fields)
    weight_files = _weight_files(path, fields)
    states = [_load_state_dict(file) for file in weight_files]
    theirs = {}
    for name, first in states[0].items():
        parts = [first]
        if name.rpartition(".")[2] in TABLES and len(states) > 1:
            parts = [_rank_slice(state, name, first, file) for state, file in zip(states, weight_files, strict=True)]
        theirs[name] = CheckpointTensor(name, parts, allow_non_finite)
    tensors = our_tensors(theirs, model, where=weight_files[0])
    facts = tensor_facts(tensors, model, where=weight_files[0])
    with _located(config_file):
        config = model.config(facts, query_layout=query_layout or "released", row_topk=row_topk)
    validate_tensors(config, tensors, where=weight_files[0])
    return Checkpoint(
        path,
        "official",
        config,
        tensors,
        [config_file, *weight_files],
        tokenizer_files(path),
        model.insertion.notes,
        tokenizer=_tokenizer_identifier(document),
        ignored_fields=list(ignore_fields),
    )


@contextlib.contextmanager
def _located(file: Path) -> Iterator[None]:
    """Errors of fields say which file holds them."""
    try:
        yield
    except Umv2Error as error:
        error.where = error.where or str(file)
        raise


def _tokenizer_identifier(document: object) -> str | None:
    """The tokenizer that the run was trained with: a file of the authors' repository, or a name on a hub."""
    section = document.get("tokenizer") if isinstance(document, dict) else None
    return identifier(section.get("identifier")) if isinstance(section, dict) else None


def _read_document(config_file: Path) -> object:
    if not config_file.is_file():
        raise InputRejected("the configuration is not a file", where=config_file)
    if config_file.stat().st_size > MAX_CONFIG_BYTES:
        raise InputRejected(f"the file is larger than {MAX_CONFIG_BYTES} bytes", where=config_file)
    try:
        return yaml.safe_load(config_file.read_text(encoding="utf-8"))
    except Exception as error:  # the constructors of dates and numbers raise whatever they like
        raise InputRejected("not a YAML file", where=config_file, why=" ".join(str(error).split())[:500]) from error


def _model_fields(data: object, config_file: Path) -> Mapping[str, Any]:
    fields = data.get("model") if isinstance(data, dict) else None
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise InputRejected("section 'model' is missing or not a mapping", where=config_file)
    return fields


def _weight_files(path: Path, fields: Mapping[str, Any]) -> list[Path]:
    """model.pt, or rank_0/model.pt .. rank_{P-1}/model.pt: more ranks hold copies of these slices."""
    if (path / WEIGHTS_FILE).exists():
        return [inside(path, WEIGHTS_FILE)]
    if not (path / "rank_0").exists():
        raise InputRejected(f"neither {WEIGHTS_FILE} nor rank_0/{WEIGHTS_FILE} is there", where=path)
    ranks = FieldReader(fields).integer("mem_parallel_size")
    files = []
    for rank in range(ranks):
        name = f"rank_{rank}/{WEIGHTS_FILE}"
        if not (path / name).exists():
            raise InputRejected(f"{name} is missing", where=path, why=f"mem_parallel_size is {ranks}")
        files.append(inside(path, name))
    return files


def _rank_slice(state: Mapping[str, torch.Tensor], name: str, first: torch.Tensor, file: Path) -> torch.Tensor:
    part = state.get(name)
    if part is None:
        raise InputRejected(f"tensor {name!r} missing", where=file, why="each rank holds its own slice of the tables")
    if part.dim() != 2 or first.dim() != 2 or part.shape[0] != first.shape[0]:
        raise InputRejected(
            f"tensor {name!r} has shape {list(part.shape)}, rank 0 has {list(first.shape)}",
            where=file,
            why="the slices are joined along dim 1",
        )
    return part


def _load_state_dict(file: Path) -> dict[str, torch.Tensor]:
    """Map a state dict: only tensors, no code, and no more bytes than the file has."""
    _check_archive(file)
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # corrupt bytes make the unpickler raise nearly anything
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise InputRejected(
                "the file holds more than tensors",
                where=file,
                why="loading it would run code from the file",
                fix="save the state dict alone: torch.save(model.state_dict(), ...)",
            ) from error
        raise InputRejected("the file is truncated or corrupt", where=file, why=_first_line(error)) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise InputRejected("the file is not a state dict of named tensors", where=file)
    for name, value in state.items():
        # Anything else than a plain array could not be mapped, or would not mean what its bytes say.
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_neg():
            raise InputRejected(f"tensor {name!r} is not a plain array", where=file)
    return {name: value.detach() for name, value in state.items()}


def _check_archive(file: Path) -> None:
    """Reject what torch cannot map: no zip archive, or compressed entries, or a pickle of absurd size."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except OSError as error:
        raise InputRejected("the file cannot be read", where=file, why=_first_line(error)) from error
    except (zipfile.BadZipFile, ValueError) as error:
        raise InputRejected(
            "the file is truncated, or no torch checkpoint",
            where=file,
            why=f"not a zip archive ({_first_line(error)})",
            fix="copy the file again; a checkpoint of torch before 1.6 must be saved again with a newer torch",
        ) from error
    for entry in entries:
        too_large = entry.filename.endswith("/data.pkl") and entry.file_size > MAX_PICKLE_BYTES
        if entry.compress_type != zipfile.ZIP_STORED or too_large:
            raise InputRejected(
                f"entry {entry.filename!r} is compressed or too large ({entry.file_size} bytes)",
                where=file,
                why="torch.save stores its entries plain",
            )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
