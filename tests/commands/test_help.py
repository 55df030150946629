"""Help texts: every option has one, and every command a line in the list."""

from collections.abc import Iterator

import click
import pytest

from tests.command import run_command
from umv2_export.cli import COMMANDS, cli


def options() -> Iterator[click.Option]:
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        yield from (parameter for parameter in command.params if isinstance(parameter, click.Option))


@pytest.mark.parametrize("option", list(options()), ids=lambda option: option.opts[0])
def test_a_help_text_is_made_of_whole_sentences_with_the_thing_first(option: click.Option) -> None:
    assert option.help is not None
    assert option.help.endswith(".")
    assert not option.help.startswith("Of ")
    assert "is no " not in option.help


def test_the_list_of_commands_cuts_no_sentence() -> None:
    listed = run_command("--help").stdout.partition("Commands:")[2].strip().splitlines()
    assert [line.split()[0] for line in listed] == list(COMMANDS)
    assert all(line.endswith(".") and not line.endswith("...") for line in listed)
