"""Compute capabilities as a user names them, such as 8.6,8.9."""

import re
from collections.abc import Iterable

from umv2_export.errors import InvalidRequest, Unsupported

__all__ = ["parse_compute_capabilities"]


def parse_compute_capabilities(text: str, known: Iterable[str], compiler: str) -> tuple[str, ...]:
    """Compute capabilities separated by commas, in the order of the known ones.

    Args:
        text: what the user typed.
        known: those that can be compiled for.
        compiler: its name, for messages.

    Raises:
        InvalidRequest: not a list of compute capabilities.
        Unsupported: one is not known.
    """
    known = tuple(known)
    names = text.replace(" ", "").split(",")
    for name in names:
        if not re.fullmatch(r"[0-9]{1,2}\.[0-9]", name):
            raise InvalidRequest(f"{name!r} is not a compute capability", fix=f"write {','.join(known[1:3])}")
        if name not in known:
            raise Unsupported(
                f"compute capability {name}",
                why=f"{compiler} compiles for " + ", ".join(known),
                fix="--compute-capability with some of these",
            )
    return tuple(name for name in known if name in names)
