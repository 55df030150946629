"""`umv2-export convert`."""

from pathlib import Path
from typing import Any

import click

from umv2_export.commands.checkpoint_output import write_checkpoint
from umv2_export.commands.options import checkpoint_options, json_option, output_options, tokenizer_option
from umv2_export.commands.parameter_types import FOLDER
from umv2_export.commands.refusals import RETRIEVAL_FLAGS, refuse_flags_of_absent_parts
from umv2_export.commands.source import open_source

__all__ = ["convert"]


@click.command()
@click.argument("official", type=FOLDER)
@output_options
@tokenizer_option
@checkpoint_options
@json_option
def convert(official: Path, output: Path, force: bool, dry_run: bool, as_json: bool, **source: Any) -> None:
    """Convert a checkpoint to config.json and safetensors.

    OFFICIAL is a checkpoint of the authors, or an OLMoE of Hugging Face.
    """
    from umv2_export.checkpoint.own_format import checkpoint_facts, checkpoint_streams

    checkpoint = open_source(official, output, force=force, **source)
    refuse_flags_of_absent_parts(checkpoint.config, RETRIEVAL_FLAGS, where=checkpoint.path)
    write_checkpoint(
        checkpoint.config,
        checkpoint_streams(checkpoint),
        output,
        checkpoint.tokenizer_files,
        facts=checkpoint_facts(checkpoint),
        force=force,
        dry_run=dry_run,
        as_json=as_json,
    )
