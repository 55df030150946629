"""Options that several commands have."""

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, TypeVar

import click

from umv2_export.commands.parameter_types import FILE, FOLDER
from umv2_export.system.exits import note_json

__all__ = [
    "LAYOUTS",
    "Option",
    "checkpoint_options",
    "device_option",
    "engine_options",
    "ignore_field_option",
    "json_option",
    "output_options",
    "reading_options",
    "row_topk_option",
    "tokenizer_option",
]

Command = TypeVar("Command", bound=Callable[..., Any])
Option = Callable[[Command], Command]

# Choice of --query-layout -> how a checkpoint is read.
LAYOUTS: Mapping[str, Any] = {"auto": None, "released": "released", "per-rank": "per_rank"}


def _together(*options: Option[Any]) -> Option[Any]:
    """Options in the order in which the help lists them."""
    return lambda command: reduce(lambda decorated, option: option(decorated), reversed(options), command)


json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    is_eager=True,
    callback=note_json,
    help="Print one JSON object and nothing else.",
)

output_options = _together(
    click.option("-o", "--output", required=True, type=FOLDER, help="Output folder."),
    click.option("--force", is_flag=True, help="Replace an output folder that is not empty."),
    click.option("--dry-run", is_flag=True, help="Run all checks and print the memory and disk needed. Write nothing."),
)

tokenizer_option = click.option(
    "--tokenizer", type=FOLDER, metavar="FILE", help="tokenizer.json of the model. Default: the one in its folder."
)

# What a checkpoint does not tell of itself.

row_topk_option = click.option(
    "--row-topk",
    type=click.IntRange(1, 2**31 - 1),
    help="Row keys, and column keys, that survive stage 1 of a retrieval. Default: as the checkpoint says.",
)

ignore_field_option = click.option(
    "--ignore-field",
    "ignore_fields",
    multiple=True,
    metavar="NAME",
    help="Leave out a field of the configuration that this tool does not know. The result records it. Repeatable.",
)

reading_options = _together(
    row_topk_option,
    click.option(
        "--query-layout",
        type=click.Choice(list(LAYOUTS)),
        default="auto",
        show_default=True,
        help="Which query serves which side and Tucker rank. auto: as the checkpoint's format says.",
    ),
    ignore_field_option,
)

checkpoint_options = _together(
    reading_options,
    click.option("--allow-non-finite", is_flag=True, help="Let NaN and infinity in weights through."),
)

device_option = click.option(
    "--device",
    type=click.Choice(("cpu", "cuda")),
    default="cpu",
    show_default=True,
    help="Where PyTorch computes. cuda: the GPU kernels of this package take the place of its ops.",
)

engine_options = _together(
    click.option("--engine", type=FOLDER, help="Engine of BUNDLE, for the runtimes tensorrt and tensorrt-rtx."),
    click.option("--trust-engine", is_flag=True, help="Load the engine though it differs from its manifest."),
    click.option("--plugin-library", type=FILE, help="Library of the plugins, if the engine was built with one."),
)
