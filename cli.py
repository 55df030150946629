"""The command line: parse, call, print, exit code.

A command lies in a file of its own in umv2_export/commands. Results go to stdout, progress and errors to stderr.
"""

import sys
from importlib import import_module
from typing import NoReturn

import click

from umv2_export import __version__
from umv2_export.system.exits import run

__all__ = ["cli", "main"]

COMMANDS = (
    *("bench", "bench-op", "build", "convert", "env", "generate"),
    *("init", "inspect", "kernels", "onnx", "parity", "refit", "verify"),
)


class Commands(click.Group):
    """Loads a command when it is named, and all of them for the list."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order of the alphabet."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, or None where there is none of this name."""
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        command: click.Command = getattr(import_module(f"umv2_export.commands.{name}"), name)
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="umv2-export")
def cli() -> None:
    """Export UltraMemV2 models to ONNX, and prove that the exported model computes the same."""


def main() -> NoReturn:
    """Run the command line; a user's mistake ends with a message and its exit code, never with a traceback."""
    sys.exit(run(cli))


if __name__ == "__main__":
    main()
