"""A folder of any format is recognised by its configuration file."""

from collections.abc import Sequence
from pathlib import Path

from umv2_export.checkpoint import native, official, olmoe
from umv2_export.checkpoint.checkpoint import Checkpoint
from umv2_export.config import QueryLayout
from umv2_export.errors import InputRejected
from umv2_export.files import read_json
from umv2_export.links import require_own_links

__all__ = ["open_checkpoint"]


def open_checkpoint(
    path: Path,
    *,
    query_layout: QueryLayout | None = None,
    row_topk: int | None = None,
    allow_non_finite: bool = False,
    ignore_fields: Sequence[str] = (),
) -> Checkpoint:
    """Open a checkpoint folder of any format.

    Args:
        path: folder with config.yaml and model.pt (or rank_*/model.pt), or with config.json and *.safetensors, native
            or of a Hugging Face OLMoE.
        query_layout: read the query projection in this layout; None: as the format says.
        row_topk: row keys, and column keys, that survive stage 1 of the retrieval; None: as the checkpoint says.
        allow_non_finite: let NaN and infinity in weights through.
        ignore_fields: unknown fields of the configuration that do not change what is computed, as the user says.

    Raises:
        InputRejected: something is missing, corrupt, unsafe or inconsistent.
        Unsupported: a field or tensor that is not implemented.
        InvalidRequest: a field that shall be ignored is not there, or is understood.
    """
    if not path.exists():
        raise InputRejected("no such checkpoint folder", where=path)
    if not path.is_dir():
        raise InputRejected("a checkpoint is a folder, this is a file", where=path, fix=f"pass {path.parent}")
    if (path / official.CONFIG_FILE).exists():
        require_own_links(path, official.CONFIG_FILE)
        return official.read_checkpoint(
            path,
            query_layout=query_layout,
            row_topk=row_topk,
            allow_non_finite=allow_non_finite,
            ignore_fields=ignore_fields,
        )
    if (path / native.CONFIG_FILE).exists():
        if olmoe.is_olmoe(read_json(path / olmoe.CONFIG_FILE), path / olmoe.CONFIG_FILE):
            return olmoe.read_checkpoint(path, allow_non_finite=allow_non_finite, ignore_fields=ignore_fields)
        return native.read_checkpoint(
            path,
            query_layout=query_layout,
            row_topk=row_topk,
            allow_non_finite=allow_non_finite,
            ignore_fields=ignore_fields,
        )
    raise InputRejected(
        "the folder holds no checkpoint",
        where=path,
        why=f"neither {official.CONFIG_FILE} (the authors' format) nor {native.CONFIG_FILE} (native, or a Hugging Face "
        "OLMoE) is there",
    )
