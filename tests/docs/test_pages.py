"""README and the pages of docs/ say what is true: their commands run and print what is shown, their flags exist.

A block runs unless the line before it says why not, in a comment that the reader does not see:

    <!-- not run: trains for an hour -->

Commands of such a block are parsed, by the command line's own parser, and no more. Blocks of other languages than
those in RUN are no commands: listings of folders, what other programs print, C++.
"""

import difflib
import importlib.util
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pytest

import umv2_export.cli
from tests.command import run_command
from tests.docs.pages import PAGES, ROOT, WRITTEN, Block, Command, blocks, commands, inline_code, links, page_name

Exported = Callable[..., tuple[Path, dict[str, Any]]]

RUN = {"sh", "console", "python"}
SHOWN = {"text", "cpp", "mermaid"}

# Bundles that a page takes for granted, and how they were made.
BUNDLES: dict[str, tuple[str, ...]] = {"bundle": ("umv2",), "inlined": ("v2_shared_ring", "--inline-functions")}

# Flags of other programs that pages name.
OTHERS = {"--dynamicPlugins", "--setPluginsToSerialize", "--staticPlugins", "--safe-tensors", "--fold-constants"}

_FIGURE = re.compile(r"\d[\d.,]*(?:e[-+]?\d+)?")

each_page = pytest.mark.parametrize("page", PAGES, ids=page_name)


@pytest.fixture
def folder(page: Path, tmp_path: Path, exported: Exported, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the reader of a page types: the root of the project, with the bundles that the page does not make."""
    text = "".join(block.text for block in blocks(page) if block.language in RUN and block.reason is None)
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    for name, arguments in BUNDLES.items():
        if re.search(rf"\b{name}\b", text) and f"-o {name}" not in text:
            (tmp_path / name).symlink_to(exported(*arguments)[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@each_page
@pytest.mark.usefixtures("folder")
def test_the_blocks_of_a_page_run_and_print_what_it_shows(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python" and block.reason is None:
            exec(compile(block.text, block.place, "exec"), {"__name__": "__main__"})
        elif block.language in RUN and block.reason is None:
            for command in commands(block):
                run(command, block)


def run(command: Command, block: Block) -> None:
    """Type a command of a block that runs."""
    program, *arguments = shlex.split(command.line, comments=True)
    if program == "make":
        require_targets(arguments)
        return
    assert program == "umv2-export", f"{block.place}: {program} is not run here; say why in a comment before the block"
    result = run_command(*arguments)
    assert result.exit_code == 0, f"{block.place}: {command.line}\n{result.stderr}"
    if command.output is not None:
        difference = compare(command.output, result.stdout)
        assert difference is None, f"{block.place}: {command.line}\n{difference}"


def compare(shown: str, printed: str) -> str | None:
    """What differs, figures aside; a line `...` stands for any lines."""
    expected, found = (_FIGURE.sub("#", re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)) for text in (shown, printed))
    pieces = [re.escape(piece) for piece in re.split(r"^\.\.\.\n?", expected.strip() + "\n", flags=re.MULTILINE)]
    if re.fullmatch(r"(?:.*\n)*?".join(pieces), found.strip() + "\n"):
        return None
    return "\n".join(difflib.unified_diff(expected.splitlines(), found.splitlines(), "shown", "printed", lineterm=""))


def require_targets(arguments: Sequence[str]) -> None:
    """Targets of the Makefile."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(arguments) <= set(targets)


@each_page
def test_every_block_says_what_it_is(page: Path) -> None:
    for block in blocks(page):
        assert block.language in RUN | SHOWN, f"{block.place}: a block of {block.language or 'no language'}"
        assert block.reason is None or block.language in RUN, f"{block.place}: is not run anyway"


@each_page
def test_what_is_not_run_has_no_unknown_command_or_option(page: Path) -> None:
    for block in blocks(page):
        if block.language in RUN - {"python"} and block.reason is not None:
            for command in commands(block):
                program, *arguments = shlex.split(command.line, comments=True)
                if program == "make":
                    require_targets(arguments)
                elif program == "umv2-export":
                    parse(arguments, where=block.place)
                elif program == "python" and arguments[0] == "-m":
                    assert importlib.util.find_spec(arguments[1]), f"{block.place}: there is no {arguments[1]}"


def parse(arguments: Sequence[str], *, where: str, whole: bool = True) -> None:
    """Let the command line's own parser read a command, and convert all but paths.

    Args:
        arguments: after the program's name.
        where: page and line.
        whole: nothing that the command requires is left out.
    """
    try:
        outer = click.Context(umv2_export.cli.cli, info_name="umv2-export")
        name, command, rest = umv2_export.cli.cli.resolve_command(outer, list(arguments))
        assert command is not None
        inner = click.Context(command, info_name=name, parent=outer, resilient_parsing=not whole)
        values, unknown, _ = command.make_parser(inner).parse_args(list(rest))
        assert not unknown, f"{where}: {unknown} is too much"
        for parameter in command.params:
            given = parameter.name in values and not parameter.value_is_missing(values[parameter.name])
            if given and not isinstance(parameter.type, click.Path):
                parameter.type_cast_value(inner, values[parameter.name])
            assert given or not (whole and parameter.required), f"{where}: {parameter.name} is missing"
    except click.UsageError as error:
        pytest.fail(f"{where}: umv2-export {' '.join(arguments)}: {error.format_message()}")


def options() -> Iterator[str]:
    """Every option of every command."""
    context = click.Context(umv2_export.cli.cli)
    for name in umv2_export.cli.cli.list_commands(context):
        command = umv2_export.cli.cli.get_command(context, name)
        assert command is not None
        yield "--help"
        for parameter in command.params:
            yield from (*parameter.opts, *parameter.secondary_opts)


@each_page
def test_commands_and_options_within_the_text_exist(page: Path) -> None:
    known = {*options(), *OTHERS}
    for code in inline_code(page):
        if code.startswith("umv2-export "):
            parse(shlex.split(code)[1:], where=f"{page_name(page)}: `{code}`", whole=False)
        flags = set(re.findall(r"(?<!\S)--[a-zA-Z][-\w]*", code))
        assert flags <= known, f"{page_name(page)}: `{code}`: {sorted(flags - known)} is not an option of a command"


@each_page
def test_targets_of_make_and_extras_of_pip_exist(page: Path) -> None:
    for code in inline_code(page):
        if code.startswith("make "):
            require_targets(code.split()[1:])
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    extras = re.findall(r"^([a-z]+) = \[", section, flags=re.MULTILINE)
    assert extras
    for named in re.findall(r"umv2-export\[([a-z,]+)\]", page.read_text(encoding="utf-8")):
        assert set(named.split(",")) <= set(extras)


@each_page
def test_files_of_the_project_that_a_page_names_exist(page: Path) -> None:
    for code in set(inline_code(page)) - {WRITTEN}:
        if re.fullmatch(r"(umv2_export|kernels|plugins|samples|benchmarks|tests|docs)/[\w./*-]*", code):
            assert list(ROOT.glob(code.rstrip("/"))), f"{page_name(page)}: there is no {code}"


def test_the_page_of_commands_has_every_command() -> None:
    named = {code.split()[0] for code in inline_code(ROOT / "docs" / "commands.md") if code}
    assert set(umv2_export.cli.cli.list_commands(click.Context(umv2_export.cli.cli))) <= named


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        path, _, heading = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page_name(page)}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, f"{page_name(page)}: {target}"


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("bundle: 7 files, 6.834 MB", "bundle: 8 files, 7.1 MB\n", True),
        ("a\n...\nz", "a\nb\nc\nz\n", True),
        ("...\nz", "z", True),
        ("passed", "failed", False),
        ("a\nz", "a\nb\nz", False),
    ],
)
def test_output_is_compared_without_its_figures(shown: str, printed: str, same: bool) -> None:
    assert (compare(shown, printed) is None) == same


@pytest.mark.parametrize(
    "line", ["onnx run -o bundle --dtyp fp16", "export run -o bundle", "onnx run", "onnx run -o b --dtype fp8"]
)
def test_a_command_that_has_changed_is_found(line: str) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        parse(line.split(), where="a page")


def test_a_block_that_is_not_run_says_why_on_the_line_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.docs.pages.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("<!-- not run: an hour -->\n```sh\nmake a\n```\n\ntext\n\n```console\n$ b \\\n  c\nout\n```\n")
    first, second = blocks(page)
    assert (first.reason, first.language, first.place) == ("an hour", "sh", "page.md:2")
    assert second.reason is None
    assert [command.output for command in commands(second)] == ["out"]
    assert shlex.split(commands(second)[0].line) == ["b", "c"]
