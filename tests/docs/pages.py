"""The pages of the documentation as data: fenced blocks with the reason why one is not run, commands, inline code."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

__all__ = ["PAGES", "ROOT", "WRITTEN", "Block", "Command", "blocks", "commands", "inline_code", "links", "page_name"]

ROOT = Path(__file__).parents[2]

# `make gpu` writes this one.
WRITTEN = "docs/gpu-results.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted({*(ROOT / "docs").glob("*.md")} - {ROOT / WRITTEN})]

# What a reader does not see: <!-- not run: trains for an hour -->, on the line before a block.
_NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.+) -->\s*")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        place: page and line.
        language: after the opening fence; `console` has commands behind `$ ` and what they print, `sh` has commands.
        text: between the fences.
        reason: why it is not run; None: it is.
    """

    place: str
    language: str
    text: str
    reason: str | None


@dataclass(frozen=True)
class Command:
    """A line to type, with what it then shows; None: the page shows nothing of it."""

    line: str
    output: str | None


def page_name(page: Path) -> str:
    """Relative to the root."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    found, reason = [], None
    for token in _parsed(page):
        if token.type == "fence":
            place = f"{page_name(page)}:{token.map[0] + 1 if token.map else 0}"
            found.append(Block(place, token.info.strip(), token.content, reason))
        match = _NOT_RUN.fullmatch(token.content) if token.type == "html_block" else None
        reason = match["reason"] if match else None
    return found


def commands(block: Block) -> list[Command]:
    """What a block of the languages `sh` and `console` says to type; a line that ends in a backslash goes on."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "sh":
        return [Command(line, None) for line in lines if line.strip() and not line.startswith("#")]
    found: list[tuple[str, list[str]]] = []
    for line in lines:
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return [Command(line, "\n".join(shown).strip("\n") if shown else None) for line, shown in found]


def inline_code(page: Path) -> Iterator[str]:
    """Every piece of code within a text or a table."""
    for token in _parsed(page):
        for child in token.children or ():
            if child.type == "code_inline":
                yield child.content


def links(page: Path) -> Iterator[str]:
    """Targets of links and pictures that are no addresses of the network."""
    for token in _parsed(page):
        for child in token.children or ():
            target = child.attrs.get("href" if child.type == "link_open" else "src")
            if isinstance(target, str) and "://" not in target:
                yield target


def _parsed(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
