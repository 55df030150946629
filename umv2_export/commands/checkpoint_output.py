"""What `convert` and `init` have in common: they write a checkpoint in our own format."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from umv2_export.commands.printing import format_bytes, format_count, print_dry_run
from umv2_export.system.exits import print_json
from umv2_export.terminal import echo

if TYPE_CHECKING:
    from umv2_export.checkpoint.own_format import TensorStream
    from umv2_export.config import ModelConfig

__all__ = ["write_checkpoint"]


def write_checkpoint(
    config: "ModelConfig",
    streams: "Sequence[TensorStream]",
    output: Path,
    extra_files: Iterable[Path],
    *,
    facts: Mapping[str, object] | None = None,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write a native checkpoint and say what was written."""
    from umv2_export.checkpoint.own_format import WRITER_MEMORY, save_checkpoint
    from umv2_export.config import count_parameters
    from umv2_export.progress import progress_bars
    from umv2_export.system.output import require_free_space

    size = sum(stream.size for stream in streams)
    require_free_space(output, size)
    if dry_run:
        print_dry_run(output, WRITER_MEMORY, size, as_json=as_json)
        return
    with progress_bars() as track:
        save_checkpoint(output, config, streams, extra_files, track, facts=facts, replace_target=force)
    parameters = count_parameters(config).as_dict()
    if as_json:
        files = {file.name: file.stat().st_size for file in sorted(output.iterdir())}
        print_json({"checkpoint": str(output), "files": files, "parameters": parameters})
    else:
        echo(f"{output}: {format_count(parameters['total'])} parameters, {format_bytes(size)}")
