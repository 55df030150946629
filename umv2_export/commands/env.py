"""`umv2-export env`."""

import click

from umv2_export.commands.options import json_option
from umv2_export.system.exits import print_json

__all__ = ["env"]


@click.command()
@json_option
def env(as_json: bool) -> None:
    """Show versions, CPU features, GPU and usable runtimes."""
    from umv2_export.commands.description import print_description
    from umv2_export.environment import describe_environment

    facts = describe_environment()
    print_json(facts) if as_json else print_description(facts)
