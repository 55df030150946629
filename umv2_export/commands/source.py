"""The checkpoint that `convert` and `onnx` read, with the tokenizer that goes along."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umv2_export.commands.options import LAYOUTS
from umv2_export.commands.printing import print_notes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from umv2_export.checkpoint import Checkpoint

__all__ = ["open_source"]


def open_source(
    path: Path, output: Path, *, tokenizer: Path | None, query_layout: str, force: bool, **options: Any
) -> "Checkpoint":
    """Check that `output` may be written, then open the checkpoint; its notes are printed.

    Args:
        path: of the checkpoint.
        output: of the command.
        tokenizer: replaces that of the checkpoint.
        query_layout: one of `LAYOUTS`.
        force: replace the output.
        options: of `open_checkpoint`.
    """
    from umv2_export.checkpoint import open_checkpoint
    from umv2_export.records.tokenizer_files import chosen_tokenizer, require_tokenizer_files
    from umv2_export.system.target import check_target

    files: Sequence[Path] | None = None if tokenizer is None else chosen_tokenizer(tokenizer)
    check_target(output, force=force, inputs=[path, *(files or [])])
    checkpoint = open_checkpoint(path, query_layout=LAYOUTS[query_layout], **options)
    if files is not None:
        checkpoint = dataclasses.replace(checkpoint, tokenizer_files=files)
    require_tokenizer_files(checkpoint.tokenizer_files)
    print_notes(checkpoint.notes)
    return checkpoint
