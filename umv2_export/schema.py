"""The fields of a manifest that is not trusted: for each, a test that its value must pass before any code uses it."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from umv2_export.errors import InputRejected, shown

__all__ = [
    "Test",
    "check_fields",
    "either",
    "flag",
    "integer",
    "list_of",
    "mapping",
    "one_of",
    "record",
    "sha256",
    "text",
]

Test = Callable[[Any], bool]

# What numpy, torch and files can count to.
LARGEST = 2**63 - 1

_MAX_TEXT = 4096


def check_fields(document: Mapping[str, Any], fields: Mapping[str, Test], *, where: Path) -> None:
    """See that a document has each of these fields, in its form, and no other.

    Raises:
        InputRejected: one is missing, malformed or unknown.
    """
    for name, test in fields.items():
        if name not in document or not test(document[name]):
            why = f"it is {shown(document[name])}" if name in document else None
            raise InputRejected(f"field {name!r} is missing or malformed", where=where, why=why)
    for name in document:
        if name not in fields:
            raise InputRejected(
                f"field {shown(name)} is unknown", where=where, why="what it means, this version ignores"
            )


def text(value: Any) -> bool:
    """A string of a length that a message can hold."""
    return isinstance(value, str) and len(value) <= _MAX_TEXT


def sha256(value: Any) -> bool:
    """64 hexadecimal digits."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def flag(value: Any) -> bool:
    """True or false."""
    return isinstance(value, bool)


def integer(least: int = 0, most: int = LARGEST) -> Test:
    """An integer from `least` to `most`."""
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def one_of(*choices: str | None) -> Test:
    """One of these words."""
    return lambda value: (value is None or isinstance(value, str)) and value in choices


def either(*tests: Test) -> Test:
    """A value of one form or another."""
    return lambda value: any(test(value) for test in tests)


def list_of(test: Test) -> Test:
    """A list of such values."""
    return lambda value: isinstance(value, list) and all(map(test, value))


def mapping(test: Test) -> Test:
    """An object of any names with such values."""
    return lambda value: isinstance(value, dict) and all(map(test, value.values()))


def record(fields: Mapping[str, Test], *, whole: bool = True) -> Test:
    """An object of just these names; some of them, where it need not be whole."""
    return lambda value: (
        isinstance(value, dict)
        and (value.keys() == fields.keys() if whole else value.keys() <= fields.keys())
        and all(fields[name](entry) for name, entry in value.items())
    )
