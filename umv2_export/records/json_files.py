"""JSON from files that are not trusted: what parses here cannot surprise the code that works with it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from umv2_export.errors import InputRejected
from umv2_export.system.links import require_own_links

__all__ = ["parse_json", "read_json"]

# Far above any configuration, index or manifest: a larger file is not read into memory.
MAX_JSON_BYTES = 16 * 2**20

# Real documents nest 6 deep. Python's own limit would be met later, by whatever walks through the result.
MAX_DEPTH = 64

# Tokenizers write 10^30 for "no limit". Far longer integers exceed the range of floats, and Python prints none of more
# than 4,300 digits.
MAX_DIGITS = 100


def read_json(file: Path) -> Mapping[str, Any]:
    """A JSON object; see `parse_json` for what is refused.

    Raises:
        InputRejected: the file is missing, too large, behind another user's link, or holds none.
    """
    require_own_links(file.parent, file.name)
    if not file.is_file():
        raise InputRejected("file missing", where=file)
    with file.open("rb") as stream:
        content = stream.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise InputRejected(f"the file is larger than {MAX_JSON_BYTES} bytes", where=file)
    try:
        data = parse_json(content.decode())
    except ValueError as error:
        raise InputRejected("not a JSON file", where=file, why=str(error)) from error
    if not isinstance(data, dict):
        raise InputRejected("expected a JSON object", where=file)
    return data


def parse_json(text: str) -> Any:
    """Parse one JSON value.

    Raises:
        ValueError: it is not JSON, or is one of the things that Python's parser lets through: NaN and infinity, a name
            that stands twice in an object, a number that nothing here can hold, half a surrogate pair, or lists in
            lists without end.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_int=_integer, parse_float=_real, parse_constant=_constant
        )
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    _check_values(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{name[:120]!r} stands twice in an object")
        result[name] = value
    return result


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _real(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"number {text[:40]} is out of range")
    return value


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _check_values(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for entry in level:
            if isinstance(entry, dict):
                below += entry.keys()
                below += entry.values()
            elif isinstance(entry, list):
                below += entry
            elif isinstance(entry, str):
                entry.encode()  # a surrogate raises UnicodeEncodeError, a ValueError
        if not below:
            return
        level = below
    raise ValueError(f"it nests more than {MAX_DEPTH} deep")
