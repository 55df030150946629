"""The errors that a user can meet, each with the exit code of the command that raises it."""

__all__ = [
    "CheckFailed",
    "EnvironmentUnfit",
    "InputRejected",
    "InvalidRequest",
    "Umv2Error",
    "Unsupported",
]


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
        return "\n".join([self.what, *(f"  {name}: {text}" for name, text in details if text)])

    def as_json(self) -> dict[str, object]:
        """The same facts for `--json`."""
        facts = {"what": self.what, "where": self.where, "why": self.why, "fix": self.fix}
        return {"error": {"exit_code": self.exit_code, **{k: v for k, v in facts.items() if v}}}


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
