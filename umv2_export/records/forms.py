"""Records from files that are not trusted, read field by field: each has a form, in words and as a test.

What is not of its form is refused with its path, what is allowed and what was found: "inputs[0].axes[1] must be an
integer from 0 to 9223372036854775807, got -1".

No library does it in less; each was tried on a manifest and a model's configuration. msgspec 0.22 names neither the
value nor the choices ("Invalid enum value 'int8' - at `$.dtype`"), lets unknown fields of a dataclass through, and has
one exception for all: a field that is unknown and one that is malformed, which end with different exit codes here,
differ in its text alone. pydantic 2.14 has path, value and choices as data, but each of its kinds of error needs a
phrase of ours, and where it is strict it reads a dataclass from JSON text alone: what our stricter parser has read
would be written out again. Neither reads fields one by one, and which fields of the authors' config.yaml count depends
on others, so the readers of checkpoints would stay beside it.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from umv2_export.errors import InputRejected, Unsupported, shown

__all__ = [
    "Fields",
    "Form",
    "Malformed",
    "anything",
    "either",
    "flag",
    "forms_of",
    "instance",
    "integer",
    "list_of",
    "mapping",
    "matching",
    "one_of",
    "optional",
    "positive",
    "read_as",
    "real",
    "record",
    "sha256",
    "text",
    "tuple_of",
]

T = TypeVar("T")

# What numpy, torch and files can count to.
LARGEST = 2**63 - 1

MAX_TEXT = 4096
MAX_NAME = 120


class Malformed(ValueError):
    """A value that is not of its form.

    Args:
        path: of the value in the record, such as inputs[0].axes.
        problem: "must be ..., got ...", "is missing" or "is unknown".
    """

    def __init__(self, path: str, problem: str) -> None:
        self.path, self.problem = path, problem
        super().__init__(f"{path} {problem}")

    @property
    def unknown(self) -> bool:
        """A field that the record does not have."""
        return self.problem == "is unknown"


@dataclass(frozen=True)
class Form(Generic[T]):
    """What a value must be.

    Attributes:
        allowed: in words, behind "must be".
        accepts: the test that a value must pass before `convert`, or any other code, uses it.
        convert: value and path -> what the program works with; the value itself where it is None.
    """

    allowed: str
    accepts: Callable[[Any], bool]
    convert: Callable[[Any, str], T] | None = None

    def read(self, value: Any, path: str = "") -> T:
        """The value.

        Raises:
            Malformed: it is not of this form.
        """
        if not self.accepts(value):
            raise Malformed(path, f"must be {self.allowed}, got {shown(value)}")
        return value if self.convert is None else self.convert(value, path)


anything: Form[Any] = Form("anything", lambda _: True)
flag: Form[bool] = Form("true or false", lambda value: isinstance(value, bool))
text: Form[str] = Form(
    f"text of at most {MAX_TEXT} characters", lambda value: isinstance(value, str) and len(value) <= MAX_TEXT
)
# An integer beyond the range of floats is not a number that a float can hold.
real: Form[float] = Form("a number", lambda value: _is_number(value) and -1e300 < value < 1e300)
positive: Form[float] = Form(
    "a positive number", lambda value: _is_number(value) and 0 < value < 1e300, lambda value, _: float(value)
)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def integer(least: int | None = None, most: int = LARGEST) -> Form[int]:
    """An integer from `least` to `most`; of any size without them."""
    return Form(
        "an integer" if least is None else f"an integer from {least} to {most}",
        lambda value: type(value) is int and (least is None or least <= value <= most),
    )


def matching(pattern: str, allowed: str) -> Form[str]:
    """Text that a pattern matches as a whole."""
    return Form(allowed, lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None)


sha256 = matching("[0-9a-f]{64}", "64 hexadecimal digits")


def one_of(*choices: str | None) -> Form[Any]:
    """One of these words."""
    words = ["null" if choice is None else choice for choice in choices]
    return Form(
        f"one of {', '.join(words)}", lambda value: (value is None or isinstance(value, str)) and value in choices
    )


def either(*forms: Form[Any]) -> Form[Any]:
    """A value of one form or another, neither of which converts it."""
    return Form(" or ".join(form.allowed for form in forms), lambda value: any(form.accepts(value) for form in forms))


def optional(form: Form[T], absent: T | None = None) -> Form[T | None]:
    """A value of this form, or null, which is read as `absent`."""
    return Form(
        f"{form.allowed}, or null",
        lambda value: value is None or form.accepts(value),
        lambda value, path: absent if value is None else form.read(value, path),
    )


def list_of(form: Form[T]) -> Form[list[T]]:
    """A list of such values."""
    return Form(
        "a list",
        lambda value: isinstance(value, list),
        lambda value, path: [form.read(entry, f"{path}[{i}]") for i, entry in enumerate(value)],
    )


def tuple_of(form: Form[T], length: int | None = None) -> Form[tuple[T, ...]]:
    """A list of such values, of any length or of this one, as a tuple."""
    return Form(
        "a list" if length is None else f"a list of {length}",
        lambda value: isinstance(value, list) and length in (None, len(value)),
        lambda value, path: tuple(list_of(form).read(value, path)),
    )


def mapping(form: Form[T]) -> Form[dict[str, T]]:
    """An object of any names with such values."""
    return Form(
        "an object",
        lambda value: isinstance(value, dict),
        lambda value, path: {name: form.read(entry, f"{path}[{shown(name)}]") for name, entry in value.items()},
    )


def record(forms: Mapping[str, Form[Any]], *, required: Collection[str] | None = None) -> Form[dict[str, Any]]:
    """An object of these names and no other; of which some may be missing, where `required` says which may not."""

    def convert(value: Mapping[str, Any], path: str) -> dict[str, Any]:
        for name in value:
            if name not in forms:
                raise Malformed(_join(path, name), "is unknown")
        for name in forms if required is None else required:
            if name not in value:
                raise Malformed(_join(path, name), "is missing")
        return {name: form.read(value[name], _join(path, name)) for name, form in forms.items() if name in value}

    return Form("an object", lambda value: isinstance(value, dict), convert)


def forms_of(kind: type, /, **forms: Form[Any]) -> dict[str, Form[Any]]:
    """The forms of a dataclass's fields: these, and by their annotations those of the others."""
    hints = typing.get_type_hints(kind)
    return {field.name: forms.get(field.name) or _form_of(hints[field.name]) for field in dataclasses.fields(kind)}


def instance(kind: type[T], /, **forms: Form[Any]) -> Form[T]:
    """An object with the fields of a dataclass, see `forms_of`; those with a default may be missing."""
    required = [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]  # type: ignore[arg-type] # any dataclass
    inner = record(forms_of(kind, **forms), required=required)
    return Form(inner.allowed, inner.accepts, lambda value, path: kind(**inner.read(value, path)))


def _form_of(annotation: Any) -> Form[Any]:
    """The form of a field of this type; which words a Literal allows, its dataclass says in its own error."""
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        return optional(_form_of(arguments[0]))
    if origin is tuple:
        return tuple_of(_form_of(arguments[0]), None if arguments[-1] is ... else len(arguments))
    if origin is list:
        return list_of(_form_of(arguments[0]))
    if origin is dict:
        return mapping(_form_of(arguments[1]))
    if origin is Literal or annotation is Any:
        return anything
    plain: Mapping[type, Form[Any]] = {int: integer(), bool: flag, float: real, str: text}
    return plain[annotation] if annotation in plain else instance(annotation)


def _join(path: str, name: str) -> str:
    name = name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}..."
    return f"{path}.{name}" if path else name


def read_as(form: Form[T], value: Any, path: str = "") -> T:
    """A configuration, or the part of one at `path`.

    Raises:
        InputRejected: a field is missing or malformed.
        Unsupported: a field is unknown: it may change what is computed.
    """
    try:
        return form.read(value, path)
    except Malformed as error:
        if error.unknown:
            raise Unsupported(f"unknown field {error.path!r}") from error
        raise InputRejected(f"field {error.path!r} {error.problem}") from error


class Fields:
    """Fields of a configuration that are read one by one, where some decide which others count.

    Args:
        values: the record.
        fix: what to do where a field is missing.
    """

    def __init__(self, values: Mapping[str, Any], *, fix: str | None = None) -> None:
        self._values, self._fix = values, fix

    def read(self, name: str, form: Form[T]) -> T:
        """A field.

        Raises:
            InputRejected: it is missing or malformed.
        """
        if name not in self._values:
            raise InputRejected(f"field {name!r} is missing", fix=self._fix)
        return read_as(form, self._values[name], name)

    def get(self, name: str, form: Form[T], default: T) -> T:
        """A field, or the default of one that is missing.

        Raises:
            InputRejected: it is malformed.
        """
        return self.read(name, form) if name in self._values else default
