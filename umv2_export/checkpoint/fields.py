"""Fields of a configuration that are asked to be left out, and names that only people read."""

from collections.abc import Container, Mapping, Sequence
from typing import Any

from umv2_export.errors import InvalidRequest, shown

__all__ = ["identifier", "ignore_fix", "without_ignored"]

# A path or a name on a hub; more is an attack or another field.
LONGEST_IDENTIFIER = 500


def without_ignored(
    fields: Mapping[str, Any], names: Sequence[str], understood: Container[str], *, where: object
) -> dict[str, Any]:
    """The fields without those that the user vouches for.

    Args:
        fields: of a configuration.
        names: to be left out: fields that this tool does not know.
        understood: fields that decide what is computed, and are followed or refused.
        where: the file.

    Raises:
        InvalidRequest: a name is not there, or is understood.
    """
    for name in names:
        if name not in fields:
            raise InvalidRequest(f"--ignore-field {shown(name)}: the configuration has no such field", where=where)
        if name in understood:
            raise InvalidRequest(
                f"--ignore-field {shown(name)}: this field is understood, and decides what is computed", where=where
            )
    return {name: value for name, value in fields.items() if name not in names}


def ignore_fix(name: str) -> str:
    """What to do about an unknown field."""
    return f"if you know that it does not change what is computed: --ignore-field {name}"


def identifier(value: object) -> str | None:
    """A name of a tokenizer from an untrusted file; None where there is not a usable one."""
    return value if isinstance(value, str) and 0 < len(value) <= LONGEST_IDENTIFIER and value.isprintable() else None
