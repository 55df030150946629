"""The errors that a user can meet, each with the exit code of the command that raises it."""

import contextlib
import reprlib
from collections.abc import Iterator

from umv2_export.terminal import printable

__all__ = [
    "BuildFailed",
    "CheckFailed",
    "EnvironmentUnfit",
    "InputRejected",
    "InvalidRequest",
    "Umv2Error",
    "Unsupported",
    "located",
    "shown",
]

# Aliases and long numbers let a small untrusted file hold a value whose text never ends.
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict, _REPR.maxstring = 2, 4, 4, 120


def shown(value: object) -> str:
    """A value from a file, cut to what a message can hold."""
    return _REPR.repr(value)


class Umv2Error(Exception):
    """Base of all errors shown to the user without a traceback.

    Args:
        what: what went wrong, naming the field, tensor or file and both values that disagree.
        where: the file or folder concerned.
        why: the reason, where the first line does not say it.
        fix: what the user can do.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: object = None, why: str | None = None, fix: str | None = None) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.why = why
        self.fix = fix
        super().__init__(self.message())

    def message(self) -> str:
        """The text for a terminal: one line for what, one for each of where, why and fix that is known."""
        details = (("where", self.where), ("why", self.why), ("fix", self.fix))
        return "\n".join([printable(self.what), *(f"  {name}: {printable(text)}" for name, text in details if text)])

    def as_json(self) -> dict[str, object]:
        """The same facts for `--json`."""
        facts = {"what": self.what, "where": self.where, "why": self.why, "fix": self.fix}
        return {"error": {"exit_code": self.exit_code, **{k: v for k, v in facts.items() if v}}}


@contextlib.contextmanager
def located(where: object) -> Iterator[None]:
    """Let errors that do not say where they arose name this file or folder."""
    try:
        yield
    except Umv2Error as error:
        error.where = error.where or (None if where is None else str(where))
        raise


class CheckFailed(Umv2Error):
    """A check ran and its answer is no: parity, hashes."""

    exit_code = 1


class InvalidRequest(Umv2Error):
    """The command's own arguments cannot be followed."""

    exit_code = 2


class InputRejected(Umv2Error):
    """A file is missing, corrupt, unsafe or contradicts itself."""

    exit_code = 3


class EnvironmentUnfit(Umv2Error):
    """The machine lacks something: a package, a provider, disk space."""

    exit_code = 4


class Unsupported(Umv2Error):
    """The input is sound, but this tool implements no such field, size or dtype."""

    exit_code = 5


class BuildFailed(Umv2Error):
    """A compiler or an engine builder failed on input that was found fit for it."""

    exit_code = 6
