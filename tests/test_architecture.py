"""The house against its page, docs/architecture.md: imports run downwards and in no circle, files are short."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "umv2_export"
PAGE = ROOT / "docs" / "architecture.md"
MOST_LINES = 400
SOURCES = (".py", ".cpp", ".h", ".cu")


def order() -> dict[str, int]:
    """Name of a layer's part -> number of the layer; a larger number lies lower."""
    section = PAGE.read_text(encoding="utf-8").partition("## The order of the layers")[2].partition("\n## ")[0]
    lines = re.findall(r"^(\d+)\. ((?:`\w+`(?:, )?)+)", section, re.MULTILINE)
    return {name: int(number) for number, names in lines for name in re.findall(r"`(\w+)`", names)}


def modules() -> dict[str, Path]:
    """Every module of the installation, under its installed name."""
    found = {f"{PACKAGE}.cli": ROOT / "cli.py"}
    for folder in (PACKAGE, "plugins", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if parts[0] == PACKAGE else (PACKAGE, *parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def part_of(module: str) -> str:
    """The name under which the page lists a module."""
    return [*module.split("."), PACKAGE][1]


def imported(source: str, module: str, *, is_package: bool, known: set[str]) -> Iterator[str]:
    """Modules among `known` that a module imports, in functions too; those for type checks alone are left out."""

    def named(name: str) -> Iterator[str]:
        while name and name not in known:
            name = name.rpartition(".")[0]
        if name and name != module:
            yield name

    def walk(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in node.orelse:
                yield from walk(other)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from named(alias.name)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: None if is_package else -1]
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield from named(f"{base}.{alias.name}")
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    yield from walk(ast.parse(source))


def arrows() -> dict[str, set[str]]:
    """Module -> modules that it imports."""
    files = modules()
    return {
        module: set(
            imported(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py", known=set(files))
        )
        for module, path in files.items()
    }


def upward(found: dict[str, set[str]], layers: dict[str, int]) -> set[str]:
    """Imports from a layer above."""
    return {
        f"{module} -> {other}"
        for module, others in found.items()
        for other in others
        if layers[part_of(other)] < layers[part_of(module)]
    }


def circle(found: dict[str, set[str]]) -> list[str]:
    """Modules that import each other, or nothing."""
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def long_files() -> set[str]:
    """Sources outside the tests with too many lines."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "." and path.name != "tests"]
    files = [*ROOT.glob("*.py"), *(file for folder in folders for file in folder.rglob("*"))]
    return {
        file.relative_to(ROOT).as_posix()
        for file in files
        if file.suffix in SOURCES and "build" not in file.parts and len(file.read_bytes().splitlines()) > MOST_LINES
    }


def test_the_page_has_a_layer_for_every_module_and_no_other() -> None:
    assert {part_of(module) for module in modules()} == order().keys()


def test_no_import_runs_upwards() -> None:
    assert upward(arrows(), order()) == set()


def test_no_imports_form_a_circle() -> None:
    assert circle(arrows()) == []


def test_no_file_has_more_than_400_lines() -> None:
    assert long_files() == set()


def test_the_files_that_the_page_names_exist() -> None:
    named = re.findall(r"`([\w./]+/[\w./]+)`", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 20
    assert {name for name in named if not (ROOT / name).exists()} == set()


@pytest.mark.parametrize(
    "source",
    [
        "import a.c",
        "from a import c",
        "from a.c import name",
        "from . import c",
        "from .c import name",
        "def f():\n    from ..a.c import name",
        "if TYPE_CHECKING:\n    pass\nelse:\n    import a.c",
    ],
)
def test_an_import_is_seen_however_it_is_written(source: str) -> None:
    assert set(imported(source, "a.b", is_package=False, known={"a.b", "a.c"})) == {"a.c"}


def test_an_import_for_type_checks_is_none() -> None:
    source = "if TYPE_CHECKING:\n    import a.c"
    assert list(imported(source, "a.b", is_package=False, known={"a.b", "a.c"})) == []


def test_an_upward_arrow_and_a_circle_are_found() -> None:
    found = {f"{PACKAGE}.low": {f"{PACKAGE}.high"}, f"{PACKAGE}.high": {f"{PACKAGE}.low"}}
    assert upward(found, {"high": 1, "low": 2}) == {f"{PACKAGE}.low -> {PACKAGE}.high"}
    assert len(circle(found)) == 3
