"""Bounds of a configuration's numbers, and the errors of those that leave them."""

from umv2_export.errors import InputRejected, Unsupported

__all__ = ["INT32_MAX", "MOST_EXPERTS", "MOST_REPEATS", "require_choice", "require_few", "require_positive"]

INT32_MAX = 2**31 - 1

# Far above any published model. A config names one tensor, or makes one list entry, for each of them: without a bound a
# few bytes of an untrusted file would fill the memory.
MOST_REPEATS = 1024
MOST_EXPERTS = 16384


def require_positive(name: str, value: int) -> None:
    """Refuse a size that is not from 1 to the end of int32.

    Raises:
        InputRejected: it is not.
    """
    if not 1 <= value <= INT32_MAX:
        raise InputRejected(f"{name} must be from 1 to {INT32_MAX}, got {value}")


def require_few(name: str, value: int) -> None:
    """Refuse more of something than is ever repeated.

    Raises:
        Unsupported: there are more.
    """
    if value > MOST_REPEATS:
        raise Unsupported(f"{name} is {value}, at most {MOST_REPEATS} are supported")


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a word that is not one of these.

    Raises:
        Unsupported: it is another.
    """
    if value not in choices:
        raise Unsupported(f"{name} is {value!r}", fix="supported values: " + ", ".join(choices))
