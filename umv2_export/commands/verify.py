"""`umv2-export verify`."""

from pathlib import Path

import click

from umv2_export.commands.options import json_option
from umv2_export.commands.parameter_types import FOLDER
from umv2_export.system.exits import print_json
from umv2_export.terminal import echo

__all__ = ["verify"]


@click.command()
@click.argument("path", type=FOLDER)
@json_option
def verify(path: Path, as_json: bool) -> None:
    """Check sizes and hashes of a bundle or an engine.

    The manifest says what they are.
    """
    from umv2_export.bundle import Bundle
    from umv2_export.engines.manifest import ENGINE_MANIFEST_FILE, verify_engine

    if (path / ENGINE_MANIFEST_FILE).is_file():
        verify_engine(path)
        kind, files, agreement = "engine", 1, "the engine agrees with its manifest"
    else:
        opened = Bundle(path)
        opened.verify()
        kind, files = "bundle", len(opened.manifest.files)
        agreement = f"{files} files agree with the manifest"
    if as_json:
        print_json({kind: str(path), "passed": True, "files": files})
    else:
        echo(f"{path}: {agreement}")
