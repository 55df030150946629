"""Types of parameters that click does not have, and the bounds of numbers."""

import math
from pathlib import Path
from typing import Any

import click

from umv2_export.system.target import check_path

__all__ = [
    "FILE",
    "FOLDER",
    "MOST_CALLS",
    "MOST_SEED",
    "MOST_THREADS",
    "MOST_TOKENS",
    "TEXT_FILE",
    "byte_size",
    "positive",
    "share",
    "sizes",
    "token_ids",
    "tolerance",
]

# The most that a number may be: of threads, which are all started at once; of counted calls, whose times are kept; of
# sequences and tokens, for which memory is taken; of a seed, which generators keep in 64 bits.
MOST_THREADS = 256
MOST_CALLS = 100_000
MOST_TOKENS = 2**20
MOST_SEED = 2**63 - 1

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def share(text: str) -> float:
    """A share above 0 and at most 1, also in percent."""
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise click.BadParameter(f"{text!r} is not a share; write 0.1 or 10%")
    return value


def positive(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise click.BadParameter(f"{text!r} is not a positive number; write a number such as 0.8")
    return value


def byte_size(text: str) -> int:
    """A size such as 2GB (10^9 bytes), 512MiB or 1000000."""
    number = text.strip().upper().rstrip("KMGIB ")
    unit = text.strip().upper()[len(number) :].strip()
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise click.BadParameter(f"{text!r} is not a size; write 2GB, 512MiB or 1000000") from None
    if size < 1:
        raise click.BadParameter(f"{text!r} is below one byte; the default is 2GB")
    return size


def tolerance(text: str) -> float:
    """A finite number, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise click.BadParameter(f"{text!r} is not a tolerance; write a number such as 1e-4")
    return value


def token_ids(text: str) -> tuple[int, ...]:
    """Token ids separated by commas."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of token ids; write 1,2,3") from None


def sizes(text: str) -> tuple[int, ...]:
    """Different sizes separated by commas, in ascending order."""
    numbers = token_ids(text)
    if min(numbers) < 1 or max(numbers) > MOST_TOKENS:
        raise click.BadParameter(f"{text!r} holds a size that is not from 1 to {MOST_TOKENS}; write 1,8,64")
    return tuple(sorted(set(numbers)))


class UsablePath(click.Path):
    """A path that every library can be handed; see `check_path`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse the path before anything is done with it."""
        check_path(Path(value))
        return super().convert(value, param, ctx)


FOLDER = UsablePath(path_type=Path)
FILE = UsablePath(path_type=Path, dir_okay=False)
TEXT_FILE = UsablePath(path_type=Path, dir_okay=False, exists=True)
