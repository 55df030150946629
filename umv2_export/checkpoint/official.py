"""The authors' format: `config.yaml` beside the weights, in whichever layout the trainer's checkpointer wrote them.

Source: the released training code (an OLMoE fork).
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from umv2_export.checkpoint.checkpoint import Checkpoint, CheckpointTensor, ReadOptions, validate_tensors
from umv2_export.checkpoint.config_file import CONFIG_FILE, read_model_fields, read_yaml
from umv2_export.checkpoint.fields import identifier, without_ignored
from umv2_export.checkpoint.official_config import read_fields
from umv2_export.checkpoint.official_fields import UNDERSTOOD
from umv2_export.checkpoint.official_tensors import our_tensors, tensor_facts
from umv2_export.checkpoint.weight_files import load_weights
from umv2_export.config import TABLES
from umv2_export.errors import InputRejected, located
from umv2_export.records.tokenizer_files import tokenizer_files

__all__ = ["CONFIG_FILE", "read_checkpoint"]


def read_checkpoint(path: Path, options: ReadOptions) -> Checkpoint:
    """Open a checkpoint in the authors' format.

    Raises:
        InputRejected: a file is missing, corrupt, unsafe or contradicts the configuration.
        Unsupported: a field or tensor that is not implemented.
        InvalidRequest: a field that shall be ignored is not there, or is understood.
    """
    config_file = path / CONFIG_FILE
    fields = without_ignored(read_model_fields(config_file), options.ignore_fields, UNDERSTOOD, where=config_file)
    # Before any tensor: what is not implemented is named as such, not as a tensor of an odd shape.
    query_layout = options.query_layout or "released"
    with located(config_file):
        model = read_fields(fields)
        model.check(query_layout=query_layout, row_topk=options.row_topk)
        ranks = load_weights(path, fields)
    weight_files = [file for rank in ranks for file in rank.files]
    theirs = {}
    for name, first in ranks[0].tensors.items():
        parts = [first]
        if name.rpartition(".")[2] in TABLES and len(ranks) > 1:
            parts = [_rank_slice(rank.tensors, name, first, rank.files[-1]) for rank in ranks]
        theirs[name] = CheckpointTensor(name, parts, options.allow_non_finite)
    with located(weight_files[0]):
        tensors = our_tensors(theirs, model)
        facts = tensor_facts(tensors, model)
        with located(config_file):
            config = model.config(facts, query_layout=query_layout, row_topk=options.row_topk)
        validate_tensors(config, tensors)
    notes = dict.fromkeys(note for rank in ranks for note in rank.notes)
    return Checkpoint(
        path,
        "official",
        config,
        tensors,
        [config_file, *weight_files],
        tokenizer_files(path),
        (*notes, *model.insertion.notes),
        never_added=model.insertion.notes,
        tokenizer=_tokenizer_identifier(read_yaml(config_file)),
        ignored_fields=list(options.ignore_fields),
    )


def _tokenizer_identifier(document: object) -> str | None:
    """The tokenizer that the run was trained with: a file of the authors' repository, or a name on a hub."""
    section = document.get("tokenizer") if isinstance(document, dict) else None
    return identifier(section.get("identifier")) if isinstance(section, dict) else None


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
