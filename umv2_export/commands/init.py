"""`umv2-export init`."""

from pathlib import Path
from typing import Any

import click

from umv2_export.commands.checkpoint_output import write_checkpoint
from umv2_export.commands.options import json_option, output_options
from umv2_export.commands.parameter_types import MOST_SEED
from umv2_export.commands.refusals import refuse_flags
from umv2_export.presets import PRESETS
from umv2_export.system.target import check_target

__all__ = ["init"]


@click.command()
@click.argument("preset", type=click.Choice(sorted(PRESETS)))
@output_options
@click.option(
    "--seed",
    type=click.IntRange(0, MOST_SEED),
    default=0,
    show_default=True,
    help="Seed of the weights. The same seed gives the same checkpoint.",
)
@click.option(
    "--scheme",
    type=click.Choice(("released", "principled")),
    default="released",
    show_default=True,
    help="Scale of the tables: 0.02 as released, or the paper's appendix A.",
)
@json_option
def init(preset: str, output: Path, seed: int, scheme: Any, force: bool, dry_run: bool, as_json: bool) -> None:
    """Write a randomly initialised checkpoint.

    PRESET is a published or a tiny size.
    """
    from umv2_export.model.initialization import random_tensors

    check_target(output, force=force)
    config = PRESETS[preset]
    if config.memory.layers == 0 and scheme == "released":
        refuse_flags(["scheme"], "the preset has no tables")
    streams = random_tensors(config, seed=seed, scheme=scheme)
    write_checkpoint(config, streams, output, [], force=force, dry_run=dry_run, as_json=as_json)
