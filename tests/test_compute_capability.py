"""Compute capabilities as a user types them."""

import pytest

from umv2_export.compute_capability import parse_compute_capabilities
from umv2_export.engines.backends import BACKENDS
from umv2_export.errors import InvalidRequest, Unsupported

KNOWN = ("8.0", "8.6", "12.0")


def test_they_are_sorted_and_named_once() -> None:
    assert parse_compute_capabilities("12.0, 8.6,8.6", KNOWN, "a compiler") == ("8.6", "12.0")


@pytest.mark.parametrize("name", ["7.5", "9.0", "10.0"])
def test_an_unknown_one_is_unsupported(name: str) -> None:
    with pytest.raises(Unsupported, match=f"compute capability {name}") as caught:
        parse_compute_capabilities(f"8.6,{name}", KNOWN, "a compiler")
    assert "a compiler compiles for 8.0, 8.6, 12.0" in str(caught.value)


@pytest.mark.parametrize("text", ["", "8.6,", "ampere", "86", "sm_86"])
def test_what_is_none_is_a_mistake(text: str) -> None:
    with pytest.raises(InvalidRequest, match="not a compute capability"):
        parse_compute_capabilities(text, KNOWN, "a compiler")


@pytest.mark.parametrize("known", [tuple(backend.architectures) for backend in BACKENDS.values()])
def test_each_compiler_takes_what_the_messages_propose(known: tuple[str, ...]) -> None:
    assert parse_compute_capabilities(",".join(known), known, "a compiler") == known
