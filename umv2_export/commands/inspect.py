"""`umv2-export inspect`."""

from pathlib import Path
from typing import Any

import click

from umv2_export.commands.options import LAYOUTS, json_option, reading_options
from umv2_export.commands.parameter_types import FOLDER
from umv2_export.commands.printing import print_notes
from umv2_export.commands.refusals import RETRIEVAL_FLAGS, refuse_flags, refuse_flags_of_absent_parts
from umv2_export.system.exits import print_json

__all__ = ["inspect"]


@click.command()
@click.argument("path", type=FOLDER)
@reading_options
@json_option
def inspect(path: Path, query_layout: str, as_json: bool, **reading: Any) -> None:
    """Describe a checkpoint, a bundle, an engine or an .onnx file.

    It shows the configuration, sizes, ops and parameter counts.
    """
    from umv2_export.commands.description import print_description
    from umv2_export.config import ModelConfig
    from umv2_export.inspection import describe_path

    facts = describe_path(path, query_layout=LAYOUTS[query_layout], **reading)
    if facts["kind"] == "checkpoint":
        refuse_flags_of_absent_parts(ModelConfig.from_dict(facts["config"]), RETRIEVAL_FLAGS, where=path)
    else:
        refuse_flags(
            ["query_layout", *reading], "it says how a checkpoint is read, and this is not a checkpoint", where=path
        )
    print_notes(facts.get("notes", []))
    print_json(facts) if as_json else print_description(facts)
