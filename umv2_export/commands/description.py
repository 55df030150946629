"""Nested facts as an indented list, as `env` and `inspect` print them."""

from collections.abc import Mapping, Sequence
from typing import Any

from umv2_export.commands.printing import format_bytes, format_count
from umv2_export.terminal import echo, one_line

__all__ = ["print_description"]


def print_description(description: Mapping[str, Any]) -> None:
    """One line a fact; long lists are cut to the first entries and the last."""
    for name, value in description.items():
        _show(name, value, 0)


def _show(name: str, value: object, indent: int, parent: str = "") -> None:
    pad = "  " * indent
    if isinstance(value, Mapping):
        echo(f"{pad}{one_line(name)}")
        for key, entry in value.items():
            _show(str(key), entry, indent + 1, name)
    elif isinstance(value, Sequence) and not isinstance(value, str) and value and isinstance(value[0], Mapping):
        echo(f"{pad}{one_line(name)} ({len(value)})")
        for entry in value if len(value) <= 4 else (*value[:3], value[-1]):
            facts = "  ".join(str(fact) for fact in entry.values())
            echo(f"{pad}  {one_line(facts)}")
    else:
        text = one_line(f"{name}: {_plain(name, value, parent)}")
        echo(f"{pad}{text}")


def _plain(name: str, value: object, parent: str) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and (name in ("size", "memory_bytes") or parent in ("files", "bytes")):
        return f"{value:,} ({format_bytes(value)})"
    if isinstance(value, int) and parent == "parameters":
        return f"{value:,} ({format_count(value)})"
    if isinstance(value, list | tuple):
        return ", ".join(str(entry) for entry in value) or "none"
    return str(value)
