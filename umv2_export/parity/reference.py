"""The checkpoint that a bundle is compared with."""

from collections.abc import Sequence
from pathlib import Path

from umv2_export.bundle import Bundle
from umv2_export.checkpoint import Checkpoint, open_checkpoint
from umv2_export.errors import Unsupported

__all__ = ["open_reference"]


def open_reference(path: Path, bundle: Bundle, *, row_topk: int | None, ignore_fields: Sequence[str]) -> Checkpoint:
    """Open a checkpoint in the way in which the bundle was exported.

    Args:
        path: of the checkpoint.
        bundle: records how many row keys survive stage 1. That counts only where the checkpoint does not tell it: a
            cap that it tells is compared with the bundle's.
        row_topk: the user's word for it.
        ignore_fields: of the checkpoint's configuration.

    Raises:
        InputRejected: this is not a checkpoint.
        Unsupported: it has fields or sizes that this tool does not know.
    """
    try:
        return open_checkpoint(path, row_topk=row_topk, ignore_fields=ignore_fields)
    except Unsupported:
        recorded = bundle.config.memory.row_topk or None
        return open_checkpoint(path, row_topk=row_topk or recorded, ignore_fields=ignore_fields)
